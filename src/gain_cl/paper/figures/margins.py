"""What became of the answers to tasks."""

from __future__ import annotations

import math
from functools import partial
from operator import add

import numpy as np
from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.paper.tables.main import scored
from gain_cl.stats import answers
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Compared, Setting, Study, compared, item_change

CAPTION = (
    "Margin (log-odds of the right answer among the choices, nats; higher is better), "
    "mean over items, after the stages in which the task"
    " was scored: each method's chosen setting, mean over the blocks that have the task. "
    "Dotted: the pretrained model. 95% intervals of the"
    " paired change from it: over items (one block), or over blocks and the items they "
    "share (several)."
)


def margins(setting: Setting, task: str) -> dict[int, Compared]:
    """Return the mean margin (nats) after each stage that was scored; its interval is that of the
    change from stage 0, which has none. Empty: no block has the task before and after."""
    found: dict[int, Compared] = {}
    runs = setting.runs.values()
    for t in range(1, max(len(run.record.stages) for run in runs)):
        pairs = [(run, p) for run in runs if (p := item_change(run, "margin", task, t))]
        if pairs:
            before = [answers.margin(answers.answers(run.items, task, 0)) for run, _ in pairs]
            base, c = float(np.mean(before)), compared([p for _, p in pairs])
            found[0] = Compared(Estimate(base, n=len(before[0])), c.values)
            found[t] = c._replace(estimate=c.estimate.map(partial(add, base)))
    return found


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a panel for each task: mean margin in nats by stage, a line for each method's chosen
    setting, with 95% intervals of the change from the pretrained model, paired over items. None
    when no run was scored on a task before and after."""
    panels: dict[str, list[tuple[Setting, dict[int, Estimate]]]] = {}
    for task in sorted(scored(study)):
        found = [(s, m) for s in study.chosen.values() if (m := margins(s, task))]
        if found:
            first = found[0][1][0]
            title = f"{task}, {first.estimate.n} items"
            if len(study.blocks) > 1:
                title += f", {first.blocks} of {len(study.blocks)} blocks"
            panels[title] = [(s, {t: c.estimate for t, c in m.items()}) for s, m in found]
    if not panels:
        return None
    looks = style.looks(study, (s for lines in panels.values() for s, _ in lines))
    figure, every = style.panels([*panels], 2.3, len(looks) > 4)
    for axes, lines in zip(every, panels.values(), strict=True):
        last = max(max(stages) for _, stages in lines)
        style.courses(axes, study, lines, longest=math.inf)
        base = lines[0][1][0].value
        axes.axhline(base, color=style.SOFT, linewidth=0.6, linestyle=":", zorder=0)
        axes.set(xlim=(-0.5, last + 0.5), xlabel="Stage (0: pretrained)")
        axes.set_xticks(range(0, last + 1, math.ceil((last + 1) / 9)))
    every[0].set_ylabel("Mean margin, nats")
    return style.finish(figure, looks)
