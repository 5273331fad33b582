"""Learning against forgetting: each method's settings."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.format import change
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Setting, Study, plane

CAPTION = (
    "Own step (change of perplexity in a domain's own stage, %) against backward change "
    "(from then to the end, %): each method's settings,"
    " means over domains and blocks; filled: chosen; dots: interpolated. Vertical: the "
    "declared own step at which methods are matched. 95% intervals over test documents (one "
    "block), or over blocks and the documents they share"
    " (several); one without caps goes on."
)


def measured(study: Study, method: str) -> list[tuple[Setting, Estimate, Estimate]]:
    """Return a method's settings with own step and backward change in nats, those that learned most
    first."""
    return sorted(plane(study.of(method)), key=lambda row: row[1].value)


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a line for each method through its settings, by their own step; points have 95%
    intervals of both (study.level). The chosen setting is filled, interpolated ones are dots.
    Dashed: the declared skill. None where no setting has both an own step and a backward change."""
    lines = {m: rows for m in study.methods if (rows := measured(study, m))}
    if not lines:
        return None
    figure, (axes,) = style.panels([""], 3.5, wide=True)
    looks = {method: style.look(study, method) for method in lines}
    for method, rows in lines.items():
        line = {k: v for k, v in looks[method].items() if k != "marker"}
        axes.plot([x.value for _, x, _ in rows], [y.value for *_, y in rows], label=method, **line)
        bare: dict[str, Any] = {"color": line["color"], "linestyle": ""}
        for s, x, y in rows:
            if not s.trained:
                axes.plot(x.value, y.value, marker=".", markersize=3, zorder=3, **bare)
                continue
            style.points(axes, [y.value], [x], across=True, alpha=0.6, **bare)
            style.points(axes, [x.value], [y], alpha=0.6, **bare)
            fill = line["color"] if study.chosen.get(method) is s else style.PAPER
            mark = {"markersize": 5.5, "markerfacecolor": fill, "gid": s.label, "zorder": 3}
            axes.plot(x.value, y.value, marker=looks[method]["marker"], **mark, **bare)
    style.zero(axes, color=style.FAINT)
    if study.skill is not None:
        dashed = {"color": style.SOFT, "linewidth": 0.8, "linestyle": style.DASHED}
        axes.axvline(study.skill, zorder=1, gid="skill", **dashed)
        skill = style.signed(round(change(study.skill), 6))
        looks[f"methods are matched at {skill}%"] = dashed
    for which in ("x", "y"):
        style.percent_axis(axes, which, most=8)
    axes.set_xlabel("Own step: change of perplexity in a domain's own stage, %")
    axes.set_ylabel("Backward change of perplexity, to the end, %")
    title = "↙ better: learned more (left), forgot less (low)"
    axes.set_title(title, loc="left", fontsize=style.SMALL, color=style.SOFT)
    return style.finish(figure, looks)
