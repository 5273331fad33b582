"""scripts/slurm.sh with programs of ours in the places of srun, scontrol and python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/slurm.sh"
LIMIT_SECONDS = 300  # of a hang; nothing below is timed

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or not hasattr(signal, "SIGUSR1"), reason="needs bash and signals"
)

PREEMPTIBLE = """\
trap 'echo saved > "$AT/saved"; exit 75' USR1
[ -e "$AT/saved" ] && exit 0
touch "$AT/up"
while :; do sleep 0.05; done
"""
"""A run: stopped by USR1 it saves and ends with 75; started again it finishes."""


@dataclass
class Cluster:
    """One node: at holds the programs' traces."""

    at: Path

    def program(self, name: str, body: str) -> None:
        path = self.at / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        about = {
            **os.environ,
            "PATH": f"{self.at / 'bin'}:{os.environ['PATH']}",
            "AT": str(self.at),
            "SLURM_JOB_ID": "4711",
            **environment,
        }
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(
            command,
            env=about,
            cwd=self.at,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def job(self, *arguments: str, **environment: str) -> int:
        process = self.start(*arguments, **environment)
        print(process.communicate(timeout=LIMIT_SECONDS)[0])
        return process.returncode

    def preempted(
        self,
        *arguments: str,
        when: Callable[[], bool],
        number: int = signal.SIGUSR1,
        **environment: str,
    ) -> int:
        """The job's exit code when its batch shell gets a signal once ``when`` holds."""
        process = self.start(*arguments, **environment)
        until = time.monotonic() + LIMIT_SECONDS
        while not when() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert process.poll() is None and when(), (
            "it ended before the signal: " + process.communicate()[0]
        )
        process.send_signal(number)
        print(process.communicate(timeout=LIMIT_SECONDS)[0])
        return process.returncode

    def up(self) -> bool:
        return (self.at / "up").exists()

    def trace(self, name: str) -> list[str]:
        path = self.at / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    found = Cluster(tmp_path / "a folder's name")
    found.at.mkdir()
    found.program("srun", 'echo "$SRUN_CPUS_PER_TASK" >> "$AT/srun"\nexec "$@"\n')
    found.program("scontrol", 'echo "$*" >> "$AT/scontrol"\n')
    return found


def test_preempted_then_finished(cluster: Cluster) -> None:
    cluster.program("python", PREEMPTIBLE)
    assert cluster.preempted(when=cluster.up) == 0
    assert cluster.trace("saved") == ["saved"]
    assert cluster.trace("scontrol") == ["requeue 4711"]
    assert cluster.job() == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]  # not again


@pytest.mark.slow
def test_a_real_run(cluster: Cluster) -> None:
    """Stopped in its first stage and started again by the same command: one record, one requeue."""
    cluster.program("python", f'export OMP_NUM_THREADS=1\nexec "{sys.executable}" "$@"\n')
    settings = ["debug=smoke", "train.steps=12", "output_dir=runs", "results_dir=results"]

    def learning() -> bool:
        return any(
            '"kind": "step"' in p.read_text() for p in (cluster.at / "runs").glob("*/metrics.jsonl")
        )

    assert cluster.preempted(*settings, when=learning) == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]
    assert not list(cluster.at.glob("results/runs/*.json"))
    assert cluster.job(*settings, SLURM_RESTART_COUNT="1") == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]
    assert len(list(cluster.at.glob("results/runs/*.json"))) == 1


def test_one_task_of_an_array(cluster: Cluster) -> None:
    """The plain id of an array's last task is the id of the whole array."""
    cluster.program("python", PREEMPTIBLE)
    array = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}
    assert cluster.preempted(when=cluster.up, **array) == 0
    assert cluster.trace("scontrol") == ["requeue 4711_2"]


@pytest.mark.parametrize("code", [1, 64, 65, 73, 74, 137])
def test_a_failed_run_is_not_requeued(cluster: Cluster, code: int) -> None:
    cluster.program("python", f"exit {code}\n")
    assert cluster.job() == code
    assert not cluster.trace("scontrol")


def test_failing_after_the_signal_is_not_requeued(cluster: Cluster) -> None:
    cluster.program("python", PREEMPTIBLE.replace("exit 75", "exit 74"))
    assert cluster.preempted(when=cluster.up) == 74
    assert not cluster.trace("scontrol")


def test_finishing_after_the_signal_is_not_requeued(cluster: Cluster) -> None:
    cluster.program("python", PREEMPTIBLE.replace("exit 75", "exit 0"))
    assert cluster.preempted(when=cluster.up) == 0
    assert not cluster.trace("scontrol")


def test_signal_before_handlers_are_installed(cluster: Cluster) -> None:
    cluster.program("python", 'touch "$AT/up"\nexec sleep 300\n')
    assert cluster.preempted(when=cluster.up) == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_ended_by_a_signal_to_the_step_alone(cluster: Cluster, name: str) -> None:
    cluster.program("python", f"kill -{name} $$\n")
    assert cluster.job() == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]


def test_several_signals(cluster: Cluster) -> None:
    """A signal only asks: the child decides when it is done, and its code is the one that
    counts."""
    slow = "trap 'asked=$((asked + 1))' USR1\nasked=0\ntouch \"$AT/up\"\n"
    slow += 'while [ ! -e "$AT/enough" ]; do echo $asked > "$AT/asked"; sleep 0.05; done\nexit 75\n'
    cluster.program("python", slow)
    process = cluster.start()
    for count in (1, 2, 3):
        while cluster.trace("asked") not in ([str(count - 1)], [str(count)]):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        while cluster.trace("asked") != [str(count)]:
            assert process.poll() is None
            time.sleep(0.02)
    (cluster.at / "enough").touch()
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    assert cluster.trace("scontrol") == ["requeue 4711"]


def test_cancelled_is_saved_and_stays_cancelled(cluster: Cluster) -> None:
    """TERM is Slurm's own end of a job: after scancel a requeue would bring it back. srun gets
    USR1, for TERM kills its tasks."""
    cluster.program("python", PREEMPTIBLE)
    assert cluster.preempted(when=cluster.up, number=signal.SIGTERM) == 75
    assert cluster.trace("saved") == ["saved"]
    assert not cluster.trace("scontrol")


def test_a_refused_requeue_does_not_look_complete(cluster: Cluster) -> None:
    cluster.program("python", PREEMPTIBLE)
    cluster.program("scontrol", 'echo "$*" >> "$AT/scontrol"\nexit 1\n')
    assert cluster.preempted(when=cluster.up) == 75
    assert cluster.trace("scontrol") == ["requeue 4711"]


def test_arguments_arrive_unchanged(cluster: Cluster) -> None:
    cluster.program("python", 'for a in "$@"; do echo "$a" >> "$AT/arguments"; done\n')
    given = [
        "output_dir=a folder/runs",
        "domain=[law,medicine]",
        "track.name=*",
        "a=$HOME",
        'b="quoted"',
        "c=it's",
    ]
    assert cluster.job(*given, SLURM_CPUS_PER_TASK="8") == 0
    assert cluster.trace("arguments") == ["-m", "gain_cl", "run", *given]
    assert cluster.trace("srun") == ["8"]


def test_the_number_of_an_array_task_is_its_seed(cluster: Cluster) -> None:
    cluster.program("python", 'for a in "$@"; do echo "$a" >> "$AT/arguments"; done\n')
    assert cluster.job("method=lora", SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID="0") == 0
    assert cluster.trace("arguments") == ["-m", "gain_cl", "run", "method=lora", "seed=0"]


def test_what_slurm_reads() -> None:
    """Directives count only above the first command."""
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = " ".join(line for line in lines[:first] if line.startswith("#SBATCH"))
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(directives.split())
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert len(lines) <= 40
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
