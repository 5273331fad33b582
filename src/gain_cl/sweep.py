"""Running what an experiment lacks: one fresh process a run, each claimed by one launcher, stage 0 first. Torch-free.

A claim is a lock on OUTPUT_DIR/claims/RUN_ID. A local run inherits it, so it lasts until launcher and run have both ended, however they
end; a Slurm job's id is written into it, and it lasts until Slurm says that the job has ended. So two launchers on one grid, on one machine
or on several that share a file system, never run a cell twice, and a launcher that was killed is followed by another that finds the
runs it left behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gain_cl
from gain_cl import signals, terms
from gain_cl.errors import IN_USE, PREEMPTED, ConfigError, StorageError
from gain_cl.experiments import Cell

POLL_SECONDS = 0.5
SAY_SECONDS = 60.0
"""Between two lines on what is running."""


# --- the code that runs ------------------------------------------------------------------------------------------------


def checkout() -> Path | None:
    """The git checkout that gain_cl is run from; None: it is installed."""
    root = Path(gain_cl.__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "src/gain_cl").is_dir() and shutil.which("git") else None


def worktree(root: Path, folder: Path) -> Path:
    """A git worktree of root's HEAD below folder, made unless it is there. ConfigError: what would run is not committed."""
    changed = _git(root, "status", "--porcelain", "--", "src", "configs", "experiments").splitlines()
    if changed:
        what = f"{changed[0][3:]} is not committed" + (f", nor are {len(changed) - 1} more files" if len(changed) > 1 else "")
        raise ConfigError(
            f"a sweep runs from one commit, and {what}", str(root), "commit, or give worktree=false to run the files as they are"
        )
    commit = _git(root, "rev-parse", "HEAD").strip()
    path = (folder / f"worktree-{commit[:12]}").resolve()
    if not (path / "src/gain_cl/__init__.py").exists():
        _git(root, "worktree", "prune")
        _git(root, "worktree", "add", "--force", "--detach", str(path), commit)
    return path


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StorageError(f"git {words[0]} failed: {why}", str(root), "mend the checkout, or give worktree=false")
    return done.stdout


# --- claims ------------------------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One launcher at a time, for the short while in which it looks around and starts a run."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "LAUNCH", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass
class Claim:
    """The right to run a cell: an open, locked file. about: JSON that was written into it (host, gpu; of a Slurm job, its id)."""

    handle: int
    path: Path

    @property
    def about(self) -> dict[str, Any]:
        return _about(self.path)

    def write(self, about: dict[str, Any]) -> None:
        os.truncate(self.handle, 0)
        os.pwrite(self.handle, json.dumps(about, allow_nan=False).encode(), 0)

    def release(self) -> None:
        """Of this process; a run that inherited it keeps it."""
        with suppress(OSError):
            os.close(self.handle)


def claim(folder: Path, run_id: str) -> Claim | None:
    """None: another launcher, or a run that one left behind, has it."""
    import fcntl

    path = folder / run_id
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return Claim(handle, path)


def held(folder: Path, run_id: str) -> bool:
    """Whether somebody has a claim on the run."""
    if not (folder / run_id).exists():
        return False
    mine = claim(folder, run_id)
    if mine is not None:
        mine.release()
    return mine is None


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- launchers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run to be started. command: the words after ``python``; environment: what is added to this process's; log: gets all it says."""

    cell: Cell
    command: list[str]
    environment: dict[str, str]
    log: Path


class Process(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None: it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""


class Launcher(Protocol):
    """Where runs are started. limit: how many of one experiment at a time."""

    limit: int

    def start(self, job: Job, claimed: Claim, taken: list[dict[str, Any]]) -> Process:
        """taken: what was written into the claims of the runs under way."""

    def adopt(self, about: dict[str, Any]) -> Process | None:
        """The process that a free claim is still about, started by a launcher before; None: there is none."""


@dataclass
class Local:
    """Processes of this machine. gpus: each run gets one of them, the first that no run under way has; empty: none is assigned."""

    limit: int
    gpus: list[str] = field(default_factory=list)

    def start(self, job: Job, claimed: Claim, taken: list[dict[str, Any]]) -> Process:
        about: dict[str, Any] = {"host": socket.gethostname()}
        environment = {**os.environ, **job.environment}
        if self.gpus:
            used = [a.get("gpu") for a in taken if a.get("host") == about["host"]]
            about["gpu"] = min(self.gpus, key=used.count)
            environment["CUDA_VISIBLE_DEVICES"] = about["gpu"]
        claimed.write(about)
        with open(job.log, "ab") as log:
            # in a session of its own: what a terminal sends to the launcher reaches the run when the launcher passes it on
            process = subprocess.Popen(
                [sys.executable, *job.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(claimed.handle,),
                start_new_session=True,
            )
        return _Local(process)

    def adopt(self, about: dict[str, Any]) -> Process | None:
        return None  # a process that lives holds its claim


@dataclass
class _Local:
    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        with suppress(OSError):
            self.process.send_signal(signal.SIGTERM)


class Command:
    """What a Slurm job does: the run as a child, asked to save before the time is up, and then queued again (submitit calls checkpoint)."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: str, log: str) -> None:
        self.words, self.environment, self.folder, self.log = words, environment, folder, log
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if code := self.process.wait():
            raise RuntimeError(f"exit code {code}: {last_line(Path(self.log))}")

    def checkpoint(self) -> Any:
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Command(self.words, self.environment, self.folder, self.log))


class Slurm:
    """Jobs of a cluster, through submitit. parameters: as submitit names them (slurm_partition, timeout_min, ...). ConfigError: submitit
    or Slurm is missing, or does not take a parameter."""

    def __init__(self, folder: Path, limit: int, parameters: dict[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError("launcher=slurm needs submitit", "gain_cl sweep", "pip install 'gain_cl[slurm]'") from None
        self.limit, self.folder = limit, folder.resolve()
        try:
            self.executor = submitit.AutoExecutor(folder=self.folder, cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"launcher=slurm: {first}", "gain_cl sweep", "see docs/slurm.md") from None

    def start(self, job: Job, claimed: Claim, taken: list[dict[str, Any]]) -> Process:
        words = Command(job.command, job.environment, str(Path.cwd()), str(job.log.resolve()))
        self.executor.update_parameters(name=job.cell.run_id[:80])
        try:
            submitted = self.executor.submit(words)
        except Exception as error:  # submitit's own, of sbatch
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise StorageError(f"sbatch refuses: {first}", job.cell.run_id, "see python -m gain_cl doctor and docs/slurm.md") from None
        claimed.write({"job": submitted.job_id})
        return _Slurm(submitted)

    def adopt(self, about: dict[str, Any]) -> Process | None:
        job_id = about.get("job")
        if not isinstance(job_id, str):
            return None
        found = _Slurm(self.executor.job_class(folder=self.folder, job_id=job_id))
        return None if found.poll() is not None else found


@dataclass
class _Slurm:
    job: Any

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return 0 if self.job.exception() is None else 1
        except Exception:  # the job left no result: cancelled, killed, out of time
            return 1

    def stop(self) -> None:
        """It goes on: a job is Slurm's; ``scancel`` ends it."""


# --- the loop ----------------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    cell: Cell
    code: int | None
    last_line: str


@dataclass
class Active:
    """A run under way that this launcher watches, since a moment of time.monotonic."""

    job: Job
    process: Process
    claim: Claim
    since: float


@dataclass
class Outcome:
    """What became of the cells that were asked for. stopped: name of the signal that ended the launcher."""

    done: list[Cell] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    stopped: str | None = None


def carry_out(
    jobs: list[Job], launcher: Launcher, claims: Path, say: Callable[[str], None], ahead: Callable[[list[Cell]], float]
) -> Outcome:
    """Start what can be started and watch it until every job has ended, whoever runs it. One failure does not stop the rest; a signal
    asks the runs to save. ahead: seconds that cells will take one after the other (nan: not known)."""
    waiting, outcome = list(jobs), Outcome()
    active: list[Active] = []
    said = time.monotonic()
    with signals.listening():
        while waiting or active:
            if signals.asked() is not None:
                break
            for a in list(active):
                code = a.process.poll()
                if code is not None:
                    active.remove(a)
                    a.claim.release()
                    _ended(a, code, outcome, say, waiting)
            with alone(claims):
                elsewhere = _start(waiting, active, launcher, claims, outcome, say)
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
    waiting: list[Job],
    active: list[Active],
    launcher: Launcher,
    claims: Path,
    outcome: Outcome,
    say: Callable[[str], None],
) -> list[Cell]:
    """Take what may start off the waiting list. Returns the cells that others run."""
    elsewhere: list[Cell] = []
    for job in list(waiting):
        run_id = job.cell.run_id
        if job.cell.state == "done" and not held(claims, run_id):
            waiting.remove(job)
            outcome.done.append(job.cell)
            say(f"done elsewhere: {title(job.cell)}")
        elif held(claims, run_id) or job.cell.state == "running":
            elsewhere.append(job.cell)
    here = [c for c in elsewhere if _about(claims / c.run_id).get("host") == socket.gethostname()]
    under_way = [*(a.job.cell for a in active), *elsewhere]
    scoring = {baseline(c) for c in under_way}
    scored = {baseline(c) for c in (*under_way, *outcome.done, *(job.cell for job in waiting)) if _scored(c)}
    for job in list(waiting):
        if len(active) + len(here) >= launcher.limit:
            break
        kind = baseline(job.cell)
        if job.cell in elsewhere or (kind in scoring and kind not in scored):
            continue  # the first of its kind scores the pretrained model, for all
        claimed = claim(claims, job.cell.run_id)
        if claimed is None:
            continue
        try:
            process = launcher.adopt(claimed.about)
            found = process is not None
            if process is None:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                taken = [*(a.claim.about for a in active), *(_about(claims / c.run_id) for c in here)]
                process = launcher.start(job, claimed, taken)
        except BaseException:
            claimed.release()
            raise
        say(f"{'found' if found else 'started':<10} {title(job.cell)}")
        waiting.remove(job)
        active.append(Active(job, process, claimed, time.monotonic()))
        scoring.add(kind)
    return elsewhere


def _ended(a: Active, code: int, outcome: Outcome, say: Callable[[str], None], waiting: list[Job]) -> None:
    cell, line = a.job.cell, last_line(a.job.log)
    if code == IN_USE:  # started by hand meanwhile: wait for it
        waiting.append(a.job)
    elif code == 0 and cell.record.exists():
        outcome.done.append(cell)
        say(f"finished   {title(cell)} in {terms.duration(time.monotonic() - a.since)}")
    else:
        if code == 0:
            line = f"it ended well, but there is no {cell.record}"
        elif code < 0:
            line = f"killed by {signal.Signals(-code).name}; {line}"
        outcome.failed.append(Failure(cell, code, line))
        say(f"{'stopped' if code == PREEMPTED else 'FAILED':<10} {title(cell)}: {line}")


def _stop(active: list[Active], outcome: Outcome, say: Callable[[str], None]) -> None:
    """Ask local runs to save, and wait for it."""
    if active:
        say(f"stopping by {outcome.stopped}: {len(active)} runs save what is done")
    for a in active:
        a.process.stop()
    for a in active:
        while isinstance(a.process, _Local) and a.process.poll() is None:
            time.sleep(0.05)
        if a.process.poll() == 0 and a.job.cell.record.exists():
            outcome.done.append(a.job.cell)
        a.claim.release()


def _status(
    active: list[Active],
    elsewhere: list[Cell],
    waiting: list[Job],
    outcome: Outcome,
    launcher: Launcher,
    ahead: Callable[[list[Cell]], float],
) -> str:
    """What is running, and the time left by what runs took."""
    running = [*(a.job.cell for a in active), *elsewhere]
    rest = [*running, *(job.cell for job in waiting if job.cell not in elsewhere)]
    total = len(outcome.done) + len(outcome.failed) + len(rest)
    seconds = ahead(rest) / min(launcher.limit, max(1, len(rest)))
    left = "" if math.isnan(seconds) else f", about {terms.duration(seconds)} left"
    where = "; ".join(f"{title(c)} ({stage(c)})" for c in running)
    return f"{len(outcome.done)} of {total} done, {len(outcome.failed)} failed{left}; running: {where}"


# --- words -------------------------------------------------------------------------------------------------------------


def title(cell: Cell) -> str:
    return f"{cell.model} {cell.label}, block {cell.block}"


def stage(cell: Cell) -> str:
    """How far a run is: stage 3 of 8."""
    done = [p.name for p in (cell.folder / "stages").glob("[0-9]*")]
    return f"stage {len(done)} of {len(cell.config.stages)}" if done else "stage 0"


def last_line(log: Path) -> str:
    """What a run said last: its error, where it ended with one."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line for line in lines[-20:] if "error:" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1].strip()[:500]


def baseline(cell: Cell) -> str:
    """What cells that share stage 0 have in common: the pretrained model, what it is scored on and how."""
    c = cell.config
    names = sorted([*c.sequence.trained, *c.sequence.controls])
    parts = [c.model.model_dump(mode="json"), c.eval.model_dump(mode="json"), c.tasks.model_dump(mode="json"), names, c.output_dir]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _scored(cell: Cell) -> bool:
    """Whether stage 0 is known."""
    return cell.state == "done" or (cell.folder / "stages" / "00-pretrained").exists()
