"""``python -m gain_cl sweep experiment=NAME``: run what an experiment lacks."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gain_cl.errors import PREEMPTED, ConfigError, GainError
from gain_cl.measure import record
from gain_cl.stats import format
from gain_cl.studies import costs, launchers, sweep
from gain_cl.studies.experiments import Experiment, Planned, planned_runs
from gain_cl.system import lock
from gain_cl.system.terminal import console, printable
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked_experiment, print_grid

USAGE = """\
python -m gain_cl sweep experiment=NAME [KEY=VALUE ...] [only=WORD,WORD] [max_parallel=N] [dry_run=true]
       [retry_failed=true] [gpus=0,1] [launcher=local|slurm] [slurm.KEY=VALUE ...] [worktree=false]"""

ABOUT = """\
Run the runs of an experiment that are missing or were stopped, each in a process of its own.

  only=          methods, models, blockK or beginnings of run ids: only=lora,block0 is LoRA in block 0
  max_parallel=  runs at a time on this machine (default: one for each GPU, else one; on Slurm: all)
  dry_run=true   show the grid, the cost and the commands, start nothing
  retry_failed=true  runs that failed before, too
  gpus=          GPUs to give out, one to a run (default: those of CUDA_VISIBLE_DEVICES, else all; none: gpus=)
  launcher=      local, or slurm: a job each, through submitit; slurm.partition=gpu slurm.time=240 (minutes) ... are its parameters
  worktree=false run the files as they are, not HEAD's

Other KEY=VALUE words are overrides of every run (output_dir=, results_dir=, compute.threads=, track=wandb). Started again, or beside
another launcher, it runs nothing twice.
"""


OWN = ("only", "gpus", "max_parallel", "dry_run", "retry_failed", "worktree", "launcher")
"""The sweep's own words; the rest are overrides."""


@dataclass
class Options:
    only: list[str] = field(default_factory=list)
    max_parallel: int | None = None
    dry_run: bool = False
    retry_failed: bool = False
    launcher: str = "local"
    gpus: list[str] | None = None
    worktree: bool = True
    slurm: dict[str, str] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    """Exit code: 0 every run asked for is done, 1 some failed, 75 stopped by a signal."""
    parser = Parser(
        "sweep",
        usage=USAGE,
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment, the sweep's words, overrides",
    )
    experiment, words = asked_experiment(parser.parse_intermixed_args(argv).words, "sweep")
    options, more = _options(words)
    cells = _only(planned_runs(experiment, more), options.only)
    out = console()

    def say(text: str = "", style: str = "") -> None:
        out.print(
            printable(text), style=style or None, markup=False, highlight=False, soft_wrap=True
        )

    print_grid(experiment, cells)
    records = _records(cells)

    def ahead(some: Sequence[Planned]) -> list[float]:
        return _left(some, cells, records)

    failed = [c for c in cells if c.state == "failed"]
    todo = [c for c in cells if c.state != "done" and (options.retry_failed or c.state != "failed")]
    seconds = sum(ahead(todo))
    cost = (
        "cost not known before a run is done"
        if math.isnan(seconds)
        else f"{format.duration(seconds)} one after the other"
    )
    untimed = any(c.config.tasks.names for c in todo) and not any(
        s.task_seconds for r in records for s in r.stages
    )
    cost += (
        ", tasks not included: none was timed yet" if untimed and not math.isnan(seconds) else ""
    )
    say(f"{format.counted(len(todo), 'run')} ahead: {cost}" if todo else "nothing to run")
    for c in failed:
        say(f"failed before: {sweep.title(c)}: {sweep.reason(c)}")
    if failed and not options.retry_failed:
        say("retry_failed=true runs what failed again")
    output = Path(cells[0].config.output_dir)
    launcher = _launcher(options, output, len(todo))
    jobs = _jobs(experiment, todo, more, options, launcher, output)
    if options.dry_run or not jobs:
        for job in jobs:
            say(shlex.join(["python", *job.command]))
        return 1 if failed and not jobs else 0
    left_of = (
        (lambda some: [math.nan] * len(some)) if untimed else ahead
    )  # better no time left than one without the tasks
    outcome = sweep.carry_out(jobs, launcher, cells[0].claims, say, left_of)
    for failure in outcome.failed:
        say(f"failed: {sweep.title(failure.cell)}: {failure.last_line}", style="bold")
        say(f"  {shlex.join(['python', '-m', 'gain_cl', 'run', *failure.cell.overrides, *more])}")
    left = len(jobs) - len(outcome.done) - len(outcome.failed)
    say(
        f"{len(outcome.done)} done, {len(outcome.failed)} failed"
        + (f", {left} not finished: start it again to go on" if left else "")
    )
    if outcome.stopped is not None:
        return PREEMPTED
    return 1 if outcome.failed or left or (failed and not options.retry_failed) else 0


# --- what was asked -------------------------------------------------------------------------------


def _options(words: list[str]) -> tuple[Options, list[str]]:
    """The sweep's own words, and the others: overrides."""
    options, more = Options(), []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("only", "gpus"):
            setattr(options, key, [v.strip() for v in value.split(",") if v.strip()])
        elif key == "max_parallel":
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(
                    f"{value!r} is no number of runs", "max_parallel", "give 1 or more"
                )
            options.max_parallel = int(value)
        elif key in ("dry_run", "retry_failed", "worktree"):
            if value not in ("true", "false"):
                raise ConfigError(
                    f"{value!r} is neither true nor false", key, f"give {key}=true or {key}=false"
                )
            setattr(options, key, value == "true")
        elif key == "launcher":
            if value not in ("local", "slurm"):
                raise ConfigError(f"no launcher {value!r}", "launcher", "there are local and slurm")
            options.launcher = value
        elif key.startswith("slurm."):
            options.slurm[key.removeprefix("slurm.")] = value
        elif close := difflib.get_close_matches(key, OWN, cutoff=0.8):
            raise ConfigError(f"unknown key {key}", "gain_cl sweep", f"did you mean {close[0]}?")
        else:
            more.append(word)
    return options, more


def _only(cells: list[Planned], words: list[str]) -> list[Planned]:
    """Cells that match a word of each kind that was given: models, methods, blocks, beginnings of
    run ids."""
    kinds: list[set[str]] = [set(), set(), set(), set()]
    for word in words:
        matches = (
            {c.run_id for c in cells if c.model == word},
            {c.run_id for c in cells if word in (c.method, c.label)},
            {c.run_id for c in cells if word == f"block{c.block}"},
            {c.run_id for c in cells if c.run_id.startswith(word)},
        )
        kind = next((i for i, found in enumerate(matches) if found), None)
        if kind is None:
            names = sorted(
                {c.method for c in cells}
                | {f"block{c.block}" for c in cells}
                | {c.model for c in cells}
            )
            raise ConfigError(
                f"no run is {word!r}", "only", f"there are {', '.join(names)}, and run ids"
            )
        kinds[kind] |= matches[kind]
    return [c for c in cells if all(c.run_id in kind for kind in kinds if kind)]


def _records(cells: list[Planned]) -> list[record.RunRecord]:
    """Of the runs that are done; else of whatever runs of these models there are: what the cost is
    told from."""
    models, found = {c.model for c in cells}, []
    done = [c.record for c in cells if c.state == "done"]
    for path in done or sorted(cells[0].record.parent.glob("*.json")):
        with suppress(GainError):  # a damaged one is named where it is read for its numbers
            r = record.load(path).record
            if r.model in models and r.interpolated is None:
                found.append(r)
    return found


def _left(
    some: Sequence[Planned], cells: Sequence[Planned], records: list[record.RunRecord]
) -> list[float]:
    """Seconds that each of some cells of a grid will take from its last saved stage on; of those
    that share stage 0, one scores it."""
    shared = {sweep.baseline(c) for c in cells if sweep.scored(c)}
    found = []
    for c in some:
        kind = sweep.baseline(c)
        found.append(
            costs.run_seconds(
                c.config, c.method, records, saved=max(sweep.saved(c), int(kind in shared))
            )
        )
        shared.add(kind)
    return found


# --- how it is run --------------------------------------------------------------------------------


def _launcher(options: Options, output: Path, ahead: int) -> launchers.Launcher:
    if options.launcher == "slurm":
        if options.gpus is not None:
            raise ConfigError("gpus= is for launcher=local", "gpus", "give slurm.gpus_per_node=1")
        parameters, cluster = _parameters(options.slurm)
        return launchers.Slurm(
            output / "slurm", options.max_parallel or max(1, ahead), parameters, cluster
        )
    if options.slurm:
        raise ConfigError(
            "slurm.* goes with launcher=slurm", "gain_cl sweep", "give launcher=slurm"
        )
    gpus = _gpus() if options.gpus is None else options.gpus
    return launchers.Local(options.max_parallel or max(1, len(gpus)), gpus)


def _parameters(given: dict[str, str]) -> tuple[dict[str, Any], str]:
    """submitit's parameters, and the cluster it sends to (slurm; slurm.cluster=local tries a sweep
    out without one)."""
    cluster = given.get("cluster", "slurm")
    shared = (
        "timeout_min",
        "mem_gb",
        "nodes",
        "cpus_per_task",
        "gpus_per_node",
        "tasks_per_node",
        "stderr_to_stdout",
    )
    found: dict[str, Any] = {"timeout_min": 24 * 60, "slurm_signal_delay_s": 300}
    for key, value in given.items():
        if key == "time":
            found["timeout_min"] = _minutes(value)
        elif key != "cluster":
            found[key if key in shared else f"slurm_{key}"] = _typed(value)
    return found, cluster


def _minutes(text: str) -> int:
    """Slurm's own: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(p.isdigit() for p in parts) or len(parts) > 3 or (days and not days.isdigit()):
        raise ConfigError(
            f"{text!r} is no time", "slurm.time", "give minutes, H:MM:SS or D-HH:MM:SS"
        )
    numbers = [int(p) for p in parts]
    if days:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = ((0, *numbers, 0) if len(numbers) < 3 else (*numbers,))[:3]
    return max(1, int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0))


def _typed(text: str) -> Any:
    """A number, true or false, else the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


def _gpus() -> list[str]:
    """GPUs of this machine that a run may have, without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [g.strip() for g in visible.split(",") if g.strip() and g.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def _jobs(
    experiment: Experiment,
    todo: list[Planned],
    more: list[str],
    options: Options,
    launcher: launchers.Launcher,
    output: Path,
) -> list[launchers.Job]:
    """A command each. They run here, so that relative paths mean the same, with the code of the
    worktree."""
    environment: dict[str, str] = {}
    root = sweep.checkout() if options.worktree else None
    if root is not None and todo and not options.dry_run:
        with lock.one_launcher(todo[0].claims):
            tree = sweep.worktree(root, output / "sweeps")
        environment["PYTHONPATH"] = os.pathsep.join(
            p for p in (str(tree / "src"), os.environ.get("PYTHONPATH", "")) if p
        )
    words = list(more)
    given = {w.partition("=")[0] for c in todo for w in (*c.overrides, *more)}
    if (
        isinstance(launcher, launchers.Local)
        and launcher.limit > 1
        and "compute.threads" not in given
        and not launcher.gpus
    ):
        threads = max(1, (os.cpu_count() or 1) // launcher.limit)
        words.append(f"compute.threads={threads}")
        environment["OMP_NUM_THREADS"] = str(threads)
    if todo and todo[0].config.track.backend == "wandb" and "track.group" not in given:
        words.append(f"track.group={experiment.name}")
    logs = output / "sweeps" / experiment.name
    return [
        launchers.Job(
            c, ["-m", "gain_cl", "run", *c.overrides, *words], environment, logs / f"{c.run_id}.log"
        )
        for c in todo
    ]
