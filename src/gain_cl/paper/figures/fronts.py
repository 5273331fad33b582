"""Learning against forgetting: each method's settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gain_cl.paper.figures import style
from gain_cl.stats.format import change
from gain_cl.stats.matrix import Estimate
from gain_cl.studies import equal
from gain_cl.studies.study import Setting, Study, plane

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Own step (change of perplexity in a domain's own stage, %) against backward change "
    "(from then to the end, %): each method's settings,"
    " means over domains and blocks; filled: chosen; dots: interpolated. Vertical: the "
    "own step at which methods are matched (marks at the"
    " foot: each with the reference). 95% intervals over test documents (one block), or "
    "over blocks and the documents they share"
    " (several); one without caps goes on."
)


def measured(study: Study, method: str) -> list[tuple[Setting, Estimate, Estimate]]:
    """Return a method's settings with own step and backward change in nats, those that learned most
    first."""
    return sorted(plane(study.of(method)), key=lambda row: row[1].value)


def skills(study: Study) -> dict[str, float]:
    """Return method -> own step in nats at which it is matched with the reference; only those that
    can be."""
    found = {m: equal.match_skill(study, m, study.reference) for m in study.others}
    return {m: f.skill for m, f in found.items() if not f.reason and math.isfinite(f.skill)}


@style.styled
def build(study: Study) -> Figure | None:
    """Return a line for each method through its settings, by their own step; points have 95%
    intervals of both (study.level). The chosen setting is filled, interpolated ones are dots.
    Dashed: the declared skill; without one, a mark at the foot where each method is matched with
    the reference. None where no setting has both an own step and a backward change."""
    from matplotlib.lines import Line2D

    lines = {m: rows for m in study.methods if (rows := measured(study, m))}
    if not lines:
        return None
    figure = style.new(style.DOUBLE, 3.8)
    axes = figure.subplots()
    for method, rows in lines.items():
        look = style.look(study, method)
        marker, line = look.pop("marker"), {"color": look["color"], "linestyle": ""}
        x, y = [own.map(change) for _, own, _ in rows], [back.map(change) for _, _, back in rows]
        axes.plot([e.value for e in x], [e.value for e in y], label=method, zorder=2, **look)
        for (s, _, _), a, b in zip(rows, x, y, strict=True):
            if not s.trained:
                axes.plot([a.value], [b.value], marker=".", markersize=3, zorder=3, **line)
                continue
            for at, of, across in ((a, b, False), (b, a, True)):
                bars = {"marker": "", "alpha": 0.6, "zorder": 2, **line}
                style.points(axes, [at.value], [of], across=across, **bars)
            mark = {"marker": marker, "markersize": 5.5, "markeredgewidth": 1.0}
            fill = look["color"] if study.chosen.get(method) is s else style.PAPER
            mark |= {"markerfacecolor": fill, "gid": s.label, "zorder": 3}
            axes.plot([a.value], [b.value], **mark, **line)
    style.zero(axes, color=style.FAINT)
    soft: dict[str, Any] = {"color": style.SOFT}
    more: dict[str, dict[str, Any]] = {}
    if study.skill is not None:
        dashed = {**soft, "linewidth": 0.8, "linestyle": (0, (4, 2))}
        axes.axvline(change(study.skill), zorder=1, gid="skill", **dashed)
        more[f"methods are matched at {style.signed(round(change(study.skill), 6))}%"] = dashed
    elif places := skills(study):
        for method, skill in places.items():
            foot = {"color": style.look(study, method)["color"], "linewidth": 1.5}
            axes.axvline(change(skill), 0, 0.035, zorder=1, gid="skill", **foot)
        mark = {"marker": "|", "markersize": 6, "markeredgewidth": 1.5, "linestyle": ""}
        more[style.name(f"matched with {study.reference} at", 44)] = soft | mark
    for which in ("x", "y"):
        style.percent_axis(axes, which, most=8)
    axes.set_xlabel("Own step: change of perplexity in a domain's own stage, %")
    axes.set_ylabel("Backward change of perplexity, to the end, %")
    title = "↙ better: learned more (left), forgot less (low)"
    axes.set_title(title, loc="left", fontsize=style.SMALL, **soft)
    handles = [style.handle(study, m, m) for m in lines]
    style.legend(figure, [*handles, *(Line2D([], [], label=k, **v) for k, v in more.items())])
    return style.finish(figure)
