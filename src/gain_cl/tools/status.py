"""``python -m gain_cl status experiment=NAME``: which runs of an experiment are done, and which are
missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from gain_cl.errors import ConfigError
from gain_cl.paper.table import say
from gain_cl.studies.experiments import Experiment, Planned, load_experiment, planned_runs
from gain_cl.tools.command import Parser, print_report, print_rows


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
    rows = []
    for run in found:
        about = {"model": run.model, "setting": run.label, "block": run.block}
        rows.append({**about, "run_id": run.run_id, "state": run.state})
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
    blocks = {f"block {k}": "" for k in sorted({run.block for run in found})}
    grid: dict[tuple[str, str], dict[str, str]] = {}
    for run in found:
        names = {"model": run.model, "setting": run.label}
        row = {**names, **blocks, "first run id": run.run_id}
        grid.setdefault((run.model, run.label), row)[f"block {run.block}"] = run.state
    print_rows("status", f"{experiment.name}: {experiment.question}", [*grid.values()])
    told = Counter(row[block] for row in grid.values() for block in blocks if row[block])
    counts = ", ".join(f"{n} {state}" for state, n in told.items())
    say(f"{len(found)} runs: {counts}")
