"""Judge an experiment's declared endpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from gain_cl.stats import format, inference
from gain_cl.stats.inference import Tests, Verdict
from gain_cl.stats.matrix import Estimate
from gain_cl.studies import equal as equal_
from gain_cl.studies import study as study_
from gain_cl.studies.experiments import Endpoint


class Judged(NamedTuple):
    """An endpoint, what was measured, tests adjusted over all endpoints (Holm), and the verdict
    with what limits it. skill: own step in nats at which a matched endpoint was read."""

    endpoint: Endpoint
    compared: study_.Compared | None
    tests: Tests
    verdict: Verdict
    why: str
    skill: float | None = None


# --- verdicts -------------------------------------------------------------------------------------


def positive_control(
    study: study_.Study,
) -> tuple[study_.Setting | None, study_.Compared | None, bool]:
    """The setting that forgets most, its backward change, and whether that reaches study.forgets:
    where nothing forgets, that a method does not is no finding. Only settings that learned
    something, in every block, and whose interval lies above 0 count."""
    found = []
    for s in study.settings:
        own, back = study_.level(s, "own_step"), study_.level(s, "backward")
        if (
            own is not None
            and back is not None
            and own.estimate.value < 0
            and s.trained
            and len(s.runs) == len(study.blocks)
        ):
            found.append((s, back))
    if not found:
        return None, None, False
    setting, most = max(found, key=lambda pair: pair[1].estimate.value)
    return (
        setting,
        most,
        any(
            c.estimate.value >= math.log1p(study.forgets / 100) and c.estimate.low > 0
            for _, c in found
        ),
    )


FEWEST = 3
"""Blocks of a verdict. With two, the t-test leans on one difference between blocks: of experiments
with four endpoints and nothing to find, up to 11% find a winner, where 5% is promised
(tests/stats/test_inference.py)."""


def judge(study: study_.Study) -> list[Judged]:
    """Every declared endpoint with its verdict: inconclusive as long as runs of its methods are
    missing (looking until something shows up, or leaving out what diverged, is no test), with fewer
    than FEWEST blocks, or when the positive control failed."""
    measured = {e.name: _measure(study, e) for e in study.endpoints}
    raw = {}
    for e in study.endpoints:
        found, _, _ = measured[e.name]
        if found is None or found.blocks < 2:
            raw[e.name] = Tests(math.nan, math.nan)
        else:
            margin = study_.nats(e.metric, e.margin)
            equal = (
                math.nan
                if math.isnan(margin)
                else inference.tost(found.values, margin, found.documents)
            )
            raw[e.name] = Tests(inference.t_test(found.values, found.documents), equal)
    tests = inference.adjusted(raw)
    _, _, forgets = positive_control(study)
    judged = []
    for e in study.endpoints:
        found, why, skill = measured[e.name]
        said: Verdict = "inconclusive"
        if found is not None:
            said = inference.verdict(
                found.estimate.value,
                tests[e.name],
                e.kind,
                study_.lower_is_better(e.metric),
                study.alpha,
            )
            absent = sum(study.absent.get(m, 0) for m in (e.of, e.minus) if m)
            if absent:
                said, why = (
                    "inconclusive",
                    f"{format.counted(absent, 'run')} of its methods "
                    f"{'is' if absent == 1 else 'are'} not finished",
                )
            elif not forgets:
                said, why = "inconclusive", f"no setting forgets by {study.forgets:g}%"
            elif found.blocks < FEWEST:
                too_few = (
                    "documents cannot tell methods apart, seeds and orders can"
                    if found.blocks < 2
                    else f"a verdict takes {FEWEST}"
                )
                said, why = (
                    "inconclusive",
                    f"{('one block', 'two blocks')[found.blocks - 1]}: {too_few}",
                )
        judged.append(Judged(e, found, tests[e.name], said, why, skill))
    return judged


def _measure(study: study_.Study, e: Endpoint) -> tuple[study_.Compared | None, str, float | None]:
    """An endpoint's difference, or why there is none; and the own step where it was read."""
    if e.at == "matched" and e.minus is not None:
        declared = replace(
            study, settings=[s for s in study.settings if s.trained]
        )  # what was interpolated was not declared
        if absent := [m for m in (e.of, e.minus) if not declared.of(m)]:
            return None, f"no finished run of {', '.join(absent)}", study.skill
        found = equal_.matched(declared, e.of, e.minus)
        if found.reason:
            return None, found.reason, study.skill
        estimate = equal_.interval(found)
        units = Estimate(estimate.value, estimate.low, estimate.high, found.over_documents.n)
        return (
            study_.Compared(
                units, found.differences, found.documents or inference.Error(math.nan, math.nan)
            ),
            "",
            found.skill,
        )
    if absent := [m for m in (e.of, e.minus) if m is not None and m not in study.chosen]:
        return None, f"no finished run of the chosen setting of {', '.join(absent)}", None
    a = study.chosen[e.of]
    measured = (
        study_.level(a, e.metric)
        if e.minus is None
        else study_.difference(a, study.chosen[e.minus], e.metric)
    )
    return (
        measured,
        "" if measured is not None else f"{e.metric} does not exist for these runs",
        None,
    )


def advice(study: study_.Study) -> list[str]:
    """What would help where nothing was decided."""
    _, most, forgets = positive_control(study)
    help_ = []
    if not forgets:
        seen = f"{100 * math.expm1(most.estimate.value):+.1f}%" if most is not None else "nothing"
        more = "a higher learning rate, more training tokens a domain, or domains further apart"
        help_.append(
            f"no setting forgets by {study.forgets:g}% (the most: {seen}), so nothing can be "
            f"decided; try {more}"
        )
    if len(study.blocks) < FEWEST:
        few = ("one block", "two blocks")[len(study.blocks) - 1]
        help_.append(
            f"{few}: set blocks: {FEWEST} or more in the experiment (python -m gain_cl power says "
            "how many)"
        )
    return help_
