"""What each block says: every method, and its difference from the reference, paired within the
block."""

from __future__ import annotations

import math

from gain_cl.paper.table import Row, Table, change_of
from gain_cl.studies.study import Study

SHOWN = {"own_step": "own step", "backward": "backward", "from_base": "from base"}


def build(study: Study) -> list[Table]:
    """Return nothing of a study with one block."""
    if len(study.blocks) == 1:
        return []
    rows, reference = [], study.chosen.get(study.reference)
    for block in study.blocks:
        there = [s for s in study.chosen.values() if block in s.runs]
        for s in there:
            values = [s.value(m, block) for m in SHOWN]
            less = [math.nan] * 2
            if reference is not None and s is not reference and block in reference.runs:
                less = [values[i] - reference.value(m, block) for i, m in enumerate([*SHOWN][:2])]
            cells = map(change_of, (*values, *less))
            run_id = s.runs[block].record.run_id
            rows.append(Row([str(block[0]), s.label, *cells], [run_id], s is there[0]))
    order = [f"Block {seed}, seed {seed}: {', '.join(order)}." for seed, order in study.blocks]
    heads = ["block", "method", *(f"{h} %" for h in SHOWN.values())]
    heads += [f"{h} minus {study.reference} %" for h in ("own step", "backward")]
    title = f"{study.model}: every block (seed and order of the domains)"
    return [Table("blocks", title, heads, rows, order)]
