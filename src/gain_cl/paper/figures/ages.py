"""Forgetting by how long ago a domain was learned."""

from __future__ import annotations

from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.matrix import Estimate, forgetting_by_age
from gain_cl.studies.study import Setting, Study, level

CAPTION = (
    "Change of perplexity since a domain was learned (%; above 0: forgotten) by the "
    "stages since: each method's chosen setting, mean over"
    " the domains that have that age (fewer and earlier ones the higher it is) and over "
    "blocks. 95% intervals over test documents (one"
    " block), or over blocks and the documents they share (several); one without caps goes on."
)


def by_age(setting: Setting) -> dict[int, Estimate]:
    """Return age -> forgetting in nats per token."""
    ages = {age for m in setting.matrices.values() for age in forgetting_by_age(m)}
    found = {a: level(setting, lambda m, a=a: forgetting_by_age(m).get(a)) for a in sorted(ages)}  # type: ignore[misc]
    return {age: c.estimate for age, c in found.items()}


@style.rules()
def build(study: Study) -> Figure | None:
    """Return forgetting by stages since learned (matrix.forgetting_by_age) of each method's chosen
    setting, in % of perplexity, with 95% intervals as study.level has them. None where nothing
    was learned after something else."""
    lines = [(s, found) for s in study.chosen.values() if (found := by_age(s))]
    if not lines:
        return None
    ages = max(max(found) for _, found in lines)
    figure, (axes,) = style.panels([""], 2.5, ages > 2 or len(lines) > 4)
    style.courses(axes, study, lines)
    style.zero(axes)
    axes.set(xlim=(0.5, ages + 0.5), xticks=range(1, ages + 1))
    style.percent_axis(axes, "y")
    axes.set_xlabel("Stages since the domain was learned")
    axes.set_ylabel("Change of perplexity since learned, %")
    return style.finish(figure, style.looks(study, (s for s, _ in lines)))
