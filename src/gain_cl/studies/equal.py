"""Compare methods at equal skill, or at equal cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from gain_cl.measure.record import Run
from gain_cl.stats import format, fronts, inference
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Block, Setting, Study, ratio

Axis = Literal["parameters", "tokens", "norm"]
"""What settings cost, and two methods can be made equal in besides their own step: trainable
parameters, training tokens, norm of the effective weight change."""


def front_of(settings: list[Setting], block: Block) -> fronts.Front:
    """Return own step and backward change of a method's settings in a block, with their resamples
    of documents."""
    found = [
        (s.parts("own_step", block), s.parts("backward", block))
        for s in settings
        if block in s.runs
    ]
    pairs = [(x, y) for x, y in found if x is not None and y is not None]
    (x, xs), (y, ys) = (
        (
            np.array([ratio(pair[side]) for pair in pairs]),
            [inference.resampled(pair[side]) for pair in pairs],
        )
        for side in (0, 1)
    )
    return fronts.Front(
        x,
        y,
        np.stack(xs, axis=1) if xs else None,
        np.stack(ys, axis=1) if ys else None,
        min((len(z) for pair in pairs for part in pair for z, _ in part.values()), default=0),
        settings[0].method,
    )


def match_skill(study: Study, a: str, b: str, skill: float | None = None) -> fronts.Matched:
    """Return the backward change of two methods at equal own step, a minus b, in the blocks that
    have both.

    In each block both methods must have settings on both sides of the skill. A method whose
    settings all learn more would be given the forgetting of a setting that learns more.

    skill: own step in nats per token; None: the study's. reason says why there is no number."""
    has = [{k for s in study.of(m) for k in s.runs} for m in (a, b)]
    shared = [k for k in study.blocks if k in has[0] & has[1]]
    if not shared:
        return _none(f"no block has runs of both {a} and {b}")
    sides = [[front_of(study.of(m), block) for block in shared] for m in (a, b)]
    if lone := [f.name for side in sides for f in side if np.isfinite(f.x).sum() == 1]:
        return _none(f"one setting of {' and of '.join(dict.fromkeys(lone))}: no front to read")
    found = fronts.matched(sides[0], sides[1], study.skill if skill is None else skill)
    for f in [f for side in sides for f in side] if not found.reason else []:
        if found.skill > (least := np.nanmax(f.x)):  # what learns more would be read there
            return _none(
                f"{f.name} has no setting that learns as little as "
                f"{format.percent(found.skill)}%: its least is {format.percent(float(least))}%",
                found.skill,
            )
    return found


def _none(reason: str, skill: float = math.nan) -> fronts.Matched:
    """Return that there is nothing, and why."""
    unknown = Estimate(math.nan, math.nan, math.nan, 0)
    return fronts.Matched(skill, math.nan, math.nan, np.array([]), None, unknown, unknown, reason)


def interval_of(found: fronts.Matched) -> Estimate:
    """Return the difference with its interval: over blocks, with one block over documents."""
    return found.over_blocks if len(found.differences) > 1 else found.over_documents


def cost_of(setting: Setting, name: Axis, norms: dict[str, float]) -> float:
    """Return what a setting costs; nan where it is not known. norms: run id -> norm of the
    effective weight change (diagnose)."""
    costs: dict[str, Callable[[Run], float]] = {
        "parameters": lambda run: run.record.trainable_parameters,
        "tokens": lambda run: sum(s.train.tokens for s in run.record.stages if s.train),
        "norm": lambda run: norms.get(run.record.run_id, math.nan),
    }
    return setting.one(costs[name])


def match_cost(
    study: Study, a: str, b: str, name: Axis, metric: str, norms: dict[str, float]
) -> fronts.Matched:
    """Return a metric of two methods at equal cost, a minus b, interpolated over log cost in the
    blocks that have both. The cost (skill of what is returned) is the geometric middle of what both
    methods' settings cover; reason says why there is none."""
    # what is interpolated cost what its run did
    sides = {m: [s for s in study.of(m) if s.trained] for m in (a, b)}
    shared = [k for k in study.blocks if all(k in s.runs for side in sides.values() for s in side)]
    costs = {m: np.array([cost_of(s, name, norms) for s in side]) for m, side in sides.items()}
    if any(np.isnan(x).any() for x in costs.values()):
        how = ": python -m gain_cl diagnose RUN" if name == "norm" else ""
        return _none(f"{name} not known of every setting{how}")
    if alike := [m for m, x in costs.items() if len(np.unique(x)) < len(x) or len(x) < 2]:
        return _none(
            f"the settings of {' and '.join(alike)} do not differ in {name}: nothing to interpolate"
        )
    if not shared:
        return _none("no block has every setting of both")
    low, high = max(x.min() for x in costs.values()), min(x.max() for x in costs.values())
    if low > high:
        return _none(f"no {name} that both methods reach")
    parts = {m: [[s.parts(metric, k) for s in sides[m]] for k in shared] for m in (a, b)}
    if lacking := [m for m in (a, b) if any(p is None for row in parts[m] for p in row)]:
        return _none(f"{metric} does not exist for {' and '.join(lacking)}")
    at, read = math.sqrt(low * high), []
    for m in (a, b):
        values = np.array([[ratio(p or {}) for p in row] for row in parts[m]])
        draws = [np.stack([inference.resampled(p or {}) for p in row], 1) for row in parts[m]]
        read += [fronts.at_equal(costs[m], x, at) for x in (values, np.stack(draws))]
    n = min(len(z) for row in parts[a] for p in row for z, _ in (p or {}).values())
    return fronts.of_resamples(at, read[0], read[2], read[1] - read[3], n)
