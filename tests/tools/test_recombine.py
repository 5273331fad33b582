"""Stages taken out, weighted and reordered; the models between the pretrained one and a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gain_cl import api, cli
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.tools.recombine import factors, product

SMOKE = ["debug=smoke", "train.lr=3e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(folder: Path, *overrides: str) -> record.Run:
    return api.run(*SMOKE, *overrides, f"output_dir={folder}/runs", f"results_dir={folder}/results")


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0, capsys.readouterr()
    return dict(json.loads(capsys.readouterr().out))


RESTARTED_BF16 = [
    "method=gain_random_basis",
    "handover=restart",
    "model.dtype=bfloat16",
]  # a last bit of S shows after rounding


@pytest.mark.parametrize(
    "extra", [[], ["handover=restart"], ["method=gain_ffn_output"], RESTARTED_BF16], ids="".join
)
def test_nothing_dropped_is_the_run_and_the_last_dropped_is_the_stage_before(
    folder: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    made = run(folder, *extra)
    losses = made.record.losses()
    whole = ask(capsys, "recombine", str(made.path), "--no-contributions")
    np.testing.assert_allclose(whole["loss_nats"]["recombined"], losses[-1], rtol=0, atol=1e-6)
    before = ask(capsys, "recombine", str(made.path), "--drop", "smoke_c", "--no-contributions")
    np.testing.assert_allclose(before["loss_nats"]["recombined"], losses[-2], rtol=0, atol=1e-6)
    nothing = ask(capsys, "recombine", str(made.path), "--drop", "smoke_a,smoke_b,smoke_c")
    np.testing.assert_allclose(nothing["loss_nats"]["recombined"], losses[0], rtol=0, atol=1e-6)
    assert np.abs(losses[-1] - losses[-2]).max() > 1e-4


def test_contributions_are_differences_of_leaving_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder)
    found = ask(capsys, "recombine", str(made.path))
    assert set(found["contribution_nats"]) == {"smoke_a", "smoke_b", "smoke_c"}
    np.testing.assert_allclose(
        found["contribution_nats"]["smoke_c"],
        made.record.losses()[-2] - made.record.losses()[-1],
        rtol=0,
        atol=1e-6,
    )
    one = ask(capsys, "recombine", str(made.path), "--drop", "smoke_a", "--no-contributions")
    expected = np.array(one["loss_nats"]["recombined"]) - np.array(found["loss_nats"]["recombined"])
    np.testing.assert_allclose(found["contribution_nats"]["smoke_a"], expected, rtol=0, atol=1e-9)


def test_powers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(folder)
    half = ask(capsys, "recombine", str(made.path), "--scale", "smoke_b=0.5", "--no-contributions")
    whole = ask(capsys, "recombine", str(made.path), "--no-contributions")
    none = ask(capsys, "recombine", str(made.path), "--drop", "smoke_b", "--no-contributions")
    a, b, c = (x["loss_nats"]["recombined"][1] for x in (none, half, whole))
    assert min(a, c) < b < max(a, c)
    assert cli.main(["recombine", str(made.path)]) == 0
    assert "when a stage is left out" in capsys.readouterr().out


def test_gains_of_stages_are_ratios_of_cumulative_ones() -> None:
    states = [
        {"x": torch.tensor([0.5, -0.5])},
        {"x": torch.tensor([1.0, 0.0])},
        {"x": torch.tensor([0.5, 1.0]), "x.past": torch.tensor([2.0, 1.0])},
    ]
    found = factors(states)
    assert [f["x"].tolist() for f in found] == [[1.5, 0.5], [2 / 1.5, 2.0], [1.5, 2.0]]
    assert product(found, [1, 1, 1])["x"].tolist() == pytest.approx([2.0, 1.0])
    assert product(found, [0, 2, 0])["x"].tolist() == pytest.approx([(2 / 1.5) ** 2 - 1, 3.0])
    with pytest.raises(DataError, match="exactly 0"):
        factors([{"x": torch.tensor([-1.0])}])
    with pytest.raises(DataError, match="turned the sign"):
        product(factors([{"x": torch.tensor([-1.5])}]), [0.5])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--drop", "smoke_x"], "'smoke_x' is no stage"),
        (["--scale", "smoke_a"], "'' is no number (--scale smoke_a)"),
        (["--scale", "smoke_a=big"], "'big' is no number"),
    ],
)
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(["recombine", str(run(folder).path), *argv]) == 64
    assert message in capsys.readouterr().err


def test_a_run_without_stages_in_a_row_has_no_factors(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recombine", str(run(folder, "regime=individual").path)]) == 64
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("; use it on a sequential run of a gain_... method")
    )


def test_only_gains_multiply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recombine", str(run(folder, "method=full").path)]) == 64
    assert "method full has no gains" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["gain_ffn", "lora", "full", pytest.param("dora", marks=pytest.mark.slow)]
)
def test_the_ends_of_the_front_are_the_base_and_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    made = run(folder, f"method={method}")
    found = ask(capsys, "interpolate", str(made.path), "--alpha", "0,0.5,1")
    losses = made.record.losses()
    np.testing.assert_allclose(found["front"][0]["loss_nats"], losses[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["front"][2]["loss_nats"], losses[-1], rtol=0, atol=2e-6)
    assert not np.allclose(found["front"][1]["loss_nats"], losses[-1], atol=1e-5)
    assert found["front"][2]["from_base_nats"] == pytest.approx(
        float((losses[-1] - losses[0])[:3].mean()), abs=2e-6
    )


def test_half_of_the_change_of_gains_is_gains_of_half_the_size(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An independent way to the same model: W diag(1 + alpha delta)."""
    from gain_cl.measure import scoring
    from gain_cl.tools.reopen import Reopened

    made = run(folder)
    found = ask(capsys, "interpolate", str(made.path), "--alpha", "0.5")
    bench = Reopened(made, None)
    with bench.opened() as loaded:
        adapter = bench.attach(loaded)
    adapter.load_state({name: 0.5 * t for name, t in bench.state(3).items()})
    rows = [
        scoring.score_domain(bench.loaded, d, bench.config.eval, 16)
        for d in bench.inputs.domains.values()
    ]
    expected = [r.nll_nats.sum() / r.tokens.sum() for r in rows]
    np.testing.assert_allclose(found["front"][0]["loss_nats"], expected, rtol=0, atol=1e-6)


def test_a_state_that_was_not_kept_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder, "method=full")
    assert cli.main(["interpolate", str(made.path), "--stage", "1"]) == 65
    assert "was not kept" in capsys.readouterr().err
    assert cli.main(["interpolate", str(made.path), "--stage", "9"]) == 64


def test_the_front_of_a_bf16_run_is_computed_in_fp32(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change below bf16's resolution is nothing at alpha 1, and 64 times of it is much: rounding
    comes last."""
    settings = ["debug=smoke", "model.dtype=bfloat16", "train.lr=1e-4", "domain=[smoke_a]"]
    made = api.run(*settings, f"output_dir={folder}/runs", f"results_dir={folder}/results")
    found = ask(capsys, "interpolate", str(made.path), "--alpha", "0,64")
    base, far = (np.array(row["loss_nats"]) for row in found["front"])
    assert np.abs(far - base).max() > 1e-3
    assert any("do nothing" in note for note in made.record.notes)


def test_a_run_that_began_from_an_adapter_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = run(folder, "domain=[smoke_a]")
    assert cli.main(["export", str(made.path), "to=peft", f"dir={tmp_path}/a"]) == 0
    on = run(folder, "domain=[smoke_b]", f"adapter.init_from={tmp_path}/a")
    assert cli.main(["recombine", str(on.path)]) == 64
    assert "began from another adapter" in capsys.readouterr().err
    assert cli.main(["recombine", str(made.path), "--to", str(tmp_path / "a")]) == 64
