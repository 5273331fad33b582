"""``python -m gain_cl sweep experiment=NAME``: run what an experiment lacks, what is missing or
was stopped, each run in a process of its own. slurm.KEY=VALUE are parameters of submitit:
slurm.partition=gpu slurm.time=240 (minutes). Other KEY=VALUE words are overrides of every run
(output_dir=, results_dir=, compute.threads=, track=wandb). Started again, or beside another
launcher, it runs nothing twice."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl.errors import PREEMPTED, ConfigError, GainError, suggest
from gain_cl.measure import record
from gain_cl.paper.table import say
from gain_cl.stats import format
from gain_cl.studies import launchers, sweep
from gain_cl.studies.costs import run_seconds
from gain_cl.studies.experiments import Experiment, Planned, planned_runs
from gain_cl.system import lock
from gain_cl.tools.command import FLAG, Parser
from gain_cl.tools.status import asked_experiment, print_grid, run_command


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
    planned = _only(planned_runs(experiment, more, execute=True), options.only or [])
    print_grid(experiment, planned)
    failed = [c for c in planned if c.state == "failed"]
    again = [] if options.retry_failed == "true" else failed
    todo = [c for c in planned if c.state != "done" and c not in again]
    say(_cost(todo, planned))
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
    parser = Parser("sweep", "words")
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
    kinds: dict[str, set[str]] = {}
    for word in words:
        matches = [(kind, c.run_id) for c in planned for kind in _kinds(c, word)]
        if not matches:
            names = {x for c in planned for x in (c.method, f"block{c.block}", c.model)}
            raise ConfigError(f"no run is {word!r}", "only", suggest(word, names))
        for kind, run_id in matches:
            kinds.setdefault(kind, set()).add(run_id)
    return [c for c in planned if all(c.run_id in found for found in kinds.values())]


def _kinds(run: Planned, word: str) -> list[str]:
    """Return as what a word names a run: at most one."""
    named = {run.model: "model", run.method: "method", run.label: "method"}
    named[f"block{run.block}"] = "block"
    return [named[word]] if word in named else ["id"] * run.run_id.startswith(word)


# --- what it costs --------------------------------------------------------------------------------


def _cost(todo: list[Planned], planned: list[Planned]) -> str:
    """Return how many runs are ahead, and how long they take by the records of those that are done,
    each from its last saved stage on."""
    if not todo:
        return "nothing to run"
    records = []
    for c in planned:
        with suppress(GainError):  # a damaged one is named where it is read for its numbers
            records += [record.load(c.record).record] if c.state == "done" else []
    left = [run_seconds(c.config, c.method, records, saved=sweep.saved(c)) for c in todo]
    ahead = f"{format.counted(len(todo), 'run')} ahead: "
    if math.isnan(seconds := sum(left)):
        return f"{ahead}cost not known before a run is done"
    return f"{ahead}{format.duration(seconds)} one after the other (tasks as far as timed)"


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
    """Return the minutes of a time of Slurm's: minutes, H:MM:SS, D-HH:MM:SS."""
    try:
        told = f"{text} min" if text.isdecimal() else text.replace("-", " days ")
        return max(1, math.ceil(pd.Timedelta(told).total_seconds() / 60))
    except ValueError:
        do = "give minutes, H:MM:SS or D-HH:MM:SS"
        raise ConfigError(f"{text!r} is no time", "slurm.time", do) from None


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
    if committed and (root := sweep.checkout()) is not None:
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
    logs, run = output / "sweeps" / experiment.name, ["-m", "gain_cl", "run"]
    return [
        launchers.Job(c, [*run, *c.overrides, *words], environment, logs / f"{c.run_id}.log")
        for c in todo
    ]
