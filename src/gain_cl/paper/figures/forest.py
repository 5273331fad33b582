"""What each method forgot less or more than the reference, domain by domain."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.matrix import LossMatrix, Parts
from gain_cl.studies.study import Compared, Setting, Study, compared, difference, paired

CAPTION = (
    "Backward change of each method's chosen setting minus that of the reference, % of "
    "perplexity, by domain and as the mean over domains;"
    " below 0: forgets less. A domain that is last in a block has none there. 95% "
    "intervals, paired: over test documents (one block), or"
    " over blocks and the documents they share (several; open: a single block, no "
    "interval); one without caps"
    " goes on."
)
MEAN = "mean over domains"


def of_domain(m: LossMatrix, domain: str) -> Parts | None:
    """Return the parts of the domain's backward change L[T, k] - L[k, k]; None for the last domain,
    and unless stages follow each other."""
    k = m.trained.index(domain) + 1
    if m.regime != "sequential" or k == m.stages:
        return None
    return m.contributions(m.mean_change([m.stages], [k], [domain]))


def rows(study: Study, a: Setting, b: Setting) -> dict[str, Compared]:
    """Return a minus b for each domain, in the order of the study's first block, then for their
    mean (study.difference). One block of several says nothing of the others: no interval."""
    found = {
        domain: compared(
            paired(
                (of_domain(a.matrices[k], domain), of_domain(b.matrices[k], domain))
                for k in a.runs
                if k in b.runs
            )
        )
        for domain in next(iter(study.settings[0].matrices.values())).trained
    }
    found[MEAN] = difference(a, b, "backward")
    return {
        name: c._replace(estimate=replace(c.estimate, low=math.nan, high=math.nan))
        if c.blocks == 1 < len(study.blocks)
        else c
        for name, c in found.items()
        if c is not None
    }


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a panel for each method other than the reference, a row for each trained domain and
    one for their mean: chosen setting minus the reference's, backward change in % of perplexity,
    with 95% intervals paired within blocks. None without a pair that has one."""
    reference = study.chosen.get(study.reference)
    if reference is None:
        return None
    panels = {
        s.label: (s, found)
        for s in study.chosen.values()
        if s is not reference and (found := rows(study, s, reference))
    }
    if not panels:
        return None
    names = [*next(iter(reference.matrices.values())).trained, MEAN]
    names = [n for n in names if any(n in found for _, found in panels.values())]
    high = style.rows_of(len(panels)) * (0.55 + 0.17 * (len(names) + 1)) + 0.6
    figure = style.new(style.DOUBLE if len(panels) > 1 else style.SINGLE, high)
    every = style.grid(figure, len(panels), sharex=True, sharey=True)
    columns = style.columns_of(len(panels))
    for i, (axes, (label, (s, found))) in enumerate(zip(every, panels.items(), strict=True)):
        look = style.look(study, s.method) | {"linestyle": ""}
        for row, c in found.items():
            single = c.blocks == 1 < len(study.blocks)
            fill: dict[str, Any] = {"markerfacecolor": style.PAPER} if single else {}
            style.points(axes, [names.index(row)], [c.estimate], across=True, **look, **fill)
        style.zero(axes, across=True)
        axes.axhline(len(names) - 1.5, color=style.FAINT, linewidth=0.6, zorder=0)
        style.title(axes, label, style.SMALL)
        axes.tick_params(axis="x", labelbottom=i + columns >= len(panels))
    every[0].set_yticks(range(len(names)), [style.name(n, 24) for n in names])
    every[0].set_ylim(len(names) - 0.4, -0.6)
    style.percent_axis(every[0], "x")
    text = (
        "Difference of backward change, % of perplexity\n(below 0: forgets less than "
        f"{style.name(reference.label, 60)})"
    )
    figure.supxlabel(text, fontsize=style.TEXT)
    return style.finish(figure)
