"""Intervals and tests: coverage in simulation, equality with scipy and statsmodels, and what they
refuse to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gain_cl.stats import inference
from gain_cl.stats.inference import Error
from gain_cl.stats.matrix import Estimate, Parts

Rng = np.random.Generator
P = inference.Tests


# --- simulated measurements -----------------------------------------------------------------------


def lengths(rng: Rng, n: int) -> np.ndarray:
    """Scored tokens of documents: most fill the window of 128, some are short."""
    return np.minimum(128, np.round(np.exp(rng.normal(4.6, 0.8, n)))).clip(8)


def trait(rng: Rng, n: int, shape: str = "heavy") -> np.ndarray:
    """Deviations of mean 0 and sd 1: heavy tails (Student's t, 5 degrees of freedom; "heavier": 3)
    or skewed (gamma, 2)."""
    if shape == "skewed":
        return (rng.gamma(2, 1, n) - 2) / np.sqrt(2)
    df = {"heavy": 5, "heavier": 3}[shape]
    return rng.standard_t(df, n) / np.sqrt(df / (df - 2))


def change(rng: Rng, n: int, mean: float, sds: list[float], shape: str = "heavy") -> Parts:
    """A mean over domains of changes in nats per token with these sds per document."""
    parts = {}
    for i, sd in enumerate(sds):
        tokens = lengths(rng, n)
        parts[f"d{i}"] = (mean + sd * trait(rng, n, shape)) * tokens / len(sds), tokens
    return parts


def repeated(
    rng: Rng,
    blocks: int,
    mean: float,
    block_sd: float,
    n: int = 32,
    domains: int = 3,
    sd: float = 0.03,
    name: str = "d",
) -> list[Parts]:
    """The same documents in every block: what is theirs is shared, the rest and the block's own
    deviation are not."""
    tokens = {f"{name}{i}": lengths(rng, n) if name == "d" else np.ones(n) for i in range(domains)}
    own = {d: trait(rng, n) for d in tokens}
    found = []
    for deviation in rng.normal(0, block_sd, blocks):
        per_token = {
            d: mean + deviation + sd * (0.8 * own[d] + 0.6 * trait(rng, n)) for d in tokens
        }
        found.append({d: (per_token[d] * tokens[d] / domains, tokens[d]) for d in tokens})
    return found


def value(parts: Parts) -> float:
    return float(sum(z.sum() / tokens.sum() for z, tokens in parts.values()))


def covers(e: Estimate, truth: float) -> bool:
    return e.low <= truth <= e.high


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["heavy", "heavier", "skewed"])
@pytest.mark.parametrize(
    ("n", "sds"), [(32, [0.03]), (32, [0.02, 0.035, 0.09]), (64, [0.09]), (64, [0.02, 0.035, 0.09])]
)
def test_bootstrap_t_covers(n: int, sds: list[float], shape: str) -> None:
    rng = np.random.default_rng([n, len(sds), len(shape)])
    hits = [
        covers(
            inference.bootstrap_t(change(rng, n, 0.03, sds, shape), seed=k % 8, resamples=1000),
            0.03,
        )
        for k in range(1000)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_bootstrap_t_covers_quickly() -> None:
    """The default case, 32 documents in each of three domains, in the fast suite."""
    rng = np.random.default_rng(8)
    hits = [
        covers(
            inference.bootstrap_t(
                change(rng, 32, -0.02, [0.02, 0.035, 0.09]), seed=k % 8, resamples=500
            ),
            -0.02,
        )
        for k in range(1000)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize(
    ("n", "discordant", "difference"), [(100, 0.15, 0.05), (500, 0.15, 0.0), (500, 0.05, 0.02)]
)
def test_bootstrap_t_covers_changes_of_accuracy(
    n: int, discordant: float, difference: float
) -> None:
    rng = np.random.default_rng(n)
    p = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    hits = [
        covers(
            inference.bootstrap_t(
                {"items": (rng.choice([1.0, -1.0, 0.0], n, p=p), np.ones(n))}, resamples=1000
            ),
            difference,
        )
        for _ in range(1000)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_resamples_equal_drawing_documents_again() -> None:
    """Counts and sums give what gathering the drawn documents gives, for the value and for its
    standard error."""
    parts = change(np.random.default_rng(0), 12, 0.1, [0.05, 0.2])
    deviations, variances = inference._sample(parts, 3, 20)
    for r in range(20):
        drawn = {
            d: tuple(np.repeat(x, inference._counts(3, d, 12, 20)[r]) for x in pair)
            for d, pair in parts.items()
        }
        assert math.isclose(inference.resampled(parts, 3, 20)[1 + r], value(drawn), rel_tol=1e-12)  # type: ignore[arg-type]
        assert math.isclose(deviations[r], value(drawn) - value(parts), abs_tol=1e-14)  # type: ignore[arg-type]
        assert math.isclose(
            math.sqrt(variances[r]), inference.error(drawn).standard_error, rel_tol=1e-9
        )  # type: ignore[arg-type]


def test_everything_meets_the_same_resamples() -> None:
    """Pairing: the resamples of a difference are the differences of the resamples, whatever else a
    summary contains."""
    rng = np.random.default_rng(1)
    a = change(rng, 40, 0.1, [0.05, 0.05])
    b = {d: (z * rng.normal(1, 0.1, 40), tokens) for d, (z, tokens) in a.items()}
    difference = inference.combined([a, b], [1, -1])
    assert np.allclose(
        inference.resampled(difference), inference.resampled(a) - inference.resampled(b)
    )
    first, second = ({d: a[d]} for d in a)
    assert np.allclose(
        inference.resampled(a), inference.resampled(first) + inference.resampled(second)
    )
    one, other = inference._counts(0, "d0", 40, 2000), inference._counts(0, "d1", 40, 2000)
    assert (one.sum(1) == 40).all() and not np.array_equal(one, other)


def test_combined_refuses_other_documents() -> None:
    with pytest.raises(ValueError, match="a: the documents differ"):
        inference.combined(
            [{"a": (np.ones(3), np.ones(3))}, {"a": (np.ones(3), np.full(3, 2.0))}], [1, -1]
        )


@pytest.mark.parametrize(
    "parts",
    [
        {"a": (np.ones(1), np.ones(1))},
        {"a": (np.ones(1), np.ones(1)), "b": (np.arange(9.0), np.ones(9))},
        {"a": (np.zeros(9), np.ones(9))},
        {
            "a": (0.1 * np.arange(1, 9), np.arange(1.0, 9))
        },  # all documents change by the same: no spread but rounding
        {
            "a": (np.eye(1, 100)[0], np.ones(100))
        },  # one item of 100 differs: a third of the resamples lack it
    ],
    ids=[
        "one document",
        "one document in a domain",
        "nothing changed",
        "the same change",
        "one flip",
    ],
)
def test_no_interval_from_nothing(parts: Parts) -> None:
    e = inference.bootstrap_t(parts)
    assert math.isclose(e.value, value(parts)) and math.isnan(e.low) and math.isnan(e.high)
    assert e.n == sum(len(z) for z, _ in parts.values())


def test_mcnemar_equals_statsmodels() -> None:
    table = pytest.importorskip("statsmodels.stats.contingency_tables")
    for lost, gained in [(0, 0), (0, 5), (3, 12), (20, 21), (40, 9)]:
        expected = (
            table.mcnemar([[50, lost], [gained, 50]], exact=True).pvalue if lost + gained else 1.0
        )
        assert math.isclose(inference.mcnemar(lost, gained), expected, rel_tol=1e-12)


# --- blocks ---------------------------------------------------------------------------------------


def test_blocks_and_t_test_equal_scipy() -> None:
    for n in (2, 3, 8):
        x = np.random.default_rng(n).normal(0.3, 1, n)
        expected, e = stats.ttest_1samp(x, 0), inference.blocks(x, 0.9)
        assert math.isclose(inference.t_test(x), expected.pvalue, rel_tol=1e-9)
        assert (
            np.allclose([e.low, e.high], expected.confidence_interval(0.9), rtol=1e-9) and e.n == n
        )


def test_tost_equals_statsmodels() -> None:
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    for n, mean, margin in [(3, 0.0, 0.05), (5, 0.01, 0.02), (8, -0.03, 0.02)]:
        x = np.random.default_rng(n).normal(mean, 0.01, n)
        expected = weightstats.ttost_paired(x, np.zeros(n), -margin, margin)[0]
        assert math.isclose(inference.tost(x, margin), expected, rel_tol=1e-9)


@pytest.mark.parametrize(
    "x", [[], [0.1], [0.1, 0.1, 0.1 + 1e-17], [0.0, 0.0], [1e-15, 2e-15], [0.1, math.nan, 0.2]]
)
def test_blocks_that_cannot_tell_say_nothing(x: list[float]) -> None:
    e = inference.blocks(np.array(x))
    assert math.isnan(e.low) and math.isnan(e.high) and e.n == len(x)
    assert math.isnan(inference.t_test(np.array(x))) and math.isnan(
        inference.tost(np.array(x), 1.0)
    )


def test_interval_and_test_agree() -> None:
    """p < 5% exactly when the 95% interval leaves out 0, TOST's when the 90% interval lies within
    the margin; with documents too."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        x, documents = rng.normal(0.02, 0.01, 4), Error(float(rng.uniform(0, 0.01)), 60.0)
        at = inference.blocks(x, documents=documents).low  # the mean that would sit on the edge
        assert math.isclose(inference.t_test(x - at, documents), 0.05, rel_tol=1e-4)
        high = inference.blocks(x, 0.9, documents).high
        assert math.isclose(inference.tost(x, high, documents), 0.05, rel_tol=1e-4)
        assert (
            inference.blocks(x).high <= inference.blocks(x, documents=Error(0.0, 60.0)).high + 1e-9
        )


@pytest.mark.parametrize("blocks", [3, 5, 8])
def test_blocks_cover(blocks: int) -> None:
    """Over blocks, for the documents at hand."""
    rng = np.random.default_rng(blocks)
    hits = [covers(inference.blocks(rng.normal(0.01, 0.006, blocks)), 0.01) for _ in range(1000)]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("blocks", [3, 5, 8])
@pytest.mark.parametrize("block_sd", [0.006, 0.02])
def test_blocks_cover_other_documents(blocks: int, block_sd: float) -> None:
    """With the error over documents the interval holds for the population of documents, which all
    blocks sample only once."""
    rng, hits, without = np.random.default_rng([blocks, int(1000 * block_sd)]), [], []
    for _ in range(1000):
        parts = repeated(rng, blocks, 0.01, block_sd)
        x, documents = np.array([value(p) for p in parts]), inference.shared_error(parts)
        hits.append(covers(inference.blocks(x, documents=documents), 0.01))
        without.append(covers(inference.blocks(x), 0.01))
    assert 0.93 <= np.mean(hits) <= 0.97
    assert np.mean(without) < np.mean(hits)


def test_shared_error_is_what_blocks_have_in_common() -> None:
    """Half of the variance of documents shared: found. All of it: the error of the mean. None:
    nothing to add."""
    rng, n = np.random.default_rng(3), 5000
    ones, own, noise = np.ones(n), rng.normal(0, 0.02, n), rng.normal(0, 0.02, (4, n))
    for parts, expected in [
        ([{"a": (own + e, ones)} for e in noise], 0.02 / np.sqrt(n)),
        ([{"a": (own, ones)}] * 4, 0.02 / np.sqrt(n)),
        ([{str(i): (e, ones)} for i, e in enumerate(noise)], 0.0),
    ]:
        assert abs(inference.shared_error(parts).standard_error - expected) < 0.05 * 0.02 / np.sqrt(
            n
        )
    alone = inference.shared_error([{"a": (own, ones)}])
    assert (
        np.allclose(alone[:2], inference.error({"a": (own, ones)})[:2])
        and alone.least == alone.standard_error
    )


def test_blocks_that_agree_by_chance_are_no_surer_than_their_documents() -> None:
    error = Error(0.004, 60.0, 0.01)
    close, apart = (
        inference.blocks(np.array([0.1, 0.1 + gap]), documents=error) for gap in (1e-5, 0.2)
    )
    assert close.high - close.low == pytest.approx(2 * stats.t.ppf(0.975, 60) * 0.01, rel=0.01)
    assert apart.high - apart.low > 10 * (close.high - close.low)
    assert inference.t_test(np.array([0.01, 0.01001]), error) == pytest.approx(
        2 * stats.t.sf(0.010005 / 0.01, 60), abs=0.01
    )
    plain = inference.blocks(np.array([0.1, 0.3]), documents=Error(0.004, 60.0))
    assert (apart.low, apart.high) == pytest.approx(
        (plain.low, plain.high)
    )  # where blocks say more, nothing changes


# --- families and verdicts ------------------------------------------------------------------------


def test_holm_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for n in (1, 4, 7):
        p = np.random.default_rng(n).uniform(0, 0.2, n)
        expected = multitest.multipletests(p, method="holm")[1]
        assert np.allclose(
            list(inference.holm({str(i): x for i, x in enumerate(p)}).values()), expected
        )


def test_holm_counts_what_has_no_p() -> None:
    found = inference.holm({"a": 0.01, "b": math.nan, "c": 0.04})
    assert (
        math.isclose(found["a"], 0.03) and math.isnan(found["b"]) and math.isclose(found["c"], 0.08)
    )
    assert list(found) == ["a", "b", "c"]


def test_a_family_pays_for_each_endpoint_once() -> None:
    """Shaffer's procedure by hand: of four tests on two endpoints two nulls at most are true, until
    one remains."""
    found = inference.adjusted({"x": P(0.001, 0.6), "y": P(0.3, 0.02)})
    assert np.allclose([*found["x"], *found["y"]], [0.002, 0.6, 0.6, 0.04])


@pytest.mark.parametrize(
    ("value", "p", "kind", "lower", "expected"),
    [
        (-0.1, (0.01, 0.9), "difference", True, "better"),
        (-0.1, (0.01, 0.9), "difference", False, "worse"),
        (0.1, (0.01, 0.9), "equivalence", True, "worse"),
        (0.1, (0.3, 0.01), "difference", True, "equivalent"),
        (
            0.1,
            (0.01, 0.01),
            "difference",
            True,
            "worse",
        ),  # tiny but certain: the question was whether they differ
        (
            0.1,
            (0.01, 0.01),
            "equivalence",
            True,
            "equivalent",
        ),  # ... or whether the difference matters
        (0.1, (0.3, 0.3), "equivalence", True, "inconclusive"),
        (0.1, (math.nan, math.nan), "difference", True, "inconclusive"),
        (math.nan, (math.nan, math.nan), "difference", True, "inconclusive"),
    ],
)
def test_verdict(
    value: float, p: tuple[float, float], kind: inference.Kind, lower: bool, expected: str
) -> None:
    assert inference.verdict(value, P(*p), kind, lower) == expected


def of_nothing(blocks: int, trials: int, block_sd: float) -> tuple[int, int]:
    """Experiments of four endpoints between methods that are the same: how many find a winner, and
    how many endpoints are equivalent."""
    rng, won, equivalent = np.random.default_rng(blocks), 0, 0
    for _ in range(trials):
        family, values = {}, {}
        for name in ("own_step", "matched", "backward", "boolq"):
            margin = 0.1 if name == "boolq" else 0.02
            items = {"n": 500, "domains": 1, "sd": 0.3, "name": "items"} if name == "boolq" else {}
            parts = repeated(
                rng, blocks, 0.0, 5 * block_sd if name == "boolq" else block_sd, **items
            )  # type: ignore[arg-type]
            x, documents = np.array([value(p) for p in parts]), inference.shared_error(parts)
            family[name], values[name] = (
                P(inference.t_test(x, documents), inference.tost(x, margin, documents)),
                float(x.mean()),
            )
        tests = inference.adjusted(family)
        said = [
            inference.verdict(
                values[e], tests[e], "equivalence" if e == "own_step" else "difference"
            )
            for e in family
        ]
        won += "better" in said or "worse" in said
        equivalent += said.count("equivalent")
    return won, equivalent


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_a_planted_null_has_no_winner(blocks: int) -> None:
    """A winner in 5% of 200 at most."""
    won, equivalent = of_nothing(blocks, 200, 0.006)
    assert won <= 10
    assert equivalent > 200  # of 800: the tests are not merely silent


def test_two_blocks_find_winners_that_are_not_there() -> None:
    """Why a verdict takes three (verdicts.FEWEST): noise between blocks that is large beside the
    documents'."""
    assert of_nothing(2, 300, 0.02)[0] > 0.05 * 300 >= of_nothing(3, 300, 0.02)[0]


# --- power ----------------------------------------------------------------------------------------


def test_detectable_equals_statsmodels_and_the_table() -> None:
    """3, 5, 8 blocks detect 3.3, 1.7, 1.2 sd (shared/paper.md)."""
    power = pytest.importorskip("statsmodels.stats.power")
    for n, table in [(3, 3.3), (5, 1.7), (8, 1.2)]:
        found = inference.detectable(1.0, n)
        assert abs(found - table) < 0.05
        assert math.isclose(
            found, power.TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8), rel_tol=1e-4
        )
        assert math.isclose(inference.detectable(0.01, n), 0.01 * found)
    assert math.isnan(inference.detectable(1.0, 1)) and math.isnan(
        inference.detectable_equivalence(1.0, 1)
    )
    assert math.isfinite(inference.detectable(1.0, 2, 0.99, 0.001)) and math.isfinite(
        inference.detectable(1.0, 200)
    )


@pytest.mark.parametrize("n", [3, 8])
def test_detectable_equivalence_by_simulation(n: int) -> None:
    rng, margin = np.random.default_rng(n), inference.detectable_equivalence(0.01, n)
    x = rng.normal(0, 0.01, (20_000, n))
    p = stats.t.sf((margin - abs(x.mean(1))) / (x.std(1, ddof=1) / np.sqrt(n)), n - 1)
    assert abs(np.mean(p < 0.05) - 0.8) < 0.015
