"""Sweeps: what is run, what is not run twice, what a failure leaves, and two launchers on one
grid."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gain_cl import cli
from gain_cl.errors import IN_USE, PREEMPTED, ConfigError, StorageError
from gain_cl.measure import record
from gain_cl.studies import costs, launchers, sweep
from gain_cl.studies.costs import run_seconds
from gain_cl.studies.experiments import Planned, load_experiment, planned_runs
from gain_cl.system import lock
from gain_cl.tools import sweep as verb

GRID = (
    "question: q\nblocks: 2\noverrides: [debug=smoke, train.steps=1]\nmethods: "
    "{gain_ffn: {train.lr: [0.01]}, lora: {train.lr: [0.001]}}\n"
)
LIMIT_SECONDS = 600  # of a hang; nothing is timed


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    monkeypatch.chdir(tmp_path)
    Path("e.yaml").write_text(GRID)
    return planned_runs(load_experiment("e.yaml"), ["output_dir=runs", "results_dir=results"])


class Fake:
    """A launcher whose runs end when they are told to: codes, by run id, one after the other. log:
    what was started, in order."""

    def __init__(self, limit: int, codes: dict[str, list[int]] | None = None) -> None:
        self.limit, self.codes, self.log, self.most, self.alive = limit, codes or {}, [], 0, 0  # type: ignore[var-annotated]
        self.taken: list[list[dict[str, Any]]] = []
        self.baselines = 0

    def start(self, job: launchers.Job, claimed: lock.Claim, taken: list[dict[str, Any]]) -> Any:
        self.log.append(job.run.run_id)
        self.taken.append(taken)
        self.alive += 1
        self.most = max(self.most, self.alive)
        claimed.write({"host": "here", "gpu": str(len(self.log))})
        if not (job.run.folder / "stages/00-pretrained").exists():
            self.baselines += not any(
                (f / "stages/00-pretrained").exists() for f in job.run.folder.parent.glob("*")
            )
        return Ends(self, job)

    def adopt(self, about: dict[str, Any]) -> None:
        return None


class Ends:
    """A run that scores stage 0 when it is first looked at, and ends at the third look."""

    def __init__(self, launcher: Fake, job: launchers.Job) -> None:
        self.launcher, self.job, self.looks = launcher, job, 0

    def poll(self) -> int | None:
        self.looks += 1
        cell = self.job.run
        (cell.folder / "stages/00-pretrained").mkdir(parents=True, exist_ok=True)
        if self.looks < 3:
            return None
        if self.looks == 3:
            self.launcher.alive -= 1
            codes = self.launcher.codes.get(cell.run_id, [0])
            self.code = codes.pop(0) if codes else 0
            if self.code == 0:
                cell.record.parent.mkdir(parents=True, exist_ok=True)
                cell.record.write_text("{}")
            else:
                self.job.log.write_text("working\ngain_cl: error: what (where); do\n")
        return self.code

    def terminate(self) -> None:
        self.looks = 2


def jobs(cells: list[Planned]) -> list[launchers.Job]:
    Path("logs").mkdir(exist_ok=True)
    return [
        launchers.Job(c, ["-m", "gain_cl", "run", *c.overrides], {}, Path("logs") / c.run_id)
        for c in cells
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)


def carried_out(cells: list[Planned], launcher: Fake) -> tuple[sweep.Outcome, list[str]]:
    said: list[str] = []
    found = sweep.carry_out(jobs(cells), launcher, cells[0].claims, said.append)  # type: ignore[arg-type]
    return found, said


def test_everything_runs_once_and_no_more_than_allowed_at_a_time(grid: list[Planned]) -> None:
    launcher = Fake(limit=3)
    found, said = carried_out(grid, launcher)
    assert launcher.log == [c.run_id for c in grid] and launcher.most == 3 and not found.failed
    assert {c.run_id for c in found.done} == {c.run_id for c in grid}
    assert sum(line.startswith("started") for line in said) == 4


def test_stage_0_is_scored_by_one_run_before_the_others_start(grid: list[Planned]) -> None:
    """All cells share the pretrained model, documents and protocol: the first runs alone until its
    stage 0 is saved."""
    assert len({sweep.baseline(c) for c in grid}) == 1
    launcher = Fake(limit=4)
    carried_out(grid, launcher)
    assert launcher.baselines == 1


def test_other_ways_to_score_do_not_wait_for_each_other(grid: list[Planned]) -> None:
    other = planned_runs(
        load_experiment("e.yaml"), ["output_dir=runs", "results_dir=results", "eval.documents=4"]
    )
    assert not {sweep.baseline(c) for c in other} & {sweep.baseline(c) for c in grid}


def test_a_failure_does_not_stop_the_rest(grid: list[Planned]) -> None:
    launcher = Fake(limit=1, codes={grid[1].run_id: [65], grid[2].run_id: [-9]})
    found, said = carried_out(grid, launcher)
    assert [(f.run.run_id, f.code) for f in found.failed] == [
        (grid[1].run_id, 65),
        (grid[2].run_id, -9),
    ]
    assert found.failed[0].last_line == "gain_cl: error: what (where); do"
    assert "killed by SIGKILL" in found.failed[1].last_line
    assert {c.run_id for c in found.done} == {grid[0].run_id, grid[3].run_id}
    assert any(line.startswith("FAILED") and "what (where); do" in line for line in said)


def test_a_run_that_somebody_else_took_is_waited_for(grid: list[Planned]) -> None:
    launcher = Fake(limit=4, codes={grid[0].run_id: [IN_USE, 0]})
    found, _ = carried_out(grid, launcher)
    assert launcher.log.count(grid[0].run_id) == 2 and not found.failed and len(found.done) == 4


def test_a_run_without_a_record_has_failed(
    grid: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Fake(limit=4)
    found, _ = carried_out(grid[:1], launcher)
    assert found.done
    monkeypatch.setattr(Ends, "poll", lambda self: 0)
    grid[1].record.unlink(missing_ok=True)
    found, _ = carried_out(grid[1:2], Fake(limit=1))
    assert "there is no" in found.failed[0].last_line


def test_what_failed_under_another_launcher_is_not_run_again(grid: list[Planned]) -> None:
    """It failed while this launcher waited for it; one that failed before and was asked for again
    is run."""
    launcher = Fake(limit=1)
    start = launcher.start

    def first(job: launchers.Job, claimed: lock.Claim, taken: list[dict[str, Any]]) -> Any:
        grid[2].folder.mkdir(parents=True, exist_ok=True)
        (grid[2].folder / "failure.json").write_text('{"error": "of another launcher"}')
        return start(job, claimed, taken)

    launcher.start = first  # type: ignore[method-assign]
    found, _ = carried_out(grid, launcher)
    assert [(f.run.run_id, f.last_line) for f in found.failed] == [
        (grid[2].run_id, "of another launcher")
    ]
    assert grid[2].run_id not in launcher.log and len(found.done) == 3
    launcher = Fake(limit=1)
    found, _ = carried_out([grid[2]], launcher)
    assert launcher.log == [grid[2].run_id] and not found.failed


def test_a_failure_without_a_trace_is_remembered(grid: list[Planned]) -> None:
    """Of a run that was refused before it began, or killed: its claim says so."""
    carried_out(grid[:1], Fake(limit=1, codes={grid[0].run_id: [-9]}))
    assert grid[0].state == "failed" and "killed by SIGKILL" in sweep.reason(grid[0])
    carried_out(grid[:1], Fake(limit=1))
    assert grid[0].state == "done"


def test_a_run_that_was_asked_to_stop_has_not_failed(grid: list[Planned]) -> None:
    found, _ = carried_out(grid, Fake(limit=2, codes={grid[1].run_id: [PREEMPTED]}))
    assert (
        [c.run_id for c in found.left] == [grid[1].run_id]
        and not found.failed
        and grid[1].state != "failed"
    )


def test_a_refused_job_waits(grid: list[Planned], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "REFUSED_SECONDS", 0.05)
    launcher, refused = Fake(limit=4), []
    start = launcher.start

    def at_most_one(job: launchers.Job, claimed: lock.Claim, taken: list[dict[str, Any]]) -> Any:
        if launcher.alive:
            refused.append(job.run.run_id)
            raise StorageError("sbatch refuses: limit of jobs", "", "")
        return start(job, claimed, taken)

    launcher.start = at_most_one  # type: ignore[method-assign]
    found, _ = carried_out(grid, launcher)
    assert refused and len(found.done) == 4 and not found.failed


def test_runs_of_other_sweeps_count(grid: list[Planned]) -> None:
    """Of another experiment or with another only=: towards the limit of this machine, and their
    GPUs are taken."""
    grid[0].claims.mkdir(parents=True)
    other = lock.claim_run(grid[0].claims, "run-of-another-sweep")
    assert other is not None
    other.write({"host": os.uname().nodename, "gpu": "0"})
    launcher = Fake(limit=2)
    carried_out(grid, launcher)
    assert launcher.most == 1 and all(
        {"host": os.uname().nodename, "gpu": "0"} in taken for taken in launcher.taken
    )
    other.release()


def test_a_job_of_slurm_is_not_started_here(grid: list[Planned]) -> None:
    grid[0].claims.mkdir(parents=True)
    (grid[0].claims / grid[0].run_id).write_text('{"job": "12"}')
    launcher = Fake(limit=1)
    launcher.adopt = launchers.Local(1).adopt  # type: ignore[method-assign]
    found, _ = carried_out(grid, launcher)
    assert "Slurm's job 12" in found.failed[0].last_line and len(found.done) == 3


def test_times_and_values_of_slurm() -> None:
    times = {"90": 90, "4:00:00": 240, "0:00:30": 1, "2-00:00:01": 2881}
    assert {text: verb._minutes(text) for text in times} == times
    assert [verb._typed(x) for x in ("2", "1.5", "true", "gpu")] == [2, 1.5, True, "gpu"]
    for text in ("soon", "0:30", "1-2-3"):
        with pytest.raises(ConfigError, match="no time"):
            verb._minutes(text)


def test_a_claim_is_one_launchers(tmp_path: Path) -> None:
    mine = lock.claim_run(tmp_path, "run")
    assert (
        mine is not None
        and lock.claim_run(tmp_path, "run") is None
        and "run" in lock.claims_under_way(tmp_path)
    )
    mine.write({"gpu": "1"})
    assert lock.read_claim(tmp_path, "run") == {"gpu": "1"}
    mine.release()
    assert "run" not in lock.claims_under_way(tmp_path)
    assert lock.claim_run(tmp_path, "run") is not None


def test_a_claim_lasts_as_long_as_the_run_that_inherited_it(tmp_path: Path) -> None:
    """Also when the launcher is gone: its descriptor closed, the child alive."""
    mine = lock.claim_run(tmp_path, "run")
    assert mine is not None
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(mine.handle,)
    )
    mine.release()
    assert "run" in lock.claims_under_way(tmp_path) and lock.claim_run(tmp_path, "run") is None
    child.communicate(b"\n", timeout=LIMIT_SECONDS)
    assert "run" not in lock.claims_under_way(tmp_path)


def test_gpus_are_given_out_one_to_a_run(grid: list[Planned]) -> None:
    launcher = launchers.Local(2, ["0", "1"])
    seen = []
    for cell, taken in (
        (grid[0], []),
        (grid[1], [{"host": os.uname().nodename, "gpu": "0"}]),
        (grid[2], [{"host": "other", "gpu": "0"}]),
    ):
        cell.claims.mkdir(parents=True, exist_ok=True)
        claimed = lock.claim_run(cell.claims, cell.run_id)
        assert claimed is not None
        job = launchers.Job(
            cell,
            ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"],
            {},
            Path(f"{cell.run_id}.log"),
        )
        process = launcher.start(job, claimed, taken)
        while process.poll() is None:
            time.sleep(0.02)
        claimed.release()
        seen.append(job.log.read_text().strip())
    assert seen == ["0", "1", "0"]


def test_words(grid: list[Planned]) -> None:
    options = verb.read_options(
        [
            "experiment=e",
            "only=lora,block1",
            "max_parallel=2",
            "dry_run=true",
            "gpus=",
            "slurm.partition=gpu",
            "seed=1",
        ]
    )
    assert (options.only, options.max_parallel, options.dry_run, options.gpus) == (
        ["lora", "block1"],
        2,
        "true",
        [],
    )
    assert options.slurm == {"partition": "gpu"} and options.words == ["experiment=e", "seed=1"]
    assert [(c.method, c.block) for c in verb._only(grid, options.only)] == [("lora", 1)]
    assert [c.run_id for c in verb._only(grid, [grid[2].run_id[:-3]])] == [grid[2].run_id]
    assert len(verb._only(grid, ["tiny"])) == 4 and len(verb._only(grid, ["lora", "gain_ffn"])) == 4
    for bad in ("max_parallel=0", "dry_run=yes", "launcher=pbs"):
        with pytest.raises(ConfigError):
            verb.read_options(["experiment=e", bad])
    with pytest.raises(ConfigError, match="no run is 'lore'"):
        verb._only(grid, ["lore"])


def test_runs_share_cores_and_a_group(grid: list[Planned]) -> None:
    """compute.threads where several run at a time on a CPU, track.group where wandb is on, unless
    they are given."""
    e = load_experiment("e.yaml")
    options = verb.read_options(["experiment=e", "worktree=false"])

    def words(more: list[str], launcher: Any) -> list[str]:
        cells = planned_runs(e, ["output_dir=runs", "results_dir=results", *more])
        return verb._jobs(e, cells, more, options, launcher, Path("runs"))[0].command

    threads = f"compute.threads={max(1, (os.cpu_count() or 1) // 2)}"
    assert threads in words([], launchers.Local(2)) and not [
        w for w in words([], launchers.Local(1)) if w.startswith("compute.")
    ]
    assert not [w for w in words([], launchers.Local(2, ["0", "1"])) if w.startswith("compute.")]
    assert words(["compute.threads=7"], launchers.Local(2))[-1] == "compute.threads=7"
    assert "track.group=e" in words(
        ["track=wandb"], launchers.Local(1)
    ) and "track.group=e" not in words([], launchers.Local(1))
    assert "track.group=e" not in words(["track=wandb", "track.group=mine"], launchers.Local(1))


def test_the_time_left_falls_with_what_is_done(
    grid: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stages that are saved."""
    stages = len(grid[0].config.stages)

    def seconds(
        config: Any, method: str, records: Any, speed: float | None = None, saved: int = 0
    ) -> float:
        return float(stages + 1 - saved)

    monkeypatch.setattr(verb, "run_seconds", seconds)
    assert f"{4.0 * (stages + 1):.1f} s one after the other" in verb._cost(grid, grid)
    for name in ("00-pretrained", "01-a"):
        (grid[1].folder / "stages" / name).mkdir(parents=True)
    assert f"{4.0 * (stages + 1) - 2:.1f} s one after the other" in verb._cost(grid, grid)
    assert sweep.stage_of(grid[1]) == f"stage 2 of {stages}"


def test_what_is_left_of_a_run_is_its_later_stages(grid: list[Planned]) -> None:
    """At a speed of 1 token a second for training and 2 for scoring: every stage costs the same,
    stage 0 only its scoring."""
    config = grid[0].config
    stages, names = len(config.stages), len(config.sequence.trained) + len(config.sequence.controls)
    scoring = names * config.eval.documents * (config.eval.window or config.eval.context) / 2
    training = config.stage.stage_steps * config.train.batch_tokens
    assert run_seconds(config, "lora", [], 1.0) == pytest.approx(
        stages * training + (stages + 1) * scoring
    )
    for saved in range(1, stages + 2):
        assert run_seconds(config, "lora", [], 1.0, saved=saved) == pytest.approx(
            (stages + 1 - saved) * (training + scoring)
        )


def test_a_forecast_counts_the_start_of_a_run() -> None:
    stages = [
        SimpleNamespace(train=None, eval_seconds=9.0, task_seconds=9.0),
        SimpleNamespace(train=SimpleNamespace(seconds=5.0), eval_seconds=3.0, task_seconds=2.0),
    ]
    told: Any = SimpleNamespace(provenance={"seconds": 30.0}, stages=stages)
    assert costs.start_seconds([told]) == 20.0 and costs.start_seconds([]) == 0.0


def test_nothing_starts_in_a_dry_run(
    grid: list[Planned], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            [
                "sweep",
                "experiment=e.yaml",
                "dry_run=true",
                "only=lora",
                "output_dir=runs",
                "results_dir=results",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        out.count("-m gain_cl run") == 2 and "2 runs ahead" in out and "method=gain_ffn" not in out
    )
    assert not Path("runs").exists()


def test_what_is_not_committed_is_not_run(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "src/gain_cl").mkdir(parents=True)
    (tmp_path / "src/gain_cl/__init__.py").write_text("")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *words], check=True)
    tree = sweep.worktree(tmp_path, tmp_path / "runs/sweeps")
    assert (tree / "src/gain_cl/__init__.py").exists() and sweep.worktree(
        tmp_path, tmp_path / "runs/sweeps"
    ) == tree
    (tree / "src/gain_cl/__init__.py").unlink()  # it was made in part, or touched
    sweep.worktree(tmp_path, tmp_path / "runs/sweeps")
    assert (tree / "src/gain_cl/__init__.py").exists()
    (tmp_path / "src/gain_cl/__init__.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"src/gain_cl/__init__.py is not committed"):
        sweep.worktree(tmp_path, tmp_path / "runs/sweeps")


# --- real runs ------------------------------------------------------------------------------------


def launched(at: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "gain_cl",
        "sweep",
        "experiment=e.yaml",
        "worktree=false",
        "output_dir=runs",
        "results_dir=results",
    ]
    about = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, *words],
        cwd=at,
        env=about,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out = process.communicate(timeout=LIMIT_SECONDS)[0]
    print(out)
    return process.returncode, out


def attempts(at: Path) -> dict[str, int]:
    return {
        p.parent.name: len(p.read_text().splitlines())
        for p in sorted((at / "runs").glob("*/attempts.jsonl"))
    }


@pytest.mark.slow
def test_two_launchers_at_once_run_every_cell_once(tmp_path: Path) -> None:
    """Also one that fails: no failure stops the rest, and it is not run again unless asked for."""
    failing = "lora: {model.prefix_token_id: [null, 99999999]}"
    (tmp_path / "e.yaml").write_text(
        GRID.replace("blocks: 2", "blocks: 1").replace("lora: {train.lr: [0.001]}", failing)
    )
    both = [launched(tmp_path), launched(tmp_path)]
    codes = [ended(p) for p in both]
    assert {code for code, _ in codes} <= {0, 1} and any(code == 1 for code, _ in codes)
    done = [record.load(p).record for p in sorted((tmp_path / "results/runs").glob("*.json"))]
    assert len(done) == 2
    counts = attempts(tmp_path)
    assert all(counts[r.run_id] == 1 for r in done)
    code, out = ended(launched(tmp_path))
    assert (
        code == 1
        and "nothing to run" in out
        and "failed before" in out
        and "retry_failed=true" in out
    )


STATES = """\
import json, os, pathlib, sys
at = pathlib.Path(os.environ["CLUSTER"])
"""

SBATCH = f"""#!{sys.executable}
{STATES}
import re, subprocess
script = pathlib.Path(sys.argv[-1])
number = str(len(list(at.glob("job-*"))) + 1)
(at / f"job-{{number}}").write_text("RUNNING")
(at / f"script-{{number}}").write_text(script.read_text())
about = dict(os.environ, SLURM_JOB_ID=number, SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1")
about |= dict.fromkeys(("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"), "0")
body = f'bash {{script}}; s=$?; [ $s = 0 ] && echo COMPLETED > {{at}}/job-{{number}} || echo FAILED > {{at}}/job-{{number}}'
subprocess.Popen(["bash", "-c", body], env=about, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(f"Submitted batch job {{number}}")
"""

SACCT = f"""#!{sys.executable}
{STATES}
print("JobID|State|NodeList")
for job in at.glob("job-*"):
    print(f"{{job.name[4:]}}|{{job.read_text().strip()}}|here")
"""

SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
exec "$@"
"""


PROGRAMS = {
    "sbatch": SBATCH,
    "sacct": SACCT,
    "srun": SRUN,
    "scancel": "#!/bin/sh\n",
    "scontrol": "#!/bin/sh\necho here\n",
}


def on_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of ours in the places of Slurm's; the folder of their traces."""
    cluster, tools = tmp_path / "cluster", tmp_path / "bin"
    cluster.mkdir(), tools.mkdir()
    for name, body in PROGRAMS.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("CLUSTER", str(cluster))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return cluster


def test_jobs_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the cluster, and that the runs are done."""
    cluster = on_cluster(tmp_path, monkeypatch)
    (tmp_path / "e.yaml").write_text(GRID.replace("blocks: 2", "blocks: 1"))
    words = [
        "launcher=slurm",
        "slurm.partition=gpu",
        "slurm.time=90",
        "slurm.gpus_per_node=1",
        "slurm.cpus_per_task=2",
    ]
    code, out = ended(launched(tmp_path, *words))
    assert code == 0 and "2 done, 0 failed" in out
    assert len(list((tmp_path / "results/runs").glob("*.json"))) == 2
    asked = (cluster / "script-1").read_text()
    for line in (
        "--partition=gpu",
        "--time=90",
        "--gpus-per-node=1",
        "--cpus-per-task=2",
        "--signal=USR2@300",
    ):
        assert f"#SBATCH {line}" in asked
    ids = [
        json.loads(p.read_text())["job"] for p in sorted((tmp_path / "runs/claims").glob("tiny-*"))
    ]
    assert sorted(ids) == ["1", "2"]


@pytest.mark.parametrize(
    ("state", "adopted"),
    [("RUNNING", True), ("PENDING", True), ("FAILED", False), ("COMPLETED", False), (None, False)],
)
def test_a_job_is_followed_if_slurm_says_that_it_lives(
    state: str | None, adopted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that left no result, or that Slurm has forgotten."""
    cluster = on_cluster(tmp_path, monkeypatch)
    (cluster / "job-6").write_text("RUNNING")
    if state is not None:
        (cluster / "job-7").write_text(state)
    launcher = launchers.Slurm(tmp_path / "slurm", 1, {"timeout_min": 5})
    assert (launcher.adopt({"job": "7"}) is not None) == adopted
    assert launcher.adopt({"host": "here"}) is None


CHECKPOINT = """
import os, signal, sys, threading, time
from gain_cl.studies.launchers import Command
saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(75))); "
saves += "open('up', 'w').close(); time.sleep(600)"
command = Command(["-c", saves], {}, ".", "log")
def handler(*_):
    again = command.checkpoint()
    print(os.path.exists("saved"), again.function.words == command.words, flush=True)
    os._exit(0)
signal.signal(signal.SIGUSR2, handler)
def when_up():
    while not os.path.exists("up"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGUSR2)
threading.Thread(target=when_up, daemon=True).start()
command()
"""


def test_a_job_that_runs_out_of_time_saves_and_is_queued_again(tmp_path: Path) -> None:
    """submitit's handler interrupts the wait for the run."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKPOINT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_slurm_without_slurm_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(GRID)
    code, out = ended(launched(tmp_path, "launcher=slurm"))
    assert code == 64 and out.splitlines()[-1].startswith("gain_cl: error: launcher=slurm:")


def table(at: Path) -> dict[str, list[list[str]]]:
    """Every table, but for what is measured anew in each run: seconds, bytes of memory, commit and
    hash of the record."""
    assert (
        cli.main(
            [
                "tables",
                f"experiment={at}/e.yaml",
                f"results_dir={at}/results",
                f"output_dir={at}/runs",
            ]
        )
        == 0
    )
    found = {}
    for path in sorted((at / "results/tables/e").glob("*.csv")):
        rows = list(csv.reader(path.open()))
        drop = {
            j
            for j, head in enumerate(rows[0])
            if head in ("training min", "memory GB", "sha256", "commit")
        }
        rows = [[x for j, x in enumerate(row) if j not in drop] for row in rows]
        found[path.name] = [
            row
            for row in rows
            if not {"seconds", "peak_memory_bytes"} & set(row)
            and not any("minutes" in x for x in row)
        ]
    return found


@pytest.mark.slow
def test_a_killed_launcher_changes_no_number(tmp_path: Path) -> None:
    """SIGKILL and SIGTERM at random moments, until the grid is done; then the tables of an
    undisturbed sweep."""
    import random

    draw = random.Random(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "e.yaml").write_text(GRID.replace("train.steps=1", "train.steps=3"))
    assert ended(launched(tmp_path / "a", "max_parallel=2"))[0] == 0
    for attempt in range(30):
        process = launched(tmp_path / "b", "max_parallel=2")
        try:
            code = process.wait(timeout=draw.uniform(3, 20) if attempt < 8 else LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
            code = process.wait(timeout=LIMIT_SECONDS)
        if code == 0:
            break
        assert code in (-signal.SIGKILL, PREEMPTED, -signal.SIGTERM)
    assert code == 0
    assert table(tmp_path / "a") == table(tmp_path / "b")
