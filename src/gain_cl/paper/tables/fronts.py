"""Every setting on the plane of own step and backward change, and the methods at equal own step."""

from __future__ import annotations

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, of, percent, signed
from gain_cl.paper.tables.main import METRICS, parameters
from gain_cl.stats import format
from gain_cl.studies import equal
from gain_cl.studies import study as comparison
from gain_cl.studies.study import Study


def build(book: Book) -> list[Table]:
    return [
        t
        for model, study in book.studies.items()
        for t in (_settings(book, model, study), *_skill(book, model, study))
    ]


def _settings(book: Book, model: str, study: Study) -> Table:
    shown = [m for m in METRICS if any(comparison.level(s, m) is not None for s in study.settings)]
    on = comparison.efficient(study)
    rows = []
    for i, s in enumerate(study.settings):
        cells: list[Value | str | None] = [
            s.label,
            Value(len(s.runs), write=count),
            Value(parameters(s), write=count),
        ]
        cells += [
            of(m, comparison.level(s, m), interval=m in ("own_step", "backward")) for m in shown
        ]
        rows.append(
            Row(
                [*cells, "*" if s.label in on else ""],
                book.ids(model, s.label),
                i > 0 and s.method != study.settings[i - 1].method,
            )
        )
    notes = [
        "Change of perplexity, mean over domains; below 0 is better. *: no other setting of "
        "its method learns more and forgets less."
    ]
    heads = ["setting", "blocks", "trains", *(METRICS[m] for m in shown), "front"]
    return Table(
        tables.named("settings", book, model), f"{model}: every setting", heads, rows, notes
    )


def _skill(book: Book, model: str, study: Study) -> list[Table]:
    """Nothing where a method has one setting: there is no front to read."""
    others = [m for m in study.methods if m != study.reference]
    rows = []
    for m in others:
        found = equal.matched(study, m, study.reference)
        d = equal.interval(found)
        runs = [
            r
            for name in (m, study.reference)
            for s in study.of(name)
            for r in book.ids(model, s.label)
        ]
        if found.reason:
            rows.append(Row([m, None, None, None, None, found.reason], runs))
            continue
        values = [Value(format.change(x), write=signed) for x in (found.skill, found.a, found.b)]
        rows.append(Row([m, *values, percent(d), ""], runs))
    if not any(isinstance(row.cells[4], Value) for row in rows):
        return []
    heads = [
        "method",
        "at own step %",
        "backward %",
        f"backward of {study.reference} %",
        "difference %",
        "why not",
    ]
    notes = [
        "Read off both fronts by monotone interpolation; 95% intervals over the blocks that "
        "have both, of one block over documents."
    ]
    return [
        Table(
            tables.named("skill", book, model),
            f"{model}: backward change at equal own step, against {study.reference}",
            heads,
            rows,
            notes,
        )
    ]
