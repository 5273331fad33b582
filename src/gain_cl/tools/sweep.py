"""``python -m gain_cl sweep experiment=NAME``: run what an experiment lacks."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
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
from gain_cl.tools.command import FLAG, Parser
from gain_cl.tools.status import asked_experiment, print_grid, run_command

ABOUT = """\
Run the runs of an experiment that are missing or were stopped, each in a process of its own.

slurm.KEY=VALUE are parameters of submitit: slurm.partition=gpu slurm.time=240 (minutes).
Other KEY=VALUE words are overrides of every run (output_dir=, results_dir=, compute.threads=,
track=wandb). Started again, or beside another launcher, it runs nothing twice.
"""


def _listed(text: str) -> list[str]:
    return [v.strip() for v in text.split(",") if v.strip()]


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def main(argv: list[str]) -> int:
    """Run what is missing. Exit code: 0 every run asked for is done, 1 some failed, 75 stopped by a
    signal."""
    options = read_options(argv)
    experiment, more = asked_experiment(options.words, "sweep")
    planned = _only(planned_runs(experiment, more), options.only or [])
    print_grid(experiment, planned)
    failed = [c for c in planned if c.state == "failed"]
    again = [] if options.retry_failed == "true" else failed
    todo = [c for c in planned if c.state != "done" and c not in again]
    records = _records(planned)
    timed = any(s.task_seconds for r in records for s in r.stages)
    untimed = not timed and any(c.config.tasks.names for c in todo)
    say(_cost(todo, _left(todo, planned, records), untimed))
    for c in failed:
        say(f"failed before: {sweep.title(c)}: {sweep.reason(c)}")
    if again:
        say("retry_failed=true runs what failed again")
    output = Path(planned[0].config.output_dir)
    launcher = _launcher(options, output, len(todo))
    jobs = _jobs(experiment, todo, more, options, launcher, output)
    if options.dry_run == "true" or not jobs:
        for job in jobs:
            say(shlex.join(["python", *job.command]))
        return 1 if failed and not jobs else 0
    outcome = sweep.carry_out(jobs, launcher, planned[0].claims, say)
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


def read_options(argv: list[str]) -> Any:
    """Return the options of the sweep, slurm.* among them as a dict, and the other words."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("sweep", "words", description=ABOUT, formatter_class=raw)
    only = "methods, models, blockK or beginnings of run ids: only=lora,block0 is LoRA in block 0"
    parser.option("--only", only, type=_listed)
    at_a_time = "runs at a time on this machine (default: one for each GPU, else one; Slurm: all)"
    parser.option("--max-parallel", at_a_time, type=_at_least_one)
    parser.option("--dry-run", "true: show grid, cost and commands, start nothing", **FLAG)
    parser.option("--retry-failed", "true: runs that failed before, too", **FLAG)
    gpus = "GPUs to give out, one to a run (default: all that are visible; none: gpus=)"
    parser.option("--gpus", gpus, type=_listed)
    jobs = "slurm: a job for each run, through submitit"
    parser.option("--launcher", jobs, "local", choices=["local", "slurm"])
    head = "false: run the files as they are, not HEAD"
    parser.option("--worktree", head, **FLAG | {"default": "true"})
    options = parser.read(argv)
    slurm = [w for w in options.words if w.startswith("slurm.")]
    options.words = [w for w in options.words if w not in slurm]
    told = (w.removeprefix("slurm.").partition("=") for w in slurm)
    options.slurm = {key: value for key, _, value in told}
    return options


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
            raise ConfigError(
                f"no run is {word!r}", "only", f"available: {', '.join(names)}, and run ids"
            )
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
    """Return the records of the runs that are done, from which the cost is told."""
    found = []
    for c in planned:
        with suppress(GainError):  # a damaged one is named where it is read for its numbers
            found += [record.load(c.record).record] if c.state == "done" else []
    return found


def _left(
    some: Sequence[Planned], planned: Sequence[Planned], records: list[record.RunRecord]
) -> float:
    """Return the seconds that some planned runs will take together, each from its last saved stage
    on; of those that share stage 0, one scores it."""
    shared, seconds = {sweep.baseline(c) for c in planned if sweep.scored(c)}, 0.0
    for c in some:
        saved = max(sweep.saved(c), int(sweep.baseline(c) in shared))
        seconds += run_seconds(c.config, c.method, records, saved=saved)
        shared.add(sweep.baseline(c))
    return seconds


# --- how it is run --------------------------------------------------------------------------------


def _launcher(options: Any, output: Path, ahead: int) -> launchers.Launcher:
    if options.launcher == "slurm":
        if options.gpus is not None:
            raise ConfigError("gpus= is for launcher=local", "gpus", "give slurm.gpus_per_node=1")
        parameters, cluster = _parameters(options.slurm)
        most = options.max_parallel or max(1, ahead)
        return launchers.Slurm(output / "slurm", most, parameters, cluster)
    if options.slurm:
        raise ConfigError(
            "slurm.* goes with launcher=slurm", "gain_cl sweep", "give launcher=slurm"
        )
    gpus = _gpus() if options.gpus is None else options.gpus
    return launchers.Local(options.max_parallel or max(1, len(gpus)), gpus)


SHARED = (
    "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node",
    "stderr_to_stdout",
)  # fmt: skip
"""Parameters of submitit that are not Slurm's alone."""


def _parameters(given: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Return submitit's parameters, and the cluster it sends to (slurm; slurm.cluster=local tries a
    sweep out without one)."""
    found: dict[str, Any] = {"timeout_min": 24 * 60, "slurm_signal_delay_s": 300}
    for key, value in given.items():
        if key == "time":
            found["timeout_min"] = _minutes(value)
        elif key != "cluster":
            found[key if key in SHARED else f"slurm_{key}"] = _typed(value)
    return found, given.get("cluster", "slurm")


def _minutes(text: str) -> int:
    """Return the minutes of a time of Slurm's: minutes, H:MM:SS, D-H, D-HH:MM:SS."""
    told = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+)(?::(\d+):(\d+))?", text)
    if told is None:
        raise ConfigError(
            f"{text!r} is no time", "slurm.time", "give minutes, H:MM:SS or D-HH:MM:SS"
        )
    plain, days, hours, minutes, seconds = (int(x or 0) for x in told.groups())
    return max(1, plain + 1440 * days + 60 * hours + minutes + (seconds > 0))


def _typed(text: str) -> Any:
    """Return a number, true or false, else the text."""
    with suppress(ValueError):
        return json.loads(text)
    return text


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
    options: Any,
    launcher: launchers.Launcher,
    output: Path,
) -> list[launchers.Job]:
    """Return a command each. They run here, so that relative paths mean the same, with the code of
    the worktree."""
    if not todo:
        return []
    environment: dict[str, str] = {}
    committed = options.worktree == "true" and options.dry_run == "false"
    root = sweep.checkout() if committed else None
    if root is not None:
        with lock.one_launcher(todo[0].claims):
            tree = sweep.worktree(root, output / "sweeps")
        before = filter(None, [os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join([str(tree / "src"), *before])
    words = list(more)
    given = {w.partition("=")[0] for c in todo for w in (*c.overrides, *more)}
    shared = isinstance(launcher, launchers.Local) and launcher.limit > 1 and not launcher.gpus
    if shared and "compute.threads" not in given:
        threads = max(1, (os.cpu_count() or 1) // launcher.limit)
        words.append(f"compute.threads={threads}")
        environment["OMP_NUM_THREADS"] = str(threads)
    if todo[0].config.track.backend == "wandb" and "track.group" not in given:
        words.append(f"track.group={experiment.name}")
    jobs = []
    for c in todo:
        log = output / "sweeps" / experiment.name / f"{c.run_id}.log"
        command = ["-m", "gain_cl", "run", *c.overrides, *words]
        jobs.append(launchers.Job(c, command, environment, log))
    return jobs
