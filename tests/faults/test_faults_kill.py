"""Kills and requests to stop, in small counts; scripts/campaign.py does the full ones. Every
campaign must notice its broken twins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import Outcome, Warm
from campaign_kill import (
    CASES,
    GAIN,
    TASK,
    Case,
    boundaries,
    kill_at_boundaries,
    kill_at_random,
    preempt,
    quit_at_once,
    trace,
)

from gain_cl.runs import resume

FULL, LORA, MEMORY = CASES[2], CASES[1], CASES[5]
SOURCE = Path(resume.__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def warm(root: Path) -> Iterator[Warm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAIN_CL_CACHE", str(root / "cache"))
        with Warm(composed_once=True) as parent:
            yield parent


def survived(outcome: Outcome) -> None:
    assert outcome.failures == []
    assert outcome.survived == outcome.injected > 0 < outcome.compared


# --- the system -----------------------------------------------------------------------------------


def test_a_kill_at_the_first_write_of_a_checkpoint_and_after_the_last_record(
    warm: Warm, root: Path
) -> None:
    survived(kill_at_boundaries(warm, root, GAIN, ["save.after_write@3", "record.after@1"]))


def test_a_run_killed_at_random_moments_is_the_undisturbed_one(warm: Warm, root: Path) -> None:
    survived(kill_at_random(warm, root, 1, [MEMORY]))


def test_a_request_to_stop_loses_nothing(warm: Warm, root: Path) -> None:
    survived(preempt(warm, root, 1, [GAIN]))


def test_boundaries_are_the_first_middle_and_last_time() -> None:
    assert boundaries(["a", "b", "a", "a", "a", "c", "c"]) == [
        "a@1",
        "a@2",
        "a@4",
        "b@1",
        "c@1",
        "c@2",
    ]


def reached_in_source() -> set[str]:
    """Names given to reach() in src; those of files.py stand there with the kind of file to
    come."""
    return {
        name
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r'reach\(f?"([^"]+)"', path.read_text())
    }


@pytest.mark.slow
@pytest.mark.data
def test_every_failpoint_of_the_source_is_reached(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Warm(
        composed_once=True, imports=["lm_eval"]
    ) as warm:  # with the packages of the usual cache
        task = set(trace(warm, TASK, root / "traced-task"))
    monkeypatch.setenv("GAIN_CL_CACHE", str(root / "cache"))
    with Warm(composed_once=True) as warm:
        full = set(trace(warm, FULL, root / "traced-full"))
    kinds = {"json", "jsonl", "parquet", "csv", "png"}
    wanted = {
        re.sub(r"\{.*\}", kind, name)
        for name in reached_in_source()
        for kind in (kinds if "{" in name else {""})
    }
    elsewhere = {
        "save.between_renames",
        "dashboard.opened",
        "dashboard.closed",
    }  # test_faults_corrupt.py, test_track.py
    assert wanted - task - full == elsewhere
    assert task | full <= wanted


@pytest.mark.slow
@pytest.mark.parametrize("case", [GAIN, FULL], ids=["gain_ffn", "full"])
def test_kills_at_io_boundaries(warm: Warm, root: Path, case: Case) -> None:
    number = CASES.index(case)
    points = boundaries(trace(warm, case, root / f"traced-{number}"))
    survived(kill_at_boundaries(warm, root, case, points[number::9]))


@pytest.mark.slow
def test_kills_around_the_removal_of_an_older_stage_s_state(warm: Warm, root: Path) -> None:
    survived(kill_at_boundaries(warm, root, FULL, ["drop.between@1", "stage.after@4"]))


@pytest.mark.slow
def test_about_40_kills_at_random_moments(warm: Warm, root: Path) -> None:
    survived(kill_at_random(warm, root, 20, seed=1))


@pytest.mark.slow
def test_12_requests_to_stop(warm: Warm, root: Path) -> None:
    survived(preempt(warm, root, 12, seed=1))


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(warm: Warm, root: Path) -> None:
    survived(quit_at_once(warm, root))


# --- its broken twins -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "case", "point", "complaint"),
    [
        ("in_place", GAIN, "save.after_write@3", "exit code 65"),
        ("rng_not_saved", LORA, "commit@4", "differs"),
        ("off_by,1", GAIN, "commit@2", "metrics.jsonl has"),
        ("off_by,-1", GAIN, "commit@2", "metrics.jsonl has"),
        ("optimizer_forgotten", GAIN, "commit@2", "safetensors differs"),
        ("adapter_forgotten", GAIN, "commit@2", "safetensors differs"),
        ("guard_forgotten", MEMORY, "commit@6", "safetensors differs"),
        ("truncate_not", LORA, "save.before_write@11", "metrics.jsonl has"),
        ("cells_forgotten", GAIN, "stage.before@3", "cells were scored again"),
        ("record_in_place", GAIN, "json.after_write@18", "exit code 65"),
    ],
)
def test_a_broken_twin_does_not_survive_a_kill(
    warm: Warm, root: Path, twin: str, case: Case, point: str, complaint: str
) -> None:
    outcome = kill_at_boundaries(warm, root, case, [point], patch=f"twins:{twin}")
    assert outcome.survived == 0
    assert complaint in outcome.failures[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "complaint"),
    [
        ("deaf", "instead of 75"),
        ("dies_of_signals", "instead of 75"),
        ("signal_unsaved", "steps were done again"),
    ],
)
def test_a_broken_twin_does_not_survive_a_request_to_stop(
    warm: Warm, root: Path, twin: str, complaint: str
) -> None:
    outcome = preempt(
        warm, root, 1, [GAIN if twin != "signal_unsaved" else CASES[3]], patch=f"twins:{twin}"
    )
    assert outcome.survived == 0
    assert complaint in outcome.failures[0]
