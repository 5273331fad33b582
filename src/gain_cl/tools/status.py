"""``python -m gain_cl status experiment=NAME``: which runs of an experiment are done, and which are
missing."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gain_cl.errors import ConfigError
from gain_cl.studies import experiments
from gain_cl.studies.experiments import Cell, Experiment
from gain_cl.system.terminal import console, printable
from gain_cl.tools.command import Parser

STYLE = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "stopped": "yellow",
    "missing": "dim",
}


def main(argv: list[str]) -> int:
    """Print the grid; with --missing the command of each run that is not done, a line each."""
    parser = Parser(
        "status",
        usage="python -m gain_cl status experiment=NAME [KEY=VALUE ...] [--missing] [--json]",
        description="The runs of an experiment: done, running, failed, stopped or missing.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment; overrides of every run",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="print the commands of the runs that are not done, one a line",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    experiment, more = asked(args.words, "status")
    found = experiments.cells(experiment, more)
    if args.missing:
        for cell in found:
            if cell.state != "done":
                print(shlex.join(["python", "-m", "gain_cl", "run", *cell.overrides, *more]))
    elif args.json:
        rows = [
            {
                "model": c.model,
                "setting": c.label,
                "block": c.block,
                "run_id": c.run_id,
                "state": c.state,
            }
            for c in found
        ]
        print(json.dumps({"experiment": experiment.name, "runs": rows}, indent=1, allow_nan=False))
    else:
        grid(experiment, found, console())
    return 0


def asked(words: list[str], verb: str) -> tuple[Experiment, list[str]]:
    """(experiment, overrides) of a command line with experiment=NAME among KEY=VALUE words."""
    names = [w.partition("=")[2] for w in words if w.startswith("experiment=")]
    if len(names) != 1:
        raise ConfigError(
            "no experiment is named" if not names else "several experiments",
            f"gain_cl {verb}",
            "give one experiment=NAME",
        )
    return experiments.load(names[0]), [w for w in words if not w.startswith("experiment=")]


def grid(experiment: Experiment, found: list[Cell], out: Any) -> None:
    """Settings by blocks with the state of each run, and how many are in which."""
    out.print(printable(f"{experiment.name}: {experiment.question}"), markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    blocks = sorted({c.block for c in found})
    if several := len({c.model for c in found}) > 1:
        table.add_column("model")
    table.add_column("setting")
    for block in blocks:
        table.add_column(f"block {block}" if experiment.blocks > 1 else "state")
    table.add_column("run id" if experiment.blocks == 1 else f"run id in block {blocks[0]}")
    rows: dict[tuple[str, str], dict[int, Cell]] = {}
    for c in found:
        rows.setdefault((c.model, c.label), {})[c.block] = c
    states = {c.run_id: c.state for c in found}
    for (model, setting), mine in rows.items():
        cells = [
            Text(states[mine[k].run_id], style=STYLE[states[mine[k].run_id]])
            if k in mine
            else Text("")
            for k in blocks
        ]
        table.add_row(
            *([model] if several else []), printable(setting), *cells, mine[min(mine)].run_id
        )
    out.print(table)
    counts = Counter(states.values())
    out.print(
        f"{len(found)} runs: {', '.join(f'{n} {state}' for state, n in counts.items())}",
        highlight=False,
    )
