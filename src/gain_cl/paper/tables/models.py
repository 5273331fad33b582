"""Model sizes: the chosen settings of every model of an experiment that has several; and what each
method trains, of how much."""

from __future__ import annotations

from gain_cl.paper.table import Row, Table, Value, count, of, plain
from gain_cl.paper.tables.main import METRICS, parameters
from gain_cl.studies.study import Study, level


def build(studies: dict[str, Study]) -> list[Table]:
    """Return a row for each method of each model: of several models what it learned and forgot, and
    what it trains."""
    rows, sizes = [], []
    for model, study in studies.items():
        for i, s in enumerate(study.chosen.values()):
            trains, total = parameters(s), s.one(lambda run: run.record.total_parameters)
            size, part, first = Value(total, count), Value(trains, count), not i
            summaries = (of(m, level(s, m)) for m in METRICS)
            rows.append(Row([model, size, s.label, part, *summaries], s.ids, first))
            share = Value(100 * trains / total, plain(3))
            sizes.append(Row([model, s.method, part, size, share], s.ids, first))
    heads = ["model", "parameters", "method", "trains", *METRICS.values()]
    notes = [
        "Perplexities of models with other tokenizers cannot be compared; methods are "
        "compared within a model."
    ]
    models = Table("models", "Methods at their chosen settings, by model", heads, rows, notes)
    heads = ["model", "method", "trains", "of", "%"]
    parameters_ = Table("parameters", "Trained parameters", heads, sizes)
    return [models, parameters_][len(studies) < 2 :]
