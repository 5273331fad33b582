"""The forgetting matrix of each run of a chosen setting."""

from __future__ import annotations

import math

from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, plain, signed
from gain_cl.stats.format import change


def build(book: Book) -> list[Table]:
    found = []
    for study in book.studies.values():
        for s in study.chosen.values():
            for run in s.runs.values():
                r, losses = run.record, run.record.losses()
                rows = []
                for stage, row in zip(r.stages, losses, strict=True):
                    cells = [
                        Value(math.exp(x), write=plain(2)) if not math.isnan(x) else None
                        for x in row
                    ]
                    rows.append(
                        Row(
                            [f"{stage.index} {stage.domain or 'pretrained'}", *cells],
                            [r.run_id] if stage.index == 0 else (),
                        )
                    )
                last = [
                    Value(change(x), write=signed) if not math.isnan(x) else None
                    for x in losses[-1] - losses[0]
                ]
                rows.append(Row(["from base %", *last], rule=True))
                title = (
                    f"{r.model}, {s.label}, seed {r.seed}: perplexity after each stage "
                    f"({r.protocol})"
                )
                note = [f"Never trained: {', '.join(r.controls)}."] if r.controls else []
                found.append(
                    Table(
                        f"matrix-{r.run_id}", title, ["stage", *r.trained, *r.controls], rows, note
                    )
                )
    return found
