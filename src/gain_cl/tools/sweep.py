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
from functools import partial
from pathlib import Path
from typing import Any

from gain_cl.errors import PREEMPTED, ConfigError, GainError
from gain_cl.measure import record
from gain_cl.paper.table import say
from gain_cl.stats import format
from gain_cl.studies import launchers, sweep
from gain_cl.studies.costs import run_seconds
from gain_cl.studies.experiments import Experiment, Planned, planned_runs
from gain_cl.system import lock
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked_experiment, flag, print_grid, run_command

USAGE = """\
python -m gain_cl sweep experiment=NAME [KEY=VALUE ...] [only=WORD,WORD] [max_parallel=N]
       [dry_run=true] [retry_failed=true] [gpus=0,1] [launcher=local|slurm] [slurm.KEY=VALUE ...]
       [worktree=false]"""

ABOUT = """\
Run the runs of an experiment that are missing or were stopped, each in a process of its own.

  only=          methods, models, blockK or beginnings of run ids: only=lora,block0 is LoRA in
                 block 0
  max_parallel=  runs at a time on this machine (default: one for each GPU, else one; on Slurm: all)
  dry_run=true   show the grid, the cost and the commands, start nothing
  retry_failed=true  runs that failed before, too
  gpus=          GPUs to give out, one to a run (default: those of CUDA_VISIBLE_DEVICES, else all;
                 none: gpus=)
  launcher=      local, or slurm: a job each, through submitit; slurm.partition=gpu slurm.time=240
                 (minutes) ... are its parameters
  worktree=false run the files as they are, not HEAD's

Other KEY=VALUE words are overrides of every run (output_dir=, results_dir=, compute.threads=,
track=wandb). Started again, or beside another launcher, it runs nothing twice.
"""


@dataclass
class Options:
    """The sweep's own words."""

    only: list[str] = field(default_factory=list)
    max_parallel: int | None = None
    dry_run: bool = False
    retry_failed: bool = False
    launcher: str = "local"
    gpus: list[str] | None = None
    worktree: bool = True
    slurm: dict[str, str] = field(default_factory=dict)


OWN = tuple(Options.__dataclass_fields__)[:-1]


def main(argv: list[str]) -> int:
    """Run what is missing. Exit code: 0 every run asked for is done, 1 some failed, 75 stopped by a
    signal."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("sweep", usage=USAGE, description=ABOUT, formatter_class=raw)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment, the sweep's words, overrides",
    )
    experiment, words = asked_experiment(parser.parse_intermixed_args(argv).words, "sweep")
    options, more = _options(words)
    planned = _only(planned_runs(experiment, more), options.only)
    print_grid(experiment, planned)
    failed = [c for c in planned if c.state == "failed"]
    again = [] if options.retry_failed else failed
    todo = [c for c in planned if c.state != "done" and c not in again]
    records = _records(planned)
    timed = any(s.task_seconds for r in records for s in r.stages)
    untimed = not timed and any(c.config.tasks.names for c in todo)
    ahead = partial(_left, planned=planned, records=records)
    say(_cost(todo, sum(ahead(todo)), untimed))
    for c in failed:
        say(f"failed before: {sweep.title(c)}: {sweep.reason(c)}")
    if again:
        say("retry_failed=true runs what failed again")
    output = Path(planned[0].config.output_dir)
    launcher = _launcher(options, output, len(todo))
    jobs = _jobs(experiment, todo, more, options, launcher, output)
    if options.dry_run or not jobs:
        for job in jobs:
            say(shlex.join(["python", *job.command]))
        return 1 if failed and not jobs else 0
    if untimed:  # better no time left than one without the tasks
        ahead = partial(_left, planned=planned, records=[])
    outcome = sweep.carry_out(jobs, launcher, planned[0].claims, say, ahead)
    for failure in outcome.failed:
        say(f"failed: {sweep.title(failure.run)}: {failure.last_line}", "bold")
        say(f"  {run_command(failure.run, more)}")
    left = len(jobs) - len(outcome.done) - len(outcome.failed)
    unfinished = f", {left} not finished: start it again to go on" if left else ""
    say(f"{len(outcome.done)} done, {len(outcome.failed)} failed{unfinished}")
    if outcome.stopped is not None:
        return PREEMPTED
    return int(bool(outcome.failed or left or again))


# --- what was asked -------------------------------------------------------------------------------


def _options(words: list[str]) -> tuple[Options, list[str]]:
    """Return the sweep's own words, and the others: overrides."""
    options, more = Options(), []
    for word in words:
        key, _, value = word.partition("=")
        if key.startswith("slurm."):
            options.slurm[key.removeprefix("slurm.")] = value
        elif key in OWN:
            setattr(options, key, _value(key, value))
        elif close := difflib.get_close_matches(key, OWN, cutoff=0.8):
            raise ConfigError(f"unknown key {key}", "gain_cl sweep", f"did you mean {close[0]}?")
        else:
            more.append(word)
    return options, more


def _value(key: str, text: str) -> Any:
    """Return what a word of the sweep says. ConfigError: it cannot."""
    if key in ("only", "gpus"):
        return _listed(text)
    if key == "max_parallel":
        if text.isdigit() and int(text):
            return int(text)
        raise ConfigError(f"{text!r} is no number of runs", key, "give 1 or more")
    if key == "launcher":
        if text in ("local", "slurm"):
            return text
        raise ConfigError(f"no launcher {text!r}", key, "available: local, slurm")
    return flag(key, text)


def _listed(text: str) -> list[str]:
    return [v.strip() for v in text.split(",") if v.strip()]


def _only(planned: list[Planned], words: list[str]) -> list[Planned]:
    """Return the runs that match a word of each kind that was given: models, methods, blocks,
    beginnings of run ids."""
    kinds: dict[int, set[str]] = {}
    for word in words:
        matches = [
            {c.run_id for c in planned if c.model == word},
            {c.run_id for c in planned if word in (c.method, c.label)},
            {c.run_id for c in planned if word == f"block{c.block}"},
            {c.run_id for c in planned if c.run_id.startswith(word)},
        ]
        kind = next((i for i, found in enumerate(matches) if found), None)
        if kind is None:
            names = sorted({x for c in planned for x in (c.method, f"block{c.block}", c.model)})
            do = f"available: {', '.join(names)}, and run ids"
            raise ConfigError(f"no run is {word!r}", "only", do)
        kinds.setdefault(kind, set()).update(matches[kind])
    return [c for c in planned if all(c.run_id in kind for kind in kinds.values())]


# --- what it costs --------------------------------------------------------------------------------


def _cost(todo: list[Planned], seconds: float, untimed: bool) -> str:
    """Return how many runs are ahead, and how long they take."""
    if not todo:
        return "nothing to run"
    cost = f"{format.counted(len(todo), 'run')} ahead: "
    if math.isnan(seconds):
        return f"{cost}cost not known before a run is done"
    less = ", tasks not included: none was timed yet" if untimed else ""
    return f"{cost}{format.duration(seconds)} one after the other{less}"


def _records(planned: list[Planned]) -> list[record.RunRecord]:
    """Return what the cost is told from: the runs that are done; else whatever runs of these models
    there are."""
    models, found = {c.model for c in planned}, []
    done = [c.record for c in planned if c.state == "done"]
    for path in done or sorted(planned[0].record.parent.glob("*.json")):
        with suppress(GainError):  # a damaged one is named where it is read for its numbers
            r = record.load(path).record
            if r.model in models and r.interpolated is None:
                found.append(r)
    return found


def _left(
    some: Sequence[Planned], planned: Sequence[Planned], records: list[record.RunRecord]
) -> list[float]:
    """Return the seconds that each of some planned runs will take from its last saved stage on; of
    those that share stage 0, one scores it."""
    shared, found = {sweep.baseline(c) for c in planned if sweep.scored(c)}, []
    for c in some:
        saved = max(sweep.saved(c), int(sweep.baseline(c) in shared))
        found.append(run_seconds(c.config, c.method, records, saved=saved))
        shared.add(sweep.baseline(c))
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
    """Return submitit's parameters, and the cluster it sends to (slurm; slurm.cluster=local tries a
    sweep out without one)."""
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
    """Return the minutes of Slurm's own way to write a time: minutes, M:S, H:M:S, D-H, D-H:M,
    D-H:M:S."""
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
    """Return a number, true or false, else the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


def _gpus() -> list[str]:
    """Return the GPUs of this machine that a run may have, without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [g for g in _listed(visible) if g != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 else []


def _jobs(
    experiment: Experiment,
    todo: list[Planned],
    more: list[str],
    options: Options,
    launcher: launchers.Launcher,
    output: Path,
) -> list[launchers.Job]:
    """Return a command each. They run here, so that relative paths mean the same, with the code of
    the worktree."""
    if not todo:
        return []
    environment: dict[str, str] = {}
    root = sweep.checkout() if options.worktree and not options.dry_run else None
    if root is not None:
        with lock.one_launcher(todo[0].claims):
            tree = sweep.worktree(root, output / "sweeps")
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(tree / "src"), *([before] if before else [])]
        )
    words = list(more)
    given = {w.partition("=")[0] for c in todo for w in (*c.overrides, *more)}
    shared = isinstance(launcher, launchers.Local) and launcher.limit > 1 and not launcher.gpus
    if shared and "compute.threads" not in given:
        threads = max(1, (os.cpu_count() or 1) // launcher.limit)
        words.append(f"compute.threads={threads}")
        environment["OMP_NUM_THREADS"] = str(threads)
    if todo[0].config.track.backend == "wandb" and "track.group" not in given:
        words.append(f"track.group={experiment.name}")
    logs = output / "sweeps" / experiment.name
    return [
        launchers.Job(
            c, ["-m", "gain_cl", "run", *c.overrides, *words], environment, logs / f"{c.run_id}.log"
        )
        for c in todo
    ]
