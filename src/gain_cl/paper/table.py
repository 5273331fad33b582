"""A table as data, and its writers: terminal, Markdown, LaTeX, HTML, CSV. The same records give the
same bytes anywhere.

A verb makes a Table and prints it:

    rows = [Row([f.check, Styled(f.state, "bold red"), f.finding]) for f in found]
    print_table(Table("verify", "What was checked", ["check", "state", "finding"], rows))

A number is a Value with its own way of writing (plain(1), count, signed, ...). It stands on the
right, is never broken, and takes its interval along. Text stands on the left and is broken where
the table would be too wide, in the first column last. None is shown as a dash. No text is read as
markup, and nothing in it commands the terminal. Lines around a table are printed by say().
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gain_cl import errors
from gain_cl.stats import format
from gain_cl.stats.format import counted
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Compared, Study, lower_is_better
from gain_cl.system.terminal import console, printable

GAP = "GAP: "
"""Begins a note on a run that is not in the table."""

HEAD, LONG, PROSE, MANY, NARROW = 11, 24, "p{2.6cm}", 8, 16
"""Widths. HEAD: characters in a line of a head, in LaTeX. LONG: a column of text with more
characters than this is set as PROSE in LaTeX. MANY: with more columns than this, LaTeX puts
intervals below their numbers. NARROW: a terminal breaks a column of text no narrower than this."""


class Styled(str):
    """Text with a style that only the terminal shows, in rich's words: bold red."""

    style: str

    def __new__(cls, text: str, style: str) -> Styled:
        made = super().__new__(cls, text)
        made.style = style
        return made


@dataclass(frozen=True)
class Value:
    """A number with its 95% interval, in the unit it is shown in (nan: there is none). write: how
    it is shown; bold: a test says so; style: what only the terminal shows, in rich's words."""

    value: float
    low: float = math.nan
    high: float = math.nan
    write: Callable[[float], str] = lambda x: f"{x:g}"
    bold: bool = False
    style: str = ""

    @property
    def shown(self) -> str:
        """Return the number alone."""
        return "-" if math.isnan(self.value) else self.write(self.value)

    @property
    def between(self) -> str:
        """Return its interval; empty where there is none."""
        if math.isnan(self.low) or math.isnan(self.high):
            return ""
        return f"{self.write(self.low)} to {self.write(self.high)}"

    def text(self) -> str:
        return f"{self.shown} ({self.between})" if self.between else self.shown


Entry = Value | str | None
"""What stands in a cell of a table: a number, text, or nothing."""


@dataclass(frozen=True)
class Row:
    """cells: a Value, text or None (nothing) for each column; runs: ids of the runs that its
    numbers come from; rule: a line above."""

    cells: Sequence[Entry]
    runs: Sequence[str] = ()
    rule: bool = False


@dataclass(frozen=True)
class Table:
    """name: of its files; title: what it shows, with units; notes: below it; grouped: a first cell
    like the one above is left blank where people read it."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=list)
    grouped: bool = False

    @property
    def read(self) -> list[list[Entry]]:
        """Return the cells as people read them."""
        cells = [list(row.cells) for row in self.rows]
        return [
            ["", *row[1:]] if self.grouped and i and row[0] == cells[i - 1][0] else row
            for i, row in enumerate(cells)
        ]


# --- numbers --------------------------------------------------------------------------------------


def of(
    metric: str, found: Compared | None, bold: bool = False, interval: bool = True, blocks: int = 0
) -> Value | None:
    """Return a summary or difference in the unit its metric is shown in: % of perplexity; of a
    task's margin nats, of its accuracy points (100 times the share).

    blocks: how many blocks the table speaks of. A task that fewer blocks have scored has an
    interval over items alone, which is left out."""
    if found is None or math.isnan(found.estimate.value):
        return None
    e = found.estimate
    if not interval or found.blocks < blocks:
        e = Estimate(e.value, math.nan, math.nan, e.n)
    if lower_is_better(metric):
        return percent(e, bold)
    if metric.startswith("margin"):
        return Value(e.value, e.low, e.high, nats, bold)
    return Value(100 * e.value, 100 * e.low, 100 * e.high, signed, bold)


def percent(e: Estimate, bold: bool = False) -> Value:
    """Return a difference of losses as a change of perplexity in %."""
    return Value(format.change(e.value), format.change(e.low), format.change(e.high), signed, bold)


def known(x: float, write: Callable[[float], str]) -> Value | None:
    """Return a number without an interval; None of nan."""
    return None if math.isnan(x) else Value(x, write=write)


def change_of(nats: float) -> Value | None:
    """Return a difference of losses as a change of perplexity in %; None of nan."""
    return known(format.change(nats), signed)


def signed(x: float, digits: int = 1) -> str:
    """Return +1.2, -10.3, +0.0; +1e+03 from 1000 on."""
    if abs(x) >= 1000:
        return f"{x:+.0e}"
    return f"{round(x, digits) + 0.0:+.{digits}f}"


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


def print_table(t: Table, out: Console | None = None) -> None:
    """Print title, table and notes. Where the width does not take the intervals beside their
    numbers they stand below them, and where it does not take all columns these follow in further
    tables that begin with the same first column: no number is lost."""
    out = out or console()
    if t.title:
        say(t.title, out=out)
    every = [j for j in range(len(t.columns)) if not j or any(c[j] != "" for c in t.read)]
    wide, narrow = ([x for j in every for x in _view(t, j, apart)] for apart in (True, False))
    views = [wide] if _widths(wide, out.width) else [narrow[:1]]
    for column in narrow[1:] if views == [narrow[:1]] else []:
        if len(views[-1]) > 1 and not _widths([*views[-1], column], out.width):
            views.append(narrow[:1])
        views[-1] = [*views[-1], column]
    for view in views:
        widths: Sequence[int | None] = _widths(view, out.width) or [None] * len(view)
        shown = RichTable(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
        for (head, _, left), width in zip(view, widths, strict=True):
            side: Any = "left" if left else "right"
            shown.add_column(Text(printable(head)), justify=side, width=width, overflow="fold")
        for i, row in enumerate(t.rows):
            if row.rule and i:
                shown.add_section()
            shown.add_row(*(texts[i] for _, texts, _ in view))
        out.print(shown)
        out.print()
    for note in t.notes:
        out.print(Text(printable(note)), style="dim")
    if t.notes:
        out.print()


View = tuple[str, list[Text], bool]
"""Head and texts of a column in the terminal, and whether it is text, which stands on the left."""


def _view(t: Table, j: int, apart: bool) -> list[View]:
    """Return a column as the terminal shows it; apart: its intervals, if any, as a second one."""
    between = [c.between if isinstance(c := row[j], Value) else "" for row in t.read]
    texts = []
    for row, interval in zip(t.read, between, strict=True):
        c = row[j]
        if isinstance(c, Value):
            below = f"\n{interval}" if interval and not apart else ""
            texts.append(Text(c.shown + below, "bold" if c.bold else c.style))
        else:
            texts.append(Text("-" if c is None else printable(c), getattr(c, "style", "")))
    view = [(t.columns[j], texts, textual(t, j))]
    if apart and any(between):
        view.append(("95% interval", [Text(x) for x in between], False))
    return view


def _widths(view: Sequence[View], room: int) -> list[int] | None:
    """Return the characters of each column, two apart; None: they do not fit. Numbers are not
    broken, heads at spaces alone, text as far as it must."""
    least: list[int] = []
    most: list[int] = []
    for head, texts, left in view:
        natural = max(cell_len(x) for t in texts or [Text()] for x in t.plain.split("\n"))
        word = max(map(cell_len, head.split(" ")))
        most_of_text = NARROW if least else 2 * LONG  # the first column says what a row is
        least.append(max(min(natural, most_of_text) if left else natural, word))
        most.append(max(natural, cell_len(head)))
    room -= 2 * (len(view) - 1)
    if sum(least) > room:
        return None
    while sum(most) > room:
        widest = max((j for j, x in enumerate(most) if x > least[j]), key=lambda j: most[j])
        most[widest] -= 1
    return most


# --- files ----------------------------------------------------------------------------------------


def markdown(t: Table) -> str:
    """Return a heading, the table, its notes and its runs."""
    lines = [[_md(c) for c in row] for row in (t.columns, *t.read)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = [textual(t, j) for j in range(len(widths))]
    sized = list(zip(widths, left, strict=True))
    rules = ["-" * (w + 2) if a else "-" * (w + 1) + ":" for w, a in sized]
    shown = [
        " | ".join(x.ljust(w) if a else x.rjust(w) for x, (w, a) in zip(line, sized, strict=True))
        for line in lines
    ]
    head, *rows = (f"| {line} |" for line in shown)
    out = [f"**{t.title}**", "", head, f"|{'|'.join(rules)}|", *rows, ""]
    out += [f"{note}  " for note in t.notes] + [""] * bool(t.notes)
    if found := named(t):
        runs = [f"- {_escaped(name)}: {', '.join(f'`{r}`' for r in ids)}" for name, ids in found]
        out += ["<details><summary>runs</summary>", "", *runs, "", "</details>"]
    return "\n".join(out).rstrip() + "\n"


def html(t: Table) -> Markup:
    """Return a heading, a table that the page's script sorts by a click on a head, and the notes
    and runs below it."""
    return render("table.html.j2", t=t, textual=textual, number=number, named=named)


def render(name: str, **given: Any) -> Markup:
    """Return a template of this folder, filled in; text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=PackageLoader("gain_cl.paper", ""),
    )
    return Markup(environment.get_template(name).render(**given))


def latex(t: Table) -> str:
    """Return a tabular with booktabs rules, to be \\input inside a table; the runs of each row as a
    comment behind it. So that more of it fits, heads are broken, intervals stand below their
    numbers, long text is set in a narrow column. A partial one says so at its foot."""
    sides = ["l" if textual(t, j) else "r" for j in range(len(t.columns))]
    prose = [
        side == "l" and any(len(str(row[j] or "")) > LONG for row in t.read)
        for j, side in enumerate(sides)
    ]
    columns = "".join(PROSE if long else side for long, side in zip(prose, sides, strict=True))
    head = (
        " & ".join(
            _stacked([_tex(x) for x in textwrap.wrap(h, HEAD, break_long_words=False)], s, "b")
            for h, s in zip(t.columns, sides, strict=True)
        )
        + r" \\"
    )
    out = [
        f"% {_comment(t.title)}",
        f"\\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
    ]
    for i, (row, cells) in enumerate(zip(t.rows, t.read, strict=True)):
        runs = f" % {_comment(', '.join(row.runs))}" if row.runs else ""
        texts = [
            f"{{\\raggedright {_broken(c)}\\par}}" if long else _cell(c, len(sides) > MANY)
            for c, long in zip(cells, prose, strict=True)
        ]
        out += [r"\midrule"] * (row.rule and i > 0)
        out.append(" & ".join(texts) + f" \\\\{runs}")
    out.append(r"\bottomrule")
    if gaps := sum(note.startswith(GAP) for note in t.notes):
        partial = f"\\textbf{{PARTIAL: {counted(gaps, 'gap')}}}"
        out.append(f"\\multicolumn{{{len(sides)}}}{{l}}{{{partial}}} \\\\")
    out += [r"\end{tabular}", *(f"% {_comment(note)}" for note in t.notes)]
    return "\n".join(out) + "\n"


def as_csv(t: Table) -> str:
    """Return a column for each number, two more for its interval, the run ids last; six digits."""
    columns = list(zip(*(r.cells for r in t.rows), strict=True)) or [()] * len(t.columns)
    wide = [any(isinstance(c, Value) and not math.isnan(c.low) for c in cs) for cs in columns]
    lines = []
    for cells, runs in ((t.columns, "runs"), *((r.cells, " ".join(r.runs)) for r in t.rows)):
        out: list[str] = []
        for c, head, three in zip(cells, t.columns, wide, strict=True):
            more = [f"{head} low", f"{head} high"] if cells is t.columns else ["", ""]
            parts = ["" if c is None else str(c), *more]
            if isinstance(c, Value):
                parts = [number(x) for x in (c.value, c.low, c.high)]
            out += parts if three else parts[:1]
        lines.append([*out, runs])
    return written(lines)


def written(rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def number(x: float) -> str:
    """Return six digits, so that the last bits of a sum, which differ between processors, do not
    show; whole numbers in full; empty for nan."""
    if math.isnan(x):
        return ""
    return f"{x:.0f}" if float(x).is_integer() and abs(x) < 1e15 else f"{x:.6g}"


def over_units(study: Study) -> str:
    """Return what the intervals of a study are over."""
    if len(study.blocks) == 1:
        return "documents of the one block"
    return "blocks and the documents they share"


def textual(t: Table, j: int) -> bool:
    """True if a column holds text alone, which stands on the left."""
    return not any(isinstance(row.cells[j], Value) for row in t.rows)


def named(t: Table) -> list[tuple[str, Sequence[str]]]:
    """Return what a row is called, and its runs."""
    rows, texts = (
        [row for row in t.rows if row.runs],
        {j for j in range(len(t.columns)) if textual(t, j)},
    )
    words = [
        [str(c) for j, c in enumerate(row.cells) if c and j in texts and c != "*"] for row in rows
    ]
    enough = 1 if len({w[0] for w in words}) == len(words) else 2
    return [(", ".join(w[:enough]), row.runs) for w, row in zip(words, rows, strict=True)]


def _md(c: Entry) -> str:
    if c is None:
        return "-"
    if isinstance(c, Value):
        return f"**{c.text()}**" if c.bold else c.text()
    return _escaped(c)


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text)


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "·": r"$\cdot$",
}
_TEX |= {c: f"\\{c}" for c in "&%$#_{}"}


def _tex(c: Entry) -> str:
    if c is None:
        return "--"
    if isinstance(c, str):
        return "".join(_TEX.get(ch, ch) for ch in c)
    if c.text() == "-":
        return "--"
    left, right = (r"$\mathbf{", "}$") if c.bold else ("$", "$")
    return _NUMBER.sub(lambda m: left + m.group().replace(",", "{,}") + right, c.text())


_NUMBER = re.compile(r"[-+]?[<]?[\d,]*\.?\d+(?:e[-+]?\d+)?")


def _cell(c: Entry, narrow: bool) -> str:
    """Return a number above its interval, narrow: above the interval's ends."""
    if not isinstance(c, Value) or not c.between:
        return _tex(c)
    between = _tex(replace(c, bold=False)).partition(" (")[2].removesuffix(")")
    ends = between.replace(" to ", " to|", narrow).split("|")
    return _stacked(
        [_tex(replace(c, low=math.nan)), *(f"\\scriptsize {end}" for end in ends)], "r", "t"
    )


def _broken(c: Entry) -> str:
    """Return text that may be broken in a name, too."""
    return _tex(c).replace(r"\_", r"\_\allowbreak{}")


def _stacked(lines: Sequence[str], side: str, at: str) -> str:
    """Return lines below each other, beside the others' first (at t) or last (b) line."""
    if len(lines) < 2:
        return "".join(lines)
    return f"\\begin{{tabular}}[{at}]{{@{{}}{side}@{{}}}}" + r"\\".join(lines) + r"\end{tabular}"


def _comment(text: str) -> str:
    return " ".join(text.split())
