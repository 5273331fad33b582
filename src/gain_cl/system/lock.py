"""One owner for a run, and one launcher for a run of an experiment. Torch-free.

A run locks FOLDER/LOCK before torch is imported. A sweep claims each run by a lock on
OUTPUT_DIR/claims/RUN_ID. The run that it starts inherits the claim, which therefore lasts until
launcher and run have both ended. The id of a Slurm job is written into its claim, which lasts until
Slurm says that the job has ended. What a free claim holds tells how the run ended.

The system releases every lock when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.errors import ConfigError, InUseError, StorageError
from gain_cl.system.files import alive

if TYPE_CHECKING:
    from filelock import FileLock

PATIENCE_SECONDS = 1.0
"""How long a lock is tried again whose holder is unknown: it is just being taken, released or
looked at."""
LAUNCH = "LAUNCH"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Opens no link: in a shared folder it may lead to somebody's file."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold folder/LOCK (flock) for the block. InUseError names the owner when another process holds
    it. StorageError: the folder cannot be written or locked."""
    handle = _acquire(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / "LOCK").unlink()  # while it is still ours
        os.close(handle)


def holder(folder: Path) -> str | None:
    """Return who holds the run now, "process PID on HOST", or None: nobody."""
    fcntl = posix_locks()
    try:
        handle = os.open(folder / "LOCK", os.O_RDONLY | NO_LINK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _owner(folder)[0]
    finally:
        os.close(handle)
    return None


def posix_locks() -> Any:
    """Return the module of POSIX locks. ConfigError on a system without them: Windows."""
    try:
        import fcntl
    except ImportError:
        do = "run it under WSL, Linux or macOS; records are shown and compared here too"
        raise ConfigError("this system has no POSIX file locks", sys.platform, do) from None
    return fcntl


def _acquire(folder: Path) -> int:
    if folder.is_symlink():
        what = "the run's folder is a link: who made it chooses what a run overwrites"
        raise StorageError(what, str(folder), "remove the link, or link its parent folder")
    path, until = folder / "LOCK", time.monotonic() + PATIENCE_SECONDS
    do = "free space or name another folder with output_dir="
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _lock(path)
        except OSError as error:
            what = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
            raise StorageError(f"cannot write or lock: {what}", str(path), do) from error
        if handle is None:
            name, known = _owner(folder)
            if known or time.monotonic() > until:
                do = "wait for it, or give the run another seed"
                raise InUseError("the run is in use", f"{folder} by {name}", do)
            time.sleep(0.02)
        elif _is(handle, path):
            break
        else:
            os.close(handle)  # the owner before removed the name between our open and our lock
    try:
        _write(handle, {"pid": os.getpid(), "host": socket.gethostname()})
    except OSError as error:
        os.close(handle)
        raise StorageError(f"cannot write: {error.strerror}", str(path), do) from error
    return handle


def _lock(path: Path) -> int | None:
    """Return an open file that this process has locked, or None: another one has."""
    fcntl = posix_locks()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise


def _write(handle: int, about: dict[str, Any]) -> None:
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(about, allow_nan=False).encode(), 0)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(folder: Path) -> tuple[str, bool]:
    """Return the holder in words, and True if that is sure: a process of another machine, or a live
    one of this."""
    about = read_claim(folder, "LOCK")
    pid, host = about.get("pid"), about.get("host")
    if not isinstance(pid, int) or not isinstance(host, str):
        return "another process", False
    return f"process {pid} on {host}", host != socket.gethostname() or alive(pid)


# --- claims of a sweep ----------------------------------------------------------------------------


def one_launcher(folder: Path) -> FileLock:
    """Return a lock to hold while one looks around and starts a run. No other launcher does so
    then."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LAUNCH)


@dataclass
class Claim:
    """The right to launch a run: an open, locked file."""

    handle: int

    def write(self, about: dict[str, Any]) -> None:
        """Write host and gpu of a local run, the id of a Slurm job, or that it failed and why."""
        _write(self.handle, about)

    def release(self) -> None:
        """Give up the claim of this process. A run that inherited it keeps it."""
        with suppress(OSError):
            os.close(self.handle)


def claim_run(folder: Path, run_id: str) -> Claim | None:
    """Return the claim, or None: another launcher, or a run that one left behind, has it."""
    handle = _lock(folder / run_id)
    return None if handle is None else Claim(handle)


def claims_under_way(folder: Path) -> dict[str, dict[str, Any]]:
    """Return run id -> what is written, of every claim that somebody has."""
    found = {}
    for name in [p.name for p in folder.glob("*") if p.name != LAUNCH]:
        if (mine := claim_run(folder, name)) is not None:
            mine.release()
        else:
            found[name] = read_claim(folder, name)
    return found


def read_claim(folder: Path, run_id: str) -> dict[str, Any]:
    """Return what was written into a claim. It is empty where there is none."""
    try:
        found = json.loads((folder / run_id).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
