"""Commands around runs: one module each, with ``main(argv) -> exit code``; imported when called."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import NoReturn

from gain_cl.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit 64."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            message, f"gain_cl {self.prog}", f"see python -m gain_cl {self.prog} --help"
        )

    def add_presets(self) -> None:
        """Add --config-dir and --plugin, each repeatable."""
        for flag, what in (
            ("--config-dir", "a folder with more presets (repeatable)"),
            ("--plugin", "a file that registers adapters or guards (repeatable)"),
        ):
            self.add_argument(flag, action="append", default=[], help=what)


def find_record(name: str, results_dir: Path) -> Path:
    """The record that a path, a run id or the beginning of one means."""
    if Path(name).is_file() or name.endswith(".json") or "/" in name:
        return Path(name)
    folder = results_dir / "runs"
    found = sorted(folder.glob(f"{glob.escape(name)}*.json"))
    runs = {p.stem for p in found}
    found = [
        p for p in found if p.stem.rpartition("-alpha")[0] not in runs
    ]  # a run before what was interpolated from it
    if (exact := folder / f"{name}.json").stem in runs:
        return exact
    if len(found) != 1:
        from gain_cl.errors import suggest

        options = [p.stem for p in folder.glob("*.json")]
        what = f"{len(found)} runs begin with {name!r}" if found else f"no run {name!r}"
        raise ConfigError(
            what,
            str(folder),
            suggest(name, [p.stem for p in found] or options) or "give the path of a record",
        )
    return found[0]
