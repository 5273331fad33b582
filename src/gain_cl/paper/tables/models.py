"""Model sizes: the chosen settings of every model of an experiment that has several."""

from __future__ import annotations

from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, of
from gain_cl.paper.tables.main import METRICS, parameters
from gain_cl.studies import study as comparison


def build(book: Book) -> list[Table]:
    if len(book.studies) < 2:
        return []
    rows = []
    for model, study in book.studies.items():
        for i, s in enumerate(study.chosen.values()):
            size = s.one(lambda run: run.record.total_parameters)
            cells = [of(m, comparison.level(s, m)) for m in METRICS]
            rows.append(
                Row(
                    [
                        model,
                        Value(size, write=count),
                        s.label,
                        Value(parameters(s), write=count),
                        *cells,
                    ],
                    book.ids(model, s.label),
                    i == 0,
                )
            )
    heads = ["model", "parameters", "method", "trains", *METRICS.values()]
    notes = [
        "Perplexities of models with other tokenizers cannot be compared; methods are "
        "compared within a model."
    ]
    return [Table("models", "Methods at their chosen settings, by model", heads, rows, notes, True)]
