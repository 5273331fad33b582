"""``python -m gain_cl status experiment=NAME``: which runs of an experiment are done, and which are
missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from gain_cl.errors import ConfigError
from gain_cl.paper.table import Row, Table, print_table, say
from gain_cl.studies.experiments import Experiment, Planned, load_experiment, planned_runs
from gain_cl.tools.command import Parser, print_report

STYLE = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "stopped": "yellow",
    "missing": "dim",
}


def main(argv: list[str]) -> int:
    """Print the grid; with --missing the command of each run that is not done, a line each."""
    parser = Parser("status", "words", "--json")
    parser.option(
        "--missing", "print the commands of the runs that are not done, one a line", False
    )
    args = parser.read(argv)
    experiment, more = asked_experiment(args.words, "status")
    found = planned_runs(experiment, more)
    if args.missing:
        for run in found:
            if run.state != "done":
                print(run_command(run, more))
        return 0
    rows = [
        {
            "model": r.model,
            "setting": r.label,
            "block": r.block,
            "run_id": r.run_id,
            "state": r.state,
        }
        for r in found
    ]
    report = {"experiment": experiment.name, "runs": rows}
    return print_report(report, args.json, lambda _: print_grid(experiment, found))


def asked_experiment(words: list[str], verb: str) -> tuple[Experiment, list[str]]:
    """Return (experiment, overrides) of a command line with experiment=NAME among KEY=VALUE
    words."""
    names = [w.partition("=")[2] for w in words if w.startswith("experiment=")]
    if len(names) != 1:
        raise ConfigError(
            f"{len(names) or 'no'} experiments are named",
            f"gain_cl {verb}",
            "give one experiment=NAME",
        )
    return load_experiment(names[0]), [w for w in words if not w.startswith("experiment=")]


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
    rows = []
    for names, mine in grid.items():
        told = [states[mine[k].run_id] if k in mine else "" for k in blocks]
        cells = [Text(state, STYLE.get(state, "")) for state in told]
        rows.append(Row([*names, *cells, mine[min(mine)].run_id]))
    heads = ["model", "setting", *(f"block {k}" for k in blocks), f"run id in block {blocks[0]}"]
    print_table(Table("status", f"{experiment.name}: {experiment.question}", heads, rows))
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).items())
    say(f"{len(found)} runs: {counts}")
