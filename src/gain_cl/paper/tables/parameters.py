"""What each method trains, of how much."""

from __future__ import annotations

from gain_cl.paper.table import Row, Table, Value, count, plain
from gain_cl.paper.tables.main import parameters
from gain_cl.studies.study import Study


def build(studies: dict[str, Study]) -> list[Table]:
    """Return a row for each method of each model."""
    rows = []
    for model, study in studies.items():
        for i, s in enumerate(study.chosen.values()):
            trains, total = parameters(s), s.one(lambda run: run.record.total_parameters)
            share = Value(100 * trains / total, write=plain(3))
            numbers = [Value(x, write=count) for x in (trains, total)]
            rows.append(Row([model, s.method, *numbers, share], s.ids, i == 0))
    heads = ["model", "method", "trains", "of", "%"]
    return [Table("parameters", "Trained parameters", heads, rows)]
