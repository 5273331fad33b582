"""What each method trains, of how much."""

from __future__ import annotations

from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, plain


def build(book: Book) -> list[Table]:
    rows = []
    for model, study in book.studies.items():
        for i, s in enumerate(study.chosen.values()):
            trains, total = (
                s.one(lambda run: run.record.trainable_parameters),
                s.one(lambda run: run.record.total_parameters),
            )
            cells: list[Value | str | None] = [
                model,
                s.method,
                Value(trains, write=count),
                Value(total, write=count),
                Value(100 * trains / total, write=plain(3)),
            ]
            rows.append(Row(cells, book.ids(model, s.label), i == 0))
    return [
        Table(
            "parameters",
            "Trained parameters",
            ["model", "method", "trains", "of", "%"],
            rows,
            grouped=True,
        )
    ]
