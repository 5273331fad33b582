"""Perplexity of every domain: of the pretrained model, after its own stage and at the end."""

from __future__ import annotations

import math

import numpy as np

from gain_cl.paper.table import Row, Table, Value, of, over_units, plain
from gain_cl.studies.study import Compared, Setting, Study, compared

ENDS = ("after its stage", "at the end")


def build(study: Study) -> list[Table]:
    """Return perplexities, and changes from the pretrained model."""
    names, model = domain_names(study), study.model
    first = next(iter(study.settings[0].matrices.values()))
    base = [math.exp(first.loss[0, first.domains.index(d)]) for d in names]
    rows = [
        Row(["pretrained", *(Value(x, write=plain(2)) for x in base)], study.settings[0].ids[:1])
    ]
    rows += [
        Row([f"{s.label}, {when}", *(_mean(s, d, when) for d in names)], s.ids, when == ENDS[0])
        for s in study.chosen.values()
        for when in ENDS
    ]
    notes = [
        "Perplexity: exp of the loss in nats per token, mean over blocks of the loss. "
        "Controls are never trained."
    ]
    title = f"{model}: perplexity of each domain"
    levels = Table("domains", title, ["model", *names], rows, notes)
    rows = [
        Row([s.label, *(of("from_base", from_base(s, d)) for d in names)], s.ids)
        for s in study.chosen.values()
    ]
    title = f"{model}: change of each domain's perplexity from the pretrained model to the end, %"
    over = "the domain's documents" if len(study.blocks) == 1 else over_units(study)
    notes = [f"95% intervals over {over}."]
    return [levels, Table("domains-change", title, ["method", *names], rows, notes)]


def domain_names(study: Study) -> list[str]:
    """Return trained domains in the order of the first block, then the controls."""
    r = study.runs[0].record
    return [*r.trained, *r.controls]


def _mean(s: Setting, domain: str, when: str) -> Value | None:
    losses = []
    for m in s.matrices.values():
        j = m.domains.index(domain)
        if when == ENDS[1]:
            if m.regime != "individual":  # else there is no model that has seen them all
                losses.append(m.loss[-1, j])
        elif m.regime != "joint" and domain in m.trained:
            losses.append(m.loss[m.trained.index(domain) + 1, j])
    return Value(math.exp(float(np.mean(losses))), write=plain(2)) if losses else None


def from_base(s: Setting, domain: str) -> Compared | None:
    """Return the change of one domain's loss from the pretrained model to the end; None where
    domains were learned alone."""
    matrices = s.matrices.values()
    if any(m.regime == "individual" for m in matrices):
        return None
    return compared([m.contributions(m.mean_change([m.stages], [0], [domain])) for m in matrices])
