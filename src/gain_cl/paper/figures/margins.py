"""What became of the answers to tasks."""

from __future__ import annotations

import math
from functools import partial
from operator import add
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from gain_cl.measure.record import Run
from gain_cl.paper.figures import style
from gain_cl.paper.tables.main import scored
from gain_cl.stats import answers
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Setting, Study, compared

CAPTION = (
    "Margin (log-odds of the right answer among the choices, nats; higher is better), "
    "mean over items, after the stages in which the task"
    " was scored: each method's chosen setting, mean over the blocks that have the task. "
    "Dotted: the pretrained model. 95% intervals of the"
    " paired change from it: over items (one block), or over blocks and the items they "
    "share (several)."
)


class Scored(NamedTuple):
    """Mean margin (nats) after each stage scored; its interval is that of the change from stage 0,
    which has none."""

    stages: dict[int, Estimate]
    blocks: int


def by_stage(run: Run, task: str) -> dict[int, np.ndarray]:
    """Return stage -> (items,) margins, of the stages in which all items were scored; empty unless
    the pretrained model and another are among them."""
    stages = [s.index for s in run.record.stages if task in s.tasks and not s.tasks[task].limited]
    if stages[:1] != [0] or len(stages) < 2:
        return {}
    return {t: answers.margin(answers.answers(run.items, task, t)) for t in stages}


def margins(setting: Setting, task: str) -> Scored | None:
    """Return the mean margins of a setting, by stage. None: no block has the task."""
    of = [found for run in setting.runs.values() if (found := by_stage(run, task))]
    stages = {}
    for t in sorted({t for margin in of for t in margin}):
        there = [margin for margin in of if t in margin]
        base = float(np.mean([margin[0].mean() for margin in there]))
        change = compared([{task: (m[t] - m[0], np.ones(len(m[0])))} for m in there])
        if change is not None:
            alone = Estimate(base, np.nan, np.nan, len(there[0][0]))
            stages[t] = change.estimate.map(partial(add, base)) if t else alone
    return Scored(stages, len(of)) if of else None


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a panel for each task: mean margin in nats by stage, a line for each method's chosen
    setting, with 95% intervals of the change from the pretrained model, paired over items. None
    when no run was scored on a task before and after."""
    chosen = study.chosen.values()
    lines = {
        task: found
        for task in sorted(scored(study))
        if (found := [(s, of) for s in chosen if (of := margins(s, task)) is not None])
    }
    if not lines:
        return None
    shown = {s.label: style.look(study, s.method) for found in lines.values() for s, _ in found}
    width = style.DOUBLE if len(lines) > 1 or len(shown) > 4 else style.SINGLE
    figure = style.new(width, 0.3 + 2.3 * style.rows_of(len(lines)))
    every = style.grid(figure, len(lines))
    for axes, (task, found) in zip(every, lines.items(), strict=True):
        last = max(max(of.stages) for _, of in found)
        style.courses(axes, study, [(s, of.stages) for s, of in found], longest=math.inf)
        base = found[0][1].stages[0]
        axes.axhline(base.value, color=style.SOFT, linewidth=0.6, linestyle=":", zorder=0)
        axes.set_xlim(-0.5, last + 0.5)
        axes.set_xticks(range(0, last + 1, math.ceil((last + 1) / 9)))
        blocks = max(of.blocks for _, of in found)
        several = f", {blocks} of {len(study.blocks)} blocks" if len(study.blocks) > 1 else ""
        style.title(axes, f"{task}, {base.n} items{several}")
        axes.set_xlabel("Stage (0: pretrained)")
    every[0].set_ylabel("Mean margin, nats")
    style.legend(figure, shown)
    return style.finish(figure)
