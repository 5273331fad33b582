"""The forgetting matrix of a run: perplexity of every domain after every stage."""

from __future__ import annotations

import numpy as np

from gain_cl.measure.record import RunRecord
from gain_cl.paper.table import Row, Table, Value, change_of, plain, signed
from gain_cl.stats import format
from gain_cl.studies.study import Study


def build(studies: dict[str, Study]) -> list[Table]:
    """Return the matrix of each run of a chosen setting."""
    chosen = (pair for study in studies.values() for pair in study.chosen_runs)
    return [of_run(run.record, s.label) for s, run in chosen]


def of_run(r: RunRecord, label: str) -> Table:
    """Return the matrix as files and the report show it. label: what its setting is called."""
    rows = [
        Row([title(s.index, s.domain), *(Value(x, plain(2)) for x in row)])
        for s, row in zip(r.stages, np.exp(r.losses()).tolist(), strict=True)
    ]
    rows[0] = rows[0]._replace(runs=[r.run_id])
    rows.append(Row(["from base %", *map(change_of, changes(r)["from base %"])], rule=True))
    heading = f"{r.model}, {label}, seed {r.seed}: perplexity after each stage ({r.protocol})"
    notes = [f"Never trained: {', '.join(r.controls)}."] if r.controls else []
    return Table(f"matrix-{r.run_id}", heading, ["stage", *r.trained, *r.controls], rows, notes)


def in_terminal(r: RunRecord, shipped: RunRecord | None = None) -> Table:
    """Return the matrix as ``show`` prints it. An entry has a star where its domain was learned.
    Rows below say in % what became of each domain.

    shipped: a run whose untouched model stands above stage 0."""
    names = [*r.trained, *r.controls]
    stages = [(title(s.index, s.domain), s, s.domain) for s in r.stages]
    joint = r.regime == "joint"
    notes = ["stage 1 learned all domains together" if joint else "* learned in this stage"]
    if shipped is not None:
        stages.insert(0, ("as shipped", shipped.stages[0], None))
        notes.append(f"as shipped: {shipped.model}, stage 0 of {shipped.run_id}")
    if r.controls:
        notes.append(f"never trained: {', '.join(r.controls)}")
    learned, other = (lambda x, end=end: format.perplexity(x) + end for end in "* ")
    rows = []
    for label, stage, own in stages:
        losses = ((d, stage.domains[d].loss_nats) for d in names)
        rows.append(Row([label, *(Value(x, learned if d == own else other) for d, x in losses)]))
    for label, values in changes(r).items():
        if np.isfinite(values).any():
            cells = (Value(format.change(x), lambda y: f"{signed(y)} ") for x in values)
            rows.append(Row([label, *cells], rule=label == "own step %" or joint))
    heading = "Perplexity after each stage"
    return Table("matrix", heading, ["stage", *names], rows, ["; ".join(notes)])


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
