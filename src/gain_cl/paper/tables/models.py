"""Model sizes: the chosen settings of every model of an experiment that has several."""

from __future__ import annotations

from gain_cl.paper.table import Entry, Row, Table, Value, count, of
from gain_cl.paper.tables.main import METRICS, parameters
from gain_cl.studies.study import Study, level


def build(studies: dict[str, Study]) -> list[Table]:
    """Return nothing of one model."""
    if len(studies) < 2:
        return []
    rows = []
    for model, study in studies.items():
        for i, s in enumerate(study.chosen.values()):
            size = Value(s.one(lambda run: run.record.total_parameters), write=count)
            cells: list[Entry] = [model, size, s.label, Value(parameters(s), write=count)]
            rows.append(Row([*cells, *(of(m, level(s, m)) for m in METRICS)], s.ids, i == 0))
    heads = ["model", "parameters", "method", "trains", *METRICS.values()]
    notes = [
        "Perplexities of models with other tokenizers cannot be compared; methods are "
        "compared within a model."
    ]
    return [Table("models", "Methods at their chosen settings, by model", heads, rows, notes)]
