"""The loss matrix: every metric against a matrix worked out by hand, every interval against a
bootstrap and in simulation."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import synthetic
from gain_cl.stats import matrix
from gain_cl.stats.matrix import LossMatrix

TRAINED, CONTROLS = ["a", "b", "c"], ["x", "y"]

# Nats per token after stages 0..3; stage k trains the k-th column.
#                 a     b     c     x     y
LOSS = np.array(
    [
        [3.00, 2.00, 4.00, 2.50, 3.50],
        [2.50, 1.90, 4.10, 2.45, 3.45],
        [2.70, 1.40, 3.80, 2.40, 3.50],
        [2.60, 1.70, 3.10, 2.30, 3.40],
    ]
)


def flat(
    loss: np.ndarray, trained: list[str], controls: list[str], documents: int = 4
) -> LossMatrix:
    """Documents of different lengths that all have their cell's loss per token."""
    tokens = np.arange(1, documents + 1) * 10.0
    names = trained + controls
    return LossMatrix(
        {d: np.outer(loss[:, j], tokens) for j, d in enumerate(names)},
        dict.fromkeys(names, tokens),
        trained,
        controls,
    )


def noisy(seed: int, documents: int = 40, trained: int = 4, controls: int = 2) -> LossMatrix:
    """Documents that differ in level, in length and in how they change."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(trained)] + [f"c{i}" for i in range(controls)]
    nll, tokens = {}, {}
    for d in names:
        tokens[d] = rng.integers(20, 129, documents).astype(float)
        level = 3 + rng.normal(0, 0.5, documents)
        steps = rng.normal(-0.02, 0.08, (trained + 1, documents)) * (
            1 + tokens[d] / 128
        )  # a change that depends on the length
        steps[0] = 0
        nll[d] = (level + steps.cumsum(0)) * tokens[d]
    return LossMatrix(nll, tokens, names[:trained], names[trained:])


@pytest.mark.parametrize(
    ("metric", "by_hand"),
    [
        ("learned", ((2.50 - 3.00) + (1.40 - 2.00) + (3.10 - 4.00)) / 3),
        ("own_step", ((2.50 - 3.00) + (1.40 - 1.90) + (3.10 - 3.80)) / 3),
        ("zero_shot", ((1.90 - 2.00) + (3.80 - 4.00)) / 2),
        ("backward", ((2.60 - 2.50) + (1.70 - 1.40)) / 2),
        # the controls moved by (-0.15 - 0.05) / 2 since stage 1 and by (-0.10 - 0.10) / 2 since
        # stage 2
        ("backward_net", ((0.10 + 0.10) + (0.30 + 0.10)) / 2),
        ("from_base", ((2.60 - 3.00) + (1.70 - 2.00) + (3.10 - 4.00)) / 3),
        ("controls_from_base", ((2.30 - 2.50) + (3.40 - 3.50)) / 2),
    ],
)
def test_metric_by_hand(metric: str, by_hand: float) -> None:
    assert matrix.summary(flat(LOSS, TRAINED, CONTROLS))[metric].value == pytest.approx(
        by_hand, abs=1e-12
    )


def test_every_metric_is_tested_by_hand() -> None:
    tested = {p[0] for p in test_metric_by_hand.pytestmark[0].args[1]}
    assert tested == {f.__name__ for f in matrix.METRICS}


def test_gem_signs() -> None:
    """Against GEM's own formulas (1706.08840, eqs. 2-4) on R = -L: forgetting is -BWT, the
    zero-shot part is -FWT."""
    r, t = -LOSS[:, :3], 3
    bwt = sum(r[t, i] - r[i + 1, i] for i in range(t - 1)) / (t - 1)
    fwt = sum(r[i, i] - r[0, i] for i in range(1, t)) / (t - 1)
    found = matrix.summary(flat(LOSS, TRAINED, CONTROLS))
    assert found["backward"].value == pytest.approx(-bwt)
    assert found["zero_shot"].value == pytest.approx(-fwt)


@pytest.mark.parametrize("seed", range(3))
def test_learned_is_zero_shot_part_plus_own_step(seed: int) -> None:
    """The first domain has no stage before its own, so its zero-shot part is 0; the metric is the
    mean over the others."""
    m = noisy(seed)
    found, t = matrix.summary(m), m.stages
    assert found["learned"].value == pytest.approx(
        found["own_step"].value + found["zero_shot"].value * (t - 1) / t, abs=1e-12
    )
    whole = matrix.own_step(m) + matrix.zero_shot(m) * (t - 1) / t
    np.testing.assert_allclose(
        matrix.learned(m), whole, atol=1e-15
    )  # as coefficients: document by document


def test_change_from_base_is_learned_plus_backward_change() -> None:
    found, t = matrix.summary(noisy(5)), 4
    assert found["from_base"].value == pytest.approx(
        found["learned"].value + found["backward"].value * (t - 1) / t, abs=1e-12
    )


def test_every_metric_ignores_a_shift_of_a_domain() -> None:
    """All are differences: coefficients of a domain sum to 0, so a domain that is harder throughout
    changes nothing."""
    m = noisy(1)
    for f in matrix.METRICS:
        np.testing.assert_allclose(f(m).sum(0), 0, atol=1e-12)


def test_a_drift_shared_with_the_controls_leaves_the_net_backward_change_alone() -> None:
    drift = np.array([0.0, -0.10, -0.15, -0.17])[:, None]
    before, after = (matrix.summary(flat(x, TRAINED, CONTROLS)) for x in (LOSS, LOSS + drift))
    assert after["backward"].value != pytest.approx(before["backward"].value)
    assert after["backward_net"].value == pytest.approx(before["backward_net"].value, abs=1e-12)


def test_a_cell_is_weighted_by_tokens() -> None:
    m = LossMatrix(
        {"a": np.array([[10.0, 300.0], [10.0, 200.0]])}, {"a": np.array([10.0, 100.0])}, ["a"], []
    )
    assert m.loss[:, 0] == pytest.approx([310 / 110, 210 / 110])  # not the mean of 1.0 and 3.0
    assert m.loss[1, 0] == pytest.approx(210 / 110)


# --- contributions, ids ---------------------------------------------------------------------------


def test_bits_per_byte_by_hand() -> None:
    """ln 2 nats are one bit: 40 bits over 20 bytes, of documents whose own ratios (3 and 1.667)
    average to another number."""
    nll = np.array([[15.0, 25.0], [5.0, 5.0]]) * math.log(2)
    tokens, nbytes = (dict.fromkeys("ax", np.array(n)) for n in ([4, 6], [5, 15]))
    m = LossMatrix({"a": nll, "x": nll * 2}, tokens, ["a"], ["x"], nbytes=nbytes)
    np.testing.assert_allclose(m.bits_per_byte, [[2.0, 4.0], [0.5, 1.0]], rtol=1e-14)


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """The same probability of the same text in half the tokens: twice the nats per token, the same
    bits per byte."""
    nll, nbytes = {"a": np.array([[30.0, 60.0], [20.0, 50.0]])}, {"a": np.array([40.0, 80.0])}
    fine, coarse = (
        LossMatrix(nll, {"a": np.array(tokens)}, ["a"], [], nbytes=nbytes)
        for tokens in ([10.0, 20.0], [5.0, 10.0])
    )
    np.testing.assert_allclose(coarse.loss, 2 * fine.loss)
    np.testing.assert_array_equal(coarse.bits_per_byte, fine.bits_per_byte)


def test_bytes_are_optional() -> None:
    m = flat(LOSS, TRAINED, CONTROLS)
    assert m.nbytes is None
    with pytest.raises(ValueError, match="bytes of the scored documents are not known"):
        m.bits_per_byte  # noqa: B018
    with pytest.raises(ValueError, match=r"a: bytes of 3 documents, tokens of 2"):
        LossMatrix({"a": np.ones((2, 2))}, {"a": np.ones(2)}, ["a"], [], nbytes={"a": np.ones(3)})


def test_contributions_by_hand() -> None:
    """Own step of two domains, half each: the later row minus the earlier one, halved, document by
    document."""
    nll = {
        "a": [[30.0, 50.0], [20.0, 46.0], [21.0, 47.0]],
        "b": [[8.0, 10.0], [9.0, 9.0], [5.0, 7.0]],
        "x": [[1.0, 1.0]] * 3,
    }
    m = LossMatrix(
        {d: np.array(v) for d, v in nll.items()},
        dict.fromkeys("abx", np.array([10.0, 20.0])),
        ["a", "b"],
        ["x"],
    )
    c = matrix.own_step(m)
    assert c is not None
    found = m.contributions(c)
    assert list(found) == ["a", "b"]  # nothing of the control
    np.testing.assert_allclose(found["a"][0], [-5.0, -2.0])
    np.testing.assert_allclose(found["b"][0], [-2.0, -1.0])
    np.testing.assert_array_equal(found["a"][1], [10.0, 20.0])
    assert m.estimate(c).value == pytest.approx(-7 / 30 - 3 / 30)


@pytest.mark.parametrize("metric", matrix.METRICS, ids=lambda f: f.__name__)
def test_contributions_hold_all_of_an_estimate(metric: object) -> None:
    m = noisy(2)
    c = metric(m)  # type: ignore[operator]
    parts = m.contributions(c)
    assert set(parts) == {d for j, d in enumerate(m.domains) if c[:, j].any()}
    assert sum(z.sum() / tokens.sum() for z, tokens in parts.values()) == pytest.approx(
        float((c * m.loss).sum()), abs=1e-12
    )
    assert sum(len(z) for z, _ in parts.values()) == m.estimate(c).n


# --- forgetting by age, forward transfer, other definitions ---------------------------------------

# Right after its own stage is not a domain's best: a is best before any training, b before its own
# stage. a     b     c     x
ODD = np.array(
    [
        [2.00, 3.00, 4.00, 2.50],
        [2.50, 2.80, 4.20, 2.90],
        [2.40, 2.90, 4.10, 1.10],
        [2.45, 3.10, 3.00, 2.70],
    ]
)


def values(m: LossMatrix, found: dict[int, np.ndarray]) -> dict[int, float]:
    return {a: m.estimate(c).value for a, c in found.items()}


def test_forgetting_by_age_by_hand() -> None:
    m = flat(LOSS, TRAINED, CONTROLS)
    by_hand = {1: (0.20 + 0.30) / 2, 2: 0.10}  # a 2.50 > 2.70 > 2.60, b 1.40 > 1.70
    found = matrix.forgetting_by_age(m)
    assert list(found) == [1, 2] and values(m, found) == pytest.approx(by_hand)
    odd = flat(ODD, TRAINED, ["x"])
    assert values(odd, matrix.forgetting_by_age(odd)) == pytest.approx(
        {1: (-0.10 + 0.20) / 2, 2: -0.05}
    )  # better is negative
    assert not any(
        c[:, 2:].any() for c in found.values()
    )  # the last domain has no age, controls none


def test_forgetting_by_age_and_backward_change() -> None:
    """Backward change is the mean over domains of their highest ages; with two stages there is one
    age, and it is that."""
    m = noisy(6)
    ages = matrix.forgetting_by_age(m)
    assert list(ages) == [1, 2, 3]
    last = sum(
        c * np.isin(np.arange(len(m.domains)), m.stages - 1 - a) * (m.stages - a)
        for a, c in ages.items()
    ) / (m.stages - 1)
    np.testing.assert_allclose(last, matrix.backward(m), atol=1e-15)
    two = noisy(7, trained=2)
    np.testing.assert_array_equal(matrix.forgetting_by_age(two)[1], matrix.backward(two))


def test_forward_transfer_by_hand() -> None:
    m = flat(LOSS, TRAINED, CONTROLS)
    c = matrix.forward_transfer(m)
    assert c is not None and m.estimate(c).value == pytest.approx(
        (0.10 + 0.20) / 2
    )  # b 2.00 > 1.90, c 4.00 > 3.80: helped
    assert m.estimate(c).value == -matrix.summary(m)["zero_shot"].value
    assert matrix.forward_transfer not in matrix.METRICS


def test_published_by_hand() -> None:
    # a: 2.50 after its stage, 2.45 at the end, best of stages 1 and 2 2.40; b: 2.90, 3.10, 2.80; c:
    # 3.00 at its stage and the end
    assert matrix.published(flat(ODD, TRAINED, ["x"])) == pytest.approx(
        {
            "forward_transfer": (0.20 - 0.10) / 2,
            "gem_bwt": (0.05 - 0.20) / 2,
            "gem_fwt": (0.20 - 0.10) / 2,
            "chaudhry_forgetting": (0.05 + 0.30) / 2,
            "trace_op": -8.55 / 3,
            "trace_bwt": (0.05 - 0.20 + 0) / 3,
            "avalanche_forgetting": 0.075,
            "avalanche_bwt": -0.075,
            "avalanche_forward_transfer": 0.05,
        }
    )


def test_forgetting_from_best_may_be_negative() -> None:
    """The end is not among the stages it is compared with: a 2.50 at its stage, 2.40 at the end."""
    m = flat(np.array([[3.0, 2.0], [2.5, 2.0], [2.4, 1.5]]), ["a", "b"], [])
    assert matrix.published(m)["chaudhry_forgetting"] == pytest.approx(-0.10)


def test_published_leaves_out_controls_and_the_base_where_it_should() -> None:
    base = ODD.copy()
    base[:, 3] += 7.0
    assert matrix.published(flat(base, TRAINED, ["x"])) == matrix.published(flat(ODD, TRAINED, []))
    base[0] -= 1.0
    moved, still = (
        matrix.published(flat(base, TRAINED, ["x"])),
        matrix.published(flat(ODD, TRAINED, ["x"])),
    )
    changed = {name for name in still if moved[name] != pytest.approx(still[name])}
    assert changed == {
        "forward_transfer",
        "gem_fwt",
        "avalanche_forward_transfer",
    }  # row 0 is no best of Chaudhry's


@pytest.mark.parametrize("seed", range(3))
def test_published_against_the_metrics(seed: int) -> None:
    m, t = noisy(seed), 4
    found, own = matrix.published(m), {name: e.value for name, e in matrix.summary(m).items()}
    assert found["gem_bwt"] == found["avalanche_bwt"] == pytest.approx(-own["backward"])
    assert (
        found["gem_fwt"]
        == found["avalanche_forward_transfer"]
        == found["forward_transfer"]
        == pytest.approx(-own["zero_shot"])
    )
    assert found["trace_bwt"] == pytest.approx(found["gem_bwt"] * (t - 1) / t)
    assert found["chaudhry_forgetting"] >= -found["gem_bwt"]
    assert all(type(v) is float for v in found.values())


def test_what_needs_an_order_of_stages_exists_only_there() -> None:
    joint = LossMatrix(
        {d: np.array([[30.0], [20.0]]) for d in "ab"},
        dict.fromkeys("ab", np.array([10.0])),
        ["a", "b"],
        [],
        "joint",
    )
    alone = LossMatrix(
        {d: np.ones((3, 2)) for d in "ab"},
        dict.fromkeys("ab", np.ones(2)),
        ["a", "b"],
        [],
        "individual",
    )
    for m in (joint, alone):
        assert (
            matrix.published(m) == {}
            and matrix.forgetting_by_age(m) == {}
            and matrix.forward_transfer(m) is None
        )
    one = LossMatrix({"a": np.array([[30.0], [20.0]])}, {"a": np.array([10.0])}, ["a"], [])
    assert matrix.published(one) == {"trace_op": -2.0, "trace_bwt": 0.0}
    assert matrix.forgetting_by_age(one) == {} and matrix.forward_transfer(one) is None


# --- docs/metrics.md ------------------------------------------------------------------------------


def tables() -> list[list[list[str]]]:
    """Rows of cells of every table on the page, heads and rules left out."""
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    found = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in found
    ]


def test_the_page_names_what_exists_and_every_metric() -> None:
    named = [re.findall(r"`([\w.]+)`", row[-1]) for row in tables()[0]]
    assert all(named)
    names = {name for row in named for name in row}
    for name in names:
        module, *path = name.split(".")
        room = "measure" if module in ("perplexity", "record") else "stats"
        thing = importlib.import_module(f"gain_cl.{room}.{module}")
        for part in path:
            thing = getattr(thing, part)
    assert {f"matrix.{f.__name__}" for f in matrix.METRICS} <= names


def test_the_example_of_the_page() -> None:
    """Each number as the arithmetic beside it and as the code computes it from the page's
    matrix."""
    _, cells, rows = tables()
    m = flat(
        np.array([[float(x) for x in row[1:]] for row in cells]),
        ["law", "code", "news"],
        ["geography"],
    )
    computed = {name: e.value for name, e in matrix.summary(m).items()} | matrix.published(m)
    computed |= {
        f"forgetting_by_age[{a}]": v for a, v in values(m, matrix.forgetting_by_age(m)).items()
    }
    assert [row[0].strip("`") for row in rows] == list(
        dict.fromkeys(row[0].strip("`") for row in rows)
    )
    assert {row[0].strip("`") for row in rows} == set(computed)
    for name, arithmetic, shown in rows:
        assert re.fullmatch(r"(?:[0-9.+*/(), -]|max)+", arithmetic)
        by_hand = eval(arithmetic)
        assert shown == f"{by_hand:+.4f}", name
        assert computed[name.strip("`")] == pytest.approx(by_hand, abs=1e-12), name
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    assert f"+{100 * math.expm1(computed['backward']):.1f}% of perplexity" in page
    assert f"mean perplexity ({math.exp(-computed['trace_op']):.2f} here)" in page
    law = m.nll_nats["law"][-1].sum() / (math.log(2) * 4 * m.tokens["law"].sum())
    assert f"= {law:.4f} bits per byte" in page


# --- intervals ------------------------------------------------------------------------------------


def bootstrap(
    m: LossMatrix, coefficients: np.ndarray, resamples: int = 4000
) -> tuple[float, float, float]:
    """Standard error and 95% percentile interval: documents drawn with replacement within each
    domain, stages together."""
    rng = np.random.default_rng(0)
    values = np.zeros(resamples)
    for j, d in enumerate(m.domains):
        if coefficients[:, j].any():
            n = len(m.tokens[d])
            drawn = rng.integers(0, n, (resamples, n))
            values += (coefficients[:, j] @ m.nll_nats[d])[drawn].sum(1) / m.tokens[d][drawn].sum(1)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.std()), float(low), float(high)


@pytest.mark.parametrize("metric", matrix.METRICS, ids=lambda f: f.__name__)
def test_interval_agrees_with_a_bootstrap_over_documents(metric: object) -> None:
    m = noisy(3, documents=80)
    c = metric(m)  # type: ignore[operator]
    e = m.estimate(c)
    spread, low, high = bootstrap(m, c)
    assert (e.high - e.low) / (2 * 1.97) == pytest.approx(spread, rel=0.05)
    assert e.low == pytest.approx(low, abs=0.3 * spread)
    assert e.high == pytest.approx(high, abs=0.3 * spread)


def test_a_cell_interval_agrees_with_a_bootstrap() -> None:
    m = noisy(4, documents=80)
    c = np.zeros_like(m.loss)
    c[2, 1] = 1
    e = m.estimate(c)
    assert (e.value, e.n) == (pytest.approx(m.loss[2, 1]), 80)
    assert (e.high - e.low) / (2 * 1.99) == pytest.approx(bootstrap(m, c)[0], rel=0.05)


def test_stages_are_paired_on_documents() -> None:
    """Levels of documents differ far more than their changes: the interval of a change must not
    contain the levels."""
    rng = np.random.default_rng(0)
    tokens = np.full(64, 128.0)
    level = 3 + rng.normal(0, 0.5, 64)
    nll = np.stack([level, level - 0.1 + rng.normal(0, 0.03, 64)]) * tokens
    e = matrix.summary(LossMatrix({"a": nll}, {"a": tokens}, ["a"], []))["own_step"]
    assert e.high - e.low == pytest.approx(
        2 * 2.0 * 0.03 / 8, rel=0.25
    )  # unpaired it would be 20 times wider


@pytest.mark.parametrize(("documents", "confidence"), [(8, 0.95), (32, 0.95), (32, 0.5)])
def test_simulated_coverage(documents: int, confidence: float) -> None:
    """The interval holds the truth as often as it says: documents of unequal length, skewed
    changes, unequal domains."""
    rng = np.random.default_rng(documents)
    trials, hits = 1500, 0
    means, spreads = {"a": -0.1, "b": 0.02, "c": 0.0}, {"a": 0.03, "b": 0.15, "c": 0.03}
    truth = sum(means.values()) / 3
    for _ in range(trials):
        nll, tokens = {}, {}
        for d, mean in means.items():
            tokens[d] = np.where(
                rng.random(documents) < 0.7, 128.0, rng.integers(30, 128, documents)
            )
            change = (
                mean + spreads[d] * (rng.gamma(4, 1, documents) - 4) / 2
            )  # independent of the length
            nll[d] = np.stack([3 * tokens[d]] * 3 + [(3 + change) * tokens[d]])
        m = LossMatrix(nll, tokens, list(means), [])
        e = m.estimate(matrix.from_base(m), confidence)
        hits += e.low <= truth <= e.high
    error = math.sqrt(confidence * (1 - confidence) / trials)
    assert hits / trials == pytest.approx(
        confidence, abs=4 * error + (0.03 if documents < 16 else 0.01)
    )


def test_a_length_that_goes_with_the_change_is_covered_too() -> None:
    """The value is a ratio of sums; its truth is E[change x tokens] / E[tokens], not E[change]."""
    rng = np.random.default_rng(1)
    trials, hits = 1500, 0
    truth = (0.5 * 40 * 0.3 + 0.5 * 128 * -0.1) / (0.5 * 40 + 0.5 * 128)
    for _ in range(trials):
        short = rng.random(32) < 0.5
        tokens = np.where(short, 40.0, 128.0)
        change = np.where(short, 0.3, -0.1) + rng.normal(0, 0.05, 32)
        m = LossMatrix(
            {"a": np.stack([3 * tokens, (3 + change) * tokens])}, {"a": tokens}, ["a"], []
        )
        e = m.estimate(matrix.own_step(m))
        hits += e.low <= truth <= e.high
    assert hits / trials == pytest.approx(0.95, abs=0.03)


# --- degenerate cases -----------------------------------------------------------------------------


def test_one_stage_one_document_no_control() -> None:
    m = LossMatrix({"a": np.array([[30.0], [20.0]])}, {"a": np.array([10.0])}, ["a"], [])
    found = matrix.summary(m)
    assert set(found) == {
        "learned",
        "own_step",
        "from_base",
    }  # nothing came before or after, nothing controls
    e = found["own_step"]
    assert (e.value, e.n) == (-1.0, 1)
    assert math.isnan(e.low) and math.isnan(e.high)  # one document has no spread


def test_one_domain_of_one_document_makes_the_interval_unknown() -> None:
    m = noisy(0, trained=2, controls=0)
    nll, tokens = dict(m.nll_nats), dict(m.tokens)
    nll["d1"], tokens["d1"] = nll["d1"][:, :1], tokens["d1"][:1]
    e = matrix.summary(LossMatrix(nll, tokens, ["d0", "d1"], []))["own_step"]
    assert math.isfinite(e.value) and math.isnan(e.low) and e.n == 41


def test_identical_documents_have_an_interval_of_no_width() -> None:
    e = matrix.summary(flat(LOSS, TRAINED, CONTROLS))["own_step"]
    assert e.low == pytest.approx(e.value, abs=1e-9) and e.high == pytest.approx(e.value, abs=1e-9)


def test_estimate_on_another_scale() -> None:
    e = matrix.Estimate(math.log(1.1), math.log(1.05), math.log(1.2), 7).map(
        lambda x: 100 * math.expm1(x)
    )
    assert (e.value, e.low, e.high, e.n) == (
        pytest.approx(10),
        pytest.approx(5),
        pytest.approx(20),
        7,
    )


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="a: "):
        LossMatrix({"a": np.zeros((3, 2))}, {"a": np.ones(2)}, ["a"], [])


# --- from the document table ----------------------------------------------------------------------


def test_from_documents_pairs_by_id_in_any_row_order() -> None:
    table = synthetic.documents({"a": 20.0, "b": 30.0, "x": 10.0}, ["a", "b"], count=6)
    one = LossMatrix.from_documents(table, ["a", "b"], ["x"])
    two = LossMatrix.from_documents(table.sample(frac=1, random_state=0), ["a", "b"], ["x"])
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-14)
    assert matrix.summary(one)["own_step"].low == pytest.approx(matrix.summary(two)["own_step"].low)
    rows = table[(table.domain == "b") & (table.stage == 2)]
    assert one.loss[2, 1] == pytest.approx(rows.nll_nats.sum() / rows.tokens.sum())
    assert one.bits_per_byte[2, 1] == pytest.approx(
        rows.nll_nats.sum() / math.log(2) / rows.bytes.sum()
    )


def test_from_documents_has_the_documents_in_the_order_of_their_ids() -> None:
    """What pairs the documents of two runs."""
    table = synthetic.documents({"a": 20.0, "x": 10.0}, ["a"], count=6).sample(
        frac=1, random_state=1
    )
    m = LossMatrix.from_documents(table, ["a"], ["x"])
    for d in ("a", "x"):
        for i, document in enumerate(sorted(set(table[table.domain == d].document))):
            for stage in (0, 1):
                (row,) = table[
                    (table.domain == d) & (table.document == document) & (table.stage == stage)
                ].itertuples()
                assert (m.nll_nats[d][stage, i], m.tokens[d][i]) == (row.nll_nats, row.tokens)


@pytest.mark.parametrize("fault", ["document", "stage", "domain", "tokens", "twice"])
def test_from_documents_refuses_a_hole(fault: str) -> None:
    table = synthetic.documents({"a": 20.0, "b": 30.0}, ["a", "b"], count=4)
    if fault == "document":
        table = table.drop(index=table.index[(table.domain == "b") & (table.stage == 1)][0])
    elif fault == "stage":
        table = table[~((table.domain == "b") & (table.stage == 1))]
    elif fault == "domain":
        table = table[table.domain != "b"]
    elif fault == "tokens":
        table.loc[table.index[(table.domain == "b") & (table.stage == 1)][0], fault] += 1
    else:
        table = pd.concat([table, table.tail(1)])
    with pytest.raises(ValueError):
        LossMatrix.from_documents(table, ["a", "b"], [])
