"""What became of each domain, before and after it was learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.paper.figures import style
from gain_cl.stats.format import change
from gain_cl.stats.matrix import LossMatrix
from gain_cl.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    pieces: list[tuple[list[int], Curve]] = []
    for x in sorted({x for c in curves for x in c}):
        there = [i for i, c in enumerate(curves) if x in c]
        if len(there) < min(2, len(curves)):
            continue
        if not pieces or pieces[-1][0] != there:
            pieces.append((there, {}))
        pieces[-1][1][x] = float(np.mean([curves[i][x] for i in there]))
    return [piece for _, piece in pieces]


@style.styled
def build(study: Study) -> Figure | None:
    """Return a panel for each trained domain and one for the mean over the controls, a line for
    each method's chosen setting. Changes of perplexity in %, spaced as changes of loss, means of
    which they are; no intervals. None without a chosen setting."""
    settings = style.chosen(study)
    if not settings:
        return None
    first = next(iter(settings[0].matrices.values()))
    controls = any(of_controls(m) for s in settings for m in s.matrices.values())
    panels = len(first.trained) + controls
    rows = style.rows_of(panels)
    figure = style.new(
        style.DOUBLE if panels > 1 else style.SINGLE, 0.3 + (1.8 if rows > 1 else 2.3) * rows
    )
    every = style.grid(figure, panels, sharey=True)

    def draw(axes: Any, curves_of: Callable[[LossMatrix], Curve]) -> None:
        for s in settings:
            look = style.look(study, s.method)
            pale = {"color": look["color"], "linewidth": 0.5, "alpha": 0.25, "zorder": 1}
            bold = {**look, "markersize": 2.5, "label": s.label, "zorder": 3}
            curves = [c for m in s.matrices.values() if (c := curves_of(m))]
            single = curves if len(curves) > 1 else []
            for some, how in ((single, pale), (means(curves), bold)):
                for c in some:
                    axes.plot(list(c), [change(y) for y in c.values()], **how)
        style.zero(axes, color=style.FAINT)

    for axes, domain in zip(every, first.trained, strict=False):
        draw(axes, partial(of_domain, domain=domain))
        style.zero(axes, across=True, linestyle=(0, (3, 2)))
        style.title(axes, domain)
    bounds = [axes.get_xlim() for axes in every[: len(first.trained)]]
    for axes in every[: len(first.trained)]:
        axes.set_xlim(min(low for low, _ in bounds), max(high for _, high in bounds))
    if controls:
        draw(every[-1], of_controls)
        style.title(every[-1], "controls, never trained")
        every[-1].set_facecolor("#f6f6f6")
    style.percent_axis(every[0], "y")
    columns = style.columns_of(panels)
    for i, axes in enumerate(every):
        low, high = axes.get_xlim()
        step = math.ceil((high - low) / 9)
        axes.set_xticks([t for t in range(-99 * step, 99 * step, step) if low <= t <= high])
        last = controls and i == panels - 1
        if last or i + columns >= panels or (controls and i + columns == panels - 1):
            axes.set_xlabel("Stage" if last else "Stages since learned")
    figure.supylabel(
        "Change of perplexity\nfrom the pretrained model, %",
        multialignment="center",
        fontsize=style.TEXT,
    )
    style.legend(figure, [style.handle(study, s.method, s.label) for s in settings])
    return style.finish(figure)
