"""One HTML page of an experiment: question, verdicts, tables, figures, matrices, provenance, how to
make it again. It loads nothing."""

from __future__ import annotations

import base64
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gain_cl.measure.record import Run
from gain_cl.paper import build, show, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Table, Value, named, number, of, textual
from gain_cl.runs import heatmap
from gain_cl.stats import format
from gain_cl.studies import study as comparison
from gain_cl.studies import verdicts as verdicts_
from gain_cl.studies.study import Study

MEANING = {
    "equivalent": "No difference that matters, by a test over blocks",
    "inconclusive": "Not decided",
}


def page(book: Book) -> bytes:
    """The page, UTF-8. The same records give the same bytes with the same matplotlib."""
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    template = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).from_string(source)
    found = tables.build(book)
    text = template.render(
        experiment=book.experiment,
        models=list(book.studies),
        facts=[_facts(model, study) for model, study in book.studies.items()],
        demonstration=_demonstration(book),
        gaps=book.gaps,
        tables=[_table(t) for t in found if not t.name.startswith("matrix-")],
        figures=[_figure(name, caption, f) for name, caption, f in build.drawn(book)],
        matrices=[
            _matrix(s.label, run)
            for study in book.studies.values()
            for s in study.chosen.values()
            for run in s.runs.values()
        ],
        runs=[_run(book, c.run_id, c.label, c.block) for c in book.cells if c.run_id in book.runs],
        reproduce=_commands(book),
        notes=list(dict.fromkeys(note for study in book.studies.values() for note in study.notes)),
    )
    return text.encode()


# --- what stands at the top -----------------------------------------------------------------------


def _facts(model: str, study: Study) -> dict[str, Any]:
    """Verdicts and what they rest on."""
    control, most, reached = verdicts_.positive_control(study)
    first = next(iter(study.settings[0].runs.values())).record
    verdicts = []
    for j in verdicts_.judge(study):
        e = j.endpoint
        value = of(e.metric, j.compared)
        unit = (
            "%"
            if comparison.lower_is_better(e.metric)
            else ("nats" if e.metric.startswith("margin") else "points")
        )
        verdicts.append(
            {
                "name": e.name.replace("_", " "),
                "what": f"{_words(e.metric)} of {e.of}"
                + (f" minus {e.minus}" if e.minus else ", against 0"),
                "value": f"{value.text()} {unit}" if value is not None else "not measured",
                "verdict": j.verdict,
                "means": j.why
                or MEANING.get(j.verdict)
                or f"{e.of} is {j.verdict} than {e.minus or 'no change'}, by a test over blocks",
            }
        )
    control_text = "no setting has a backward change"
    if control is not None and most is not None:
        control_text = f"{control.label} forgets most, {format.percent(most.estimate.value)}%"
    return {
        "model": model,
        "verdicts": verdicts,
        "reached": reached,
        "control": control_text,
        "blocks": format.counted(len(study.blocks), "block"),
        "protocol": first.protocol,
        "tokens": tables.published.tokens(study),
    }


def _words(metric: str) -> str:
    name, _, task = metric.partition(":")
    words = {
        "own_step": "own step",
        "backward": "backward change",
        "from_base": "change from base",
    }.get(name, name.replace("_", " "))
    return f"{task} {words}" if task else words


def _demonstration(book: Book) -> list[str]:
    """Why this cannot decide between methods at all; empty when it can."""
    runs = [run.record for run in book.runs.values()]
    return show.demonstration(
        min(
            runs,
            key=lambda r: min((s.train.tokens for s in r.stages if s.train is not None), default=0),
        ),
        len(runs),
    )


# --- tables, figures, matrices --------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A cell of a sortable table. between: its interval; sort: what it is sorted by; numeric:
    whether that is a number."""

    text: str
    between: str
    sort: str
    numeric: bool
    bold: bool


def _table(t: Table) -> dict[str, Any]:
    rows = [{"cells": [_cell(c) for c in row.cells], "runs": " ".join(row.runs)} for row in t.rows]
    return {
        "name": t.name,
        "title": t.title,
        "columns": [(c, textual(t, j)) for j, c in enumerate(t.columns)],
        "rows": rows,
        "notes": list(t.notes),
        "named": named(t),
    }


def _cell(c: Value | str | None) -> Shown:
    if isinstance(c, Value):
        return Shown(c.shown, c.between, number(c.value), True, c.bold)
    return Shown("–" if c is None else c, "", "" if c is None else c, c is None, False)


def _figure(name: str, caption: str, figure: Any) -> dict[str, str]:
    picture = base64.b64encode(style.svg(figure)).decode()
    width = round(96 * figure.get_size_inches()[0])
    return {
        "name": name,
        "caption": caption,
        "source": f"data:image/svg+xml;base64,{picture}",
        "width": str(width),
    }


def _matrix(setting: str, run: Run) -> dict[str, Any]:
    """Cells with their colour and what is told of them under the pointer."""
    from matplotlib.colors import to_hex

    r, losses = run.record, run.record.losses()
    change = 100 * np.expm1(np.clip(losses - losses[0], None, 700.0))
    bound, _ = heatmap.scale(change)
    colours = heatmap.shades(bound)
    names = [*r.trained, *r.controls]
    rows = []
    for i, stage in enumerate(r.stages):
        cells = []
        for j, domain in enumerate(names):
            loss = float(losses[i, j])
            if math.isnan(loss):
                cells.append(
                    {
                        "text": "–",
                        "tip": f"{domain}: not scored",
                        "fill": "",
                        "ink": "",
                        "own": False,
                    }
                )
                continue
            fill = colours.to_rgba(change[i, j])
            since = format.percent(loss - float(losses[0, j]))
            own = (
                r.trained.index(domain) + 1 if domain in r.trained and r.regime != "joint" else None
            )
            tip = (
                f"{domain} after stage {i} ({stage.domain or 'pretrained'}): perplexity "
                f"{format.perplexity(loss)}, {loss:.4f} nats per token"
            )
            tip += f", {since}% since pretrained" if i else ""
            tip += (
                f", {format.percent(loss - float(losses[own, j]))}% since it was learned"
                if own is not None and i > own
                else ""
            )
            tip += f"; {stage.domains[domain].documents} documents"
            text, ink = format.perplexity(loss), heatmap.ink(fill)
            cells.append(
                {"text": text, "tip": tip, "fill": to_hex(fill), "ink": ink, "own": own == i}
            )
        rows.append({"stage": f"{stage.index} {stage.domain or 'pretrained'}", "cells": cells})
    title = f"{r.model}, {setting}, seed {r.seed}"
    return {
        "run": r.run_id,
        "title": title,
        "domains": names,
        "controls": r.controls,
        "rows": rows,
        "bound": f"{bound:g}",
    }


# --- provenance -----------------------------------------------------------------------------------


def _run(book: Book, run_id: str, setting: str, block: int) -> dict[str, Any]:
    r = book.runs[run_id].record
    p = r.provenance
    seconds = sum(
        (s.train.seconds if s.train else 0) + s.eval_seconds + s.task_seconds for s in r.stages
    )
    packages = ", ".join(f"{k} {v}" for k, v in (p.get("packages") or {}).items() if v)
    facts = {
        "commit": str(p.get("commit") or "not known") + (" with changes" if p.get("dirty") else ""),
        "started": str(p.get("started", "")),
        "device": ", ".join(str(x) for x in (p.get("device"), p.get("processor")) if x),
        "dtype": str(r.config["model"]["dtype"]),
        "time": format.duration(seconds),
        "peak memory": f"{r.peak_memory_bytes / 1e9:.2f} GB",
        "python": str(p.get("python", "")),
        "packages": packages,
        "values": r.items_sha256,
        "seal": r.seal,
    }
    return {
        "id": run_id,
        "setting": setting,
        "block": block,
        "order": ", ".join(r.trained),
        "facts": facts,
        "notes": r.notes,
    }


def _commands(book: Book) -> list[str]:
    return [
        shlex.join(["python", "-m", "gain_cl", verb, *book.words])
        for verb in ("sweep", "compare", "paper")
    ]
