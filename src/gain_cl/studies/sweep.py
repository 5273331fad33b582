"""Running what an experiment lacks: one fresh process a run, each claimed by one launcher
(system/lock.py), stage 0 first. Torch-free.

Two launchers on one grid, on one machine or on several that share a file system, never run a cell
twice, and a launcher that was killed is followed by another that finds the runs it left behind.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
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
    """The git checkout that gain_cl is run from; None: it is installed."""
    root = Path(gain_cl.__file__).resolve().parents[2]
    return (
        root
        if (root / ".git").exists() and (root / "src/gain_cl").is_dir() and shutil.which("git")
        else None
    )


def worktree(root: Path, folder: Path) -> Path:
    """A git worktree of root's HEAD below folder, made unless it is there. ConfigError: what would
    run is not committed."""
    changed = _git(
        root, "status", "--porcelain", "--", "src", "configs", "experiments"
    ).splitlines()
    if changed:
        what = f"{changed[0][3:]} is not committed" + (
            f", nor are {len(changed) - 1} more files" if len(changed) > 1 else ""
        )
        raise ConfigError(
            f"a sweep runs from one commit, and {what}",
            str(root),
            "commit, or give worktree=false to run the files as they are",
        )
    commit = _git(root, "rev-parse", "HEAD").strip()
    path = (folder / f"worktree-{commit[:12]}").resolve()
    if path.exists() and not _whole(path, commit):  # it was made in part, or touched
        _git(root, "worktree", "remove", "--force", str(path)) if (
            path / ".git"
        ).exists() else shutil.rmtree(path)
    if not path.exists():
        _git(root, "worktree", "prune")
        _git(root, "worktree", "add", "--force", "--detach", str(path), commit)
    return path


def _whole(tree: Path, commit: str) -> bool:
    try:
        return (
            _git(tree, "rev-parse", "HEAD").strip() == commit
            and not _git(tree, "status", "--porcelain").strip()
        )
    except StorageError:
        return False


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StorageError(
            f"git {words[0]} failed: {why}", str(root), "mend the checkout, or give worktree=false"
        )
    return done.stdout


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class Failure:
    cell: Planned
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
    """What became of the cells that were asked for. left: asked to stop by somebody else, with what
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
    ahead: Callable[[list[Planned]], list[float]],
) -> Outcome:
    """Start what can be started and watch it until every job has ended, whoever runs it. One
    failure does not stop the rest; a signal asks the runs to save. folder: of the claims; ahead:
    seconds that each cell will take from its last saved stage on (nan: not known)."""
    waiting, outcome = list(jobs), Outcome()
    active: list[Active] = []
    again = {
        job.cell.run_id for job in jobs if job.cell.state == "failed"
    }  # their failure is of before
    said = time.monotonic()
    with signals.listening():
        while waiting or active:
            if signals.asked() is not None:
                break
            for a in list(active):
                code = a.process.poll()
                if code is not None:
                    active.remove(a)
                    _ended(a, code, outcome, say, waiting)
            with lock.one_launcher(folder):
                elsewhere = _start(waiting, active, launcher, folder, outcome, again, say)
            if time.monotonic() - said > SAY_SECONDS and (active or elsewhere):
                said = time.monotonic()
                say(_status(active, elsewhere, waiting, outcome, launcher, ahead))
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
    """Take what may start off the waiting list, and what others ended. Returns the cells that
    others run."""
    mine = {a.job.cell.run_id for a in active}
    others = {
        run_id: about
        for run_id, about in lock.claims_under_way(folder).items()
        if run_id not in mine
    }
    elsewhere: list[Planned] = []
    for job in list(waiting):
        cell, state = job.cell, job.cell.state
        if cell.run_id in others or state == "running":
            elsewhere.append(cell)
            again.discard(cell.run_id)
        elif state == "done":
            waiting.remove(job)
            outcome.done.append(cell)
            say(f"done elsewhere: {title(cell)}")
        elif state == "failed" and cell.run_id not in again:
            waiting.remove(job)
            outcome.failed.append(Failure(cell, None, reason(cell)))
            say(f"FAILED elsewhere: {title(cell)}")
    here = [about for about in others.values() if about.get("host") == socket.gethostname()]
    under_way = [*(a.job.cell for a in active), *elsewhere]
    scoring = {baseline(c) for c in under_way}
    known = {
        baseline(c)
        for c in (*under_way, *outcome.done, *(job.cell for job in waiting))
        if scored(c)
    }
    for job in list(waiting):
        if len(active) + len(here) >= launcher.limit or time.monotonic() < outcome.not_before:
            break
        kind = baseline(job.cell)
        if job.cell in elsewhere or (kind in scoring and kind not in known):
            continue  # the first of its kind scores the pretrained model, for all
        claim = lock.claim_run(folder, job.cell.run_id)
        if claim is None:
            continue
        try:
            process = launcher.adopt(lock.read_claim(folder, job.cell.run_id))
            found = process is not None
            if process is None:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                taken = [*(lock.read_claim(folder, run_id) for run_id in mine), *here]
                process = launcher.start(job, claim, taken)
        except ConfigError as error:
            claim.release()
            waiting.remove(job)
            outcome.failed.append(Failure(job.cell, None, str(error)))
            continue
        except StorageError as error:
            claim.release()
            if not active:
                raise
            say(f"later      {title(job.cell)}: {error.what}")  # such as a limit on jobs
            outcome.not_before = time.monotonic() + REFUSED_SECONDS
            break
        say(f"{'found' if found else 'started':<10} {title(job.cell)}")
        waiting.remove(job)
        active.append(Active(job, process, claim, time.monotonic()))
        mine.add(job.cell.run_id)
        scoring.add(kind)
    return elsewhere


def _ended(
    a: Active, code: int, outcome: Outcome, say: Callable[[str], None], waiting: list[launchers.Job]
) -> None:
    """Sort a run that ended, and give its claim back; of a failure the claim keeps why."""
    cell, line = a.job.cell, last_line(a.job.log)
    if code == IN_USE:  # started by hand meanwhile: wait for it
        waiting.append(a.job)
    elif code == 0 and cell.record.exists():
        outcome.done.append(cell)
        say(f"finished   {title(cell)} in {format.duration(time.monotonic() - a.since)}")
    elif code == PREEMPTED:
        outcome.left.append(cell)
        say(f"stopped    {title(cell)}: {line}")
    else:
        if code == 0:
            line = f"it ended well, but there is no {cell.record}"
        elif code < 0:
            line = f"killed by {_signal(-code)}; {line}"
        a.claim.write({"failed": line})
        outcome.failed.append(Failure(cell, code, line))
        say(f"FAILED     {title(cell)}: {line}")
    a.claim.release()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stop(active: list[Active], outcome: Outcome, say: Callable[[str], None]) -> None:
    """Ask local runs to save, and wait for it."""
    if active:
        say(
            f"stopping by {outcome.stopped}: {format.counted(len(active), 'run')} to save "
            "what is done"
        )
    for a in active:
        a.process.stop()
    for a in active:
        while isinstance(a.process, launchers._Local) and a.process.poll() is None:
            time.sleep(0.05)
        if a.process.poll() == 0 and a.job.cell.record.exists():
            outcome.done.append(a.job.cell)
        a.claim.release()


def _status(
    active: list[Active],
    elsewhere: list[Planned],
    waiting: list[launchers.Job],
    outcome: Outcome,
    launcher: launchers.Launcher,
    ahead: Callable[[list[Planned]], list[float]],
) -> str:
    """What is running, and the time left by what runs took."""
    running = [*(a.job.cell for a in active), *elsewhere]
    rest = [*running, *(job.cell for job in waiting if job.cell not in elsewhere)]
    total = len(outcome.done) + len(outcome.failed) + len(outcome.left) + len(rest)
    here = [min(_since_saved(a.job.cell), time.monotonic() - a.since) for a in active]
    gone = [*here, *map(_since_saved, elsewhere), *([0.0] * (len(rest) - len(running)))]
    each = [
        seconds if math.isnan(seconds) else max(0.0, seconds - past)
        for seconds, past in zip(ahead(rest), gone, strict=True)
    ]
    seconds = sum(each) if math.isnan(sum(each)) else max(sum(each) / launcher.limit, *each)
    left = "" if math.isnan(seconds) or seconds < 1 else f", about {format.duration(seconds)} left"
    where = "; ".join(f"{title(c)} ({stage(c)})" for c in running)
    return (
        f"{len(outcome.done)} of {total} done, {len(outcome.failed)} failed{left}; running: {where}"
    )


# --- words ----------------------------------------------------------------------------------------


def title(cell: Planned) -> str:
    return f"{cell.model} {cell.label}, block {cell.block}"


def stage(cell: Planned) -> str:
    """How far a run is: stage 3 of 8."""
    last = len(cell.config.stages)
    return f"stage {min(saved(cell), last)} of {last}" if saved(cell) else "stage 0"


def saved(cell: Planned) -> int:
    """How many stages of a run are saved, stage 0 included."""
    return len(list((cell.folder / "stages").glob("[0-9]*")))


def _since_saved(cell: Planned) -> float:
    """Seconds that a run under way has been at its stage: since the stage before was saved, or
    since its process started."""
    marks = [cell.folder / "attempts.jsonl", *(cell.folder / "stages").glob("[0-9]*")]
    return max(
        0.0, time.time() - max((p.stat().st_mtime for p in marks if p.exists()), default=math.inf)
    )


def reason(cell: Planned) -> str:
    """Why a run failed, by its folder or its claim."""
    try:
        told = json.loads((cell.folder / "failure.json").read_bytes())["error"]
    except (OSError, ValueError, KeyError, TypeError):
        told = lock.read_claim(cell.claims, cell.run_id).get("failed")
    return str(told or "no reason is known")


def last_line(log: Path) -> str:
    """What a run said last: its error, where it ended with one."""
    try:
        lines = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
    except OSError:
        lines = []
    errors = [line for line in lines[-20:] if "error:" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1].strip()[:500]


def baseline(cell: Planned) -> str:
    """What cells that share stage 0 have in common: the pretrained model, what it is scored on and
    how."""
    c = cell.config
    names = sorted([*c.sequence.trained, *c.sequence.controls])
    parts = [
        c.model.model_dump(mode="json"),
        c.eval.model_dump(mode="json"),
        c.tasks.model_dump(mode="json"),
        names,
        c.output_dir,
    ]
    return json_sha256(parts)


def scored(cell: Planned) -> bool:
    """Whether stage 0 is known."""
    return cell.state == "done" or (cell.folder / "stages" / "00-pretrained").exists()
