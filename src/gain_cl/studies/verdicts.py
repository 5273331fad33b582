"""Judge an experiment's declared endpoints."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

from gain_cl.stats import format, inference
from gain_cl.stats.inference import Tests, Verdict
from gain_cl.stats.matrix import Estimate
from gain_cl.studies import equal
from gain_cl.studies.experiments import Endpoint
from gain_cl.studies.study import (
    Compared,
    Setting,
    Study,
    difference,
    level,
    lower_is_better,
    margin_nats,
    plane,
)


class Judged(NamedTuple):
    """An endpoint, what was measured, tests adjusted over all endpoints (Holm), and the verdict
    with what limits it. skill: own step in nats at which a matched endpoint was read."""

    endpoint: Endpoint
    compared: Compared
    tests: Tests
    verdict: Verdict
    why: str
    skill: float | None = None


class Control(NamedTuple):
    """The setting that forgets most with its backward change, if any, and whether some setting
    forgets enough."""

    setting: Setting | None
    most: Estimate | None
    reached: bool


FEWEST = 3
"""Blocks of a verdict. With two, the t-test leans on one difference between blocks: of experiments
with four endpoints and nothing to find, up to 11% find a winner, where 5% is promised
(tests/stats/test_inference.py)."""


@functools.lru_cache(maxsize=8)
def positive_control(study: Study) -> Control:
    """Return the setting that forgets most, and whether that reaches study.forgets: where nothing
    forgets, that a method does not is no finding. Only settings that learned something, in every
    block, and whose interval lies above 0 count."""
    found = [
        (s, back)
        for s, own, back in plane(study.settings)
        if own.value < 0 and s.trained and len(s.runs) == len(study.blocks)
    ]
    if not found:
        return Control(None, None, False)
    enough = math.log1p(study.forgets / 100)
    reached = any(back.value >= enough and back.low > 0 for _, back in found)
    return Control(*max(found, key=lambda pair: pair[1].value), reached)


@functools.lru_cache(maxsize=8)
def judge(study: Study) -> tuple[Judged, ...]:
    """Return every declared endpoint with its verdict: inconclusive as long as runs of its methods
    are missing (looking until something shows up, or leaving out what diverged, is no test), with
    fewer than FEWEST blocks, or when the positive control failed."""
    measured = {e.name: _measure(study, e) for e in study.endpoints}
    tests = inference.adjusted({e.name: _tests(e, measured[e.name][0]) for e in study.endpoints})
    judged = []
    for e in study.endpoints:
        found, why, skill = measured[e.name]
        said: Verdict = "inconclusive"
        if not (why := why or _undecided(study, e, found.blocks)):
            better, value = lower_is_better(e.metric), found.estimate.value
            said = inference.verdict(value, tests[e.name], e.kind, better, study.alpha)
        judged.append(Judged(e, found, tests[e.name], said, why, skill))
    return tuple(judged)


def _tests(e: Endpoint, found: Compared) -> Tests:
    return Tests(
        inference.t_test(found.values, found.documents),
        inference.tost(found.values, margin_nats(e.metric, e.margin), found.documents),
    )


def _undecided(study: Study, e: Endpoint, blocks: int) -> str:
    """Return why what was measured of an endpoint decides nothing; empty when it may."""
    if absent := sum(study.absent.get(m, 0) for m in (e.of, e.minus) if m):
        verb = "is" if absent == 1 else "are"
        return f"{format.counted(absent, 'run')} of its methods {verb} not finished"
    if not positive_control(study).reached:
        return f"no setting forgets by {study.forgets:g}%"
    if blocks < 2:
        return "one block: documents cannot tell methods apart, seeds and orders can"
    return f"two blocks: a verdict takes {FEWEST}" if blocks < FEWEST else ""


def _measure(study: Study, e: Endpoint) -> tuple[Compared, str, float | None]:
    """Return an endpoint's difference, or why there is none; and the own step where it was read."""
    if e.at == "matched" and e.minus is not None:
        # what was interpolated was not declared
        declared = replace(study, settings=[s for s in study.settings if s.trained])
        if absent := [m for m in (e.of, e.minus) if not declared.of(m)]:
            return Compared(), f"no finished run of {', '.join(absent)}", study.skill
        found = equal.match_skill(declared, e.of, e.minus)
        if found.reason:
            return Compared(), found.reason, study.skill
        estimate = replace(equal.interval_of(found), n=found.over_documents.n)
        measured = Compared(estimate, found.differences, found.documents or inference.Error())
        return measured, "", found.skill
    sides = [m for m in (e.of, e.minus) if m is not None]
    if absent := [m for m in sides if m not in study.chosen]:
        reason = f"no finished run of the chosen setting of {', '.join(absent)}"
        return Compared(), reason, None
    a, *b = (study.chosen[m] for m in sides)
    measured = difference(a, b[0], e.metric) if b else level(a, e.metric)
    reason = "" if measured.blocks else f"{e.metric} does not exist for these runs"
    return measured, reason, None
