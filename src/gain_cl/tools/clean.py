"""``python -m gain_cl clean``: abandoned runs, what finished runs no longer need, leftovers and
caches.

It shows what and how much, and removes with ``--yes`` or after a question on a terminal. What it
may remove is known by its form: a run by its id, a cache entry by its name; anything else in the
same folders stays, and so do results/, runs in use, and whatever a link points to. Torch-free.
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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gain_cl.errors import ConfigError, InUseError, StorageError
from gain_cl.system import hashes, lock
from gain_cl.system.terminal import console, printable, size
from gain_cl.tools.command import Parser

DAY = 86_400

RUN_ID = re.compile(r"(?![.-])[A-Za-z0-9._-]+-s\d+-[0-9a-f]{10}")
"""Names that provenance.run_id gives."""
RUN_PARTS = ("run.json", "LOCK", "ckpt", "stages")
"""One of these is in every run folder."""

LEFTOVER = re.compile(r"\.tmp-.*|\..*\.tmp", re.DOTALL)
"""Temporary names: of folders, and of files.write_all."""

CACHE_LEFTOVER = re.compile(LEFTOVER.pattern + r"|\.(fetch|build)-.{8}|tmp[a-z0-9_]{8}", re.DOTALL)
"""Those, and of downloads, of token caches and of converted models."""

CACHES = {
    "packages": (
        re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9._+!-]+"),
        "fetched again from the package index",
    ),
    "models": (
        re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}"),
        "converted again from its package, in seconds",
    ),
    "tokens": (re.compile(r"[0-9a-f]{32}"), "tokenised again, in minutes"),
    "hashes": (re.compile(r"[0-9a-f]{64}\.json"), "computed again"),
    "hub": (
        re.compile(r"(model|dataset)s--[A-Za-z0-9._-]+"),
        "asked of the hub again; its files are not touched (hf cache)",
    ),
}
"""Folder of the cache -> the names of its entries, how they come back."""

CELL = re.compile(r"[0-9a-f]{32}\.json")


@dataclass(frozen=True)
class Item:
    """Something to remove. run: the folder whose lock guards it; changed: when last, in seconds
    since 1970."""

    shown: Path
    paths: tuple[Path, ...]
    why: str
    bytes: int
    changed: float
    run: Path | None = None

    @property
    def days(self) -> float:
        return max(0.0, time.time() - self.changed) / DAY


def main(argv: list[str]) -> int:
    """Show, ask, remove. ConfigError: a folder that cannot be one of runs; StorageError: something
    could not be removed."""
    parser = Parser(
        "clean",
        usage="python -m gain_cl clean [--output-dir DIR] [--results-dir DIR] [--days N] "
        "[--cache] [--yes] [--json]",
        description="Show what abandoned runs, finished runs and caches hold that can go, and "
        "remove it. Records are never touched.",
    )
    parser.add_argument(
        "--output-dir", default="runs", help="folder of run folders (default: %(default)s)"
    )
    parser.add_argument(
        "--results-dir",
        default="results",
        help="where runs/RUN_ID.json tell which are finished (default: %(default)s)",
    )
    parser.add_argument(
        "--days",
        type=float,
        default=7.0,
        help="an unfinished run is abandoned after so many without a write (default: 7)",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="also the caches: packages, models, tokens, hashes, shared scores",
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: {items: [{path, bytes, days, why}], left, bytes, removed_bytes}; "
        "asks nothing",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.days < float("inf"):
        raise ConfigError(
            f"--days {args.days} is no age",
            "gain_cl clean",
            "give the days since the last write, 0 or more",
        )
    output, results = Path(args.output_dir).expanduser(), Path(args.results_dir).expanduser()
    items, left = plan(output, results, args.days, args.cache)
    total = sum(item.bytes for item in items)
    if not args.json:
        _show(items, left)
    asking = not (args.yes or args.json) and sys.stdin.isatty() and sys.stdout.isatty()
    removing = bool(items) and (_agreed(len(items), total) if asking else args.yes)
    kept = remove(items) if removing else []
    gone = total - sum(item.bytes for item in kept) if removing else 0
    if args.json:
        rows = [
            {"path": str(i.shown), "bytes": i.bytes, "days": round(i.days, 2), "why": i.why}
            for i in items
        ]
        print(
            json.dumps(
                {"items": rows, "left": left, "bytes": total, "removed_bytes": gone},
                indent=1,
                allow_nan=False,
            )
        )
    elif removing:
        print(
            f"removed {size(gone)}"
            + "".join(f"; left alone, it changed meanwhile: {printable(i.shown)}" for i in kept)
        )
    elif items:
        print("nothing removed" + ("" if asking else "; add --yes"))
    return 0


def plan(
    output: Path, results: Path, days: float = 7.0, cache: bool = False
) -> tuple[list[Item], list[str]]:
    """What can go, largest first; and which runs are left alone and why. Reads only. ConfigError:
    no folder of runs."""
    items: list[Item] = []
    left: list[str] = []
    if output.exists():
        _refuse(output, results)
        for folder in _runs(output):
            if owner := lock.holder(folder):
                left.append(f"{folder}: in use by {owner}")
            elif results.resolve().is_relative_to(folder.resolve()):
                left.append(f"{folder}: holds {results}")
            else:
                written = _extent([results / "runs" / f"{folder.name}.json"])[1]
                if (
                    not written and (folder / "matrix.csv").exists()
                ):  # which is written after the record
                    left.append(
                        f"{folder}: finished, with its record elsewhere than in {results / 'runs'}"
                    )
                items += _of_run(folder, written, days)
        items += _leftovers(_children(output))
        items += _leftovers(_inside(output, "cells"))
        if cache:
            items += _entries(output, "cells", CELL, "scores of pretrained models, computed again")
    if cache:
        home = hashes.cache_dir()
        _no_root(home, "GAIN_CL_CACHE")
        for name, (pattern, back) in CACHES.items():
            items += _entries(home, name, pattern, back)
            items += _leftovers(_inside(home, name), CACHE_LEFTOVER)
    return sorted(items, key=lambda i: (-i.bytes, i.shown)), left


def _refuse(output: Path, results: Path) -> None:
    """ConfigError for a folder in which nothing should be removed."""
    if not output.is_dir():
        raise ConfigError(
            "not a folder", f"--output-dir {printable(output)}", "name the output_dir of runs"
        )
    _no_root(output, "--output-dir")
    if output.resolve().is_relative_to((results / "runs").resolve()):
        raise ConfigError(
            "records are there, not runs",
            f"--output-dir {printable(output)}",
            "name the output_dir of runs",
        )
    names = [p.name for p in _children(output)]
    if (
        names
        and not _runs(output)
        and not any(n in ("cells", "multirun") or LEFTOVER.fullmatch(n) for n in names)
    ):
        raise ConfigError(
            "no run in the folder",
            f"--output-dir {printable(output)}",
            "name the output_dir of runs",
        )


def _no_root(folder: Path, where: str) -> None:
    home, real = Path.home().resolve(), folder.resolve()
    if home.is_relative_to(real):  # the root, /home and the home folder among them
        raise ConfigError(
            "not in the root or a home folder",
            f"{where} {printable(folder)}",
            "name the folder of gain_cl alone",
        )


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _inside(folder: Path, name: str) -> list[Path]:
    """What is in folder/name; nothing where that is a link."""
    return _children(folder / name) if _is_folder(folder / name) else []


def _is_folder(path: Path) -> bool:
    """A folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _runs(output: Path) -> list[Path]:
    return [
        p
        for p in _children(output)
        if RUN_ID.fullmatch(p.name)
        and _is_folder(p)
        and any(os.path.lexists(p / n) for n in RUN_PARTS)
    ]


def _of_run(folder: Path, written: float, days: float) -> Iterator[Item]:
    """written: when its record was, in seconds since 1970; 0: it has none."""
    finished = written > 0
    if finished and _is_folder(folder / "ckpt"):
        states = _item(folder / "ckpt", [folder / "ckpt"], "checkpoints of a finished run", folder)
        if (
            states.changed <= written or states.days >= days
        ):  # newer ones are of an attempt with force=true
            yield states
    elif not finished and not (folder / "matrix.csv").exists():
        failed = "failed and " if (folder / "failure.json").exists() else ""
        whole = _item(folder, [folder], f"abandoned run: {failed}has no record", folder)
        if whole.days >= days:
            yield whole
            return
    for at, names, files in os.walk(folder):
        yield from _leftovers((Path(at) / n for n in sorted(names + files)), run=folder)
        names[:] = [
            n for n in names if not LEFTOVER.fullmatch(n) and not (finished and n == "ckpt")
        ]


def _leftovers(
    paths: Iterable[Path], pattern: re.Pattern[str] = LEFTOVER, run: Path | None = None
) -> Iterator[Item]:
    for path in paths:
        if pattern.fullmatch(path.name):
            item = _item(path, [path], "left by a process that was killed", run)
            if item.days >= 1:
                yield item


def _entries(folder: Path, name: str, pattern: re.Pattern[str], back: str) -> Iterator[Item]:
    """The entries of folder/name whose names fit, as one item."""
    if paths := [p for p in _inside(folder, name) if pattern.fullmatch(p.name)]:
        yield _item(folder / name, paths, f"cache of {len(paths)}: {back}")


def _item(shown: Path, paths: list[Path], why: str, run: Path | None = None) -> Item:
    return Item(shown, tuple(paths), why, *_extent(paths), run)


def _extent(paths: Iterable[Path]) -> tuple[int, float]:
    """(bytes, time of the last change) of the paths and all below them."""
    total, changed = 0, 0.0
    for path in paths:
        for file in _tree(path):
            with suppress(OSError):  # gone meanwhile
                about = os.lstat(file)
                changed = max(changed, about.st_mtime)
                total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total, changed


def _tree(path: Path) -> Iterator[Path]:
    """The path and all below it; links are not followed."""
    yield path
    if _is_folder(path):
        for at, names, files in os.walk(path):
            yield from (Path(at) / n for n in names + files)


def _show(items: list[Item], left: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    if items:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("what", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("days", justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for i in items:
            table.add_row(
                Text(printable(i.shown)), size(i.bytes), f"{i.days:.1f}", Text(printable(i.why))
            )
        out.print(table)
        out.print(f"{len(items)} to remove, {size(sum(i.bytes for i in items))}", highlight=False)
    else:
        out.print("nothing to remove")
    for line in left:
        out.print(f"left alone: {printable(line)}", markup=False, highlight=False, soft_wrap=True)


def _agreed(count: int, total: int) -> bool:
    try:
        return input(f"remove {count}, {size(total)}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


# --- removing -------------------------------------------------------------------------------------


def remove(items: Iterable[Item]) -> list[Item]:
    """Remove each item; those whose run went on meanwhile stay and are returned. StorageError after
    trying all."""
    kept: list[Item] = []
    failures: list[OSError | StorageError] = []
    for item in items:
        try:
            if item.run is None:
                for path in item.paths:
                    _remove(path)
            else:
                with lock.owned(item.run):
                    paths = _parts(item.run) if item.run in item.paths else item.paths
                    if _extent(paths)[1] > item.changed:
                        kept.append(item)
                        continue
                    for path in paths:
                        _remove(path)
                if item.run in item.paths:
                    with suppress(OSError):  # somebody started the run anew
                        item.run.rmdir()
        except InUseError:
            kept.append(item)
        except (OSError, StorageError) as error:
            failures.append(error)
    for first in failures[:1]:
        if isinstance(first, StorageError):
            raise first
        what = f"cannot remove: {first.strerror or type(first).__name__}"
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise StorageError(
            what, f"{printable(first.filename)}{more}", "check the permissions"
        ) from first
    return kept


def _parts(run: Path) -> list[Path]:
    """All of a run but its lock. Checkpoints go first: a run half removed starts anew."""
    return sorted(
        (p for p in _children(run) if p.name != "LOCK"), key=lambda p: (p.name != "ckpt", p)
    )


def _remove(path: Path) -> None:
    """Gone at once for a reader: a folder gets another name before it is emptied. A link goes, not
    what it points to."""
    if _is_folder(path):
        away = tempfile.mkdtemp(dir=path.parent, prefix=".tmp-clean-")
        os.rename(path, away)
        shutil.rmtree(away)
    else:
        path.unlink(missing_ok=True)
