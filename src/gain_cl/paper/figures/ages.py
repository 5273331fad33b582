"""Forgetting by how long ago a domain was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gain_cl.paper.figures import style
from gain_cl.stats import matrix
from gain_cl.stats.format import change
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Setting, Study, compared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Change of perplexity since a domain was learned (%; above 0: forgotten) by the "
    "stages since: each method's chosen setting, mean over"
    " the domains that have that age (fewer and earlier ones the higher it is) and over "
    "blocks. 95% intervals over test documents (one"
    " block), or over blocks and the documents they share (several); one without caps goes on."
)


def by_age(setting: Setting) -> dict[int, Estimate]:
    """Return age -> forgetting in nats per token."""
    of = [
        {age: m.contributions(c) for age, c in matrix.forgetting_by_age(m).items()}
        for m in setting.matrices.values()
    ]
    found = {
        age: compared([parts[age] for parts in of if age in parts])
        for age in sorted({a for parts in of for a in parts})
    }
    return {age: c.estimate for age, c in found.items() if c is not None}


@style.styled
def build(study: Study) -> Figure | None:
    """Return forgetting by stages since learned (matrix.forgetting_by_age) of each method's chosen
    setting, in % of perplexity, with 95% intervals as study.level has them. None where nothing
    was learned after something else."""
    lines = {s.label: (s, found) for s in style.chosen(study) if (found := by_age(s))}
    if not lines:
        return None
    ages = max(max(found) for _, found in lines.values())
    figure = style.new(style.DOUBLE if ages > 2 or len(lines) > 4 else style.SINGLE, 2.8)
    axes = figure.subplots()
    for i, (s, found) in enumerate(lines.values()):
        at = style.dodged(list(found), i, len(lines))
        style.points(
            axes,
            list(at),
            [e.map(change) for e in found.values()],
            **style.look(study, s.method),
            label=s.label,
        )
    style.zero(axes)
    axes.set_xlim(0.5, ages + 0.5)
    axes.set_xticks(range(1, ages + 1))
    style.percent_axis(axes, "y")
    axes.set_xlabel("Stages since the domain was learned")
    axes.set_ylabel("Change of perplexity since learned, %")
    style.legend(figure, [style.handle(study, s.method, s.label) for s, _ in lines.values()])
    return style.finish(figure)
