"""What the figures share: sizes, type, a look for each method, axes in % of perplexity, and bytes
that depend on the figure alone."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from gain_cl.errors import printable
from gain_cl.stats.format import change, counted
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Setting, Study

SINGLE, DOUBLE = 3.4, 7.0
"""Width of a figure in inches: one column of text, or two."""
TEXT, SMALL = 8, 7  # points
SOFT, FAINT, PAPER = "#5f5f5f", "#d9d9d9", "#ffffff"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Okabe and Ito's, which colour-blind readers can tell apart; grey for their yellow, which is too
pale for a line on white."""
MARKERS = "os^DvXP<*"
"""One more than colours, so that no two of 72 methods look the same, in grey either while there are
nine or fewer."""
DASHED = (0, (4, 2))


rules = functools.partial(mpl.rc_context, fname=Path(__file__).with_name("paper.mplstyle"))
"""A decorator and a context in which figures are made and written: matplotlib's defaults, whatever
the reader's matplotlibrc says, and paper.mplstyle."""


def panels(
    titles: Sequence[str], high: float, wide: bool = False, **shared: Any
) -> tuple[Figure, list[Any]]:
    """Return a figure whose parts make room for each other, and an axes for each title: one row of
    them while it holds four, else the columns, four or three, that leave fewer gaps. high: of a
    row, in inches; wide: two columns of text also for a single panel."""
    count = len(titles)
    columns = count if count <= 4 else min((4, 3), key=lambda n: -count % n)
    rows = math.ceil(count / columns)
    size = DOUBLE if wide or count > 1 else SINGLE, 0.3 + high * rows
    figure = Figure(size, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for axes in every[count:]:
        axes.remove()
    for axes, text in zip(every, titles, strict=False):
        room = (size[0] / columns - 0.4) * 72  # points
        axes.set_title(name(text, int(room / (0.6 * TEXT))))
    return figure, list(every[:count])


def finish(figure: Figure, looks: dict[str, dict[str, Any]] | None = None) -> Figure:
    """Return the figure with its layout made once and for all, so that it is the same in every
    format.

    looks: label -> how its line looks, for a legend beneath everything, in as few rows as the
    figure's width allows and with even columns; the figure grows by its height."""
    handles = [Line2D([], [], label=name(x, 44), **how) for x, how in (looks or {}).items()]
    where: Any = {"loc": "outside lower center", "columnspacing": 1.2, "handlelength": 2.2}
    count = len(handles)
    for columns in sorted({-(-count // k) for k in range(1, count + 1)}, reverse=True):
        made = figure.legend(handles=handles, ncols=columns, **where)
        box = made.get_window_extent()
        if columns == 1 or box.width < 0.98 * figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            break
        made.remove()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def partial(figure: Figure, gaps: int) -> Figure:
    """Return a finished figure that says how many runs it lacks, if any."""
    if gaps:
        look: dict[str, Any] = {"fontsize": SMALL, "color": "#b00020", "fontweight": "bold"}
        text = f"PARTIAL: {counted(gaps, 'gap')}"
        figure.text(0.995, 0.005, text, ha="right", va="bottom", gid="partial", **look)
    return figure


def zero(axes: Any, across: bool = False, **look: Any) -> None:
    """Draw a line at no change."""
    line = axes.axvline if across else axes.axhline
    line(0, **{"color": SOFT, "linewidth": 0.6, "zorder": 0, **look})


# --- methods and names ----------------------------------------------------------------------------


def look(study: Study, method: str) -> dict[str, Any]:
    """Return colour, marker and line of a method, by its place in the study: the same in all
    figures of the study."""
    place = study.methods.index(method)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(COLOURS) else DASHED,
    }


def looks(study: Study, settings: Iterable[Setting]) -> dict[str, dict[str, Any]]:
    """Return those of settings, by label."""
    return {s.label: look(study, s.method) for s in settings}


def name(text: str, width: int = 200) -> str:
    """Return a name as it is drawn, in lines of so many characters at most: broken after a space,
    _, -, ., else anywhere."""
    pattern = rf"(?m).{{1,{width}}}(?:(?<=[ _.-])|$)|.{{1,{width}}}"
    return "\n".join(line.strip() for line in re.findall(pattern, printable(text)))


# --- values ---------------------------------------------------------------------------------------

CUT = math.log(4)
"""Longest side of an interval of a change of loss that is drawn: a factor of 4 of perplexity."""


def points(
    axes: Any,
    at: Sequence[float] | np.ndarray,
    estimates: Sequence[Estimate],
    *,
    across: bool = False,
    longest: float = CUT,
    **look: Any,
) -> None:
    """Draw values with their intervals, upright or (across) lying: at is the other coordinate.

    No interval where it is not known; one that is longer than longest on a side is cut there, and
    has no caps (few blocks can be compatible with anything)."""
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    bars = np.minimum([value - low, high - value], longest)
    whole = (bars != longest).all(0)
    x, y, side = (value, at, "xerr") if across else (at, value, "yerr")
    drawn = axes.errorbar(x, y, **{side: bars}, elinewidth=0.8, capthick=0.8, **look)
    for caps in drawn.lines[1]:
        caps.set_data(*caps.get_xydata()[whole].T)


def courses(
    axes: Any, study: Study, lines: Sequence[tuple[Setting, dict[int, Estimate]]], **how: Any
) -> None:
    """Draw a line for each setting through its values at whole numbers, beside each other so that
    intervals do not hide each other; at 0 stands what all have in common."""
    for i, (s, found) in enumerate(lines):
        x = np.array(list(found), dtype=np.float64)
        x += np.sign(x) * (i - (len(lines) - 1) / 2) * min(0.12, 0.72 / len(lines))
        points(axes, x, list(found.values()), label=s.label, **look(study, s.method), **how)


def percent_axis(axes: Any, which: str, most: int = 6) -> None:
    """Label an axis of changes of loss in % of perplexity: a factor is as long everywhere. Call it
    when everything is drawn."""
    low, high = getattr(axes, f"get_{which}lim")()
    ticks = ticks_percent((change(low), change(high)), most)
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks([math.log1p(t / 100) for t in ticks], [signed(t) for t in ticks])


def ticks_percent(bounds: tuple[float, float], most: int = 6) -> list[float]:
    """Return round changes of perplexity in % within the bounds: even steps where these look even,
    else round factors."""
    low, high = sorted(bounds)
    wide = math.log1p(high / 100) - math.log1p(low / 100)
    if wide < 1.1:
        steps = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        ticks = np.asarray(steps.tick_values(low, high))
    else:
        factors = LogLocator(subs=(1, 2, 5) if wide < 6 else (1,))
        ticks = 100 * np.asarray(factors.tick_values(1 + low / 100, 1 + high / 100)) - 100
    return [round(float(t), 9) for t in ticks if low <= t <= high]


def signed(x: float) -> str:
    """Return a change in %: +5, −2.5, 0; +3e6 where it would be long."""
    text = "0" if abs(x) < 1e-12 else re.sub(r"e\+0*", "e", f"{x:+g}")
    return text.replace("-", "−")


# --- bytes ----------------------------------------------------------------------------------------

METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": "gain_cl", "Creator": "gain_cl"},
    "svg": {"Date": None, "Creator": "gain_cl"},
    "png": {"Software": None},
}
"""What a file says of itself: no date and no version, so that the same figure gives the same bytes
on one matplotlib."""


@rules()
def written(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """Return the figure as pdf, svg (text as outlines) or png."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=dpi, metadata=METADATA[kind])
    return out.getvalue()
