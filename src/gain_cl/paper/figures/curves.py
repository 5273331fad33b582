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
    "blocks at the positions that all have. Pale: single blocks. No intervals."
)

Curve = dict[int, float]
"""Position -> change of loss from the pretrained model, nats per token."""


def of_domain(m: LossMatrix, domain: str) -> Curve:
    """Return the course of a domain by stages since the domain was learned: 0 just after, -1 just
    before. Of a domain learned alone or with all others only these."""
    k = 1 if m.regime == "joint" else m.trained.index(domain) + 1
    course = m.loss[:, m.domains.index(domain)] - m.loss[0, m.domains.index(domain)]
    if m.regime != "sequential":
        course, k = course[[0, k]], 1
    return {t - k: float(x) for t, x in enumerate(course)}


def of_controls(m: LossMatrix) -> Curve:
    """Return the mean over the controls, by stage; empty without controls, and where stages do not
    follow each other."""
    if not m.controls or m.regime == "individual":
        return {}
    mean = m.loss[:, len(m.trained) :].mean(1)
    return {t: float(x - mean[0]) for t, x in enumerate(mean)}


def mean(curves: list[Curve]) -> Curve:
    """Return the mean at the positions that all curves have: over fewer of them it would jump where
    one begins or ends, though none of them does."""
    return dict(pd.DataFrame(curves).dropna(axis=1).mean().sort_index())


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
    figure, every = style.panels([*drawn], 1.8 if len(drawn) > 4 else 2.3, sharey=True)
    for axes, curve_of in zip(every, drawn.values(), strict=True):
        for s in settings:
            look = style.look(study, s.method)
            pale = {"color": look["color"], "linewidth": 0.5, "alpha": 0.25, "zorder": 1}
            bold = {**look, "markersize": 2.5, "label": s.label, "zorder": 3}
            curves = [c for m in s.matrices.values() if (c := curve_of(m))]
            for c in curves if len(curves) > 1 else []:
                axes.plot(list(c), list(c.values()), **pale)
            middle = mean(curves)
            axes.plot(list(middle), list(middle.values()), **bold)
        style.zero(axes, color=style.FAINT)
        axes.locator_params(axis="x", integer=True, nbins=9)
        axes.set_xlabel("Stage" if curve_of is of_controls else "Stages since learned")
        if curve_of is of_controls:
            axes.set_facecolor("#f6f6f6")
        else:
            style.zero(axes, across=True, linestyle=style.DASHED)
            axes.set_xlim(-matrices[0].stages - 0.5, matrices[0].stages - 0.5)
    style.percent_axis(every[0], "y")
    figure.supylabel("Change of perplexity\nfrom the pretrained model, %", ma="center")
    return style.finish(figure, style.looks(study, settings))
