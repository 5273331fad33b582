"""``python -m gain_cl clean``: abandoned runs, what finished runs no longer need, leftovers and
caches.

It shows what can go and how much that is, and removes it with ``--yes`` or after a question on a
terminal. What it may remove is known by its form: a run by its id, a cache entry by its name.
Anything else in the same folders stays, and so do results/, runs in use, and whatever a link points
to. Torch-free.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.filesize import decimal as size

from gain_cl.errors import ConfigError, InUseError, StorageError
from gain_cl.paper.table import Row, Table, print_table, say
from gain_cl.system import hashes, lock
from gain_cl.system.terminal import printable
from gain_cl.tools.command import Parser

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


class Item:
    """Something to remove: a path, or what is in a folder under certain names. run: the folder
    whose lock guards it."""

    def __init__(
        self, path: Path, why: str, run: Path | None = None, names: re.Pattern[str] | None = None
    ) -> None:
        self.path, self.why, self.run, self.names = path, why, run, names
        self.bytes, self.changed = self.extent()
        self.days = max(0.0, time.time() - self.changed) / DAY

    def told(self) -> dict[str, Any]:
        """Return what is shown of it."""
        days = round(self.days, 2)
        return {"path": str(self.path), "bytes": self.bytes, "days": days, "why": self.why}

    def parts(self) -> list[Path]:
        """Return what is removed. Checkpoints go first: a run half removed starts anew."""
        if self.names is None:
            return [self.path]
        found = [path for path in _children(self.path) if self.names.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.name != "ckpt")

    def extent(self) -> tuple[int, float]:
        """Return (bytes, time of the last change in seconds since 1970), links not followed."""
        total, changed = 0, 0.0
        for part in self.parts():
            for file in [part, *part.rglob("*")] if _is_folder(part) else [part]:
                with suppress(OSError):  # gone meanwhile
                    about = file.lstat()
                    changed = max(changed, about.st_mtime)
                    total += about.st_size if stat.S_ISREG(about.st_mode) else 0
        return total, changed

    def remove(self) -> bool:
        """Remove it. False: its run went on meanwhile, and it stays."""
        try:
            with lock.owned(self.run) if self.run else nullcontext():
                if self.run and self.extent()[1] > self.changed:
                    return False
                for path in self.parts():
                    _remove(path)
        except InUseError:
            return False
        if self.run == self.path:
            with suppress(OSError):  # somebody started the run anew
                self.path.rmdir()
        return True


def main(argv: list[str]) -> int:
    """Show, ask, remove. ConfigError: a folder that cannot be one of runs. StorageError: something
    could not be removed."""
    about = "Show what abandoned runs, finished runs and caches hold that can go, and remove it."
    parser = Parser("clean", "--output-dir", "--results-dir", "--json", description=about)
    parser.set_defaults(output_dir="runs")
    days = "an unfinished run is abandoned after so many without a write (default: %(default)s)"
    parser.add_argument("--days", type=float, default=7.0, help=days)
    parser.add_argument("--cache", action="store_true", help="also the caches and shared scores")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    args = parser.read(argv)
    if not 0 <= args.days < float("inf"):
        raise ConfigError(f"--days {args.days} is no age", "gain_cl clean", "give 0 or more days")
    output, results = Path(args.output_dir).expanduser(), Path(args.results_dir).expanduser()
    items, left = plan(output, results, args.days, args.cache)
    total, told = sum(item.bytes for item in items), [item.told() for item in items]
    if told and not args.json:
        rows = [Row([t["path"], size(t["bytes"]), f"{t['days']:.1f}", t["why"]]) for t in told]
        print_table(Table("clean", "", list(told[0]), rows))
        say(f"{len(items)} to remove, {size(total)}")
    for line in () if args.json else [*left, *["nothing to remove"] * (not items)]:
        say(printable(line))
    removing = bool(items) and (args.yes or (not args.json and _agreed(len(items), total)))
    kept = remove(items) if removing else items
    gone = total - sum(item.bytes for item in kept)
    if args.json:
        report = {"items": told, "left": left, "bytes": total, "removed_bytes": gone}
        print(json.dumps(report, indent=1, allow_nan=False))
    elif removing:
        stay = "".join(f"; left alone, it changed meanwhile: {printable(i.path)}" for i in kept)
        print(f"removed {size(gone)}{stay}")
    elif items:
        print("nothing removed; --yes removes it without asking")
    return 0


def _agreed(count: int, total: int) -> bool:
    """Ask on a terminal; elsewhere the answer is no."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(EOFError):
            return input(f"remove {count}, {size(total)}? [y/N] ").strip().lower() in ("y", "yes")
    return False


def plan(
    output: Path, results: Path, days: float = 7.0, cache: bool = False
) -> tuple[list[Item], list[str]]:
    """Return what can go, largest first, and which runs are left alone and why. Reads only.
    ConfigError: no folder of runs."""
    items: list[Item] = []
    left: list[str] = []
    records, home = results / "runs", hashes.cache_dir()
    if output.exists():
        _refuse(output, records)
    for folder in filter(_is_run, _children(output)):
        record = records / f"{folder.name}.json"
        if owner := lock.holder(folder):
            left.append(f"left alone: {folder} is in use by {owner}")
        elif results.resolve().is_relative_to(folder.resolve()):
            left.append(f"left alone: {folder} holds {results}")
        elif record.exists():
            item = Item(folder / "ckpt", "checkpoints of a finished run", folder)
            # newer ones are of an attempt with force=true
            if _is_folder(item.path) and (
                item.days >= days or item.changed <= record.stat().st_mtime
            ):
                items.append(item)
        elif (folder / "matrix.csv").exists():  # which is written after the record
            left.append(f"left alone: {folder} is finished, with its record not in {records}")
        else:
            failed = "failed and " if (folder / "failure.json").exists() else ""
            whole = re.compile("(?!LOCK$).*", re.DOTALL)
            item = Item(folder, f"abandoned run: {failed}has no record", folder, whole)
            items += [item] if item.days >= days else []
    places = {output: None, output / "cells": CELLS}
    if cache:
        _no_home(home, "GAIN_CL_CACHE")
        places |= {home / name: names for name, names in CACHES.items()}
    for place, names in places.items():
        old = [
            Item(p, "left by a killed process")
            for p in _children(place)
            if LEFTOVER.fullmatch(p.name)
        ]
        items += [item for item in old if item.days >= 1]
        if cache and names:
            item = Item(place, "cache: made again when needed", names=names)
            items += [item] if item.parts() else []
    return sorted(items, key=lambda i: (-i.bytes, i.path)), left


def remove(items: Iterable[Item]) -> list[Item]:
    """Remove each item. Return those whose run went on meanwhile, which stay. StorageError, after
    trying all: one could not be removed."""
    kept: list[Item] = []
    failure: OSError | StorageError | None = None
    for item in items:
        try:
            kept += [] if item.remove() else [item]
        except (OSError, StorageError) as error:
            failure = failure or error
    if isinstance(failure, OSError):
        where = printable(failure.filename)
        raise StorageError(f"cannot remove: {failure.strerror}", where, "check the permissions")
    if failure:
        raise failure
    return kept


def _refuse(output: Path, records: Path) -> None:
    """Raise ConfigError for a folder in which nothing should be removed."""
    _no_home(output, "--output-dir")
    there = _children(output)
    known = [
        p
        for p in there
        if _is_run(p) or p.name in ("cells", "multirun") or LEFTOVER.fullmatch(p.name)
    ]
    inside = output.resolve().is_relative_to(records.resolve())
    if inside or not output.is_dir() or (there and not known):
        where, do = f"--output-dir {printable(output)}", "name the output_dir of runs"
        raise ConfigError("it is no folder of runs", where, do)


def _no_home(folder: Path, where: str) -> None:
    """Raise ConfigError for the root, /home, a home folder."""
    if Path.home().resolve().is_relative_to(folder.resolve()):
        what, do = "not in the root or a home folder", "name the folder of gain_cl alone"
        raise ConfigError(what, f"{where} {printable(folder)}", do)


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
