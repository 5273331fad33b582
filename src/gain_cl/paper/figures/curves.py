"""What became of each domain, before and after it was learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.matrix import LossMatrix
from gain_cl.studies.study import Study

CAPTION = (
    "Change of perplexity from the pretrained model (%), of each trained domain by "
    "stages since it was learned (0: just after; vertical"
    " line) and of the controls by stage: each method's chosen setting, mean over the "
    "blocks that have the position, two at least; a line"
    " is broken where they change. Pale: single blocks. No intervals."
)

Curve = dict[int, float]
"""Position -> change of loss from the pretrained model, nats per token."""


def of_domain(m: LossMatrix, domain: str) -> Curve:
    """Return the course of a domain by stages since the domain was learned: 0 just after, -1 just
    before. Of a domain learned alone or with all others only these."""
    j, k = m.domains.index(domain), 1 if m.regime == "joint" else m.trained.index(domain) + 1
    base = float(m.loss[0, j])
    if m.regime != "sequential":
        return {-1: 0.0, 0: float(m.loss[k, j]) - base}
    return {t - k: float(m.loss[t, j]) - base for t in range(m.stages + 1)}


def of_controls(m: LossMatrix) -> Curve:
    """Return the mean over the controls, by stage; empty without controls, and where stages do not
    follow each other."""
    if not m.controls or m.regime == "individual":
        return {}
    mean = m.loss[:, len(m.trained) :].mean(1)
    return {t: float(x - mean[0]) for t, x in enumerate(mean)}


def means(curves: list[Curve]) -> list[Curve]:
    """Return means at the positions that at least two curves have (all, of one curve), in pieces
    over the same curves each: where one begins or ends, a mean would jump though none of them
    does."""
    table = pd.DataFrame(curves).T.sort_index()
    table = table[table.count(axis=1) >= min(2, len(curves))]
    there = table.notna()
    pieces = table.groupby((there != there.shift()).any(axis=1).cumsum())
    return [dict(piece.mean(axis=1)) for _, piece in pieces]


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a panel for each trained domain and one for the mean over the controls, a line for
    each method's chosen setting. Changes of perplexity in %, spaced as changes of loss, means of
    which they are; no intervals. None without a chosen setting."""
    settings = list(study.chosen.values())
    if not settings:
        return None
    matrices = [m for s in settings for m in s.matrices.values()]
    drawn: dict[str, Callable[[LossMatrix], Curve]] = {
        d: partial(of_domain, domain=d) for d in matrices[0].trained
    }
    if any(map(of_controls, matrices)):
        drawn["controls, never trained"] = of_controls
    rows = style.rows_of(len(drawn))
    high = 0.3 + (1.8 if rows > 1 else 2.3) * rows
    figure = style.new(style.DOUBLE if len(drawn) > 1 else style.SINGLE, high)
    every = style.grid(figure, len(drawn), sharey=True)
    for i, (axes, (title, curve_of)) in enumerate(zip(every, drawn.items(), strict=True)):
        for s in settings:
            look = style.look(study, s.method)
            pale = {"color": look["color"], "linewidth": 0.5, "alpha": 0.25, "zorder": 1}
            bold = {**look, "markersize": 2.5, "label": s.label, "zorder": 3}
            curves = [c for m in s.matrices.values() if (c := curve_of(m))]
            for some, how in ((curves[1:] and curves, pale), (means(curves), bold)):
                for c in some:
                    axes.plot(list(c), list(c.values()), **how)
        style.zero(axes, color=style.FAINT)
        style.title(axes, title)
        axes.locator_params(axis="x", integer=True, nbins=9)
        if i + style.columns_of(len(drawn)) >= len(drawn):
            axes.set_xlabel("Stage" if curve_of is of_controls else "Stages since learned")
        if curve_of is of_controls:
            axes.set_facecolor("#f6f6f6")
        else:
            style.zero(axes, across=True, linestyle=(0, (3, 2)))
            axes.set_xlim(-matrices[0].stages - 0.5, matrices[0].stages - 0.5)
    style.percent_axis(every[0], "y")
    text = "Change of perplexity\nfrom the pretrained model, %"
    figure.supylabel(text, multialignment="center", fontsize=style.TEXT)
    style.legend(figure, {s.label: style.look(study, s.method) for s in settings})
    return style.finish(figure)
