"""verify-resume on the real command line: a sound program passes it, a program whose resume is
broken does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gain_cl
import synthetic
from gain_cl import cli
from gain_cl.tools import verify_resume

TINY = [
    "debug=smoke",
    "domain=[smoke_a]",
    "sequence.controls=[]",
    "train.steps=8",
    "eval.documents=4",
    "compute.threads=1",
]
LONGER = [word.replace("train.steps=8", "train.steps=60") for word in TINY]

TWIN = """
from gain_cl import adapters
from gain_cl.adapters.gain import GainAdapter

class Forgetful(GainAdapter):
    def load_state(self, state):
        super().load_state({name: 0 * tensor if i == 0 else tensor for i, (name, tensor) in enumerate(state.items())})

adapters.register("forgetful", Forgetful)
"""


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_resume_is_exact_here(tmp_path: Path) -> None:
    """The whole command with a kill at a random moment."""
    line = [
        sys.executable,
        "-m",
        "gain_cl",
        "verify-resume",
        "--kills",
        "1",
        *TINY,
        f"output_dir={tmp_path}/runs",
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "150"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "resume is exact here: 1 kills (1 with a checkpoint to go on from), 6 files compared"
    )
    assert done.stderr.startswith("seed ") and "kill 1: " in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "runs"}
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_many_kills(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify-resume", "--kills", "8", "--signal", name, "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "resume is exact here: 8 kills" in out


@pytest.mark.slow
def test_a_broken_twin_is_not_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that forgets one of its tensors when a state is loaded: one kill is enough, for it
    comes behind a checkpoint."""
    (tmp_path / "twin.py").write_text(TWIN)
    line = [
        "verify-resume",
        "--kills",
        "1",
        "--seed",
        "7",
        "--plugin",
        "twin.py",
        *LONGER,
        "adapter.kind=forgetful",
    ]
    assert cli.main(line) == 65
    out, err = capsys.readouterr()
    assert "exact" not in out
    last = err.splitlines()[-1]
    assert (
        last.startswith("gain_cl: error: resume is NOT exact here: runs/")
        and "/stages/01-smoke_a/adapter.safetensors differs" in last
    )
    assert "compute.threads" in last and not list(tmp_path.rglob(".tmp-*"))


# --- its parts ------------------------------------------------------------------------------------


def go(folder: Path) -> Path:
    gain_cl.run(*TINY, f"output_dir={folder}/runs", f"results_dir={folder}/results")
    return folder


def test_evidence_sees_every_number_and_no_time(tmp_path: Path) -> None:
    seen = verify_resume.evidence(go(tmp_path / "a"))
    assert len(seen) == 6
    assert verify_resume.evidence(go(tmp_path / "b")) == seen  # other times, another folder
    for name in seen:
        copy = shutil.copytree(tmp_path / "a", tmp_path / "copy", dirs_exist_ok=True)
        if name.endswith((".json", ".jsonl")):
            text = (copy / name).read_text()
            assert '"tokens": 256' in text
            (copy / name).write_text(text.replace('"tokens": 256', '"tokens": 255'))
            if name.startswith("results/"):
                synthetic.edit(copy / name, lambda _: None)  # a record: sealed again
        elif name.endswith(".items.parquet"):
            continue  # its hash is in the record: reading it fails
        else:
            data = bytearray((copy / name).read_bytes())
            data[-1] ^= 1
            (copy / name).write_bytes(data)
        found = verify_resume.evidence(copy)
        assert [n for n in seen if found[n] != seen[n]] == [name]
        (copy / name).unlink()
        assert verify_resume.evidence(copy).keys() == seen.keys() - {name}


def test_an_attempt_is_killed_when_it_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So long after its start, or after a checkpoint that was not there before."""
    real, code = subprocess.Popen, ""
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **rest: real([sys.executable, "-c", code], **rest)
    )
    sleep = "import os, time; time.sleep(1); {}; time.sleep(60)"
    code = sleep.format("pass")
    assert verify_resume.attempt([], tmp_path / "a", signal.SIGTERM, 0.1) == -signal.SIGTERM
    begun, step = time.monotonic(), tmp_path / "a/runs/x/ckpt/step-4"
    code = sleep.format(f"os.makedirs({str(step)!r})")
    assert verify_resume.attempt([], tmp_path / "a", signal.SIGKILL, 0.1, True) == -signal.SIGKILL
    assert time.monotonic() - begun > 1 and step.exists()
    code = "import sys; sys.exit(3)"
    assert verify_resume.attempt([], tmp_path / "a") == 3


def test_interrupted_itself_it_leaves_nothing(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "gain_cl", "verify-resume", *TINY]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(
        tmp_path.rglob(".tmp-verify-resume-*/undisturbed/log.txt")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (
        err.splitlines()[-1] == "gain_cl: error: stopped by SIGTERM; nothing was kept: run it again"
    )
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([65], "undisturbed the run ends with exit code 65: the loss is not finite"),
        ([139], "undisturbed the run ends with exit code 139: Segmentation fault"),
        ([0, -9, 65], "resume is NOT exact here: started again after kill 1 the run ends with"),
        ([0, -9, -9, 0], "no kill came after a checkpoint: nothing was resumed"),
    ],
)
def test_a_run_that_fails(
    codes: list[int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failed(words: list[str], place: Path, *_: object) -> int:
        place.mkdir(exist_ok=True, parents=True)
        (place / "log.txt").write_text(
            "  0:01  run x\ngain_cl: error: the loss is not finite (stage 1); lower train.lr\n\n"
            if codes[0] != 139
            else "  0:01  run x\nSegmentation fault\n"
        )
        return codes.pop(0)

    monkeypatch.setattr(verify_resume, "attempt", failed)
    assert cli.main(["verify-resume", "--kills", "2", *TINY]) == 65
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["--signal", "HUP"], "invalid choice: 'HUP'"),
        (["resume=never"], "resume is decided by verify-resume"),
        (["force=true"], "force is decided by verify-resume"),
        (["results_dir=x"], "results_dir is decided by verify-resume"),
        (["model=smollm3"], "smollm3"),
        (["-m", "seed=1,2"], "-m"),
        (["--keep", "full"], "the folder is not empty"),
    ],
)
def test_mistakes(
    line: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert cli.main(["verify-resume", *line]) == 64
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and found in err


def test_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's words, saved often enough that a kill loses something, and without a tracker."""
    seen: list[Any] = []
    monkeypatch.setattr(verify_resume, "_compare", lambda *told: seen.extend(told))
    assert cli.main(["verify-resume", "--seed", "3", *TINY, "output_dir=there/runs"]) == 0
    words, kills, kind, *_ = seen
    assert (kills, kind) == (5, signal.SIGKILL)
    assert words == [*TINY, "track.backend=none", "checkpoint.every_steps=2"]
    seen.clear()
    assert cli.main(["verify-resume", *TINY, "checkpoint.every_steps=5"]) == 0
    assert [w for w in seen[0] if w.startswith("checkpoint")] == ["checkpoint.every_steps=5"]
