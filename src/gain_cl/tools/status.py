"""``python -m gain_cl status experiment=NAME``: which runs of an experiment are done, and which are
missing."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence

from gain_cl.errors import ConfigError
from gain_cl.paper.table import Row, Styled, Table, print_table, say
from gain_cl.studies.experiments import Experiment, Planned, load_experiment, planned_runs
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
    experiment, more = asked_experiment(args.words, "status")
    found = planned_runs(experiment, more)
    if args.missing:
        for run in found:
            if run.state != "done":
                print(run_command(run, more))
    elif args.json:
        rows = [
            {
                "model": run.model,
                "setting": run.label,
                "block": run.block,
                "run_id": run.run_id,
                "state": run.state,
            }
            for run in found
        ]
        print(json.dumps({"experiment": experiment.name, "runs": rows}, indent=1, allow_nan=False))
    else:
        print_grid(experiment, found)
    return 0


def asked_experiment(words: list[str], verb: str) -> tuple[Experiment, list[str]]:
    """Return (experiment, overrides) of a command line with experiment=NAME among KEY=VALUE
    words."""
    names = [w.partition("=")[2] for w in words if w.startswith("experiment=")]
    if len(names) != 1:
        raise ConfigError(
            "no experiment is named" if not names else "several experiments",
            f"gain_cl {verb}",
            "give one experiment=NAME",
        )
    return load_experiment(names[0]), [w for w in words if not w.startswith("experiment=")]


def flag(key: str, text: str) -> bool:
    """Return what KEY=true or KEY=false says."""
    if text not in ("true", "false"):
        raise ConfigError(
            f"{text!r} is neither true nor false", key, f"give {key}=true or {key}=false"
        )
    return text == "true"


def run_command(run: Planned, more: list[str]) -> str:
    """Return the command line that carries out a planned run."""
    return shlex.join(["python", "-m", "gain_cl", "run", *run.overrides, *more])


def print_grid(experiment: Experiment, found: Sequence[Planned]) -> None:
    """Print settings by blocks with the state of each run, and how many are in which."""
    states = {run.run_id: run.state for run in found}
    blocks = sorted({run.block for run in found})
    grid: dict[tuple[str, str], dict[int, Planned]] = {}
    for run in found:
        grid.setdefault((run.model, run.label), {})[run.block] = run
    rows = [
        Row(
            [
                model,
                setting,
                *(
                    Styled(state, STYLE[state])
                    if k in mine and (state := states[mine[k].run_id])
                    else ""
                    for k in blocks
                ),
                mine[min(mine)].run_id,
            ]
        )
        for (model, setting), mine in grid.items()
    ]
    heads = ["model", "setting", *(f"block {k}" for k in blocks), f"run id in block {blocks[0]}"]
    if experiment.blocks == 1:
        heads[2:] = ["state", "run id"]
    if len({run.model for run in found}) == 1:
        heads, rows = heads[1:], [Row(row.cells[1:]) for row in rows]
    title = f"{experiment.name}: {experiment.question}"
    print_table(Table("status", title, heads, rows))
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).items())
    say(f"{len(found)} runs: {counts}")
