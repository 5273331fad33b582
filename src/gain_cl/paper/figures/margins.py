"""What became of the answers to tasks."""

from __future__ import annotations

import math
from functools import partial
from operator import add
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gain_cl.measure.record import Run
from gain_cl.paper.figures import style
from gain_cl.stats import answers
from gain_cl.stats.matrix import Estimate, Parts
from gain_cl.studies.study import Setting, Study, compared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    items: int


def tasks(study: Study) -> list[str]:
    return sorted(
        {task for s in style.chosen(study) for run in s.runs.values() for task in stages(run)}
    )


def stages(run: Run) -> dict[str, list[int]]:
    """Return task -> the stages in which all of its items were scored, if the pretrained model and
    another are among them."""
    names = {task for s in run.record.stages for task in s.tasks}
    found = {
        n: [s.index for s in run.record.stages if n in s.tasks and not s.tasks[n].limited]
        for n in sorted(names)
    }
    return {n: at for n, at in found.items() if len(at) > 1 and at[0] == 0}


def margins(setting: Setting, task: str) -> Scored | None:
    """Return the mean margins of a setting, by stage. None: no block has the task."""
    runs = [run for run in setting.runs.values() if task in stages(run)]
    if not runs:
        return None
    of = [
        {t: answers.margin(answers.answers(run.items, task, t)) for t in stages(run)[task]}
        for run in runs
    ]
    found = {}
    for t in sorted({t for margin in of for t in margin}):
        there = [margin for margin in of if t in margin]
        base = float(np.mean([margin[0].mean() for margin in there]))
        parts: list[Parts] = [
            {task: (margin[t] - margin[0], np.ones(len(margin[0])))} for margin in there
        ]
        c = compared(parts) if t else None
        found[t] = (
            c.estimate.map(partial(add, base))
            if c
            else Estimate(base, np.nan, np.nan, len(there[0][0]))
        )
    return Scored(found, len(runs), len(of[0][0]))


@style.styled
def build(study: Study) -> Figure | None:
    """Return a panel for each task: mean margin in nats by stage, a line for each method's chosen
    setting, with 95% intervals of the change from the pretrained model, paired over items. None
    when no run was scored on a task before and after."""
    names, settings = tasks(study), style.chosen(study)
    if not names:
        return None
    width = style.DOUBLE if len(names) > 1 or len(settings) > 4 else style.SINGLE
    figure = style.new(width, 0.3 + 2.3 * style.rows_of(len(names)))
    every = style.grid(figure, len(names))
    shown: dict[str, Setting] = {}
    for axes, task in zip(every, names, strict=True):
        lines = [(s, found) for s in settings if (found := margins(s, task)) is not None]
        last = max(max(found.stages) for _, found in lines)
        for i, (s, found) in enumerate(lines):
            shown[s.label] = s
            at = style.dodged(list(found.stages), i, len(lines))
            at[0] = 0  # the model that all have in common
            style.points(
                axes,
                list(at),
                list(found.stages.values()),
                **style.look(study, s.method),
                label=s.label,
            )
        axes.axhline(
            lines[0][1].stages[0].value, color=style.SOFT, linewidth=0.6, linestyle=":", zorder=0
        )
        axes.set_xlim(-0.5, last + 0.5)
        axes.set_xticks(range(0, last + 1, math.ceil((last + 1) / 9)))
        axes.locator_params(axis="y", nbins=6)
        blocks = max(found.blocks for _, found in lines)
        several = f", {blocks} of {len(study.blocks)} blocks" if len(study.blocks) > 1 else ""
        style.title(axes, f"{task}, {lines[0][1].items} items{several}")
        axes.set_xlabel("Stage (0: pretrained)")
    every[0].set_ylabel("Mean margin, nats")
    style.legend(figure, [style.handle(study, s.method, label) for label, s in shown.items()])
    return style.finish(figure)
