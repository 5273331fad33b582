"""What a run will take, from what runs took. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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
    """Return the seconds of one run: training tokens at the method's speed, scored tokens at the
    records', its tasks at the stages they are due (as far as any were timed), and what runs took
    beside these (loading, checks, files); nan when nothing tells.

    records: what runs took; of the model those of the method are used, else all. speed: training
    tokens a second; scoring twice that. saved: stages that are done, stage 0 included: the run goes
    on after them."""
    stages, names = len(config.stages), len(config.sequence.trained) + len(config.sequence.controls)
    ahead = range(saved, stages + 1)
    train_tokens = (
        config.stage.stage_steps * config.train.batch_tokens * (len(ahead) - (0 in ahead))
    )
    scored = (
        len(ahead) * names * config.eval.documents * (config.eval.window or config.eval.context)
    )
    records = [r for r in records if r.model == config.model.name]
    timed = [
        s.task_seconds / sum(t.items for t in s.tasks.values())
        for r in records
        for s in r.stages
        if s.task_seconds and s.tasks
    ]
    due = sum(tasks.due(config.tasks.stages, i, stages) for i in ahead) if config.tasks.names else 0
    answering = due * _task_items(config) * float(np.median(timed)) if timed and due else 0.0
    mine = [r for r in records if r.method == method] or records
    trained = [s.train for r in mine for s in r.stages if s.train is not None]
    if speed is not None or not trained:
        return (
            math.nan if speed is None else train_tokens / speed + scored / (2 * speed) + answering
        )
    per_token = sum(t.seconds for t in trained) / sum(t.tokens for t in trained)
    per_score = sum(s.eval_seconds for r in mine for s in r.stages) / sum(
        d.tokens for r in mine for s in r.stages for d in s.domains.values()
    )
    beside = [x for r in mine if not math.isnan(x := _beside(r))]
    return (
        train_tokens * per_token
        + scored * per_score
        + answering
        + (float(np.median(beside)) if beside else 0.0)
    )


def _beside(r: RunRecord) -> float:
    """Return the seconds of a run outside of training, scoring and tasks; nan where its whole time
    is not known, and where scores that it shares with another run, which took that one's time, are
    more than it."""
    named = sum(
        (s.train.seconds if s.train else 0.0) + s.eval_seconds + s.task_seconds for s in r.stages
    )
    whole = r.provenance.get("seconds")
    return whole - named if isinstance(whole, int | float) and whole >= named else math.nan


def _task_items(config: RunConfig) -> int:
    """Return the items of all tasks of one scored stage."""
    counts = [tasks.parse_task(name) for name in config.tasks.names]
    return sum(tasks.STOCK[task].items if count is None else count for task, count in counts)
