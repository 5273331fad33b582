"""A table as data, and its writers: terminal, Markdown, LaTeX, HTML, CSV. The same records give the
same bytes anywhere.

A verb makes a Table and prints it:

    rows = [Row([f.check, Text(f.state, "bold red"), f.finding]) for f in found]
    print_table(Table("verify", "What was checked", ["check", "state", "finding"], rows))

A number is a Value with its own way of writing (plain(1), count, signed, ...). It stands on the
right, is never broken, and takes its interval along. Text stands on the left and is broken where
the table would be too wide, in the first column last. rich's Text has a style, which the terminal
alone shows. None is shown as a dash. No text is read as markup, and nothing in it commands the
terminal. Lines around a table are printed by say().
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gain_cl import errors
from gain_cl.stats import format
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Compared, Study, lower_is_better
from gain_cl.system.terminal import console, printable

GAP = "GAP: "
"""Begins a note on a run that is not in the table."""

HEAD, LONG, PROSE, NARROW = 11, 24, "p{2.6cm}", 16
"""Widths. HEAD: characters in a line of a head. LONG: a column of text with more characters than
this is set as PROSE in LaTeX. NARROW: a terminal breaks a column of text no narrower than this."""


def number(x: float) -> str:
    """Return six digits, so that the last bits of a sum, which differ between processors, do not
    show; whole numbers in full; empty for nan."""
    if math.isnan(x):
        return ""
    return f"{x:.0f}" if float(x).is_integer() and abs(x) < 1e15 else f"{x:.6g}"


class Value(NamedTuple):
    """A number in the unit it is shown in (nan: there is none), how it is shown, and its 95%
    interval. bold: a test says so."""

    value: float
    write: Callable[[float], str] = number
    low: float = math.nan
    high: float = math.nan
    bold: bool = False

    @property
    def shown(self) -> str:
        """Return the number alone."""
        return "-" if math.isnan(self.value) else self.write(self.value)

    @property
    def between(self) -> str:
        """Return its interval; empty where there is none."""
        if math.isnan(self.low + self.high):
            return ""
        return f"{self.write(self.low)} to {self.write(self.high)}"

    def text(self) -> str:
        return f"{self.shown} ({self.between})" if self.between else self.shown


Entry = Value | Text | str | None
"""What stands in a cell of a table: a number, text, or nothing."""


class Row(NamedTuple):
    """cells: a Value, text or None (nothing) for each column; runs: ids of the runs that its
    numbers come from; rule: a line above."""

    cells: Sequence[Entry]
    runs: Sequence[str] = ()
    rule: bool = False


@dataclass(frozen=True)
class Table:
    """name: of its files; title: what it shows, with units; notes: below it."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()


# --- numbers --------------------------------------------------------------------------------------


def of(metric: str, found: Compared, bold: bool = False, blocks: int = 0) -> Value:
    """Return a summary or difference in the unit its metric is shown in: % of perplexity; of a
    task's margin nats, of its accuracy points (100 times the share).

    blocks: how many blocks the table speaks of. A task that fewer blocks have scored has an
    interval over items alone, which is left out."""
    e = found.estimate
    if found.blocks < blocks:
        e = Estimate(e.value)
    if lower_is_better(metric):
        return percent(e, bold)
    if metric.startswith("margin"):
        return valued(e, nats, bold)
    return valued(e.map(lambda share: 100 * share), signed, bold)


def valued(e: Estimate, write: Callable[[float], str], bold: bool = False) -> Value:
    """Return an estimate as it is shown."""
    return Value(e.value, write, e.low, e.high, bold)


def percent(e: Estimate, bold: bool = False) -> Value:
    """Return a difference of losses as a change of perplexity in %."""
    return valued(e.map(format.change), signed, bold)


def change_of(nats: float) -> Value:
    """Return a difference of losses as a change of perplexity in %."""
    return Value(format.change(nats), signed)


def signed(x: float, digits: int = 1) -> str:
    """Return +1.2, -10.3, +0.0; +1e+03 from 1000 on."""
    return f"{x:+.0e}" if abs(x) >= 1000 else f"{round(x, digits) + 0.0:+.{digits}f}"


def nats(x: float) -> str:
    return signed(x, 3)


def count(x: float) -> str:
    return f"{x:,.0f}"


def plain(digits: int) -> Callable[[float], str]:
    return lambda x: f"{x:.{digits}f}"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# --- terminal -------------------------------------------------------------------------------------


def say(text: str = "", style: str = "", out: Console | None = None) -> None:
    """Print text as it is: brackets are no markup, long lines are not broken, nothing in it
    commands the terminal."""
    out = out or console()
    out.print(errors.printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


class _Column(NamedTuple):
    """A column as the terminal shows it. width: what it takes at least; look: for rich."""

    head: str
    cells: list[Text]
    width: int
    look: dict[str, Any]


def print_table(t: Table, out: Console | None = None) -> None:
    """Print title, table and notes. Where the width does not take the intervals beside their
    numbers they stand below them, and where it does not take all columns these follow in further
    tables that begin with the same first column: no number is lost."""
    out = out or console()
    if t.title:
        say(t.title, out=out)
    every = range(len(t.columns))
    shown = [j for j in every if not j or any(row.cells[j] != "" for row in t.rows)]

    def fit(columns: Sequence[_Column]) -> bool:
        return sum(c.width + 2 for c in columns) - 2 <= out.width

    for apart in (" ", "\n"):
        first, *rest = (_column(t, j, apart) for j in shown)
        if fit([first, *rest]):
            break
    groups = [[first]]
    for column in rest:
        if len(groups[-1]) > 1 and not fit([*groups[-1], column]):
            groups.append([first])
        groups[-1].append(column)
    for group in groups:
        made = RichTable(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
        for c in group:
            made.add_column(Text(c.head), overflow="fold", **c.look)
        for i, row in enumerate(t.rows):
            if row.rule and i:
                made.add_section()
            made.add_row(*(c.cells[i] for c in group))
        out.print(made)
        out.print()
    for note in t.notes:
        out.print(Text(printable(note)), style="dim")
    if t.notes:
        out.print()


def _column(t: Table, j: int, apart: str) -> _Column:
    """Return a column of a table. apart: what stands between a number and its interval."""
    cells = [_text(row.cells[j], apart) for row in t.rows]
    wide = max((cell_len(x) for text in cells for x in text.plain.split("\n")), default=0)
    head = _head(printable(t.columns[j]), wide)
    wide = max(wide, *map(cell_len, head))
    most = NARROW if j else 2 * LONG  # the first column says what a row is
    left = textual(t, j)
    whole = not left or wide <= most
    look = {"justify": "left" if left else "right", "no_wrap": whole}
    return _Column("\n".join(head), cells, wide if whole else most, look)


def _text(c: Entry, apart: str) -> Text:
    if isinstance(c, Value):
        return Text(c.text().replace(" (", f"{apart}("), "bold" if c.bold else "")
    return Text("-" if c is None else printable(c), getattr(c, "style", ""))


# --- files ----------------------------------------------------------------------------------------


def markdown(t: Table) -> str:
    """Return a heading, the table, its notes and its runs."""
    columns = []
    for j, head in enumerate(t.columns):
        texts, left = [_md(c) for c in (head, *(row.cells[j] for row in t.rows))], textual(t, j)
        width = max(3, *map(len, texts))
        head, *rest = (f" {x.ljust(width) if left else x.rjust(width)} " for x in texts)
        columns.append([head, "-" * (width + 1) + ("-" if left else ":"), *rest])
    lines = [f"|{'|'.join(line)}|" for line in zip(*columns, strict=True)]
    return render("table.md.j2", t=t, lines=lines, runs=named(t), escaped=_escaped).rstrip() + "\n"


def html(t: Table) -> Markup:
    """Return a heading, a table that the page's script sorts by a click on a head, and the notes
    and runs below it."""
    return Markup(render("table.html.j2", t=t, textual=textual, number=number, named=named))


def render(name: str, **given: Any) -> str:
    """Return a template of this folder, filled in; in HTML text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=PackageLoader("gain_cl.paper", ""),
    )
    return environment.get_template(name).render(**given)


def latex(t: Table) -> str:
    """Return a tabular with booktabs rules, to be \\input inside a table; the runs of each row as a
    comment behind it. So that more of it fits, heads are broken, intervals stand below their
    numbers, long text is set in a narrow column. A partial one says so at its foot."""
    sides = []
    for j in range(len(t.columns)):
        long = any(len(str(row.cells[j] or "")) > LONG for row in t.rows)
        sides.append(("p" if long else "l") if textual(t, j) else "r")
    gaps = sum(note.startswith(GAP) for note in t.notes)
    given: dict[str, Any] = {"translate": _translate, "math": _math, "PROSE": PROSE}
    given["heads"] = [[_translate(x) for x in _head(head, HEAD)] for head in t.columns]
    given["partial"] = gaps and format.counted(gaps, "gap")
    return render("table.tex.j2", t=t, sides=sides, **given)


def as_csv(t: Table) -> str:
    """Return a column for each number, two more for its interval, the run ids last; six digits."""
    columns = []
    for j, head in enumerate(t.columns):
        cells: list[Any] = [row.cells[j] for row in t.rows]
        texts = (number(c.value) if isinstance(c, Value) else str(c or "") for c in cells)
        columns.append([head, *texts])
        for end in ("low", "high") if any(getattr(c, "between", "") for c in cells) else ():
            columns.append([f"{head} {end}", *(number(getattr(c, end, math.nan)) for c in cells)])
    columns.append(["runs", *(" ".join(row.runs) for row in t.rows)])
    return written(list(zip(*columns, strict=True)))


def written(rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def over_units(study: Study) -> str:
    """Return what the intervals of a study are over."""
    if len(study.blocks) == 1:
        return "documents of the one block"
    return "blocks and the documents they share"


def textual(t: Table, j: int) -> bool:
    """True if a column holds no number: it stands on the left."""
    cells = (row.cells[j] for row in t.rows)
    return all(not isinstance(c, Value) or math.isnan(c.value) for c in cells)


def named(t: Table) -> list[tuple[str, Sequence[str]]]:
    """Return what a row is called, and its runs."""
    rows = (row for row in t.rows if row.runs)
    return [(", ".join(c for c in row.cells[:2] if isinstance(c, str)), row.runs) for row in rows]


def _md(c: Entry) -> str:
    if c is None:
        return "-"
    if isinstance(c, Value):
        return f"**{c.text()}**" if c.bold else c.text()
    return _escaped(str(c))


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text)


def _head(text: str, width: int) -> list[str]:
    """Return a head in lines, broken at spaces alone."""
    wide = max(HEAD, width)
    return textwrap.wrap(text, wide, break_long_words=False, break_on_hyphens=False) or [""]


_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "·": r"$\cdot$",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
)
_NUMBER = re.compile(r"[-+]?[<]?[\d,]*\.?\d+(?:e[-+]?\d+)?")


def _translate(text: str) -> str:
    return text.translate(_TEX)


def _math(text: str, bold: bool = False) -> str:
    """Return text with its numbers set as numbers."""
    left, right = (r"$\mathbf{", "}$") if bold else ("$", "$")
    return _NUMBER.sub(lambda m: left + m.group().replace(",", "{,}") + right, text)
