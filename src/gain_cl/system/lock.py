"""One owner per run. Taken before torch is imported, released by the system when its process ends,
however it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gain_cl.errors import InUseError, StorageError

PATIENCE_SECONDS = 1.0
"""How long a lock is tried again whose holder cannot be told: it is just being taken, released or
looked at."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold folder/LOCK (flock) for the block; InUseError names the owner when another process holds
    it."""
    handle = _acquire(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / "LOCK").unlink()  # while it is still ours
        os.close(handle)


def holder(folder: Path) -> str | None:
    """Who holds the run now, "process PID on HOST"; None: nobody."""
    import fcntl

    try:
        handle = os.open(folder / "LOCK", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _owner(handle)[0]
    finally:
        os.close(handle)
    return None


def _acquire(folder: Path) -> int:
    import fcntl

    path, until = folder / "LOCK", time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"cannot write: {error.strerror}",
                str(folder),
                "name another folder with output_dir=",
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name, known = _owner(handle)
            os.close(handle)
            if known or time.monotonic() > until:
                raise InUseError(
                    "the run is in use",
                    f"{folder} by {name}",
                    "wait for it, or give the run another seed",
                ) from None
            time.sleep(0.02)
            continue
        except OSError as error:
            os.close(handle)
            do = "name a folder on another file system with output_dir="
            raise StorageError(f"cannot lock: {error.strerror}", str(path), do) from error
        if _is(handle, path):
            break
        os.close(handle)  # the owner before removed the name between our open and our lock
    try:
        os.truncate(handle, 0)
        os.pwrite(
            handle,
            json.dumps(
                {"pid": os.getpid(), "host": socket.gethostname()}, allow_nan=False
            ).encode(),
            0,
        )
    except OSError as error:
        os.close(handle)
        raise StorageError(
            f"cannot write: {error.strerror}",
            str(path),
            "free space or name another folder with output_dir=",
        ) from error
    return handle


def _is(handle: int, path: Path) -> bool:
    try:
        here, there = os.fstat(handle), os.stat(path)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _owner(handle: int) -> tuple[str, bool]:
    """The holder in words, and whether that is sure: a process of another machine, or a live one of
    this."""
    try:
        owner = json.loads(os.pread(handle, 1000, 0))
        pid, host = int(owner["pid"]), str(owner["host"])
    except (ValueError, KeyError, TypeError):
        return "another process", False
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return f"process {pid} on {host}", False
        except OSError:
            pass
    return f"process {pid} on {host}", True
