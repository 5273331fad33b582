"""Compare what methods forget when they have learned the same. Needs numpy and scipy alone.

A front is one method's settings (learning rates, ranks, strengths, replay shares) as points: own
step x in nats per token (negative is good), backward change y (positive is forgetting). A method
may answer with any of its settings. The value at a skill is therefore the least it forgets among
the answers that learn at least as much. Only settings that no other beats count, with monotone
interpolation between them (PCHIP: Fritsch & Carlson 1980, Fritsch & Butland 1984). At a skill that
the least learning of them passes, its own value counts. Beyond the most learning one there is no
value. Choosing settings on the reported documents flatters the method with more of them: declared
endpoints take as many settings of both methods.
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
    """The settings of one method on one block. x, y: (settings,). xs, ys: (resamples, settings), x
    and y when documents are drawn again, the same draws for all settings, methods and blocks
    (inference.resampled). n: the fewest documents of a domain."""

    x: np.ndarray
    y: np.ndarray
    xs: np.ndarray | None = None
    ys: np.ndarray | None = None
    n: int = 0
    name: str = "the method"


class Matched(NamedTuple):
    """Backward change of two methods at the own step ``skill``. a, b: means over blocks.
    differences: (blocks,) a minus b, positive where a forgets more. documents: their shared error
    for inference.t_test and tost, None without resamples. reason: why intervals are nan."""

    skill: float
    a: float
    b: float
    differences: np.ndarray
    documents: Error | None
    over_documents: Estimate
    over_blocks: Estimate
    reason: str


def _ranked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's settings by rising x (and y), and True for those that are efficient: their
    y is below the y of every smaller x."""
    order = np.lexsort((y, x), axis=-1)
    y = np.take_along_axis(np.where(np.isfinite(x + y), y, np.inf), order, -1)
    least = np.minimum.accumulate(y, axis=-1)
    return order, y < np.insert(least[:, :-1], 0, np.inf, axis=-1)


def efficient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the indices of the settings that no other beats (at least as much learned and as
    little forgotten, one of them more so), the most learned first. Of equal settings the first
    counts. A setting without numbers (diverged) never does."""
    order, keep = _ranked(*np.array([[x], [y]], np.float64))
    return order[0][keep[0]]


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


def _at(x: np.ndarray, y: np.ndarray, skill: float) -> np.ndarray:
    """Return the value of every row at the skill, each on its own efficient settings."""
    order, keep = _ranked(x, y)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    found = np.full(len(x), np.nan)
    for pattern in (k for k in np.unique(keep, axis=0) if k.any()):
        rows = (keep == pattern).all(1)
        xs, ys = x[rows][:, pattern], y[rows][:, pattern]
        between = _pchip(xs, ys, skill) if pattern.sum() > 1 else np.nan
        found[rows] = np.where(skill >= xs[:, -1], ys[:, -1], between)
    return found


def at_skill(x: np.ndarray, y: np.ndarray, skill: float) -> float:
    """Return the least backward change with an own step of ``skill`` or better; nan where no
    setting learns that much (out_of_reach says so)."""
    xs, ys = np.array([[x], [y]], np.float64)
    return float(_at(xs, ys, skill)[0])


def at_equal(x: np.ndarray, y: np.ndarray, level: float, log: bool = True) -> np.ndarray:
    """Return y (..., settings) at an equal cost x: trainable parameters, tokens, norm of the
    effective weight change. PCHIP through all settings, nan outside. log: over log x, since costs
    span decades and act by their ratio. No setting is dropped as beaten: an equal cost is a
    control, not an offer.

    ValueError: fewer than two settings, or two of one cost (choose first: by dev loss, or by
    at_skill)."""
    x, place = (np.log(x), np.log(level)) if log else (np.asarray(x, dtype=np.float64), level)
    order = np.argsort(x)
    if len(np.unique(x)) < max(len(x), 2):
        raise ValueError("several settings at the same cost, or fewer than two")
    curve = scipy.interpolate.PchipInterpolator(
        x[order], np.asarray(y)[..., order], axis=-1, extrapolate=False
    )
    return np.asarray(curve(place))


def out_of_reach(x: np.ndarray, y: np.ndarray, skill: float, name: str = "the method") -> str:
    """Return why at_skill has no value, in words; empty where it has one."""
    points = np.asarray(x)[efficient(x, y)]
    if not len(points):
        return f"{name} has no setting with numbers"
    reached = f"{name} does not reach the own step {skill:+.4f} nats: its best is {points[0]:+.4f}"
    return reached if skill < points[0] else ""


def common_skill(fronts: Sequence[Front]) -> float:
    """Return a skill within reach of every front: the middle of the range of own steps that all
    cover. Where they do not overlap: 9/10 of what the least learning front learns at most. nan if a
    front has no setting with numbers."""
    ranges = [f.x[efficient(f.x, f.y)] for f in fronts]
    if not ranges or not all(len(r) for r in ranges):
        return np.nan
    most, least = max(r.min() for r in ranges), min(r.max() for r in ranges)
    return float((most + least) / 2 if most <= least else 0.9 * most)


def of_resamples(
    at: float, a: np.ndarray, b: np.ndarray, draws: np.ndarray | None, n: int, reason: str = ""
) -> Matched:
    """Return values read at one place, a and b (blocks,), with the intervals that draws (blocks,
    resamples) of a minus b give. Over documents it is a t-interval with their standard deviation
    (94-96%; percentiles: 92-93% with 32 documents), over blocks inference.blocks with the
    documents' shared error. n: the fewest documents of a domain."""
    value, half, error = float(np.mean(a - b)), np.nan, None
    if draws is not None:
        drawn = draws[:, np.isfinite(draws).all(0)]
        missed, error = 1 - drawn.shape[1] / draws.shape[1], Error(np.nan, np.nan)
        if missed > MISSING and not reason:
            reason = f"{missed:.0%} of the resamples of documents do not reach {at:+.4f}"
        if not reason and n > 1:
            covariance = np.atleast_2d(np.cov(drawn)) * n / (n - 1)
            own = np.eye(len(a), dtype=bool) & (len(a) > 1)
            shared = covariance[~own].mean()  # as in inference.shared_error
            alone = np.sqrt(covariance.mean())
            error = Error(float(np.sqrt(max(shared, 0.0))), n - 1.0, float(alone))
            half = float(scipy.stats.t.ppf(0.975, n - 1) * alone)
    over, across = Estimate(value, value - half, value + half, n), blocks(a - b, documents=error)
    return Matched(at, float(a.mean()), float(b.mean()), a - b, error, over, across, reason)


def matched(a: Sequence[Front], b: Sequence[Front], skill: float | None = None) -> Matched:
    """Return the backward change of a minus b at the same own step, by default common_skill. a, b:
    a front for each block (one block gives the interval over documents only). Every resample makes
    and reads each front anew. There is no interval where a front is out of reach, or out of reach
    in more than MISSING of the resamples."""
    fronts = [*a, *b]
    skill = common_skill(fronts) if skill is None else skill
    reasons = [why for f in fronts if (why := out_of_reach(f.x, f.y, skill, f.name))]
    ya, yb = (np.array([at_skill(f.x, f.y, skill) for f in side]) for side in (a, b))
    draws = None
    if all(f.xs is not None for f in fronts):
        da, db = (np.stack([_at(f.xs, f.ys, skill) for f in side]) for side in (a, b))  # type: ignore[arg-type]
        draws = da - db
    return of_resamples(skill, ya, yb, draws, min(f.n for f in fronts), "; ".join(reasons))
