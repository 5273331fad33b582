"""``python -m gain_cl clean``: show what abandoned runs, leftovers and caches hold that can go, and
remove it with --yes.

What it may remove is
known by its form: a run by its id, a cache entry by its name. Anything else in the same folders
stays, and so do results/, finished runs, runs in use, and whatever a link points to. Torch-free.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal as size

from gain_cl.errors import ConfigError
from gain_cl.system import hashes, lock
from gain_cl.system.terminal import printable
from gain_cl.tools.command import Parser, print_report, print_rows

DAY = 86_400

RUN_ID = re.compile(r"(?![.-])[A-Za-z0-9._-]+-s\d+-[0-9a-f]{10}")
"""Names that provenance.run_id gives."""

RUN_PARTS = ("run.json", "LOCK", "ckpt", "stages")
"""One of these is in every run folder."""

LEFTOVER = re.compile(r"\.tmp-.*|\..*\.tmp|\.(fetch|build)-.{8}|tmp[a-z0-9_]{8}", re.DOTALL)
"""Temporary names: of folders, of files, of downloads, of token caches, of converted models."""

CELLS = re.compile(r"[0-9a-f]{32}\.json")
CACHES = {
    "packages": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9._+!-]+"),
    "models": re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}"),
    "tokens": re.compile(r"[0-9a-f]{32}"),
    "hashes": re.compile(r"[0-9a-f]{64}\.json"),
    "hub": re.compile(r"(model|dataset)s--[A-Za-z0-9._-]+"),
}
"""Folder of the cache -> the names of its entries."""


@dataclass
class Item:
    """Something to remove. parts: what goes, in this order; is_run: whether path is a run folder,
    whose lock guards it."""

    path: Path
    why: str
    parts: list[Path]
    is_run: bool = False

    def __post_init__(self) -> None:
        self.bytes, self.changed = extent(self.parts)
        self.days = max(0.0, time.time() - self.changed) / DAY

    def remove(self) -> None:
        """Remove it. InUseError: its run goes on again."""
        with lock.owned(self.path) if self.is_run else nullcontext():
            for path in self.parts:
                _remove(path)
        if self.is_run:
            with suppress(OSError):  # somebody started the run anew
                self.path.rmdir()


def extent(parts: list[Path]) -> tuple[int, float]:
    """Return (bytes, time of the last change in seconds since 1970), links not followed."""
    total, changed = 0, 0.0
    for part in parts:
        for file in [part, *part.rglob("*")] if _is_folder(part) else [part]:
            with suppress(OSError):  # gone meanwhile
                about = file.lstat()
                changed = max(changed, about.st_mtime)
                total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total, changed


def main(argv: list[str]) -> int:
    """Show, or remove and tell. ConfigError: a folder that cannot be one of runs."""
    parser = Parser("clean", "--output-dir", "--results-dir", "--json")
    parser.set_defaults(output_dir="runs")
    parser.option(
        "--days",
        "an unfinished run is abandoned after so many without a write (default: %(default)s)",
        7.0,
    )
    parser.option("--cache", "also the caches and shared scores", False)
    parser.option("--yes", "remove what is shown", False)
    args = parser.read(argv)
    if not 0 <= args.days < float("inf"):
        raise ConfigError(f"--days {args.days} is no age", "gain_cl clean", "give 0 or more days")
    output, results = Path(args.output_dir).expanduser(), Path(args.results_dir).expanduser()
    items = plan(output, results, args.days, args.cache)
    total = sum(item.bytes for item in items)
    told: list[dict[str, Any]] = [
        {"path": str(i.path), "bytes": i.bytes, "days": round(i.days, 1), "why": i.why}
        for i in items
    ]
    for item in items if args.yes else ():
        item.remove()

    def show(_: Any) -> None:
        if told:
            print_rows("clean", "", [{**row, "bytes": size(row["bytes"])} for row in told])
        more = f"removed {size(total)}" if args.yes else f"{size(total)}; --yes removes it"
        print(more if told else "nothing to remove")

    report = {"items": told, "bytes": total, "removed_bytes": total * args.yes}
    return print_report(report, args.json, show)


def plan(output: Path, results: Path, days: float = 7.0, cache: bool = False) -> list[Item]:
    """Return what can go, largest first. Reads only. ConfigError: no folder of runs."""
    records, home = results / "runs", hashes.cache_dir()
    for folder in (output, *[home] * cache):
        if Path.home().resolve().is_relative_to(folder.resolve()):
            what, do = "not in the root or a home folder", "name the folder of gain_cl alone"
            raise ConfigError(what, printable(folder), do)
    there, runs = _children(output), [path for path in _children(output) if _is_run(path)]
    known = runs or not there or (output / "cells").exists() or (output / "multirun").exists()
    inside = output.resolve().is_relative_to(records.resolve())
    if output.exists() and (inside or not known or not output.is_dir()):
        where, do = f"--output-dir {printable(output)}", "name the output_dir of runs"
        raise ConfigError("it is no folder of runs", where, do)
    found: list[tuple[float, Item]] = []
    for folder in runs:
        finished = (folder / "matrix.csv").exists() or (records / f"{folder.name}.json").exists()
        holds = results.resolve().is_relative_to(folder.resolve())
        if not finished and not holds and not lock.holder(folder):
            # checkpoints first: a run half removed starts anew
            parts = sorted(_children(folder), key=lambda path: path.name != "ckpt")
            parts = [path for path in parts if path.name != "LOCK"]
            found.append((days, Item(folder, "abandoned run: has no record", parts, is_run=True)))
    places = {output: None, output / "cells": CELLS if cache else None}
    places |= {home / name: names for name, names in CACHES.items() if cache}
    for place, names in places.items():
        children = _children(place)
        for path in (path for path in children if LEFTOVER.fullmatch(path.name)):
            found.append((1, Item(path, "left by a killed process", [path])))
        if parts := [path for path in children if names and names.fullmatch(path.name)]:
            found.append((0, Item(place, "cache: made again when needed", parts)))
    return sorted((i for least, i in found if i.days >= least), key=lambda i: (-i.bytes, i.path))


def _is_folder(path: Path) -> bool:
    """True if the path is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _is_run(path: Path) -> bool:
    """True if a path is a run folder by its name and by what is in it."""
    marked = any(os.path.lexists(path / name) for name in RUN_PARTS)
    return marked and _is_folder(path) and RUN_ID.fullmatch(path.name) is not None


def _children(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing of a link or of what cannot be read."""
    with suppress(OSError):
        return sorted(folder.iterdir()) if _is_folder(folder) else []
    return []


def _remove(path: Path) -> None:
    """Remove a path at once for a reader: a folder gets another name before it is emptied. A link
    goes, not what it points to."""
    if _is_folder(path):
        away = tempfile.mkdtemp(dir=path.parent, prefix=".tmp-clean-")
        os.rename(path, away)
        shutil.rmtree(away)
    else:
        path.unlink(missing_ok=True)
