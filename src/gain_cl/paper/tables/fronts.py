"""Every setting on the plane of own step and backward change, and the methods at equal own step."""

from __future__ import annotations

from gain_cl.paper.table import Entry, Row, Table, Value, change_of, of, percent
from gain_cl.paper.tables.main import METRICS, sizes
from gain_cl.studies import equal
from gain_cl.studies.study import Study, level, on_front


def build(study: Study) -> list[Table]:
    """Return the settings, and where methods have fronts what they forget at equal own step."""
    matched = skill(study)
    return [settings(study), *[matched][: any(row.cells[4] for row in matched.rows)]]


def settings(study: Study) -> Table:
    """Return a row for each setting of each method, with intervals of own step and backward."""
    levels = {m: [level(s, m) for s in study.settings] for m in METRICS}
    shown = [m for m, found in levels.items() if any(c.blocks for c in found)]
    on, rows, before = on_front(study), list[Row](), study.settings[0]
    for i, s in enumerate(study.settings):
        values = {m: of(m, levels[m][i]) for m in shown}
        for m in values.keys() - {"own_step", "backward"}:
            values[m] = Value(*values[m][:2])
        star = "*" if s.label in on else ""
        cells: list[Entry] = [s.label, *sizes(s), *values.values(), star]
        rows.append(Row(cells, s.ids, s.method != before.method))
        before = s
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
        cells: list[Entry] = [None] * 4
        if not found.reason:
            read = map(change_of, (found.skill, found.a, found.b))
            cells = [*read, percent(equal.interval_of(found))]
        sides = study.of(m) + study.of(study.reference)
        rows.append(Row([m, *cells, found.reason], [r for s in sides for r in s.ids]))
    heads = ["method", "at own step %", "backward %", f"backward of {study.reference} %"]
    heads += ["difference %", "why not"]
    notes = [
        "Read off both fronts by monotone interpolation; 95% intervals over the blocks that "
        "have both, of one block over documents."
    ]
    title = f"{study.model}: backward change at equal own step, against {study.reference}"
    return Table("skill", title, heads, rows, notes)
