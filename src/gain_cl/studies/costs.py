"""What a run will take, from what runs took. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from gain_cl.config.schema import RunConfig
from gain_cl.measure import tasks
from gain_cl.measure.record import RunRecord


def run_seconds(
    config: RunConfig,
    method: str,
    records: Sequence[RunRecord],
    speed: float | None = None,
    saved: int = 0,
) -> float:
    """Return the seconds of one run: its start, training tokens at the method's speed, scored
    tokens at the records', and its tasks at the stages they are due (as far as any were timed); nan
    when nothing tells.

    records: what runs took; of the model those of the method are used, else all. speed: training
    tokens a second; scoring twice that. saved: stages that are done, stage 0 included: the run goes
    on after them."""
    stages, names = len(config.stages), len(config.sequence.trained + config.sequence.controls)
    ahead = range(saved, stages + 1)
    trains = config.stage.stage_steps * config.train.batch_tokens * sum(map(bool, ahead))
    text = config.eval.documents * (config.eval.window or config.eval.context)
    scored = len(ahead) * names * text
    every = [s for r in records if r.model == config.model.name for s in r.stages]
    timed = sum(t.items for s in every if s.task_seconds for t in s.tasks.values())
    due = sum(tasks.due(config.tasks.stages, i, stages) for i in ahead)
    items = sum(tasks.size(name) for name in config.tasks.names)
    answering = due * items * sum(s.task_seconds for s in every) / max(1, timed)
    answering += start_seconds([r for r in records if r.model == config.model.name])
    if speed is not None:
        return trains / speed + scored / (2 * speed) + answering
    mine = [
        s for r in records if (r.model, r.method) == (config.model.name, method) for s in r.stages
    ] or every
    trained = [s.train for s in mine if s.train is not None]
    if not trained:
        return math.nan
    per_token = sum(t.seconds for t in trained) / sum(t.tokens for t in trained)
    per_score = sum(s.eval_seconds for s in mine) / sum(
        d.tokens for s in mine for d in s.domains.values()
    )
    return trains * per_token + scored * per_score + answering


def start_seconds(records: Sequence[RunRecord]) -> float:
    """Return the seconds that a run takes besides learning and scoring: to import, load and
    tokenise. Scores of stage 0 are those of an earlier run for most."""
    spent = [
        r.provenance.get("seconds", 0)
        - sum(s.eval_seconds + s.task_seconds + s.train.seconds for s in r.stages if s.train)
        for r in records
    ]
    return max(0.0, median(spent)) if spent else 0.0
