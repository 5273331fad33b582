"""The forgetting matrix of a run: perplexity of every domain after every stage."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gain_cl.measure.record import RunRecord
from gain_cl.paper.table import Row, Table, Value, change_of, known, plain, signed
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
    rows = [
        Row(
            [title(s.index, s.domain), *(known(float(x), plain(2)) for x in row)],
            [] if s.index else [r.run_id],
        )
        for s, row in zip(r.stages, np.exp(r.losses()), strict=True)
    ]
    rows.append(Row(["from base %", *map(change_of, changes(r)["from base %"])], rule=True))
    heading = f"{r.model}, {label}, seed {r.seed}: perplexity after each stage ({r.protocol})"
    notes = [f"Never trained: {', '.join(r.controls)}."] if r.controls else []
    return Table(f"matrix-{r.run_id}", heading, ["stage", *r.trained, *r.controls], rows, notes)


def in_terminal(r: RunRecord, shipped: RunRecord | None = None) -> Table:
    """Return the matrix as ``show`` prints it. An entry has a star where its domain was learned and
    a colour by its change since stage 0. Rows below say in % what became of each domain.

    shipped: a run whose untouched model stands above stage 0."""
    losses, names = r.losses(), [*r.trained, *r.controls]

    def perplexities(label: str, values: Iterable[float], learned: str | None = None) -> Row:
        shown = zip(names, values, losses[0], strict=True)
        return Row([label, *(entry(x, x - base, d == learned) for d, x, base in shown)])

    rows = [
        perplexities(title(s.index, s.domain), x, s.domain)
        for s, x in zip(r.stages, losses, strict=True)
    ]
    joint = r.regime == "joint"
    notes = ["stage 1 learned all domains together" if joint else "* learned in this stage"]
    if shipped is not None:
        above = (shipped.stages[0].domains[d].loss_nats for d in names)
        rows.insert(0, perplexities("as shipped", above))
        notes.append(f"as shipped: {shipped.model}, stage 0 of {shipped.run_id}")
    if r.controls:
        notes.append(f"never trained: {', '.join(r.controls)}")
    notes.append("colours: blue below stage 0, orange above")
    for label, values in changes(r).items():
        if np.isfinite(values).any():
            cells = (known(format.change(x), lambda y: f"{signed(y)} ") for x in values)
            rows.append(Row([label, *cells], rule=label == "own step %" or joint))
    return Table(
        "matrix", "Perplexity after each stage", ["stage", *names], rows, ["; ".join(notes)]
    )


def changes(r: RunRecord) -> dict[str, np.ndarray]:
    """Return what became of each domain, (domains,) in nats per token: in its own stage, from then
    to the end, and from the pretrained model to the end. nan: it does not exist."""
    losses, count = r.losses(), len(r.trained)
    own, back, base = np.full((3, losses.shape[1]), np.nan)
    if r.regime != "joint":
        after = np.diagonal(losses, -1)[:count]
        before = losses[0] if r.regime == "individual" else np.diagonal(losses)
        own[:count] = after - before[:count]
    if r.regime == "sequential":
        back[: count - 1] = (losses[-1, :count] - after)[:-1]
    if r.regime != "individual":
        base[:] = losses[-1] - losses[0]
    return {"own step %": own, "backward %": back, "from base %": base}


def title(index: int, domain: str | None) -> str:
    """Return what a stage is called: 0 pretrained, 3 law."""
    return f"{index} {domain or 'pretrained'}"


def entry(loss: float, change_nats: float, learned: bool) -> Value:
    """Return the perplexity of a loss in nats per token, for the terminal."""
    mark = "*" if learned else " "
    style = colour(change_nats, learned)
    return Value(loss, write=lambda x: format.perplexity(x) + mark, style=style)


def colour(change_nats: float, learned: bool) -> str:
    """Return blue where perplexity fell since stage 0 and orange where it rose, which colour-blind
    readers can tell apart: none within 1%; bold where the domain was learned."""
    fell = "color(33)" if change_nats < 0 else "color(202)"
    seen = math.isfinite(change_nats) and abs(change_nats) >= 0.01
    return f"{'bold ' if learned else ''}{fell if seen else 'default'}"
