"""How stages follow each other: handed over or restarted, all domains at once, each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gain_cl import api, cli
from gain_cl.compose import composition
from gain_cl.errors import ConfigError
from gain_cl.measure import record
from gain_cl.paper import show
from gain_cl.stats import matrix

SMOKE = ["debug=smoke", "train.steps=3"]


def run(folder: Path, *overrides: str) -> record.Run:
    return api.run(*SMOKE, *overrides, f"output_dir={folder}/runs", f"results_dir={folder}/results")


def trained(folder: Path, made: record.Run, stage: int) -> dict[str, torch.Tensor]:
    (path,) = (folder / "runs" / made.record.run_id / "stages").glob(
        f"{stage:02d}-*/adapter.safetensors"
    )
    return load_file(path)


@pytest.mark.parametrize(
    "method", ["individual", "gain_ffn", pytest.param("full", marks=pytest.mark.slow)]
)
def test_individual_equals_a_run_of_that_domain_bit_for_bit(tmp_path: Path, method: str) -> None:
    regime = [f"method={method}", "regime=individual", "checkpoint.keep_stages=all"]
    together = run(tmp_path, *regime)
    for stage, domain in enumerate(["smoke_a", "smoke_b", "smoke_c"], start=1):
        alone = run(
            tmp_path,
            f"domain=[{domain}]",
            *(["regime=sequential"] if method == "individual" else []),
            *regime[:1],
        )
        a, b = trained(tmp_path, together, stage), trained(tmp_path, alone, 1)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert (
            together.record.stages[stage].domains[domain] == alone.record.stages[1].domains[domain]
        )
    assert not any(
        torch.equal(trained(tmp_path, together, 1)[n], t)
        for n, t in trained(tmp_path, together, 2).items()
        if t.any()
    )


def test_joint_learns_every_domain_in_one_stage_with_the_same_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joint, one_by_one = (
        run(tmp_path, "method=gain_ffn", "regime=joint"),
        run(tmp_path, "method=gain_ffn"),
    )
    r = joint.record
    assert [s.domain for s in r.stages] == [None, "joint"] and r.regime == "joint"
    assert r.trained == one_by_one.record.trained and list(r.stages[1].domains) == [
        *r.trained,
        *r.controls,
    ]
    assert r.stages[1].train.tokens == sum(s.train.tokens for s in one_by_one.record.stages[1:])  # type: ignore[union-attr]
    assert r.stages[0].domains == one_by_one.record.stages[0].domains
    assert r.run_id != one_by_one.record.run_id
    found = matrix.summary(
        matrix.LossMatrix.from_documents(joint.documents, r.trained, r.controls, r.regime)
    )
    assert set(found) == {"learned", "from_base", "controls_from_base"}
    losses = r.losses()
    assert found["learned"].value == pytest.approx(float(np.mean(losses[1, :3] - losses[0, :3])))
    show.render(joint)
    assert "joint" in capsys.readouterr().out
    assert record.load(joint.path).record == r


def test_individual_has_no_backward_change() -> None:
    rng = np.random.default_rng(0)
    nll = {d: rng.uniform(20, 30, (3, 4)) for d in "abx"}
    m = matrix.LossMatrix(
        nll, dict.fromkeys("abx", np.full(4, 10.0)), ["a", "b"], ["x"], "individual"
    )
    found = matrix.summary(m)
    assert set(found) == {"learned", "own_step", "controls_from_base"}
    assert found["own_step"] == found["learned"]
    assert found["learned"].value == pytest.approx(
        ((m.loss[1, 0] - m.loss[0, 0]) + (m.loss[2, 1] - m.loss[0, 1])) / 2
    )
    assert found["controls_from_base"].value == pytest.approx(
        (m.loss[1, 2] + m.loss[2, 2]) / 2 - m.loss[0, 2]
    )


def test_joint_of_a_hand_made_matrix() -> None:
    nll = {"a": np.array([[30.0, 50.0], [20.0, 40.0]]), "b": np.array([[10.0, 10.0], [12.0, 12.0]])}
    m = matrix.LossMatrix(
        nll, {"a": np.array([10.0, 10.0]), "b": np.array([10.0, 10.0])}, ["a", "b"], [], "joint"
    )
    assert matrix.summary(m)["learned"].value == pytest.approx((-1.0 + 0.2) / 2)


@pytest.mark.parametrize("method", ["gain_ffn", "gain_random_basis", "multiplicative_lora", "lora"])
def test_a_restarted_stage_begins_where_the_last_ended(tmp_path: Path, method: str) -> None:
    """At a rate of next to nothing the second stage changes next to nothing; its state holds what
    the first left frozen."""
    made = run(tmp_path, f"method={method}", "handover=restart", "domain=[smoke_a,smoke_b]")
    first, second = trained(tmp_path, made, 1), trained(tmp_path, made, 2)
    assert len(second) > len(first) and first.keys() < second.keys()
    other = run(tmp_path, f"method={method}", "domain=[smoke_a,smoke_b]")
    assert other.record.run_id != made.record.run_id
    assert (
        made.record.stages[1].domains == other.record.stages[1].domains
    )  # the first stage knows nothing of it
    assert made.record.stages[2].domains != other.record.stages[2].domains


def test_gains_restarted_are_products(tmp_path: Path) -> None:
    made = run(tmp_path, "method=gain_ffn", "handover=restart", "domain=[smoke_a,smoke_b]")
    first, second = trained(tmp_path, made, 1), trained(tmp_path, made, 2)
    for name, delta in first.items():
        torch.testing.assert_close(second[f"{name}.past"], 1 + delta, rtol=0, atol=0)


def test_joint_is_the_name_of_a_stage(tmp_path: Path) -> None:
    (tmp_path / "domain").mkdir()
    (tmp_path / "domain/joint.yaml").write_text("source: {kind: generated, seed: 5}\n")
    with pytest.raises(ConfigError, match="a domain is called joint"):
        composition.compose(["debug=smoke", "domain=[joint]"], [tmp_path])


@pytest.mark.parametrize(
    "extra", [["regime=joint"], ["regime=individual"], ["handover=restart"]], ids="".join
)
def test_verify_finds_nothing(
    tmp_path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(tmp_path, "method=gain_ffn", *extra)
    assert cli.main(["verify", str(made.path), "--output-dir", str(tmp_path / "runs")]) == 0, (
        capsys.readouterr()
    )


def test_norms_without_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = (
        "{model_type: olmo, vocab_size: 257, hidden_size: 32, intermediate_size: 48, "
        "num_hidden_layers: 1, num_attention_heads: 4}"
    )
    words = [
        "run",
        *SMOKE,
        "method=ln_only",
        f"model.arch={arch}",
        "domain=[smoke_a]",
        "train.block=32",
        "train.batch_tokens=64",
    ]
    assert (
        cli.main([*words, f"output_dir={tmp_path}/runs", f"results_dir={tmp_path}/results"]) == 64
    )
    assert "method ln_only trains nothing on this model" in capsys.readouterr().err
