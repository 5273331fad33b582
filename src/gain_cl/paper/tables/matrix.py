"""The forgetting matrix of a run: perplexity of every domain after every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gain_cl.measure.record import RunRecord
from gain_cl.paper.table import Entry, Row, Table, Value, change_of, known, plain, signed
from gain_cl.stats import format
from gain_cl.studies.study import Study


def build(studies: dict[str, Study]) -> list[Table]:
    """Return the matrix of each run of a chosen setting."""
    return [
        of_run(run.record, s.label)
        for study in studies.values()
        for s in study.chosen.values()
        for run in s.runs.values()
    ]


def of_run(r: RunRecord, label: str) -> Table:
    """Return the matrix as files and the report show it. label: what its setting is called."""
    losses = r.losses()
    rows = [
        Row(
            [title(s.index, s.domain), *(None if math.isnan(x) else entry(x) for x in row)],
            [] if s.index else [r.run_id],
        )
        for s, row in zip(r.stages, losses, strict=True)
    ]
    rows.append(Row(["from base %", *map(change_of, losses[-1] - losses[0])], rule=True))
    heading = f"{r.model}, {label}, seed {r.seed}: perplexity after each stage ({r.protocol})"
    notes = [f"Never trained: {', '.join(r.controls)}."] if r.controls else []
    return Table(f"matrix-{r.run_id}", heading, ["stage", *r.trained, *r.controls], rows, notes)


def in_terminal(r: RunRecord, shipped: RunRecord | None = None, coloured: bool = False) -> Table:
    """Return the matrix as ``show`` prints it. An entry has a star where its domain was learned and
    a colour by its change since stage 0, controls stand behind a bar, and rows below say in % what
    became of each domain.

    shipped: a run whose untouched model stands above stage 0. coloured: colours are seen, and are
    explained."""
    losses, names, trained = r.losses(), [*r.trained, *r.controls], len(r.trained)
    stars = [" " if d in r.trained else "" for d in names]  # their place behind each number

    def row(label: str, cells: Sequence[Entry], rule: bool = False) -> Row:
        bar = ["|"] if r.controls else []
        return Row([label, *cells[:trained], *bar, *cells[trained:]], rule=rule)

    def perplexities(label: str, values: Sequence[float], learned: str | None = None) -> Row:
        marks = ["*" if d == learned else star for d, star in zip(names, stars, strict=True)]
        return row(
            label,
            [
                entry(x, mark, colour(x - base, mark == "*"))
                for x, base, mark in zip(values, losses[0], marks, strict=True)
            ],
        )

    rows = [
        perplexities(title(s.index, s.domain), x, s.domain)
        for s, x in zip(r.stages, losses, strict=True)
    ]
    learned = "stage 1 learned all domains together" if r.regime == "joint" else ""
    notes = [learned or "* learned in this stage"]
    if shipped is not None:
        above = [shipped.stages[0].domains[d].loss_nats for d in names]
        rows.insert(0, perplexities("as shipped", above))
        notes.append(f"as shipped: {shipped.model}, stage 0 of {shipped.run_id}")
    if r.controls:
        notes.append("right of the bar: controls, never trained")
    if coloured:
        notes.append("blue: below stage 0, orange: above")
    rule = True
    for label, values in changes(r).items():
        if any(x is not None for x in values):
            cells = [
                "" if x is None else known(format.change(x), _before(star))
                for x, star in zip(values, stars, strict=True)
            ]
            rows.append(row(label, cells, rule))
            rule = False
    heads = [d + star for d, star in zip(names, stars, strict=True)]
    columns = [str(c) for c in row("stage", heads).cells]
    return Table("matrix", "Perplexity after each stage", columns, rows, ["; ".join(notes)])


def _before(star: str) -> Callable[[float], str]:
    return lambda x: signed(x) + star


def changes(r: RunRecord) -> dict[str, list[float | None]]:
    """Return what became of each domain, in nats per token: in its own stage, from then to the end,
    and from the pretrained model to the end. None: it does not exist."""
    losses, count = r.losses(), len(r.trained)
    nothing: list[float | None] = [None] * losses.shape[1]
    own, back, base = nothing[:], nothing[:], nothing[:]
    for j, end in enumerate(losses[-1]):
        if j < count and r.regime != "joint":
            own[j] = losses[j + 1, j] - losses[0 if r.regime == "individual" else j, j]
        if j < count - 1 and r.regime == "sequential":
            back[j] = end - losses[j + 1, j]
        if r.regime != "individual":
            base[j] = end - losses[0, j]
    return {"own step %": own, "backward %": back, "from base %": base}


def title(index: int, domain: str | None) -> str:
    """Return what a stage is called: 0 pretrained, 3 law."""
    return f"{index} {domain or 'pretrained'}"


def entry(loss: float, mark: str | None = None, style: str = "") -> Value:
    """Return the perplexity of a loss in nats per token. mark: in the terminal, what stands behind
    it."""
    if mark is None:
        return Value(math.exp(loss), write=plain(2))
    return Value(loss, write=lambda x: format.perplexity(x) + mark, style=style)


def colour(change_nats: float, learned: bool) -> str:
    """Return blue where perplexity fell since stage 0 and orange where it rose, which colour-blind
    readers can tell apart: stronger from 10%, none within 1%; bold where the domain was learned."""
    weight = "bold " if learned else ""
    if not math.isfinite(change_nats) or abs(change_nats) < 0.01:
        return weight + "default"
    pair = (33, 202) if abs(change_nats) >= 0.1 else (31, 172)
    return f"{weight}color({pair[bool(change_nats > 0)]})"
