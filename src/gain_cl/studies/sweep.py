"""Running what an experiment lacks: one fresh process a run, each claimed by one launcher
(system/lock.py), stage 0 first. Torch-free.

Two launchers on one grid, on one machine or on several that share a file system, never run anything
twice, and a launcher that was killed is followed by another that finds the runs it left behind.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import gain_cl
from gain_cl.errors import IN_USE, PREEMPTED, ConfigError, StorageError
from gain_cl.stats import format
from gain_cl.studies import launchers
from gain_cl.studies.experiments import Planned
from gain_cl.system import lock, signals
from gain_cl.system.hashes import json_sha256

REFUSED_SECONDS = 30.0
"""After a cluster refused a job."""

POLL_SECONDS = 0.5
SAY_SECONDS = 60.0
"""Between two lines on what is running."""


# --- the code that runs ---------------------------------------------------------------------------


def checkout() -> Path | None:
    """Return the git checkout that gain_cl is run from; None: it is installed."""
    root = Path(gain_cl.__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "src/gain_cl").is_dir() else None


def worktree(root: Path, folder: Path) -> Path:
    """Return a git worktree of root's HEAD below folder, made unless it is there. ConfigError: what
    would run is not committed."""
    inside = ("src", "configs", "experiments")
    changed = _git(root, "status", "--porcelain", "--", *inside).splitlines()
    if changed:
        raise ConfigError(
            f"a sweep runs from one commit, and {changed[0][3:]} is not committed",
            str(root),
            "commit, or give worktree=false to run the files as they are",
        )
    commit = _git(root, "rev-parse", "HEAD").strip()
    path = (folder / f"worktree-{commit[:12]}").resolve()
    if not (path / ".git").exists():
        shutil.rmtree(path, ignore_errors=True)
        _git(root, "worktree", "prune")
        _git(root, "worktree", "add", "--force", "--detach", str(path), commit)
    _git(path, "reset", "--quiet", "--hard", commit)  # it was made in part, or touched
    return path


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if done.returncode:
        do = "fix the checkout, or give worktree=false"
        raise StorageError(f"git {words[0]} failed: {done.stderr}", str(root), do)
    return done.stdout


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class Failure:
    run: Planned
    code: int | None
    last_line: str


@dataclass
class Active:
    """A run under way that this launcher watches, since a moment of time.monotonic."""

    job: launchers.Job
    process: launchers.Process
    claim: lock.Claim
    since: float


@dataclass
class Outcome:
    """What became of the runs that were asked for. left: asked to stop by somebody else, with what
    is done saved; stopped: name of the signal that ended the launcher."""

    done: list[Planned] = field(default_factory=list)
    left: list[Planned] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    stopped: str | None = None
    not_before: float = 0.0  # moment of time.monotonic, after a cluster refused a job


def carry_out(
    jobs: list[launchers.Job],
    launcher: launchers.Launcher,
    folder: Path,
    say: Callable[[str], None],
) -> Outcome:
    """Start what can be started and watch it until every job has ended, whoever runs it. One
    failure does not stop the rest; a signal asks the runs to save.

    folder: of the claims."""
    waiting, outcome, said = list(jobs), Outcome(), time.monotonic()
    active: list[Active] = []
    again = {job.run.run_id for job in jobs if job.run.state == "failed"}  # it failed before
    with signals.listening():
        while (waiting or active) and signals.asked() is None:
            for a in list(active):
                if (code := a.process.poll()) is not None:
                    active.remove(a)
                    _ended(a, code, outcome, say, waiting)
            with lock.one_launcher(folder):
                elsewhere = _start(waiting, active, launcher, folder, outcome, again, say)
            if time.monotonic() - said > SAY_SECONDS and (active or elsewhere):
                said = time.monotonic()
                running = [*(a.job.run for a in active), *elsewhere]
                where = "; ".join(f"{title(run)} ({stage_of(run)})" for run in running)
                done, failed = len(outcome.done), len(outcome.failed)
                say(f"{done} of {len(jobs)} done, {failed} failed; running: {where}")
            if waiting or active:
                time.sleep(POLL_SECONDS)
        outcome.stopped = signals.asked()
        if outcome.stopped is not None:
            _stop(active, outcome, say)
    return outcome


def _start(
    waiting: list[launchers.Job],
    active: list[Active],
    launcher: launchers.Launcher,
    folder: Path,
    outcome: Outcome,
    again: set[str],
    say: Callable[[str], None],
) -> list[Planned]:
    """Take what may start off the waiting list, and what others ended. Return the runs that others
    carry out."""
    mine = {a.job.run.run_id for a in active}
    claimed = lock.claims_under_way(folder)
    others = {run_id: about for run_id, about in claimed.items() if run_id not in mine}
    elsewhere: list[Planned] = []
    for job in list(waiting):
        run, state = job.run, job.run.state
        if run.run_id in others or state == "running":
            elsewhere.append(run)
            again.discard(run.run_id)
        elif state == "done":
            waiting.remove(job)
            outcome.done.append(run)
            say(f"done elsewhere: {title(run)}")
        elif state == "failed" and run.run_id not in again:
            waiting.remove(job)
            outcome.failed.append(Failure(run, None, reason(run)))
            say(f"FAILED elsewhere: {title(run)}")
    here = [about for about in others.values() if about.get("host") == socket.gethostname()]
    under_way = [*(a.job.run for a in active), *elsewhere]
    scoring = {baseline(run) for run in under_way}
    every = [*under_way, *outcome.done, *(job.run for job in waiting)]
    known = {baseline(run) for run in every if scored(run)}
    for job in list(waiting):
        run, kind = job.run, baseline(job.run)
        if len(active) + len(here) >= launcher.limit or time.monotonic() < outcome.not_before:
            break
        if run in elsewhere or (kind in scoring and kind not in known):
            continue  # the first of its kind scores the pretrained model, for all
        claim = lock.claim_run(folder, run.run_id)
        if claim is None:
            continue
        try:
            process, how = launcher.adopt(lock.read_claim(folder, run.run_id)), "found"
            if process is None:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                taken = [*(lock.read_claim(folder, run_id) for run_id in mine), *here]
                process, how = launcher.start(job, claim, taken), "started"
        except ConfigError as error:
            claim.release()
            waiting.remove(job)
            outcome.failed.append(Failure(run, None, str(error)))
            continue
        except StorageError as error:
            claim.release()
            if not active:
                raise
            say(f"later      {title(run)}: {error.what}")  # such as a limit on jobs
            outcome.not_before = time.monotonic() + REFUSED_SECONDS
            break
        say(f"{how:<10} {title(run)}")
        waiting.remove(job)
        active.append(Active(job, process, claim, time.monotonic()))
        mine.add(run.run_id)
        scoring.add(kind)
    return elsewhere


def _ended(
    a: Active, code: int, outcome: Outcome, say: Callable[[str], None], waiting: list[launchers.Job]
) -> None:
    """Sort a run that ended, and give its claim back; of a failure the claim keeps why."""
    run, line = a.job.run, last_line(a.job.log)
    if code == IN_USE:  # started by hand meanwhile: wait for it
        waiting.append(a.job)
    elif code == 0 and run.record.exists():
        outcome.done.append(run)
        say(f"finished   {title(run)} in {format.duration(time.monotonic() - a.since)}")
    elif code == PREEMPTED:
        outcome.left.append(run)
        say(f"stopped    {title(run)}: {line}")
    else:
        if code == 0:
            line = f"it ended well, but there is no {run.record}"
        elif code < 0:
            with suppress(ValueError):
                line = f"killed by {signal.Signals(-code).name}; {line}"
        a.claim.write({"failed": line})
        outcome.failed.append(Failure(run, code, line))
        say(f"FAILED     {title(run)}: {line}")
    a.claim.release()


def _stop(active: list[Active], outcome: Outcome, say: Callable[[str], None]) -> None:
    """Ask local runs to save, and wait for it."""
    if active:
        runs = format.counted(len(active), "run")
        say(f"stopping by {outcome.stopped}: {runs} to save what is done")
    for a in active:
        a.process.terminate()
    for a in active:
        if isinstance(a.process, subprocess.Popen):
            a.process.wait()
        if a.process.poll() == 0 and a.job.run.record.exists():
            outcome.done.append(a.job.run)
        a.claim.release()


# --- words ----------------------------------------------------------------------------------------


def title(run: Planned) -> str:
    """Return what a planned run is called."""
    return f"{run.model} {run.label}, block {run.block}"


def stage_of(run: Planned) -> str:
    """Return how far a run is: stage 3 of 8."""
    last = len(run.config.stages)
    return f"stage {min(saved(run), last)} of {last}" if saved(run) else "stage 0"


def saved(run: Planned) -> int:
    """Return how many stages of a run are saved, stage 0 included."""
    return len(list((run.folder / "stages").glob("[0-9]*")))


def reason(run: Planned) -> str:
    """Return why a run failed, by its folder or its claim."""
    try:
        told = json.loads((run.folder / "failure.json").read_bytes())["error"]
    except (OSError, ValueError, KeyError, TypeError):
        told = lock.read_claim(run.claims, run.run_id).get("failed")
    return str(told or "no reason is known")


def last_line(log: Path) -> str:
    """Return what a run said last: its error, where it ended with one."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines[-20:] if "error:" in line.lower()]
    return (errors or lines)[-1][:500]


def baseline(run: Planned) -> str:
    """Return a hash of what runs that share stage 0 have in common: the pretrained model, what it
    is scored on and how."""
    c = run.config
    sections = [part.model_dump(mode="json") for part in (c.model, c.eval, c.tasks)]
    names = sorted([*c.sequence.trained, *c.sequence.controls])
    return json_sha256([*sections, names, c.output_dir])


def scored(run: Planned) -> bool:
    """True if stage 0 is known."""
    return run.state == "done" or (run.folder / "stages" / "00-pretrained").exists()
