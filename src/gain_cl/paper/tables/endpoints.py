"""The declared endpoints: what was measured, the tests, the verdict."""

from __future__ import annotations

import math

from gain_cl.paper.table import Entry, Row, Table, Value, count, of, p_value
from gain_cl.stats import format
from gain_cl.studies import verdicts
from gain_cl.studies.experiments import Endpoint
from gain_cl.studies.study import Study


def build(study: Study) -> list[Table]:
    """Return nothing of a study without endpoints."""
    if not study.endpoints:
        return []
    rows = []
    for j in verdicts.judge(study):
        e, c = j.endpoint, j.compared
        at = f" at an own step of {format.percent(j.skill)}%" if j.skill is not None else ""
        kind = e.kind if e.margin is None else f"{e.kind}, margin {e.margin:g}"
        sides = [s for m in (e.of, e.minus) if m for s in study.of(m)]
        if e.at == "chosen":
            sides = [s for s in sides if s is study.chosen.get(s.method)]
        numbers: list[Entry] = [of(e.metric, c), *(Value(x, p_value) for x in j.tests)]
        numbers += [Value(x or math.nan, count) for x in (c.blocks, c.estimate.n)]
        cells: list[Entry] = [e.name, f"{contrast(e)}{at}", kind, *numbers, j.verdict, j.why]
        rows.append(Row(cells, [r for s in sides for r in s.ids]))
    notes = [
        "p and verdict are adjusted over the declared endpoints (Holm, alpha "
        f"{study.alpha:g}); intervals are not. Changes of perplexity in %, margins in nats, "
        "accuracies in points."
    ]
    control, most, reached = verdicts.positive_control(study)
    if control is not None and most is not None:
        notes.append(
            f"Positive control, some setting forgets by {study.forgets:g}%: "
            f"{'reached' if reached else 'not reached, so nothing is decided'}; the most is "
            f"{control.label}, {format.percent(most.value)}%."
        )
    heads = ["endpoint", "what", "kind", "measured", "p", "p equal", "blocks", "units"]
    heads += ["verdict", "why"]
    return [Table("endpoints", f"{study.model}: declared endpoints", heads, rows, notes)]


def contrast(e: Endpoint) -> str:
    """Return what an endpoint compares: backward of gain minus lora."""
    return f"{e.metric} of {e.of}" + (f" minus {e.minus}" if e.minus else ", against 0")
