"""One HTML page of an experiment: question, verdicts, tables, figures, matrices, provenance, how to
make it again. It loads nothing; what it says, and of what, stands in report.html.j2."""

from __future__ import annotations

import base64
import shlex

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gain_cl.paper import build, show, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import html, of, render
from gain_cl.runs import heatmap
from gain_cl.stats import format
from gain_cl.studies import verdicts


def page(book: Book) -> bytes:
    """Return the page, UTF-8. The same records give the same bytes with the same matplotlib."""
    return render(
        "report.html.j2",
        book=book,
        build=build,
        format=format,
        heatmap=heatmap,
        html=html,
        of=of,
        picture=picture,
        quoted=shlex.join,
        show=show,
        tables=tables,
        to_hex=to_hex,
        verdicts=verdicts,
    ).encode()


def picture(figure: Figure) -> str:
    """Return a figure as the address of an image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(style.written(figure, 'svg')).decode()}"
