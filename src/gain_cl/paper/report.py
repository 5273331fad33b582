"""One HTML page of an experiment: question, verdicts, tables, figures, matrices, provenance, how to
make it again. It loads nothing; what it says stands in report.html.j2."""

from __future__ import annotations

import base64
import shlex
from typing import Any

from gain_cl.measure.record import Run
from gain_cl.paper import build, show, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import html, of, render
from gain_cl.runs import heatmap
from gain_cl.stats import format
from gain_cl.studies import verdicts


def page(book: Book) -> bytes:
    """Return the page, UTF-8. The same records give the same bytes with the same matplotlib."""
    studies = book.studies.values()
    chosen = [
        (s, run) for study in studies for s in study.chosen.values() for run in s.runs.values()
    ]
    text = render(
        "report.html.j2",
        experiment=book.experiment,
        studies=[
            (
                study,
                verdicts.positive_control(study),
                [(j, of(j.endpoint.metric, j.compared)) for j in verdicts.judge(study)],
            )
            for study in studies
        ],
        tokens=tables.published.tokens,
        format=format,
        demonstration=show.demonstration([run.record for run in book.runs.values()]),
        gaps=book.gaps,
        tables=[html(t) for t in tables.build_tables(book) if not t.name.startswith("matrix-")],
        figures=[_figure(*drawn) for drawn in build.drawn(book)],
        matrices=[_matrix(run, s.label) for s, run in chosen],
        runs=[(planned, book.runs[planned.run_id]) for planned in book.printed],
        commit=build.commit,
        reproduce=[
            shlex.join(["python", "-m", "gain_cl", verb, *book.words])
            for verb in ("sweep", "compare", "paper")
        ],
        notes=list(dict.fromkeys(note for study in studies for note in study.notes)),
    )
    return text.encode()


def _figure(name: str, caption: str, figure: Any) -> dict[str, str]:
    picture = base64.b64encode(style.svg(figure)).decode()
    return {
        "name": name,
        "caption": caption,
        "source": f"data:image/svg+xml;base64,{picture}",
        "width": str(round(96 * figure.get_size_inches()[0])),
    }


def _matrix(run: Run, setting: str) -> dict[str, Any]:
    """Return a matrix with the colour of each entry; the template says what is told of it under the
    pointer."""
    from matplotlib.colors import to_hex

    r, losses = run.record, run.record.losses()
    change = heatmap.changes(losses)
    bound, _ = heatmap.scale(change)
    colours = heatmap.shades(bound).to_rgba(change)
    return {
        "record": r,
        "title": f"{r.model}, {setting}, seed {r.seed}",
        "domains": [*r.trained, *r.controls],
        "losses": losses.tolist(),
        "fills": [[to_hex(fill) for fill in row] for row in colours],
        "inks": [[heatmap.ink(fill) for fill in row] for row in colours],
        "own": {s.domain: s.index for s in r.stages},
        "bound": f"{bound:g}",
    }
