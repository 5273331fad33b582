"""What each method forgot less or more than the reference, domain by domain."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from gain_cl.paper.figures import style
from gain_cl.stats.matrix import Coefficients, Estimate, LossMatrix
from gain_cl.studies.study import Compared, Setting, Study, difference

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


def of_domain(m: LossMatrix, domain: str) -> Coefficients:
    """Return the domain's backward change L[T, k] - L[k, k]; None for the last domain, and unless
    stages follow each other."""
    k = m.trained.index(domain) + 1
    if m.regime != "sequential" or k == m.stages:
        return None
    return m.mean_change(m.stages, k, [domain])


def rows(study: Study, a: Setting, b: Setting) -> dict[str, Compared]:
    """Return a minus b for each domain, in the order of the study's first block, then for their
    mean. One block of several says nothing of the others: no interval."""
    trained = study.runs[0].record.trained
    found = {d: difference(a, b, partial(of_domain, domain=d)) for d in trained}
    found[MEAN] = difference(a, b, "backward")
    for name, c in found.items():
        if c.blocks == 1 < len(study.blocks):
            found[name] = c._replace(estimate=Estimate(c.estimate.value))
    return {name: c for name, c in found.items() if c.blocks}


@style.rules()
def build(study: Study) -> Figure | None:
    """Return a panel for each method other than the reference, a row for each trained domain and
    one for their mean: chosen setting minus the reference's, backward change in % of perplexity,
    with 95% intervals paired within blocks. None without a pair that has one."""
    reference = study.chosen.get(study.reference)
    found = {
        s.label: (s, differences)
        for s in study.chosen.values()
        if reference and s is not reference and (differences := rows(study, s, reference))
    }
    if reference is None or not found:
        return None
    names = [*study.runs[0].record.trained, MEAN]
    names = [n for n in names if any(n in differences for _, differences in found.values())]
    high = 0.85 + 0.17 * (len(names) + 1)
    figure, every = style.panels([*found], high, sharex=True, sharey=True)
    for axes, (s, differences) in zip(every, found.values(), strict=True):
        look = style.look(study, s.method) | {"linestyle": ""}
        for row, c in differences.items():
            single = c.blocks == 1 < len(study.blocks)
            fill: dict[str, Any] = {"markerfacecolor": style.PAPER} if single else {}
            style.points(axes, [names.index(row)], [c.estimate], across=True, **look, **fill)
        style.zero(axes, across=True)
        axes.axhline(len(names) - 1.5, color=style.FAINT, linewidth=0.6, zorder=0)
        axes.tick_params(axis="x", labelbottom=True)
    every[0].set_yticks(range(len(names)), [style.name(n, 24) for n in names])
    every[0].set_ylim(len(names) - 0.4, -0.6)
    style.percent_axis(every[0], "x")
    less = f"(below 0: forgets less than {style.name(reference.label, 60)})"
    figure.supxlabel(f"Difference of backward change, % of perplexity\n{less}")
    return style.finish(figure)
