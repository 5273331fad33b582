"""The forgetting matrix as CSV."""

from __future__ import annotations

import csv as csv_
import io
import math

from gain_cl.measure.record import Run


def csv(run: Run) -> str:
    """Perplexities, one row per stage: stage (0 = pretrained), trained (the domain learned in it,
    empty for 0), then one column per domain, trained ones in training order, then controls. Full
    precision (the shortest text that reads back as the same float64); empty where a domain was not
    scored. A tainted run has one more column, which says why."""
    out = io.StringIO()
    writer = csv_.writer(out, lineterminator="\n")
    table = run.matrix
    tainted = ["; ".join(run.record.tainted)] if run.record.tainted else []
    writer.writerow(["stage", "trained", *table.columns, *(["tainted"] if tainted else [])])
    for stage, values in zip(run.record.stages, table.to_numpy().tolist(), strict=True):
        writer.writerow(
            [
                stage.index,
                stage.domain or "",
                *("" if math.isnan(v) else repr(v) for v in values),
                *tainted,
            ]
        )
    return out.getvalue()
