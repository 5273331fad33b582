"""Every setting on the plane of own step and backward change, and the methods at equal own step."""

from __future__ import annotations

from gain_cl.paper.table import Entry, Row, Table, Value, change_of, count, of, percent
from gain_cl.paper.tables.main import METRICS, parameters
from gain_cl.studies import equal
from gain_cl.studies.study import Study, level, on_front


def build(study: Study) -> list[Table]:
    """Return the settings, and where methods have fronts what they forget at equal own step."""
    matched = skill(study)
    read = any(isinstance(row.cells[4], Value) for row in matched.rows)
    return [settings(study), *[matched][:read]]


def settings(study: Study) -> Table:
    """Return a row for each setting of each method."""
    levels = {s.label: {m: level(s, m) for m in METRICS} for s in study.settings}
    shown = [m for m in METRICS if any(x[m] is not None for x in levels.values())]
    on = on_front(study)
    rows = []
    for before, s in zip([study.settings[0], *study.settings], study.settings, strict=False):
        numbers = [Value(x, write=count) for x in (len(s.runs), parameters(s))]
        found = levels[s.label]
        summaries = [of(m, found[m], interval=m in ("own_step", "backward")) for m in shown]
        star = "*" if s.label in on else ""
        rows.append(Row([s.label, *numbers, *summaries, star], s.ids, s.method != before.method))
    notes = [
        "Change of perplexity, mean over domains; below 0 is better. *: no other setting of "
        "its method learns more and forgets less."
    ]
    heads = ["setting", "blocks", "trains", *(METRICS[m] for m in shown), "front"]
    return Table("settings", f"{study.model}: every setting", heads, rows, notes)


def skill(study: Study, at: float | None = None) -> Table:
    """Return the methods at equal own step, or why they have no fronts to read.

    at: own step in nats per token; None: the study's."""
    rows = []
    for m in study.others:
        found = equal.match_skill(study, m, study.reference, at)
        runs = [r for name in (m, study.reference) for s in study.of(name) for r in s.ids]
        cells: list[Entry] = [None] * 4
        if not found.reason:
            read = map(change_of, (found.skill, found.a, found.b))
            cells = [*read, percent(equal.interval_of(found))]
        rows.append(Row([m, *cells, found.reason], runs))
    heads = [
        "method",
        "at own step %",
        "backward %",
        f"backward of {study.reference} %",
        "difference %",
        "why not",
    ]
    notes = [
        "Read off both fronts by monotone interpolation; 95% intervals over the blocks that "
        "have both, of one block over documents."
    ]
    title = f"{study.model}: backward change at equal own step, against {study.reference}"
    return Table("skill", title, heads, rows, notes)
