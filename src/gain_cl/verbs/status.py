"""``python -m gain_cl status experiment=NAME``: which runs of an experiment are done, and which are missing."""

from __future__ import annotations

import json
import shlex
from collections import Counter

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gain_cl import experiments
from gain_cl.errors import ConfigError
from gain_cl.experiments import Cell, Experiment, label
from gain_cl.verbs import Parser, console, printable


def main(argv: list[str]) -> int:
    """Print the grid; with --missing the command of each run that is not done, a line each."""
    parser = Parser(
        "status",
        usage="python -m gain_cl status experiment=NAME [KEY=VALUE ...] [--missing] [--json]",
        description="The runs of an experiment: done, running, failed, stopped or missing.",
    )
    parser.add_argument("words", nargs="+", metavar="experiment=NAME | KEY=VALUE", help="the experiment; overrides of every run")
    parser.add_argument("--missing", action="store_true", help="print the commands of the runs that are not done, one a line")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    experiment, more = asked(args.words, "status")
    found = experiments.cells(experiment, more)
    if args.missing:
        for cell in found:
            if cell.state != "done":
                print(shlex.join(["python", "-m", "gain_cl", "run", *cell.overrides, *more]))
    elif args.json:
        rows = [{"setting": label(c.method, c.values), "block": c.block, "run_id": c.run_id, "state": c.state} for c in found]
        print(json.dumps({"experiment": experiment.name, "runs": rows}, indent=1, allow_nan=False))
    else:
        _show(experiment, found)
    return 0


def asked(words: list[str], verb: str) -> tuple[Experiment, list[str]]:
    """(experiment, overrides) of a command line with experiment=NAME among KEY=VALUE words."""
    names = [w.partition("=")[2] for w in words if w.startswith("experiment=")]
    if len(names) != 1:
        raise ConfigError("no experiment is named" if not names else "several experiments", f"gain_cl {verb}", "give one experiment=NAME")
    return experiments.load(names[0]), [w for w in words if not w.startswith("experiment=")]


def _show(experiment: Experiment, found: list[Cell]) -> None:
    out = console()
    out.print(printable(f"{experiment.name}: {experiment.question}"), markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("setting")
    for block in range(experiment.blocks):
        table.add_column(f"block {block}" if experiment.blocks > 1 else "state")
    table.add_column("run id" if experiment.blocks == 1 else "run id in block 0")
    for method, values in experiment.settings():
        mine = [c for c in found if (c.method, c.values) == (method, values)]
        table.add_row(printable(label(method, values)), *(c.state for c in mine), mine[0].run_id)
    out.print(table)
    counts = Counter(c.state for c in found)
    out.print(f"{len(found)} runs: {', '.join(f'{n} {state}' for state, n in counts.items())}", highlight=False)
