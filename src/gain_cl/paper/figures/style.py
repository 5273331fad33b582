"""What the figures share: sizes, type, a look for each method, axes in % of perplexity, and bytes
that depend on the figure alone."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Sequence
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
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "*")
"""One more than colours, so that no two of 72 methods look the same, in grey either while there are
nine or fewer."""


rules = functools.partial(mpl.rc_context, fname=Path(__file__).with_name("paper.mplstyle"))
"""A decorator and a context in which figures are made and written: matplotlib's defaults, whatever
the reader's matplotlibrc says, and paper.mplstyle."""


def new(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure) -> Figure:
    """Return the figure with its layout made once and for all, so that it is the same in every
    format."""
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
        "linestyle": "-" if place < len(COLOURS) else (0, (4, 1.5)),
    }


def name(text: str, width: int = 200) -> str:
    """Return a name as it is drawn, in lines of so many characters at most: broken after a space,
    _, -, ., else anywhere."""
    pattern = rf"(?m).{{1,{width}}}(?:(?<=[ _.-])|$)|.{{1,{width}}}"
    return "\n".join(line.strip() for line in re.findall(pattern, printable(text)))


def legend(figure: Figure, looks: dict[str, dict[str, Any]]) -> None:
    """Draw the legend beneath everything, in as few rows as the figure's width allows and with even
    columns; the figure grows by its height. looks: label -> how its line looks."""
    handles = [Line2D([], [], label=name(label, 44), **how) for label, how in looks.items()]
    where: Any = {"loc": "outside lower center", "columnspacing": 1.2, "handlelength": 2.2}
    for columns in sorted({-(-len(looks) // k) for k in range(1, len(looks) + 1)}, reverse=True):
        made = figure.legend(handles=handles, ncols=columns, **where)
        box = made.get_window_extent()
        if columns == 1 or box.width < 0.98 * figure.bbox.width:
            break
        made.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def columns_of(panels: int) -> int:
    """Return the columns of ``grid``: one row while it holds four, else whichever of four and three
    leaves fewer gaps."""
    return panels if panels <= 4 else min((4, 3), key=lambda n: -panels % n)


def rows_of(panels: int) -> int:
    return math.ceil(panels / columns_of(panels))


def grid(figure: Figure, panels: int, **shared: Any) -> list[Any]:
    """Return so many axes of equal size, row by row."""
    every = figure.subplots(rows_of(panels), columns_of(panels), squeeze=False, **shared).ravel()
    for axes in every[panels:]:
        axes.remove()
    return list(every[:panels])


def title(axes: Any, text: str, size: float = TEXT) -> None:
    """Write over a panel, in lines that fit its width."""
    room = axes.figure.get_figwidth() / axes.get_gridspec().ncols - 0.4  # inches
    axes.set_title(name(text, int(room / (0.6 * size / 72))), fontsize=size)


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
    cut = (bars == longest).any(0)
    at = np.asarray(at)
    x, y = (value, at) if across else (at, value)
    axis, thin = "xerr" if across else "yerr", {"elinewidth": 0.8}
    whole = {axis: np.where(cut, np.nan, bars), "capsize": 1.5, "capthick": 0.8}
    axes.errorbar(x, y, **whole, **thin, **look)
    if cut.any():
        bare = {axis: bars[:, cut], "fmt": "none", "ecolor": look.get("color")}
        axes.errorbar(x[cut], y[cut], **bare, **thin)


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


vector, svg, png = (functools.partial(written, kind=kind) for kind in ("pdf", "svg", "png"))
