"""What each block says: every method, and its difference from the reference, paired within the
block."""

from __future__ import annotations

import math

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, signed
from gain_cl.stats.format import change
from gain_cl.studies.study import Study

SHOWN = {"own_step": "own step", "backward": "backward", "from_base": "from base"}


def build(book: Book) -> list[Table]:
    return [
        _of(book, model, study) for model, study in book.studies.items() if len(study.blocks) > 1
    ]


def _of(book: Book, model: str, study: Study) -> Table:
    rows = []
    reference = study.chosen.get(study.reference)
    for block in study.blocks:
        first = True
        for s in study.chosen.values():
            if block not in s.runs:
                continue
            values = [s.value(m, block) for m in SHOWN]
            less: list[float] = [math.nan] * 2
            if reference is not None and s is not reference and block in reference.runs:
                less = [
                    s.value(m, block) - reference.value(m, block) for m in ("own_step", "backward")
                ]
            cells = [
                Value(change(x), write=signed) if not math.isnan(x) else None
                for x in (*values, *less)
            ]
            rows.append(Row([str(block[0]), s.label, *cells], [s.runs[block].record.run_id], first))
            first = False
    order = [f"Block {seed}, seed {seed}: {', '.join(order)}." for seed, order in study.blocks]
    differences = [f"{h} minus {study.reference} %" for h in ("own step", "backward")]
    heads = ["block", "method", *(f"{h} %" for h in SHOWN.values()), *differences]
    return Table(
        tables.named("blocks", book, model),
        f"{model}: every block (seed and order of the domains)",
        heads,
        rows,
        order,
        True,
    )
