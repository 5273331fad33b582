"""What verbs share: a parser with their common options, runs by name, and the settings of a record.

Each verb is a module with ``main(argv) -> exit code``. It is imported when it is called.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.stats import format

if TYPE_CHECKING:
    from gain_cl.config.schema import RunConfig
    from gain_cl.measure.record import Run, RunRecord

SHARED: dict[str, dict[str, Any]] = {
    "run": {"help": "path of a record, or a run id (its beginning is enough)"},
    "overrides": {"nargs": "*", "metavar": "KEY=VALUE", "help": "as for run"},
    "words": {
        "nargs": "+",
        "metavar": "KEY=VALUE",
        "help": "experiment=NAME, the options below as KEY=VALUE, and overrides of every run",
    },
    "--results-dir": {
        "default": "results",
        "help": "where runs/RUN_ID.json are (default: %(default)s)",
    },
    "--output-dir": {"help": "where the folders of runs are (default: as recorded)"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--config-dir": {
        "action": "append",
        "default": [],
        "help": "a folder with more presets (repeatable)",
    },
    "--plugin": {
        "action": "append",
        "default": [],
        "help": "a file that registers adapters or guards (repeatable)",
    },
}
"""Arguments that several verbs take."""

RUN = ("run", "--results-dir", "--output-dir", "--json")
"""Those of a verb that works on a finished run."""

CONFIGURATION = ("overrides", "--config-dir", "--plugin")
"""Those of a verb that takes the words of ``run``."""

FLAG: dict[str, Any] = {"choices": ["true", "false"], "default": "false"}
"""Settings of an option that is on or off: dry_run=true."""

STYLES = dict.fromkeys(("ok", "done"), "green") | dict.fromkeys(("not there", "missing"), "dim")
STYLES |= dict.fromkeys(("warning", "stopped"), "yellow") | {"running": "cyan"}
STYLES |= dict.fromkeys(("problem", "FAILED", "failed"), "bold red")
"""What became of a check or a run -> its colour."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit 64.

    verb: as it is called; shared: names in SHARED; settings: as for argparse. What the verb does is
    told by the first paragraph of its module.
    """

    def __init__(self, verb: str, *shared: str, **settings: Any) -> None:
        self.verb, self.known, self.overridden = verb, list[str](), "overrides" in shared
        module = sys.modules.get(f"gain_cl.tools.{verb.replace('-', '_')}")
        about = str(module and module.__doc__).partition("\n\n")[0].partition("``: ")[2]
        given = {"allow_abbrev": False, "description": about, **settings}
        super().__init__(f"python -m gain_cl {verb}", **given)
        for name in shared:
            self.add_argument(name, **SHARED[name])

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Add an argument, and note its names."""
        self.known += names
        return super().add_argument(*names, **settings)

    def option(self, name: str, about: str, default: Any = None, **settings: Any) -> None:
        """Add an option. default: its type is the option's; False makes it a flag."""
        if default is False:
            settings["action"] = "store_true"
        elif default is not None:
            settings["type"] = type(default)
        self.add_argument(name, help=about, default=default, **settings)

    def read(self, argv: list[str]) -> Any:
        """Return the arguments, in any order. KEY=VALUE is --KEY VALUE, unless it overrides a
        setting of a run."""
        if not self.overridden:
            argv = [self._option(word) for word in argv]
        return self.parse_intermixed_args(argv)

    def _option(self, word: str) -> str:
        key, equals, value = word.partition("=")
        option = "--" + key.replace("_", "-")
        return f"{option}={value}" if equals and option in self.known else word

    def error(self, message: str) -> NoReturn:
        do = f"see python -m gain_cl {self.verb} --help"
        if unknown := re.match(r"unrecognized arguments: -*([\w-]+)", message):
            do = suggest(unknown[1], [name.lstrip("-") for name in self.known], False) or do
        raise ConfigError(message, f"gain_cl {self.verb}", do)


def find_record(name: str, results_dir: Path | str) -> Path:
    """Return the record that a path, a run id or the beginning of one means."""
    if Path(name).is_file() or name.endswith(".json") or "/" in name:
        return Path(name)
    folder = Path(results_dir) / "runs"
    found = {path.stem: path for path in sorted(folder.glob(f"{glob.escape(name)}*.json"))}
    if name in found:
        return found[name]
    if len(found) != 1:
        what = f"{len(found)} runs begin with {name!r}" if found else f"no run {name!r}"
        options = list(found) or [path.stem for path in folder.glob("*.json")]
        do = suggest(name, options) or "give the path of a record"
        raise ConfigError(what, str(folder), do)
    return next(iter(found.values()))


def load_run(args: Any) -> Run:
    """Return the finished run that the arguments name."""
    from gain_cl.measure import record

    run = record.load(find_record(args.run, args.results_dir))
    if (made := run.record.interpolated) is not None:
        what = "it is interpolated and has no trained state of its own"
        raise ConfigError(what, run.record.run_id, f"use {made.of}")
    return run


def recorded_config(told: RunRecord) -> RunConfig:
    """Return the settings of a record. DataError: they are not those of this version."""
    from gain_cl.config.schema import RunConfig
    from gain_cl.measure.record import first_line

    try:
        return RunConfig.model_validate(told.config)
    except ValueError as error:
        what, do = f"config.{first_line(error)}", "use the gain_cl that wrote the record"
        raise DataError(what, told.run_id, do) from None


def print_report(report: Any, as_json: bool, show: Callable[[Any], object]) -> int:
    """Print a report as JSON (null: a number that is not finite), or by its own function. Return
    the exit code."""
    if as_json:
        print(json.dumps(format.finite(report)[0], indent=1, allow_nan=False), flush=True)
    else:
        show(report)
    return 0


def print_rows(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as a table, what became of a check or a run in colour."""
    from rich.text import Text

    from gain_cl.paper.table import Row, Table, print_table

    cells = [Row([Text(str(x), STYLES.get(x, "")) for x in row.values()]) for row in rows]
    print_table(Table(name, title, list(rows[0]), cells))


def new_folder(folder: Path) -> Path:
    """Return a folder that is not there, or empty. ConfigError: it is neither."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the folder is not empty", str(folder), "name another one")
    return folder
