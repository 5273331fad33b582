"""``python -m gain_cl clean``: abandoned runs, leftovers and caches.

It shows what can go and how much that is, and removes it with ``--yes``. What it may remove is
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
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal as size

from gain_cl.errors import ConfigError, InUseError, StorageError
from gain_cl.paper.table import Row, Table, print_table, say
from gain_cl.system import hashes, lock
from gain_cl.system.terminal import printable
from gain_cl.tools.command import Parser, print_report

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

    def remove(self) -> bool:
        """Remove it. False: its run went on meanwhile, and it stays."""
        try:
            with lock.owned(self.path) if self.is_run else nullcontext():
                if self.is_run and extent(self.parts)[1] > self.changed:
                    return False
                for path in self.parts:
                    _remove(path)
        except InUseError:
            return False
        if self.is_run:
            with suppress(OSError):  # somebody started the run anew
                self.path.rmdir()
        return True


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
    """Show, or remove and tell. ConfigError: a folder that cannot be one of runs. StorageError:
    something could not be removed."""
    about = "Show what abandoned runs and caches hold that can go; --yes removes it."
    parser = Parser("clean", "--output-dir", "--results-dir", "--json", description=about)
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
    items, left = plan(output, results, args.days, args.cache)
    kept = remove(items) if args.yes else items
    left += [f"left alone: {item.path} changed meanwhile" for item in kept if args.yes]
    total = sum(item.bytes for item in items)
    told = [
        {"path": str(i.path), "bytes": i.bytes, "days": round(i.days, 2), "why": i.why}
        for i in items
    ]
    gone = total - sum(item.bytes for item in kept)
    report = {"items": told, "left": left, "bytes": total, "removed_bytes": gone}
    return print_report(report, args.json, lambda told: _show(told, args.yes))


def _show(report: dict[str, Any], removed: bool) -> None:
    rows = [
        Row([item["path"], size(item["bytes"]), f"{item['days']:.1f}", item["why"]])
        for item in report["items"]
    ]
    if rows:
        print_table(Table("clean", "", ["path", "bytes", "days", "why"], rows))
    for line in report["left"]:
        say(printable(line))
    if not rows:
        say("nothing to remove")
    elif removed:
        say(f"removed {size(report['removed_bytes'])}")
    else:
        say(f"{len(rows)} to remove, {size(report['bytes'])}; --yes removes it")


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
        if owner := lock.holder(folder):
            left.append(f"left alone: {folder} is in use by {owner}")
        elif results.resolve().is_relative_to(folder.resolve()):
            left.append(f"left alone: {folder} holds {results}")
        elif (records / f"{folder.name}.json").exists():
            continue
        elif (folder / "matrix.csv").exists():  # which is written after the record
            left.append(f"left alone: {folder} is finished, with its record not in {records}")
        else:
            failed = "failed and " if (folder / "failure.json").exists() else ""
            parts = [path for path in _children(folder) if path.name != "LOCK"]
            parts.sort(key=lambda path: path.name != "ckpt")  # a run half removed starts anew
            item = Item(folder, f"abandoned run: {failed}has no record", parts, is_run=True)
            items += [item] if item.days >= days else []
    places = {output: None, output / "cells": CELLS}
    if cache:
        _no_home(home, "GAIN_CL_CACHE")
        places |= {home / name: names for name, names in CACHES.items()}
    for place, names in places.items():
        children = _children(place)
        old = [
            Item(path, "left by a killed process", [path])
            for path in children
            if LEFTOVER.fullmatch(path.name)
        ]
        items += [item for item in old if item.days >= 1]
        if cache and names:
            parts = [path for path in children if names.fullmatch(path.name)]
            items += [Item(place, "cache: made again when needed", parts)] if parts else []
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
        raise ConfigError(
            "not in the root or a home folder",
            f"{where} {printable(folder)}",
            "name the folder of gain_cl alone",
        )


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
