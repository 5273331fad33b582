"""The declared endpoints: what was measured, the tests, the verdict."""

from __future__ import annotations

import math

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, of, p_value
from gain_cl.stats import format
from gain_cl.studies import verdicts
from gain_cl.studies.study import Study


def build(book: Book) -> list[Table]:
    return [_of(book, model, study) for model, study in book.studies.items() if study.endpoints]


def _of(book: Book, model: str, study: Study) -> Table:
    rows = []
    for j in verdicts.judge(study):
        e, c = j.endpoint, j.compared
        what = f"{e.metric} of {e.of}" + (f" minus {e.minus}" if e.minus else ", against 0")
        what += f" at an own step of {format.percent(j.skill)}%" if j.skill is not None else ""
        kind = e.kind if e.margin is None else f"{e.kind}, margin {e.margin:g}"
        sides = [
            s
            for m in (e.of, e.minus)
            if m
            for s in study.of(m)
            if e.at == "matched" or s is study.chosen.get(m)
        ]
        runs = [r for s in sides for r in book.ids(model, s.label)]
        n = None if c is None else Value(c.blocks, write=count)
        documents = None if c is None else Value(c.estimate.n, write=count)
        p = [
            Value(x, write=p_value) if not math.isnan(x) else None
            for x in (j.tests.difference, j.tests.equivalence)
        ]
        rows.append(
            Row([e.name, what, kind, of(e.metric, c), *p, n, documents, j.verdict, j.why], runs)
        )
    control, most, forgets = verdicts.positive_control(study)
    units = "Changes of perplexity in %, margins in nats, accuracies in points."
    notes = [
        "p and verdict are adjusted over the declared endpoints (Holm, alpha "
        f"{study.alpha:g}); intervals are not. {units}"
    ]
    if control is not None and most is not None:
        reached = "reached" if forgets else "not reached, so nothing is decided"
        most_is = f"the most is {control.label}, {format.percent(most.estimate.value)}%"
        notes.append(
            f"Positive control, some setting forgets by {study.forgets:g}%: {reached}; {most_is}."
        )
    heads = [
        "endpoint",
        "what",
        "kind",
        "measured",
        "p",
        "p equal",
        "blocks",
        "units",
        "verdict",
        "why",
    ]
    return Table(
        tables.named("endpoints", book, model), f"{model}: declared endpoints", heads, rows, notes
    )
