"""Compare methods at equal skill, or at equal cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gain_cl.measure.record import Run
from gain_cl.stats import format, fronts, inference
from gain_cl.stats.fronts import Matched
from gain_cl.stats.matrix import Estimate, Parts
from gain_cl.studies.study import Block, Setting, Study

Axis = Literal["parameters", "tokens", "norm"]
"""What settings cost, and two methods can be made equal in besides their own step: trainable
parameters, training tokens, norm of the effective weight change."""


def draws(parts: Sequence[Parts]) -> np.ndarray:
    """Return (draws, settings) of a summary: see fronts."""
    found = [inference.resampled(p) for p in parts]
    return np.reshape(found, (len(parts), inference.RESAMPLES + 1)).T


def fewest(parts: Sequence[Parts]) -> int:
    """Return the fewest documents of a domain."""
    return min((len(z) for p in parts for z, _ in p.values()), default=0)


def front_of(settings: list[Setting], block: Block) -> fronts.Front:
    """Return own step and backward change of a method's settings in a block."""
    own, back = [], []
    for s in settings:
        if block in s.runs:
            x, y = s.parts("own_step", block), s.parts("backward", block)
            if x and y:
                own.append(x)
                back.append(y)
    return fronts.Front(draws(own), draws(back), fewest(own + back), settings[0].method)


def match_skill(study: Study, a: str, b: str, skill: float | None = None) -> Matched:
    """Return the backward change of two methods at equal own step, a minus b, in the blocks that
    have both.

    In each block both methods must have settings on both sides of the skill. A method whose
    settings all learn more would be given the forgetting of a setting that learns more.

    skill: own step in nats per token; None: the study's. reason says why there is no number."""
    has = [{k for s in study.of(m) for k in s.runs} for m in (a, b)]
    shared = [k for k in study.blocks if k in has[0] & has[1]]
    if not shared:
        return Matched(reason=f"no block has runs of both {a} and {b}")
    sides = [[front_of(study.of(m), block) for block in shared] for m in (a, b)]
    every = sides[0] + sides[1]
    if lone := [f.name for f in every if f.x.shape[1] == 1]:
        names = " and of ".join(dict.fromkeys(lone))
        return Matched(reason=f"one setting of {names}: no front to read")
    found = fronts.matched(sides[0], sides[1], study.skill if skill is None else skill)
    for f in [] if found.reason else every:
        if found.skill > (least := float(f.x[0].max())):  # what learns more would be read there
            reason = f"{f.name} has no setting that learns as little as "
            reason += f"{format.percent(found.skill)}%: its least is {format.percent(least)}%"
            return Matched(found.skill, reason=reason)
    return found


def interval_of(found: Matched) -> Estimate:
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
) -> Matched:
    """Return a metric of two methods at equal cost, a minus b, interpolated over log cost in the
    blocks that have both. The cost (skill of what is returned) is the geometric middle of what both
    methods' settings cover; reason says why there is none."""
    # what is interpolated cost what its run did
    sides = {m: [s for s in study.of(m) if s.trained] for m in (a, b)}
    shared = [k for k in study.blocks if all(k in s.runs for side in sides.values() for s in side)]
    costs = {m: np.array([cost_of(s, name, norms) for s in side]) for m, side in sides.items()}
    if any(np.isnan(x).any() for x in costs.values()):
        how = ": python -m gain_cl diagnose RUN" if name == "norm" else ""
        return Matched(reason=f"{name} not known of every setting{how}")
    if alike := [m for m, x in costs.items() if len(np.unique(x)) < max(len(x), 2)]:
        names = " and ".join(alike)
        return Matched(reason=f"the settings of {names} do not differ in {name}: nothing to read")
    if not shared:
        return Matched(reason="no block has every setting of both")
    low, high = max(x.min() for x in costs.values()), min(x.max() for x in costs.values())
    if low > high:
        return Matched(reason=f"no {name} that both methods reach")
    at, read, n = math.sqrt(low * high), [], []
    for m, side in sides.items():
        parts = [[p for s in side if (p := s.parts(metric, k))] for k in shared]
        if any(len(row) < len(side) for row in parts):
            return Matched(reason=f"{metric} does not exist for {m}")
        read.append(fronts.at_equal(costs[m], np.stack([draws(row) for row in parts]), at))
        n += [fewest(row) for row in parts]
    return fronts.of_draws(at, read[0], read[1], min(n))
