"""Sweeps: what is run, what is not run twice, what a failure leaves, and two launchers on one grid."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gain_cl import cli, experiments, record, sweep
from gain_cl.errors import IN_USE, PREEMPTED, ConfigError
from gain_cl.experiments import Cell
from gain_cl.verbs import sweep as verb

GRID = (
    "question: q\nblocks: 2\noverrides: [debug=smoke, train.steps=1]\nmethods: {gain_ffn: {train.lr: [0.01]}, lora: {train.lr: [0.001]}}\n"
)
LIMIT_SECONDS = 600  # of a hang; nothing is timed


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    monkeypatch.chdir(tmp_path)
    Path("e.yaml").write_text(GRID)
    return experiments.cells(experiments.load("e.yaml"), ["output_dir=runs", "results_dir=results"])


class Fake:
    """A launcher whose runs end when they are told to: codes, by run id, one after the other. log: what was started, in order."""

    def __init__(self, limit: int, codes: dict[str, list[int]] | None = None) -> None:
        self.limit, self.codes, self.log, self.most, self.alive = limit, codes or {}, [], 0, 0  # type: ignore[var-annotated]
        self.taken: list[list[dict[str, Any]]] = []
        self.baselines = 0

    def start(self, job: sweep.Job, claimed: sweep.Claim, taken: list[dict[str, Any]]) -> Any:
        self.log.append(job.cell.run_id)
        self.taken.append(taken)
        self.alive += 1
        self.most = max(self.most, self.alive)
        claimed.write({"host": "here", "gpu": str(len(self.log))})
        if not (job.cell.folder / "stages/00-pretrained").exists():
            self.baselines += not any((f / "stages/00-pretrained").exists() for f in job.cell.folder.parent.glob("*"))
        return Ends(self, job)

    def adopt(self, about: dict[str, Any]) -> None:
        return None


class Ends:
    """A run that scores stage 0 when it is first looked at, and ends at the third look."""

    def __init__(self, launcher: Fake, job: sweep.Job) -> None:
        self.launcher, self.job, self.looks = launcher, job, 0

    def poll(self) -> int | None:
        self.looks += 1
        cell = self.job.cell
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

    def stop(self) -> None:
        self.looks = 2


def jobs(cells: list[Cell]) -> list[sweep.Job]:
    Path("logs").mkdir(exist_ok=True)
    return [sweep.Job(c, ["-m", "gain_cl", "run", *c.overrides], {}, Path("logs") / c.run_id) for c in cells]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)


def carried_out(cells: list[Cell], launcher: Fake) -> tuple[sweep.Outcome, list[str]]:
    said: list[str] = []
    found = sweep.carry_out(jobs(cells), launcher, Path("claims"), said.append, lambda some: float(len(some)))  # type: ignore[arg-type]
    return found, said


def test_everything_runs_once_and_no_more_than_allowed_at_a_time(grid: list[Cell]) -> None:
    launcher = Fake(limit=3)
    found, said = carried_out(grid, launcher)
    assert launcher.log == [c.run_id for c in grid] and launcher.most == 3 and not found.failed
    assert {c.run_id for c in found.done} == {c.run_id for c in grid}
    assert sum(line.startswith("started") for line in said) == 4


def test_stage_0_is_scored_by_one_run_before_the_others_start(grid: list[Cell]) -> None:
    """All cells share the pretrained model, documents and protocol: the first runs alone until its stage 0 is saved."""
    assert len({sweep.baseline(c) for c in grid}) == 1
    launcher = Fake(limit=4)
    carried_out(grid, launcher)
    assert launcher.baselines == 1


def test_other_ways_to_score_do_not_wait_for_each_other(grid: list[Cell]) -> None:
    other = experiments.cells(experiments.load("e.yaml"), ["output_dir=runs", "results_dir=results", "eval.documents=4"])
    assert not {sweep.baseline(c) for c in other} & {sweep.baseline(c) for c in grid}


def test_a_failure_does_not_stop_the_rest(grid: list[Cell]) -> None:
    launcher = Fake(limit=1, codes={grid[1].run_id: [65], grid[2].run_id: [-9]})
    found, said = carried_out(grid, launcher)
    assert [(f.cell.run_id, f.code) for f in found.failed] == [(grid[1].run_id, 65), (grid[2].run_id, -9)]
    assert found.failed[0].last_line == "gain_cl: error: what (where); do"
    assert "killed by SIGKILL" in found.failed[1].last_line
    assert {c.run_id for c in found.done} == {grid[0].run_id, grid[3].run_id}
    assert any(line.startswith("FAILED") and "what (where); do" in line for line in said)


def test_a_run_that_somebody_else_took_is_waited_for(grid: list[Cell]) -> None:
    launcher = Fake(limit=4, codes={grid[0].run_id: [IN_USE, 0]})
    found, _ = carried_out(grid, launcher)
    assert launcher.log.count(grid[0].run_id) == 2 and not found.failed and len(found.done) == 4


def test_a_run_without_a_record_has_failed(grid: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Fake(limit=4)
    found, _ = carried_out(grid[:1], launcher)
    assert found.done
    monkeypatch.setattr(Ends, "poll", lambda self: 0)
    grid[1].record.unlink(missing_ok=True)
    found, _ = carried_out(grid[1:2], Fake(limit=1))
    assert "there is no" in found.failed[0].last_line


def test_a_claim_is_one_launchers(tmp_path: Path) -> None:
    mine = sweep.claim(tmp_path, "run")
    assert mine is not None and sweep.claim(tmp_path, "run") is None and sweep.held(tmp_path, "run")
    mine.write({"gpu": "1"})
    assert sweep._about(tmp_path / "run") == {"gpu": "1"}
    mine.release()
    assert not sweep.held(tmp_path, "run")
    assert sweep.claim(tmp_path, "run") is not None


def test_a_claim_lasts_as_long_as_the_run_that_inherited_it(tmp_path: Path) -> None:
    """Also when the launcher is gone: its descriptor closed, the child alive."""
    mine = sweep.claim(tmp_path, "run")
    assert mine is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(mine.handle,))
    mine.release()
    assert sweep.held(tmp_path, "run") and sweep.claim(tmp_path, "run") is None
    child.communicate(b"\n", timeout=LIMIT_SECONDS)
    assert not sweep.held(tmp_path, "run")


def test_gpus_are_given_out_one_to_a_run(grid: list[Cell]) -> None:
    launcher = sweep.Local(2, ["0", "1"])
    seen = []
    for cell, taken in ((grid[0], []), (grid[1], [{"host": os.uname().nodename, "gpu": "0"}]), (grid[2], [{"host": "other", "gpu": "0"}])):
        Path("claims").mkdir(exist_ok=True)
        claimed = sweep.claim(Path("claims"), cell.run_id)
        assert claimed is not None
        job = sweep.Job(cell, ["-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"], {}, Path(f"{cell.run_id}.log"))
        process = launcher.start(job, claimed, taken)
        while process.poll() is None:
            time.sleep(0.02)
        claimed.release()
        seen.append(job.log.read_text().strip())
    assert seen == ["0", "1", "0"]


def test_words(grid: list[Cell]) -> None:
    options, more = verb._options(["only=lora,block1", "max_parallel=2", "dry_run=true", "gpus=", "slurm.partition=gpu", "seed=1"])
    assert (options.only, options.max_parallel, options.dry_run, options.gpus) == (["lora", "block1"], 2, True, [])
    assert options.slurm == {"partition": "gpu"} and more == ["seed=1"]
    assert [(c.method, c.block) for c in verb._only(grid, options.only)] == [("lora", 1)]
    assert [c.run_id for c in verb._only(grid, [grid[2].run_id[:-3]])] == [grid[2].run_id]
    assert len(verb._only(grid, ["tiny"])) == 4 and len(verb._only(grid, ["lora", "gain_ffn"])) == 4
    for bad in ("max_parallel=0", "dry_run=yes", "launcher=pbs"):
        with pytest.raises(ConfigError):
            verb._options([bad])
    with pytest.raises(ConfigError, match="no run is 'lore'"):
        verb._only(grid, ["lore"])


def test_nothing_starts_in_a_dry_run(grid: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "experiment=e.yaml", "dry_run=true", "only=lora", "output_dir=runs", "results_dir=results"]) == 0
    out = capsys.readouterr().out
    assert out.count("-m gain_cl run") == 2 and "2 runs ahead" in out and "method=gain_ffn" not in out
    assert not Path("runs").exists()


def test_what_is_not_committed_is_not_run(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "src/gain_cl").mkdir(parents=True)
    (tmp_path / "src/gain_cl/__init__.py").write_text("")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *words], check=True)
    tree = sweep.worktree(tmp_path, tmp_path / "runs/sweeps")
    assert (tree / "src/gain_cl/__init__.py").exists() and sweep.worktree(tmp_path, tmp_path / "runs/sweeps") == tree
    (tmp_path / "src/gain_cl/__init__.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"src/gain_cl/__init__.py is not committed"):
        sweep.worktree(tmp_path, tmp_path / "runs/sweeps")


# --- real runs ---------------------------------------------------------------------------------------------------------


def launched(at: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gain_cl", "sweep", "experiment=e.yaml", "worktree=false", "output_dir=runs", "results_dir=results"]
    about = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*command, *words], cwd=at, env=about, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out = process.communicate(timeout=LIMIT_SECONDS)[0]
    print(out)
    return process.returncode, out


def attempts(at: Path) -> dict[str, int]:
    return {p.parent.name: len(p.read_text().splitlines()) for p in sorted((at / "runs").glob("*/attempts.jsonl"))}


@pytest.mark.slow
def test_two_launchers_at_once_run_every_cell_once(tmp_path: Path) -> None:
    """Also one that fails: no failure stops the rest, and it is not run again unless asked for."""
    failing = "lora: {model.prefix_token_id: [null, 99999999]}"
    (tmp_path / "e.yaml").write_text(GRID.replace("blocks: 2", "blocks: 1").replace("lora: {train.lr: [0.001]}", failing))
    both = [launched(tmp_path), launched(tmp_path)]
    codes = [ended(p) for p in both]
    assert {code for code, _ in codes} <= {0, 1} and any(code == 1 for code, _ in codes)
    done = [record.load(p).record for p in sorted((tmp_path / "results/runs").glob("*.json"))]
    assert len(done) == 2
    counts = attempts(tmp_path)
    assert all(counts[r.run_id] == 1 for r in done)
    code, out = ended(launched(tmp_path))
    assert code == 1 and "nothing to run" in out and "failed before" in out and "retry_failed=true" in out


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


def test_jobs_of_slurm(tmp_path: Path) -> None:
    """With programs of ours in the places of sbatch, srun and sacct: what is asked of the cluster, and that the runs are done."""
    cluster, tools = tmp_path / "cluster", tmp_path / "bin"
    cluster.mkdir(), tools.mkdir()
    for name, body in (
        ("sbatch", SBATCH),
        ("sacct", SACCT),
        ("srun", SRUN),
        ("scancel", "#!/bin/sh\n"),
        ("scontrol", "#!/bin/sh\necho here\n"),
    ):
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    (tmp_path / "e.yaml").write_text(GRID.replace("blocks: 2", "blocks: 1"))
    words = ["launcher=slurm", "slurm.partition=gpu", "slurm.time=90", "slurm.gpus_per_node=1", "slurm.cpus_per_task=2"]
    code, out = ended(launched(tmp_path, *words, CLUSTER=str(cluster), PATH=f"{tools}:{os.environ['PATH']}"))
    assert code == 0 and "2 done, 0 failed" in out
    assert len(list((tmp_path / "results/runs").glob("*.json"))) == 2
    asked = (cluster / "script-1").read_text()
    for line in ("--partition=gpu", "--time=90", "--gpus-per-node=1", "--cpus-per-task=2", "--signal=USR2@300"):
        assert f"#SBATCH {line}" in asked
    claims = [json.loads(p.read_text())["job"] for p in sorted((tmp_path / "runs/claims").glob("tiny-*"))]
    assert sorted(claims) == ["1", "2"]


def test_slurm_without_slurm_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(GRID)
    code, out = ended(launched(tmp_path, "launcher=slurm"))
    assert code == 64 and out.splitlines()[-1].startswith("gain_cl: error: launcher=slurm:")


def table(at: Path) -> dict[str, list[list[str]]]:
    """Every table, but for what is measured anew in each run: seconds, bytes of memory, commit and hash of the record."""
    assert cli.main(["tables", f"experiment={at}/e.yaml", f"results_dir={at}/results", f"output_dir={at}/runs"]) == 0
    found = {}
    for path in sorted((at / "results/tables/e").glob("*.csv")):
        rows = list(csv.reader(path.open()))
        drop = {j for j, head in enumerate(rows[0]) if head in ("training min", "memory GB", "sha256", "commit")}
        rows = [[x for j, x in enumerate(row) if j not in drop] for row in rows]
        found[path.name] = [row for row in rows if not {"seconds", "peak_memory_bytes"} & set(row) and not any("minutes" in x for x in row)]
    return found


@pytest.mark.slow
def test_a_killed_launcher_changes_no_number(tmp_path: Path) -> None:
    """SIGKILL and SIGTERM at random moments, until the grid is done; then the tables of an undisturbed sweep."""
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
