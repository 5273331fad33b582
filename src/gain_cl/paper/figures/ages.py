"""Forgetting by how long ago a domain was learned."""

from __future__ import annotations

from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.matrix import Estimate, Parts, forgetting_by_age
from gain_cl.studies.study import Setting, Study, compared

CAPTION = (
    "Change of perplexity since a domain was learned (%; above 0: forgotten) by the "
    "stages since: each method's chosen setting, mean over"
    " the domains that have that age (fewer and earlier ones the higher it is) and over "
    "blocks. 95% intervals over test documents (one"
    " block), or over blocks and the documents they share (several); one without caps goes on."
)


def by_age(setting: Setting) -> dict[int, Estimate]:
    """Return age -> forgetting in nats per token."""
    parts: dict[int, list[Parts]] = {}
    for m in setting.matrices.values():
        for age, coefficients in forgetting_by_age(m).items():
            parts.setdefault(age, []).append(m.contributions(coefficients))
    return {age: c.estimate for age, some in parts.items() if (c := compared(some))}


@style.rules()
def build(study: Study) -> Figure | None:
    """Return forgetting by stages since learned (matrix.forgetting_by_age) of each method's chosen
    setting, in % of perplexity, with 95% intervals as study.level has them. None where nothing
    was learned after something else."""
    lines = [(s, found) for s in study.chosen.values() if (found := by_age(s))]
    if not lines:
        return None
    ages = max(max(found) for _, found in lines)
    figure = style.new(style.DOUBLE if ages > 2 or len(lines) > 4 else style.SINGLE, 2.8)
    axes = figure.subplots()
    style.courses(axes, study, lines)
    style.zero(axes)
    axes.set_xlim(0.5, ages + 0.5)
    axes.set_xticks(range(1, ages + 1))
    style.percent_axis(axes, "y")
    axes.set_xlabel("Stages since the domain was learned")
    axes.set_ylabel("Change of perplexity since learned, %")
    style.legend(figure, {s.label: style.look(study, s.method) for s, _ in lines})
    return style.finish(figure)
