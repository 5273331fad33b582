"""Who may run a cell of an experiment: a lock file for each run, OUTPUT_DIR/claims/RUN_ID.
Torch-free.

A local run inherits the lock, so it lasts until launcher and run have both ended, however they end;
a Slurm job's id is written into it, and it lasts until Slurm says that the job has ended. What is
written in a free one tells how the run ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = "LAUNCH"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One launcher at a time, for the short while in which it looks around and starts a run."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LAUNCH, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass
class Claim:
    """The right to run a cell: an open, locked file."""

    handle: int

    def write(self, about: dict[str, Any]) -> None:
        """about: host and gpu of a local run, the id of a Slurm job, or that it failed and why."""
        os.truncate(self.handle, 0)
        os.pwrite(self.handle, json.dumps(about, allow_nan=False).encode(), 0)

    def release(self) -> None:
        """Of this process; a run that inherited it keeps it."""
        with suppress(OSError):
            os.close(self.handle)


def take(folder: Path, run_id: str) -> Claim | None:
    """None: another launcher, or a run that one left behind, has it."""
    import fcntl

    path = folder / run_id
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return Claim(handle)


def held(folder: Path, run_id: str) -> bool:
    """Whether somebody has a claim on the run."""
    if not (folder / run_id).exists():
        return False
    mine = take(folder, run_id)
    if mine is not None:
        mine.release()
    return mine is None


def under_way(folder: Path) -> dict[str, dict[str, Any]]:
    """run id -> what is written, of every claim that somebody has."""
    names = [p.name for p in folder.glob("*") if p.name != LAUNCH] if folder.is_dir() else []
    return {name: about(folder, name) for name in names if held(folder, name)}


def about(folder: Path, run_id: str) -> dict[str, Any]:
    """What was written into a claim; nothing where there is none."""
    try:
        found = json.loads((folder / run_id).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
