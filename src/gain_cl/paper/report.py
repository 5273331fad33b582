"""One HTML page of an experiment: question, verdicts, tables, figures, matrices, provenance, how to
make it again. It loads nothing."""

from __future__ import annotations

import base64
import math
import shlex
from typing import Any

import numpy as np

from gain_cl.measure.record import Run
from gain_cl.paper import build, show, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import html, of, render
from gain_cl.paper.tables.matrix import of_run
from gain_cl.runs import heatmap
from gain_cl.stats import format
from gain_cl.studies import verdicts
from gain_cl.studies.experiments import Planned
from gain_cl.studies.study import Study, lower_is_better

MEANING = {
    "equivalent": "No difference that matters, by a test over blocks",
    "inconclusive": "Not decided",
}


def page(book: Book) -> bytes:
    """Return the page, UTF-8. The same records give the same bytes with the same matplotlib."""
    runs = [run.record for run in book.runs.values()]
    shortest = min(
        runs, key=lambda r: min((s.train.tokens for s in r.stages if s.train), default=0)
    )
    text = render(
        "report.html.j2",
        experiment=book.experiment,
        models=list(book.studies),
        facts=[_facts(study) for study in book.studies.values()],
        demonstration=show.demonstration(shortest, len(runs)),
        gaps=book.gaps,
        tables=[html(t) for t in tables.build_tables(book) if not t.name.startswith("matrix-")],
        figures=[_figure(*drawn) for drawn in build.drawn(book)],
        matrices=[
            _matrix(run, s.label)
            for study in book.studies.values()
            for s in study.chosen.values()
            for run in s.runs.values()
        ],
        runs=[_run(book.runs[c.run_id], c) for c in book.printed],
        reproduce=[
            shlex.join(["python", "-m", "gain_cl", verb, *book.words])
            for verb in ("sweep", "compare", "paper")
        ],
        notes=list(dict.fromkeys(note for study in book.studies.values() for note in study.notes)),
    )
    return text.encode()


def _facts(study: Study) -> dict[str, Any]:
    """Return the verdicts and what they rest on."""
    control, most, reached = verdicts.positive_control(study)
    judged = []
    for j in verdicts.judge(study):
        e = j.endpoint
        value = of(e.metric, j.compared)
        unit = "nats" if e.metric.startswith("margin") else "points"
        unit = "%" if lower_is_better(e.metric) else unit
        than = f"{e.of} is {j.verdict} than {e.minus or 'no change'}, by a test over blocks"
        judged.append(
            {
                "name": e.name.replace("_", " "),
                "what": f"{_words(e.metric)} of {e.of}"
                + (f" minus {e.minus}" if e.minus else ", against 0"),
                "value": f"{value.text()} {unit}" if value is not None else "not measured",
                "verdict": j.verdict,
                "means": j.why or MEANING.get(j.verdict, than),
            }
        )
    told = "no setting has a backward change"
    if control is not None and most is not None:
        told = f"{control.label} forgets most, {format.percent(most.value)}%"
    return {
        "model": study.model,
        "verdicts": judged,
        "reached": reached,
        "control": told,
        "blocks": format.counted(len(study.blocks), "block"),
        "protocol": study.runs[0].record.protocol,
        "tokens": tables.published.tokens(study),
    }


def _words(metric: str) -> str:
    name, _, task = metric.partition(":")
    special = {"backward": "backward change", "from_base": "change from base"}
    return f"{task} {special.get(name, name.replace('_', ' '))}".strip()


def _figure(name: str, caption: str, figure: Any) -> dict[str, str]:
    picture = base64.b64encode(style.svg(figure)).decode()
    return {
        "name": name,
        "caption": caption,
        "source": f"data:image/svg+xml;base64,{picture}",
        "width": str(round(96 * figure.get_size_inches()[0])),
    }


def _matrix(run: Run, setting: str) -> dict[str, Any]:
    """Return the entries of a matrix with their colour and what is told of them under the
    pointer."""
    from matplotlib.colors import to_hex

    r, losses = run.record, run.record.losses()
    change = 100 * np.expm1(np.clip(losses - losses[0], None, 700.0))
    bound, _ = heatmap.scale(change)
    colours = heatmap.shades(bound)
    table = of_run(r, setting)
    names = list(table.columns[1:])

    def shown(i: int, j: int) -> dict[str, Any]:
        domain, loss, stage = names[j], float(losses[i, j]), r.stages[i]
        if math.isnan(loss):
            tip = f"{domain}: not scored"
            return {"text": "–", "tip": tip, "fill": "", "ink": "", "own": False}
        own = r.trained.index(domain) + 1 if domain in r.trained and r.regime != "joint" else None
        since = [(0, "pretrained"), (own, "it was learned")]
        parts = [
            f"{domain} after stage {i} ({stage.domain or 'pretrained'}): perplexity "
            f"{format.perplexity(loss)}",
            f"{loss:.4f} nats per token",
            *(
                f"{format.percent(loss - float(losses[k, j]))}% since {what}"
                for k, what in since
                if k is not None and i > k
            ),
        ]
        tip = f"{', '.join(parts)}; {stage.domains[domain].documents} documents"
        fill = colours.to_rgba(change[i, j])
        ink = heatmap.ink(fill)
        text = format.perplexity(loss)
        return {"text": text, "tip": tip, "fill": to_hex(fill), "ink": ink, "own": own == i}

    return {
        "run": r.run_id,
        "title": f"{r.model}, {setting}, seed {r.seed}",
        "domains": names,
        "controls": r.controls,
        "rows": [
            {"stage": row.cells[0], "cells": [shown(i, j) for j in range(len(names))]}
            for i, row in enumerate(table.rows[: len(r.stages)])
        ],
        "bound": f"{bound:g}",
    }


def _run(run: Run, planned: Planned) -> dict[str, Any]:
    r, p = run.record, run.record.provenance
    seconds = sum(
        (s.train.seconds if s.train else 0) + s.eval_seconds + s.task_seconds for s in r.stages
    )
    facts = {
        "commit": build.commit(run),
        "started": str(p.get("started", "")),
        "device": ", ".join(str(x) for x in (p.get("device"), p.get("processor")) if x),
        "dtype": str(r.config["model"]["dtype"]),
        "time": format.duration(seconds),
        "peak memory": f"{r.peak_memory_bytes / 1e9:.2f} GB",
        "python": str(p.get("python", "")),
        "packages": ", ".join(f"{k} {v}" for k, v in (p.get("packages") or {}).items() if v),
        "values": r.items_sha256,
        "seal": r.seal,
    }
    return {
        "id": r.run_id,
        "setting": planned.label,
        "block": planned.block,
        "order": ", ".join(r.trained),
        "facts": facts,
        "notes": r.notes,
    }
