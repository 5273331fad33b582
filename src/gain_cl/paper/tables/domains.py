"""Perplexity of every domain: of the pretrained model, after its own stage and at the end."""

from __future__ import annotations

import math

import numpy as np

from gain_cl.paper.table import Row, Table, Value, of, over_units, plain
from gain_cl.stats.matrix import Coefficients, LossMatrix
from gain_cl.studies.study import Compared, Setting, Study, level


def build(study: Study) -> list[Table]:
    """Return perplexities, and changes from the pretrained model."""
    names, first, chosen = domain_names(study), study.settings[0], study.chosen.values()
    matrix = next(iter(first.matrices.values()))
    base = (_perplexity([matrix.loss[0, matrix.domains.index(d)]]) for d in names)
    rows = [Row(["pretrained", *base], first.ids[:1])]
    for s in chosen:
        for when in ("after its stage", "at the end"):
            ended = when == "at the end"
            losses = ([_loss(m, d, ended) for m in s.matrices.values()] for d in names)
            rows.append(Row([f"{s.label}, {when}", *map(_perplexity, losses)], s.ids, not ended))
    note = "Perplexity: exp of the loss in nats per token, mean over blocks of the loss. "
    notes = [note + "Controls are never trained."]
    title = f"{study.model}: perplexity of each domain"
    levels = Table("domains", title, ["model", *names], rows, notes)
    rows = [
        Row([s.label, *(of("from_base", from_base(s, d)) for d in names)], s.ids) for s in chosen
    ]
    change = "change of each domain's perplexity from the pretrained model to the end, %"
    over = "the domain's documents" if len(study.blocks) == 1 else over_units(study)
    notes = [f"95% intervals over {over}."]
    return [
        levels,
        Table("domains-change", f"{study.model}: {change}", ["method", *names], rows, notes),
    ]


def domain_names(study: Study) -> list[str]:
    """Return trained domains in the order of the first block, then the controls."""
    r = study.runs[0].record
    return [*r.trained, *r.controls]


def _loss(m: LossMatrix, domain: str, ended: bool) -> float:
    """Return a domain's loss at the end, or after its stage; nan where there is no such model."""
    if m.regime == ("individual" if ended else "joint") or not (ended or domain in m.trained):
        return math.nan
    stage = m.stages if ended else m.trained.index(domain) + 1
    return float(m.loss[stage, m.domains.index(domain)])


def _perplexity(losses: list[float]) -> Value:
    known = [x for x in losses if not math.isnan(x)]
    return Value(math.exp(np.mean(known)) if known else math.nan, plain(2))


def from_base(s: Setting, domain: str) -> Compared:
    """Return the change of one domain's loss from the pretrained model to the end; nothing where
    domains were learned alone."""

    def change(m: LossMatrix) -> Coefficients:
        return None if m.regime == "individual" else m.mean_change(m.stages, 0, [domain])

    return level(s, change)
