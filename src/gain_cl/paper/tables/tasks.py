"""Tasks before and after: accuracy, items that flipped, margin."""

from __future__ import annotations

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, nats, p_value, plain
from gain_cl.stats import answers, inference
from gain_cl.studies.study import Study


def build(book: Book) -> list[Table]:
    return [
        t for model, study in book.studies.items() if (t := _of(book, model, study)) is not None
    ]


def _of(book: Book, model: str, study: Study) -> Table | None:
    rows = []
    for s in study.chosen.values():
        for block in study.blocks:
            run = s.runs.get(block)
            if run is None:
                continue
            first, last = run.record.stages[0], run.record.stages[-1]
            for task in (t for t in last.tasks if t in first.tasks):
                a, b = (answers.answers(run.items, task, stage.index) for stage in (first, last))
                f = answers.flips(run.items, task, first.index, last.index)
                before, after = (100 * x.mean() for x in (answers.correct(a), answers.correct(b)))
                margins = [float(answers.margin(x).mean()) for x in (a, b)]
                found = answers.change(run.items, task, first.index, last.index)
                change, auc, base = found["margin"], found.get("auc"), answers.auc(a)
                rows.append(
                    Row(
                        [
                            task,
                            s.label,
                            str(block[0]),
                            Value(len(a.gold), write=count),
                            *(Value(float(x), write=plain(1)) for x in (before, after)),
                            *(Value(x, write=count) for x in (f.lost, f.gained)),
                            Value(inference.mcnemar(f.lost, f.gained), write=p_value),
                            None if base is None else Value(base, write=plain(3)),
                            None if auc is None else Value(auc.value, auc.low, auc.high, nats),
                            *(Value(x, write=nats) for x in margins),
                            Value(change.value, change.low, change.high, nats),
                        ],
                        [run.record.run_id],
                    )
                )
    if not rows:
        return None
    heads = [
        "task",
        "method",
        "block",
        "items",
        "accuracy before %",
        "after %",
        "lost",
        "gained",
        "p (McNemar)",
    ]
    heads += ["AUC before", "AUC change", "margin before, nats", "after, nats", "change, nats"]
    notes = [
        "lost, gained: items answered right before and not after, and the reverse.",
        "AUC: chance that a yes item leans to yes more than a no item does; 0.5 is no "
        "knowledge, whatever the accuracy.",
        "Flips, p and 95% intervals (over items) speak of the one run, not of the method.",
    ]
    return Table(
        tables.named("tasks", book, model), f"{model}: tasks before and after", heads, rows, notes
    )
