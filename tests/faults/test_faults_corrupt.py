"""Damaged files, in small counts; scripts/campaign.py does the full ones. Every campaign must
notice its broken twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import twins
from campaign import Outcome, Warm
from campaign_corrupt import STATES, State, bad_ones_stay_out, decide, kill_while_replacing, run_on

from gain_cl.runs import resume
from gain_cl.system import checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def warm(root: Path) -> Iterator[Warm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAIN_CL_CACHE", str(root / "cache"))
        with Warm(composed_once=True) as parent:
            yield parent


def survived(outcome: Outcome) -> None:
    assert outcome.failures == []
    assert outcome.survived == outcome.injected > 0 < outcome.compared


def test_every_damage_is_caught_before_use(warm: Warm, root: Path) -> None:
    survived(decide(warm, root, 8))


@pytest.mark.parametrize("twin", [twins.no_manifest_check, twins.restart_on_bad])
def test_a_broken_twin_does_not_catch_it(
    warm: Warm, root: Path, twin: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((checkpoint, "verify"), (resume, "begin_attempt")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is put back
    twin()
    outcome = decide(warm, root, 2)
    assert len(outcome.failures) > outcome.injected / 4


@pytest.mark.slow
def test_a_run_with_a_damaged_file_goes_on_from_the_state_before_or_stops(
    warm: Warm, root: Path
) -> None:
    survived(run_on(warm, root, 9))


@pytest.mark.slow
def test_a_kill_while_a_damaged_stage_is_replaced(warm: Warm, root: Path) -> None:
    survived(kill_while_replacing(warm, root))


@pytest.mark.slow
def test_bad_checkpoints_do_not_push_out_good_ones(warm: Warm, root: Path) -> None:
    survived(bad_ones_stay_out(warm, root))
    assert bad_ones_stay_out(warm, root, "twins:bad_ones_stay").failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("twin", "state", "complaint"),
    [
        ("no_manifest_check", STATES[0], "says nothing"),
        ("restart_on_bad", STATES[0], "says nothing"),
        ("keep_one", STATES[0]._replace(point="prune.after@5"), "steps were done again"),
    ],
)
def test_a_broken_twin_does_not_survive_a_damage(
    warm: Warm, root: Path, twin: str, state: State, complaint: str
) -> None:
    outcome = run_on(warm, root, 3, patch=f"twins:{twin}", states=(state,))
    assert any(complaint in failure for failure in outcome.failures)
