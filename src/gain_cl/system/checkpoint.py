"""A folder of files that is there whole or not at all, and is what was written. Torch-free until
tensors are saved or read.

``save`` builds the folder under another name, syncs every file, writes ``MANIFEST.json`` (size and
SHA-256 of each file), renames it and syncs the parent. ``verify`` compares size and hash of every
file before anything is used.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.errors import DataError, StorageError
from gain_cl.system import watchdog
from gain_cl.system.failpoints import reach
from gain_cl.system.files import sha256, sync_folder, write_bytes
from gain_cl.system.hashes import json_sha256

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
CHANGED = "it was changed after it was written"
REMOVED = "it was removed after it was written"


def save(folder: Path, files: Mapping[str, bytes | Path | Mapping[str, Tensor]]) -> None:
    """Write ``folder``. A file's content: bytes; tensors by name (safetensors); or a Path, an
    existing file that is linked.

    What was there under that name is replaced. StorageError when the disk refuses: the old folder
    is then untouched."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}")
    try:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, content in files.items():
                watchdog.beat()  # a large state takes its time
                reach("save.before_write")
                _write(temporary / name, content)
                reach("save.after_write")
                _sync(temporary / name)
                reach("save.after_fsync")
            listed = {name: _facts(temporary / name) for name in files}
            (temporary / MANIFEST).write_bytes(_manifest(listed))
            reach("save.after_manifest")
            _sync(temporary / MANIFEST)
            sync_folder(temporary)
            reach("save.before_rename")
            if folder.exists():  # a bad one, or the same state: a good one is kept beside it
                shutil.rmtree(folder)
                reach("save.between_renames")
            temporary.rename(folder)
            reach("save.after_rename")
            sync_folder(folder.parent)
        except OSError as error:
            do = "free space or name another folder; the same command then goes on"
            what = f"cannot save: {error.strerror or error}"
            raise StorageError(what, str(folder), do) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file, after comparing them, but for some. DataError names
    the first file that is not what was written."""
    listed = {name: facts for name, facts in manifest(folder).items() if name not in but}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        list(pool.map(lambda name: _compare(folder / name, listed[name]["sha256"]), listed))
    return listed


def _compare(path: Path, wanted: str) -> None:
    try:
        found = sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path.name} is missing", str(path.parent), REMOVED) from None
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise StorageError(what, str(path), "check the disk") from error
    if found != wanted:
        what = f"{path.name} has SHA-256 {found[:12]}... instead of {wanted[:12]}..."
        raise DataError(what, str(path), CHANGED)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what MANIFEST.json lists, unverified. DataError when it is not what ``save`` wrote."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        listed: dict[str, dict[str, Any]] = json.loads(data)["files"]
        if data == _manifest(listed):
            return listed
    except FileNotFoundError:
        raise DataError(f"{MANIFEST} is missing", str(folder), REMOVED) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{MANIFEST} is not what was written", str(path), CHANGED)


def drop(folder: Path, names: Iterable[str] = ()) -> None:
    """Remove files of a saved folder that are no longer needed: first from its manifest, then from
    the disk. What the manifest does not list goes too: a process that was killed in between left
    it."""
    listed = manifest(folder)
    kept = {name: facts for name, facts in listed.items() if name not in names}
    if kept.keys() < listed.keys():
        write_bytes(folder / MANIFEST, _manifest(kept))
        reach("drop.between")
    for path in folder.iterdir():
        if path.name not in kept and path.name != MANIFEST:
            path.unlink()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of a verified folder."""
    return dict(json.loads((folder / name).read_bytes()))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Return a safetensors file of a verified folder, on the CPU. It is empty when there is
    none."""
    from safetensors.torch import load_file

    return dict(load_file(folder / name)) if (folder / name).exists() else {}


def steps(root: Path) -> list[Path]:
    """Return the checkpoints root/step-N, newest first."""
    found = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step-")))


def prune(root: Path, keep: int = 2) -> None:
    """Keep the newest ``keep`` checkpoints."""
    for old in steps(root)[keep:]:
        remove(old)


def remove(folder: Path) -> None:
    """Remove a saved folder: a half removed one must not look like a bad one."""
    reach("prune.before")
    doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    reach("prune.between")
    shutil.rmtree(doomed, ignore_errors=True)
    reach("prune.after")


def remove_leftovers(*folders: Path) -> None:
    """Remove what a killed process left half written; for the owner of the run only."""
    for folder in folders:
        for left in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(".*.tmp")]:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


class Due:
    """Whether a checkpoint inside a stage is due: every so many minutes or steps, and by the
    minutes never more than 1/40 of the time is spent on it, however long saving takes."""

    def __init__(self, every_minutes: float | None, every_steps: int | None) -> None:
        self.every_seconds = None if every_minutes is None else 60 * every_minutes
        self.every_steps = every_steps
        self.last, self.cost = time.monotonic(), 0.0

    def now(self, step: int) -> bool:
        """True if a checkpoint is due after this step."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        passed = time.monotonic() - self.last
        return self.every_seconds is not None and passed >= max(self.every_seconds, 40 * self.cost)

    def saved(self, seconds: float) -> None:
        """Note that one was saved, which took so long."""
        self.last, self.cost = time.monotonic(), seconds


def _write(path: Path, content: bytes | Path | Mapping[str, Tensor]) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Path):
        try:
            os.link(content, path)
        except OSError:  # a file system without links
            shutil.copyfile(content, path)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(dict(content), path)
        except SafetensorError as error:
            raise OSError(f"safetensors: {error}") from error
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)  # it makes private files


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _manifest(listed: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the manifest's bytes. Its own hash stands in it, and there is one way to write it, so
    that a changed bit anywhere shows."""
    both = {"files": listed, "sha256": json_sha256(listed)}
    return (json.dumps(both, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
