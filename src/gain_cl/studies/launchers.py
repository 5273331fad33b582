"""Start runs: as processes here, or as jobs of Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError, StorageError
from gain_cl.studies import sweep
from gain_cl.studies.experiments import Planned
from gain_cl.system import lock

TIMEOUTS = 1000
"""How often a Slurm job may run out of time and be queued again."""


# --- launchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run to be started. command: the words after ``python``; environment: what is added to this
    process's; log: gets all it says."""

    run: Planned
    command: list[str]
    environment: dict[str, str]
    log: Path


@dataclass
class Local:
    """Processes of this machine. limit: how many at a time; gpus: each run gets one of them, the
    first that no run under way has; empty: none is assigned."""

    limit: int
    gpus: list[str] = field(default_factory=list)

    def start(self, job: Job, claimed: lock.Claim, taken: list[dict[str, Any]]) -> Process:
        """Start a job. taken: what was written into the claims of the runs under way."""
        about: dict[str, Any] = {"host": socket.gethostname()}
        environment = {**os.environ, **job.environment}
        if self.gpus:
            used = [a.get("gpu") for a in taken if a.get("host") == about["host"]]
            about["gpu"] = min(self.gpus, key=used.count)
            environment["CUDA_VISIBLE_DEVICES"] = about["gpu"]
        claimed.write(about)
        with open(job.log, "ab") as log:
            # in a session of its own: what a terminal sends to the launcher reaches the run when
            # the launcher passes it on
            return subprocess.Popen(
                [sys.executable, *job.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(claimed.handle,),
                start_new_session=True,
            )

    def adopt(self, about: dict[str, Any]) -> None:
        """Return None: a process that lives holds its claim. about: what stands in a free claim."""
        if "job" in about:
            raise ConfigError(
                f"it is Slurm's job {about['job']}",
                "launcher=local",
                "follow it with launcher=slurm, or scancel it",
            )


@dataclass
class Command:
    """What a Slurm job does: the run as a child, asked to save before the time is up, and then
    queued again (submitit calls checkpoint, from a signal handler that interrupts the wait for the
    child)."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    log: str
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Slurm's own signal is for this process
            )
        if code := self.process.wait():
            raise RuntimeError(f"exit code {code}: {sweep.last_line(Path(self.log))}")

    def checkpoint(self) -> Any:
        import submitit

        if self.process is not None:
            with suppress(OSError):  # it has ended; Popen.wait is not entered twice
                os.kill(self.process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(replace(self, process=None))


class Slurm:
    """Jobs of a cluster, through submitit. parameters: as submitit names them (slurm_partition,
    timeout_min, ...). ConfigError: submitit or Slurm is missing, or does not take a parameter."""

    def __init__(
        self, folder: Path, limit: int, parameters: dict[str, Any], cluster: str = "slurm"
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError(
                "launcher=slurm needs submitit", "gain_cl sweep", "pip install 'gain_cl[slurm]'"
            ) from None
        self.limit, self.folder = limit, folder.resolve()
        try:
            self.job = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
            self.executor = submitit.AutoExecutor(
                folder=self.folder, cluster=cluster, slurm_max_num_timeout=TIMEOUTS
            )
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError, KeyError, AssertionError) as error:
            what = f"launcher=slurm: {error!r}"
            raise ConfigError(what, "gain_cl sweep", "see docs/slurm.md") from None

    def start(self, job: Job, claimed: lock.Claim, taken: list[dict[str, Any]]) -> Process:
        """Submit a job; see Local."""
        words = Command(job.command, job.environment, str(Path.cwd()), str(job.log.resolve()))
        self.executor.update_parameters(name=job.run.run_id[:80])
        try:
            submitted = self.executor.submit(words)
        except Exception as error:  # submitit's own, of sbatch
            do = "see docs/slurm.md, or lower max_parallel"
            raise StorageError(f"sbatch refuses: {error}", job.run.run_id, do) from None
        claimed.write({"job": submitted.job_id})
        return SlurmProcess(submitted)

    def adopt(self, about: dict[str, Any]) -> Process | None:
        """Return the job that a free claim is still about, submitted by a launcher before; None:
        there is none."""
        job_id = about.get("job")
        if not isinstance(job_id, str):
            return None
        found = SlurmProcess(self.job(folder=self.folder, job_id=job_id))
        gone = found.poll() is not None or found.job.state == "UNKNOWN"  # Slurm has forgotten it
        return None if gone else found


@dataclass
class SlurmProcess:
    """A job of Slurm, as a Popen is a process."""

    job: Any

    def poll(self) -> int | None:
        """Return its exit code; None: it runs."""
        if not self.job.done():
            return None
        try:
            return 0 if self.job.exception() is None else 1
        except Exception:  # the job left no result: cancelled, killed, out of time
            return 1

    def terminate(self) -> None:
        """Do nothing. It goes on: a job is Slurm's; ``scancel`` ends it."""


Process = subprocess.Popen[bytes] | SlurmProcess
Launcher = Local | Slurm
"""Where runs are started."""
