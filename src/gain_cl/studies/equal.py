"""Compare methods at equal skill."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from gain_cl.stats import format, fronts, inference
from gain_cl.stats.matrix import Estimate
from gain_cl.studies import study as study_

Axis = Literal["parameters", "tokens", "norm"]
"""What settings cost, and two methods can be made equal in besides their own step: trainable
parameters, training tokens, norm of the effective weight change."""


# --- equal skill ----------------------------------------------------------------------------------


def front(settings: list[study_.Setting], block: study_.Block) -> fronts.Front:
    """Own step and backward change of a method's settings in a block, with their resamples of
    documents."""
    found = [
        (s.parts("own_step", block), s.parts("backward", block))
        for s in settings
        if block in s.runs
    ]
    pairs = [(x, y) for x, y in found if x is not None and y is not None]
    xs, ys = (
        ([inference.resampled(part) for part in side] for side in zip(*pairs, strict=True))
        if pairs
        else ([], [])
    )
    return fronts.Front(
        np.array([study_._ratio(x) for x, _ in pairs]),
        np.array([study_._ratio(y) for _, y in pairs]),
        np.stack(xs, axis=1) if xs else None,
        np.stack(ys, axis=1) if ys else None,
        min((len(z) for x, y in pairs for part in (x, y) for z, _ in part.values()), default=0),
        settings[0].method,
    )


def matched(study: study_.Study, a: str, b: str, skill: float | None = None) -> fronts.Matched:
    """Backward change of two methods at equal own step, a minus b, in the blocks that have both. In
    each, both must have settings that learn more and less: one that learns more than asked would be
    said to forget as much at less."""
    shared = [
        k
        for k in study.blocks
        if any(k in s.runs for s in study.of(a)) and any(k in s.runs for s in study.of(b))
    ]
    if not shared:
        return NOTHING._replace(reason=f"no block has runs of both {a} and {b}")
    sides = [[front(study.of(m), block) for block in shared] for m in (a, b)]
    if lone := [f.name for side in sides for f in side if np.isfinite(f.x).sum() == 1]:
        return NOTHING._replace(
            reason=f"one setting of {' and of '.join(dict.fromkeys(lone))}: no front to read"
        )
    found = fronts.matched(sides[0], sides[1], study.skill if skill is None else skill)
    for f in [f for side in sides for f in side] if not found.reason else []:
        if found.skill > (least := np.nanmax(f.x)):  # what learns more would be read there
            little = (
                f"{f.name} has no setting that learns as little as {format.percent(found.skill)}%"
            )
            return NOTHING._replace(
                skill=found.skill, reason=f"{little}: its least is {format.percent(float(least))}%"
            )
    return found


_NONE = Estimate(math.nan, math.nan, math.nan, 0)
NOTHING = fronts.Matched(math.nan, math.nan, math.nan, np.array([]), None, _NONE, _NONE, "")


def interval(found: fronts.Matched) -> Estimate:
    """Of the difference: over blocks, with one block over documents."""
    return found.over_blocks if len(found.differences) > 1 else found.over_documents


def axis(setting: study_.Setting, name: Axis, norms: dict[str, float]) -> float:
    """What a setting costs; nan where it is not known. norms: run id -> norm of the effective
    weight change (diagnose)."""
    if name == "parameters":
        return setting.one(lambda run: run.record.trainable_parameters)
    if name == "tokens":
        return setting.one(
            lambda run: sum(s.train.tokens for s in run.record.stages if s.train is not None)
        )
    return setting.one(lambda run: norms.get(run.record.run_id, math.nan))


def at_equal(
    study: study_.Study, a: str, b: str, name: Axis, metric: str, norms: dict[str, float]
) -> fronts.Matched:
    """A metric of two methods at equal cost, a minus b, interpolated over log cost in the blocks
    that have both. The cost (skill of what is returned) is the geometric middle of what both
    methods' settings cover; reason says why there is none."""
    sides = {
        m: [s for s in study.of(m) if s.trained] for m in (a, b)
    }  # what is interpolated cost what its run did
    shared = [k for k in study.blocks if all(k in s.runs for side in sides.values() for s in side)]
    costs = {m: np.array([axis(s, name, norms) for s in side]) for m, side in sides.items()}
    if any(np.isnan(x).any() for x in costs.values()):
        return NOTHING._replace(
            reason=f"{name} not known of every setting"
            + (": python -m gain_cl diagnose RUN" if name == "norm" else "")
        )
    if alike := [m for m, x in costs.items() if len(np.unique(x)) < len(x) or len(x) < 2]:
        return NOTHING._replace(
            reason=f"the settings of {' and '.join(alike)} do not differ in {name}: nothing to "
            "interpolate"
        )
    low, high = max(x.min() for x in costs.values()), min(x.max() for x in costs.values())
    if low > high or not shared:
        return NOTHING._replace(
            reason=f"no {name} that both methods reach"
            if shared
            else "no block has every setting of both"
        )
    level_ = math.sqrt(low * high)

    parts = {m: [[s.parts(metric, k) for s in study.of(m)] for k in shared] for m in (a, b)}
    if lacking := [m for m in (a, b) if any(p is None for row in parts[m] for p in row)]:
        return NOTHING._replace(reason=f"{metric} does not exist for {' and '.join(lacking)}")

    def read(m: str) -> tuple[np.ndarray, np.ndarray]:
        """(blocks,) and (blocks, resamples)."""
        values = np.array([[study_._ratio(p or {}) for p in row] for row in parts[m]])
        draws = np.stack(
            [np.stack([inference.resampled(p or {}) for p in row], axis=1) for row in parts[m]]
        )
        return fronts.at_equal(costs[m], values, level_), fronts.at_equal(costs[m], draws, level_)

    (va, ra), (vb, rb) = read(a), read(b)
    n = min(len(z) for row in parts[a] for p in row for z, _ in (p or {}).values())
    return fronts.of_resamples(level_, va, vb, ra - rb, n)
