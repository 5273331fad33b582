"""Files that are there whole or not at all. Torch-free."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

from gain_cl.errors import StorageError
from gain_cl.system.failpoints import reach


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one, also after a power cut.
    I/O errors become StorageError."""
    write_all({path: data})


def write_all(files: dict[Path, bytes]) -> None:
    """Write several files, each atomically. The first is replaced only when all are on disk, so a
    full disk leaves every old one."""
    temporary = {
        path: path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")
        for path in files
    }
    path = next(iter(files))
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = path.suffix.lstrip(".")
            reach(f"{kind}.before_write")
            temporary[path].unlink(missing_ok=True)
            with open(temporary[path], "xb") as f:  # x: never through a link that lies there
                f.write(data)
                f.flush()
                reach(f"{kind}.after_write")
                os.fsync(f.fileno())
            reach(f"{kind}.after_fsync")
        for path in files:
            os.replace(temporary[path], path)
            reach(f"{path.suffix.lstrip('.')}.after_rename")
        for folder in {path.parent for path in files}:
            sync_folder(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror or error}",
            str(path),
            "free space or name another folder",
        ) from error
    finally:
        for left in temporary.values():
            with suppress(OSError):
                left.unlink()


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left half written in a folder that runs
    share."""
    for left in folder.glob(".*@*.tmp"):
        before, _, host = left.name.removesuffix(".tmp").rpartition("@")
        pid = before.rpartition(".")[2]
        if host == socket.gethostname() and pid.isdigit() and not alive(int(pid)):
            left.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """True if a process of this machine has the id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Put a folder on disk: a new name is there only when its folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
