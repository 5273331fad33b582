"""verify-resume on the real command line: a sound program passes it, a program whose resume is
broken does not."""

from __future__ import annotations

import os
import random
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
from gain_cl.compose import composition
from gain_cl.errors import DataError
from gain_cl.tools import verify_resume
from gain_cl.tools.verify_resume import Asked, Ended, Moment, Pace

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
        "resume is exact here: 1 kills (1 with a checkpoint to go on from), 8 files, "
    )
    assert "adapter.safetensors" in done.stdout and "NO" not in done.stdout
    assert done.stderr.startswith("seed ") and "about " in done.stderr and "kill 1: " in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}  # nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_many_kills(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify-resume", "--kills", "8", "--signal", name, "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "resume is exact here: 8 kills" in out
    assert ("slowest to save and stop" in out) == (name == "TERM")


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
    assert "exact" not in out and "NO" in out
    last = err.splitlines()[-1]
    assert (
        last.startswith("gain_cl: error: resume is NOT exact here: runs/")
        and "/stages/01-smoke_a/adapter.safetensors differs" in last
    )
    assert "seed 7" in last and "compute.threads" in last
    assert not list(tmp_path.glob(".tmp-*"))


# --- its parts ------------------------------------------------------------------------------------


def go(folder: Path) -> Path:
    gain_cl.run(*TINY, f"output_dir={folder}/runs", f"results_dir={folder}/results")
    return folder


def test_evidence_sees_every_number_and_no_time(tmp_path: Path) -> None:
    seen = verify_resume.evidence(go(tmp_path / "a"))
    assert len(seen) == 8 and all(s.bytes > 0 for s in seen.values())
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


def test_moments_fall_into_start_up_and_into_the_work() -> None:
    draw = random.Random(0)
    moments = [verify_resume._moment(draw, Pace(startup=10.0, work=2.0)) for _ in range(400)]
    early, late = (
        [m.seconds for m in moments if m.early],
        [m.seconds for m in moments if not m.early],
    )
    assert 70 < len(early) < 130
    assert min(early) < 1 and 9 < max(early) <= 10 and min(late) < 0.2 and 1.8 < max(late) <= 2


def test_the_first_kill_comes_behind_a_checkpoint() -> None:
    """The rest of a short run is start-up and drawing: moments in time alone would seldom hit what
    resume is about."""
    draw, pace = random.Random(0), Pace(10.0, 2.0, saves=(2, 4, 6), between=0.5)
    first = [verify_resume._moment(draw, pace, first=True) for _ in range(100)]
    assert {m.save for m in first} == {2, 4} and all(0 <= m.seconds <= 0.5 for m in first)
    later = [verify_resume._moment(draw, pace) for _ in range(400)]
    assert (
        160 < sum(m.save is not None for m in later) < 240
        and 70 < sum(m.early for m in later) < 130
    )
    assert verify_resume._saves(composition.compose([*TINY, "checkpoint.every_steps=3"])) == (
        3,
        6,
        8,
    )
    assert verify_resume._saves(composition.compose(["debug=smoke", "train.steps=5"])) == (
        2,
        4,
        5,
        7,
        9,
        10,
        12,
        14,
        15,
    )


def test_an_attempt_is_killed_behind_its_checkpoint(tmp_path: Path) -> None:
    code = (
        "import os, time; [(time.sleep(0.1), os.makedirs(f'place/runs/x/ckpt/step-{n}')) for "
        "n in range(2, 40, 2)]"
    )
    ended = verify_resume._attempt(
        sleeper(tmp_path, code), tmp_path / "place", Moment(False, 0.0, save=4)
    )
    assert ended.code == -signal.SIGTERM and ended.training is not None
    assert verify_resume._saved(tmp_path / "place") in (4, 6)


def test_no_kill_behind_a_checkpoint_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_resume, "_moment", lambda *_: Moment(True, 0.0))
    assert cli.main(["verify-resume", "--kills", "1", *TINY]) == 65
    out, err = capsys.readouterr()
    assert (
        "exact" not in out
        and "no kill came between a checkpoint and the end" in err.splitlines()[-1]
    )


def sleeper(folder: Path, code: str) -> Asked:
    """A process that stands in for the run."""
    return Asked([sys.executable, "-c", code], 1, signal.SIGTERM, 0)


def test_an_attempt_is_killed_and_told(tmp_path: Path) -> None:
    asked = sleeper(tmp_path, "import time; time.sleep(60)")
    ended = verify_resume._attempt(asked, tmp_path / "place", Moment(True, 0.1))
    assert ended.code == -signal.SIGTERM and ended.stopping is not None and ended.startup is None
    assert (
        verify_resume._attempt(
            sleeper(tmp_path, "import sys; sys.exit(3)"), tmp_path / "place"
        ).code
        == 3
    )


def test_an_attempt_that_does_not_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_resume, "PATIENCE_SECONDS", 0.2)
    (tmp_path / "place").mkdir()
    ignoring = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    )
    with pytest.raises(DataError, match=r"did not stop within 0 s of SIGTERM"):
        verify_resume._attempt(
            sleeper(tmp_path, f"{ignoring}; time.sleep(60)"), tmp_path / "place", Moment(True, 1.0)
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_interrupted_itself_it_leaves_nothing(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "gain_cl", "verify-resume", *TINY]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".tmp-verify-resume-*/undisturbed/log.txt")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (
        err.splitlines()[-1] == "gain_cl: error: stopped by SIGTERM; nothing was kept: run it again"
    )
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_run_that_fails_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_resume, "_attempt", lambda *_, **__: _failed(tmp_path))
    assert cli.main(["verify-resume", *TINY, "--keep", str(tmp_path / "kept")]) == 65
    assert (
        "the run fails undisturbed with exit code 65: the loss is not finite"
        in capsys.readouterr().err
    )


def _failed(folder: Path) -> Ended:
    (folder / "kept/undisturbed").mkdir()
    (folder / "kept/undisturbed/log.txt").write_text(
        "  0:01  run x\ngain_cl: error: the loss is not finite (stage 1); lower train.lr\n\n"
    )
    return Ended(65, 1.0, None, None)


def test_a_resume_that_fails(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("gain_cl: error: no good checkpoint (step-4)\n")
    with pytest.raises(
        DataError,
        match=r"NOT exact here: started again after kill 2 the run ends with exit code 65: no "
        r"good checkpoint",
    ):
        verify_resume._gave_up(65, tmp_path, kills=2)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["--kills", "0"], "--kills 0"),
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
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        verify_resume,
        "_compare",
        lambda asked, config, folder: seen.update(asked=asked, config=config),
    )
    assert cli.main(["verify-resume", "--seed", "3", *TINY, "output_dir=there/runs"]) == 0
    asked, words = seen["asked"], seen["asked"].command[4:]
    assert asked.command[:4] == [sys.executable, "-m", "gain_cl", "run"] and (
        asked.kills,
        asked.seed,
    ) == (5, 3)
    assert words == [*TINY, "track.backend=none", "checkpoint.every_steps=2"]
    assert composition.compose([*words, "output_dir=x"]).checkpoint.every_steps == 2
    assert cli.main(["verify-resume", *TINY, "checkpoint.every_steps=5"]) == 0
    assert [w for w in seen["asked"].command if w.startswith("checkpoint")] == [
        "checkpoint.every_steps=5"
    ]
