"""Tasks before and after: accuracy, items that flipped, margin."""

from __future__ import annotations

from gain_cl.measure.record import Run
from gain_cl.paper.table import Entry, Row, Table, Value, count, nats, p_value, plain, valued
from gain_cl.stats import answers, inference
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Study

HEADS = (
    "task|method|block|items|accuracy before %|after %|lost|gained|p (McNemar)|AUC before|"
    "AUC change|margin before, nats|after, nats|change, nats"
)
NOTES = [
    "lost, gained: items answered right before and not after, and the reverse.",
    "AUC: chance that a yes item leans to yes more than a no item does; 0.5 is no "
    "knowledge, whatever the accuracy.",
    "Flips, p and 95% intervals (over items) speak of the one run, not of the method.",
]


def build(study: Study) -> list[Table]:
    """Return nothing where no run was scored on a task before and after."""
    rows = [
        Row([task, s.label, str(block[0]), *_numbers(run, task)], [run.record.run_id])
        for s in study.chosen.values()
        for block in study.blocks
        if (run := s.runs.get(block)) is not None
        for task in run.record.stages[-1].tasks
        if task in run.record.stages[0].tasks
        and run.record.stages[-1].tasks[task].correct is not None
    ]
    title = f"{study.model}: tasks before and after"
    return [Table("tasks", title, HEADS.split("|"), rows, NOTES)] if rows else []


def _numbers(run: Run, task: str) -> list[Entry]:
    ends = [run.record.stages[0].index, run.record.stages[-1].index]
    before, after = (answers.level(run.items, task, i) for i in ends)
    change, f = answers.change(run.items, task, *ends), answers.flips(run.items, task, *ends)
    return [
        Value(f.items, count),
        *(Value(100 * x["accuracy"].value, plain(1)) for x in (before, after)),
        *(Value(x, count) for x in (f.lost, f.gained)),
        Value(inference.mcnemar(f.lost, f.gained), p_value),
        Value(before.get("auc", Estimate()).value, plain(3)),
        valued(change.get("auc", Estimate()), nats),
        *(Value(x.get("margin", Estimate()).value, nats) for x in (before, after)),
        valued(change.get("margin", Estimate()), nats),
    ]
