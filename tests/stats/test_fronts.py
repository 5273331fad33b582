"""Equal skill: which settings count, interpolation against known fronts, intervals that cover, and
what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from gain_cl.stats import fronts, inference
from gain_cl.stats.fronts import Front

SETTINGS = {
    "a": np.array([-0.03, -0.06, -0.10, -0.15, -0.19, -0.22]),
    "b": np.array([-0.05, -0.10, -0.16, -0.21, -0.24]),
}


def truth(name: str, x: float | np.ndarray) -> float | np.ndarray:
    """Backward change at own step x: both forget more the more they learn, b more than a."""
    return -0.01 + 1.2 * x**2 if name == "a" else -0.01 + 2.5 * x**2 - 0.05 * x


def simulated(
    rng: np.random.Generator,
    blocks: int = 1,
    n: int = 32,
    domains: int = 3,
    sd: float = 0.03,
    block_sd: float = 0.0,
    resamples: int = 300,
) -> dict[str, list[Front]]:
    """Fronts of a and b as measured: a document's change varies with the size of the change (sd at
    an own step of -0.15), in part in the same way for methods, settings and blocks; a block shifts
    a whole method."""

    def trait() -> np.ndarray:
        return rng.standard_t(5, (domains, 2, n)) / np.sqrt(5 / 3)

    tokens = np.minimum(128, np.round(np.exp(rng.normal(4.6, 0.8, (domains, n))))).clip(8)
    document, method = trait(), {name: trait() for name in SETTINGS}
    found: dict[str, list[Front]] = {name: [] for name in SETTINGS}
    for _ in range(blocks):
        for name, steps in SETTINGS.items():
            shift, points = rng.normal(0, block_sd), []
            for x in steps:
                noise = sd * abs(x) / 0.15 * (0.8 * document + 0.5 * method[name] + 0.33 * trait())
                parts = [
                    {
                        f"d{i}": ((mean + noise[i, axis]) * tokens[i] / domains, tokens[i])
                        for i in range(domains)
                    }
                    for axis, mean in enumerate((x, float(truth(name, x)) + shift))
                ]
                points.append([inference.resampled(p, 0, resamples) for p in parts])
            xs, ys = (np.stack([p[axis] for p in points], axis=1) for axis in (0, 1))
            found[name].append(Front(xs, ys, n, name))
    return found


# --- which settings count -------------------------------------------------------------------------


def test_efficient_by_hand() -> None:
    x = np.array([-0.1, -0.3, -0.2, -0.25, -0.05, np.nan, -0.3])
    y = np.array([0.01, 0.20, 0.05, 0.06, 0.02, -1.0, 0.20])
    # -0.05 learns less than -0.1 and forgets more; nan diverged; the last equals the second
    assert list(fronts.efficient(x, y)) == [1, 3, 2, 0]
    assert list(fronts.efficient(np.array([]), np.array([]))) == []


def test_efficient_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.integers(-4, 4, (2, 6)) / 10
        beaten = [any((x <= x[i]) & (y <= y[i]) & ((x < x[i]) | (y < y[i]))) for i in range(6)]
        expected = {(x[i], y[i]) for i in range(6) if not beaten[i]}
        found = fronts.efficient(x, y)
        assert {(x[i], y[i]) for i in found} == expected and len(found) == len(expected)
        assert (np.diff(x[found]) > 0).all() and (np.diff(y[found]) < 0).all()


# --- interpolation --------------------------------------------------------------------------------


def test_interpolation_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    for m in (2, 3, 4, 7):
        x, y = np.sort(rng.normal(size=m)), -np.sort(rng.normal(size=m))
        shuffled = rng.permutation(m)
        for at in np.linspace(x[0], x[-1], 9):
            assert math.isclose(
                fronts.at_skill(x[shuffled], y[shuffled], at),
                PchipInterpolator(x, y)(at),
                abs_tol=1e-12,
            )


def test_interpolation_recovers_the_truth() -> None:
    """Smooth fronts read at any skill to 0.001 nats from five or six settings, and a bad setting in
    between changes nothing."""
    for name, x in SETTINGS.items():
        y = np.asarray(truth(name, x))
        worse = np.append(x, -0.12), np.append(y, 0.5)
        for at in np.linspace(x.min(), x.max(), 50):
            assert abs(fronts.at_skill(x, y, at) - truth(name, at)) < 1e-3
            assert fronts.at_skill(*worse, at) == fronts.at_skill(x, y, at)


def test_never_beyond_the_settings() -> None:
    x, y = np.array([-0.2, -0.1, -0.02]), np.array([0.05, 0.0, 0.01])
    assert math.isnan(fronts.at_skill(x, y, -0.25))
    assert (
        fronts.out_of_reach(x, y, -0.25, "m")
        == "m does not reach the own step -0.2500 nats: its best is -0.2000"
    )
    assert fronts.out_of_reach(x, y, -0.15) == "" and 0 < fronts.at_skill(x, y, -0.15) < 0.05
    assert (
        fronts.at_skill(x, y, -0.05) == 0.0
    )  # of answers that learn at least as much the one at -0.1 forgets least
    better = np.array(
        [-0.05, -0.02, 0.0]
    )  # learns more and forgets less with every step: one setting is efficient
    assert (
        fronts.at_skill(x, better, -0.12) == -0.05 and fronts.out_of_reach(x, better, -0.12) == ""
    )
    assert "no setting with numbers" in fronts.out_of_reach(
        np.array([np.nan]), np.array([0.0]), -0.1
    )


def test_equal_cost() -> None:
    """A power law of the cost is read exactly half-way on the log axis; resamples are rows; the
    order is free."""
    cost, y = np.array([1e6, 1e4, 1e5]), np.array([3.0, 1.0, 2.0])
    assert math.isclose(fronts.at_equal(cost, y, 10**4.5), 1.5)
    assert np.allclose(fronts.at_equal(cost, np.stack([y, 2 * y]), 1e5), [2, 4])
    assert math.isnan(fronts.at_equal(cost, y, 1e7))
    for bad in ([1e4, 1e4], [1e4]):
        with pytest.raises(ValueError, match=r"increasing|2"):
            fronts.at_equal(np.array(bad), y[: len(bad)], 1e4)


# --- differences at matched skill -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "domains", "sd"), [(32, 3, 0.03), (32, 1, 0.03), (64, 3, 0.03), (32, 3, 0.06)]
)
def test_matched_covers_over_documents(n: int, domains: int, sd: float) -> None:
    rng, hits, off = np.random.default_rng([n, domains, int(100 * sd)]), [], []
    for _ in range(1000):
        f = simulated(rng, n=n, domains=domains, sd=sd)
        m = fronts.matched(f["a"], f["b"])
        assert not m.reason
        expected = float(truth("a", m.skill) - truth("b", m.skill))
        hits.append(m.over_documents.low <= expected <= m.over_documents.high)
        off.append(m.over_documents.value - expected)
    assert 0.93 <= np.mean(hits) <= 0.97
    assert abs(np.mean(off)) < 0.2 * np.std(
        off
    )  # noise and interpolation shift it by far less than its error


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [3, 5])
def test_matched_covers_over_blocks(blocks: int) -> None:
    rng, hits = np.random.default_rng(blocks), []
    for _ in range(1000):
        f = simulated(rng, blocks, block_sd=0.005, resamples=200)
        m = fronts.matched(f["a"], f["b"], -0.14)
        assert not m.reason and m.over_blocks.n == blocks
        hits.append(
            m.over_blocks.low <= float(truth("a", -0.14) - truth("b", -0.14)) <= m.over_blocks.high
        )
    assert 0.93 <= np.mean(hits) <= 0.97


def test_matched_is_paired_and_signed() -> None:
    f = simulated(np.random.default_rng(2), blocks=3, block_sd=0.002)
    m, mirrored = fronts.matched(f["a"], f["b"]), fronts.matched(f["b"], f["a"])
    assert math.isclose(m.skill, fronts.common_skill([*f["a"], *f["b"]])) and m.a < m.b
    assert m.over_blocks.high < 0 and m.over_documents.high < 0  # a forgets less
    assert np.allclose(m.differences, -mirrored.differences) and math.isclose(
        m.over_blocks.low, -mirrored.over_blocks.high
    )
    assert math.isclose(m.over_documents.value, m.a - m.b)
    same = fronts.matched(f["a"], f["a"])
    assert (
        same.over_documents.value == same.over_documents.low == same.over_documents.high == 0
    )  # every resample is the same
    assert math.isnan(same.over_blocks.low)
    assert m.documents is not None and inference.t_test(m.differences, m.documents) < 0.05


def test_matched_without_documents_uses_blocks_alone() -> None:
    f = simulated(np.random.default_rng(3), blocks=3, block_sd=0.002)
    bare = {name: [Front(x.x[:1], x.y[:1], name=name) for x in side] for name, side in f.items()}
    m = fronts.matched(bare["a"], bare["b"], -0.14)
    assert m.documents is None and math.isnan(m.over_documents.low) and not m.reason
    assert m.over_blocks == inference.blocks(m.differences)


def test_matched_refuses_what_is_out_of_reach() -> None:
    f = simulated(np.random.default_rng(4))
    m = fronts.matched(f["a"], f["b"], -0.235)
    assert (
        "a does not reach" in m.reason and math.isnan(m.over_documents.value) and math.isfinite(m.b)
    )
    edge = float(f["a"][0].x[0].min()) + 1e-6  # half of the resamples learn less than this
    m = fronts.matched(f["a"], f["b"], edge)
    assert "of the resamples of documents do not reach" in m.reason
    assert math.isfinite(m.over_documents.value) and math.isnan(m.over_documents.low)
    weak = Front(np.array([[-0.01, -0.02]]), np.array([[0.0, 0.01]]), name="weak")
    b = Front(SETTINGS["b"][None], np.asarray(truth("b", SETTINGS["b"]))[None], name="b")
    m = fronts.matched([weak], [b])
    assert (
        m.skill == pytest.approx(-0.018) and m.reason == ""
    )  # 9/10 of what the weak one learns at most; b answers with its least
    assert math.isnan(fronts.common_skill([]))
