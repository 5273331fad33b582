"""Perplexity of every domain: of the pretrained model, after its own stage and at the end."""

from __future__ import annotations

import math

import numpy as np

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, of, plain
from gain_cl.stats.inference import Parts
from gain_cl.studies import study as comparison
from gain_cl.studies.study import Setting, Study


def build(book: Book) -> list[Table]:
    return [
        t
        for model, study in book.studies.items()
        for t in (_perplexity(book, model, study), _change(book, model, study))
    ]


def names(study: Study) -> list[str]:
    """Trained domains in the order of the first block, then the controls."""
    r = next(iter(study.settings[0].runs.values())).record
    return [*r.trained, *r.controls]


def _perplexity(book: Book, model: str, study: Study) -> Table:
    domains, rows = names(study), []
    first = next(iter(study.settings[0].matrices.values()))
    base = [math.exp(first.loss[0, first.domains.index(d)]) for d in domains]
    rows.append(
        Row(
            ["pretrained", *(Value(x, write=plain(2)) for x in base)],
            book.ids(model, study.settings[0].label)[:1],
        )
    )
    for s in study.chosen.values():
        for when in ("after its stage", "at the end"):
            cells = [_mean(s, d, when) for d in domains]
            rows.append(
                Row(
                    [f"{s.label}, {when}", *cells],
                    book.ids(model, s.label),
                    when == "after its stage",
                )
            )
    notes = [
        "Perplexity: exp of the loss in nats per token, mean over blocks of the loss. "
        "Controls are never trained."
    ]
    return Table(
        tables.named("domains", book, model),
        f"{model}: perplexity of each domain",
        ["model", *domains],
        rows,
        notes,
    )


def _mean(s: Setting, domain: str, when: str) -> Value | None:
    losses = []
    for m in s.matrices.values():
        j = m.domains.index(domain)
        if (
            when == "at the end" and m.regime != "individual"
        ):  # else there is no model that has seen them all
            losses.append(m.loss[-1, j])
        elif when != "at the end" and m.regime != "joint" and domain in m.trained:
            losses.append(m.loss[m.trained.index(domain) + 1, j])
    return Value(math.exp(float(np.mean(losses))), write=plain(2)) if losses else None


def _change(book: Book, model: str, study: Study) -> Table:
    domains = names(study)
    rows = [
        Row(
            [s.label, *(of("from_base", from_base(s, d)) for d in domains)],
            book.ids(model, s.label),
        )
        for s in study.chosen.values()
    ]
    notes = [
        "95% intervals over "
        + (
            "the domain's documents."
            if len(study.blocks) == 1
            else "blocks and the documents they share."
        )
    ]
    title = f"{model}: change of each domain's perplexity from the pretrained model to the end, %"
    return Table(
        tables.named("domains-change", book, model), title, ["method", *domains], rows, notes
    )


def from_base(s: Setting, domain: str) -> comparison.Compared | None:
    """Change of one domain's loss from the pretrained model to the end; None where domains were
    learned alone."""
    parts: list[Parts] = []
    if any(m.regime == "individual" for m in s.matrices.values()):
        return None
    for m in s.matrices.values():
        parts.append(m.contributions(m.mean_change([m.stages], [0], [domain])))
    return comparison.compared(parts)
