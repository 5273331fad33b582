"""Compare what methods forget when they have learned the same. Needs numpy and scipy alone.

A front is one method's settings (learning rates, ranks, strengths, replay shares) as points: own
step x in nats per token (negative is good), backward change y (positive is forgetting). A method
may answer with any of its settings. The value at a skill is therefore the least it forgets among
the answers that learn at least as much. Only settings that no other beats count, with monotone
interpolation between them (PCHIP: Fritsch & Carlson 1980, Fritsch & Butland 1984). At a skill that
the least learning of them passes, its own value counts. Beyond the most learning one there is no
value. Choosing settings on the reported documents flatters the method with more of them: declared
endpoints take as many settings of both methods.

Draws are values as measured (the first), then as they are when documents are drawn again
(inference.resampled): the same draws for all settings, methods and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # scipy.stats takes a second to import: it is loaded when it is first used

from gain_cl.stats.inference import Error, blocks
from gain_cl.stats.matrix import Estimate

MISSING = 0.05  # share of resamples that may fail to reach the skill before the interval is refused


class Front(NamedTuple):
    """The settings of one method on one block. x, y: (draws, settings). n: the fewest documents of
    a domain."""

    x: np.ndarray
    y: np.ndarray
    n: int = 0
    name: str = "the method"


class Matched(NamedTuple):
    """Backward change of two methods at the own step ``skill``. a, b: means over blocks.
    differences: (blocks,) a minus b, positive where a forgets more. documents: their shared error
    for inference.t_test and tost, None without resamples. reason: why intervals are nan."""

    skill: float = np.nan
    a: float = np.nan
    b: float = np.nan
    differences: np.ndarray = np.array([])
    documents: Error | None = None
    over_documents: Estimate = Estimate()
    over_blocks: Estimate = Estimate()
    reason: str = ""


def _ranked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's settings by rising x (and y), and True for those that are efficient: their
    y is below the y of every smaller x."""
    order = np.lexsort((y, x), axis=-1)
    y = np.take_along_axis(np.where(np.isfinite(x + y), y, np.inf), order, -1)
    least = np.minimum.accumulate(y, axis=-1)
    return order, y < np.insert(least[..., :-1], 0, np.inf, axis=-1)


def efficient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the indices of the settings that no other beats (at least as much learned and as
    little forgotten, one of them more so), the most learned first. Of equal settings the first
    counts. A setting without numbers (diverged) never does."""
    order, keep = _ranked(x, y)
    return order[keep]


def _pchip(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """Return PCHIP of each row of x (rising, two or more) and y (falling) at one place, nan
    outside. scipy's takes one x for all rows."""
    rows, m = np.arange(len(x)), x.shape[1]
    h, s = np.diff(x), np.diff(y) / np.diff(x)
    slope = np.repeat(s[:, :1], m, axis=1)
    if m > 2:
        v, w = 2 * h[:, 1:] + h[:, :-1], h[:, 1:] + 2 * h[:, :-1]
        slope[:, 1:-1] = (v + w) / (v / s[:, :-1] + w / s[:, 1:])
        for end, i, k in ((0, 0, 1), (-1, -1, -2)):  # three points, falling like the rest or flat
            slope[:, end] = np.minimum(
                ((2 * h[:, i] + h[:, k]) * s[:, i] - h[:, i] * s[:, k]) / (h[:, i] + h[:, k]), 0
            )
    j = np.clip((x <= at).sum(1) - 1, 0, m - 2)
    width, t = h[rows, j], (at - x[rows, j]) / h[rows, j]
    left = (1 + 2 * t) * y[rows, j] + t * width * slope[rows, j]
    right = (3 - 2 * t) * y[rows, j + 1] + (t - 1) * width * slope[rows, j + 1]
    return np.where((t >= 0) & (t <= 1), (1 - t) ** 2 * left + t**2 * right, np.nan)


def at_skill(x: np.ndarray, y: np.ndarray, skill: float) -> np.ndarray:
    """Return (...) the least backward change with an own step of ``skill`` or better, of each row
    of x and y (..., settings) on its own efficient settings; nan where no setting learns that much
    (out_of_reach says so)."""
    shape, m = x.shape[:-1], x.shape[-1]
    x, y = x.reshape(-1, m), y.reshape(-1, m)
    order, keep = _ranked(x, y)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    found = np.full(len(x), np.nan)
    for pattern in (k for k in np.unique(keep, axis=0) if k.any()):
        rows = (keep == pattern).all(1)
        xs, ys = x[rows][:, pattern], y[rows][:, pattern]
        between = _pchip(xs, ys, skill) if pattern.sum() > 1 else np.nan
        found[rows] = np.where(skill >= xs[:, -1], ys[:, -1], between)
    return found.reshape(shape)


def at_equal(x: np.ndarray, y: np.ndarray, level: float) -> np.ndarray:
    """Return y (..., settings) at an equal cost x: trainable parameters, tokens, norm of the
    effective weight change. PCHIP through all settings over log x, since costs span decades and act
    by their ratio; nan outside. No setting is dropped as beaten: an equal cost is a control, not an
    offer. ValueError: fewer than two settings, or two of one cost."""
    order = np.argsort(x)
    return np.asarray(
        scipy.interpolate.PchipInterpolator(
            np.log(x[order]), y[..., order], axis=-1, extrapolate=False
        )(np.log(level))
    )


def out_of_reach(x: np.ndarray, y: np.ndarray, skill: float, name: str = "the method") -> str:
    """Return why at_skill has no value, in words; empty where it has one."""
    points = x[efficient(x, y)]
    if not len(points):
        return f"{name} has no setting with numbers"
    reached = f"{name} does not reach the own step {skill:+.4f} nats: its best is {points[0]:+.4f}"
    return reached if skill < points[0] else ""


def common_skill(fronts: Sequence[Front]) -> float:
    """Return a skill within reach of every front: the middle of the range of own steps that all
    cover. Where they do not overlap: 9/10 of what the least learning front learns at most. nan if a
    front has no setting with numbers."""
    ranges = [f.x[0][efficient(f.x[0], f.y[0])] for f in fronts]
    if not ranges or not all(len(r) for r in ranges):
        return np.nan
    most, least = max(r.min() for r in ranges), min(r.max() for r in ranges)
    return float((most + least) / 2 if most <= least else 0.9 * most)


def of_draws(at: float, a: np.ndarray, b: np.ndarray, n: int, reason: str = "") -> Matched:
    """Return values read at one place, a and b (blocks, draws), with the intervals of a minus b.
    Over documents it is a t-interval with the standard deviation of the draws (94-96%; percentiles:
    92-93% with 32 documents), over blocks inference.blocks with the documents' shared error. n: the
    fewest documents of a domain."""
    difference, error, half = (a - b)[:, 0], None, np.nan
    value, draws = float(difference.mean()), (a - b)[:, 1:]
    if draws.size:
        drawn = draws[:, np.isfinite(draws).all(0)]
        missed, error = 1 - drawn.shape[1] / draws.shape[1], Error()
        if missed > MISSING and not reason:
            reason = f"{missed:.0%} of the resamples of documents do not reach {at:+.4f}"
        if not reason and n > 1:
            covariance = np.atleast_2d(np.cov(drawn)) * n / (n - 1)
            own = np.eye(len(a), dtype=bool) & (len(a) > 1)
            shared = covariance[~own].mean()  # as in inference.shared_error
            alone = float(np.sqrt(covariance.mean()))
            error = Error(float(np.sqrt(max(shared, 0.0))), n - 1.0, alone)
            half = float(scipy.stats.t.ppf(0.975, n - 1)) * alone
    over, across = Estimate(value, value - half, value + half, n), blocks(difference, 0.95, error)
    mean_a, mean_b = (float(x[:, 0].mean()) for x in (a, b))
    return Matched(at, mean_a, mean_b, difference, error, over, across, reason)


def matched(a: Sequence[Front], b: Sequence[Front], skill: float | None = None) -> Matched:
    """Return the backward change of a minus b at the same own step, by default common_skill. a, b:
    a front for each block (one block gives the interval over documents only). Every draw makes and
    reads each front anew. There is no interval where a front is out of reach, or out of reach in
    more than MISSING of the resamples."""
    fronts = [*a, *b]
    skill = common_skill(fronts) if skill is None else skill
    reasons = (out_of_reach(f.x[0], f.y[0], skill, f.name) for f in fronts)
    ya, yb = (np.stack([at_skill(f.x, f.y, skill) for f in side]) for side in (a, b))
    return of_draws(skill, ya, yb, min(f.n for f in fronts), "; ".join(filter(None, reasons)))
