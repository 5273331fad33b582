"""What the figures share: sizes, type, a look for each method, axes in % of perplexity, and bytes
that depend on the figure alone."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from gain_cl.errors import printable
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.study import Setting, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")
SINGLE, DOUBLE = 3.4, 7.0
"""Width of a figure in inches: one column of text, or two."""
TEXT, SMALL = 8, 7  # points
INK, SOFT, FAINT, PAPER = "#1a1a1a", "#5f5f5f", "#d9d9d9", "#ffffff"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Okabe and Ito's, which colour-blind readers can tell apart; grey for their yellow, which is too
pale for a line on white."""
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "*")
"""One more than colours, so that no two of 72 methods look the same, in grey either while there are
nine or fewer."""


def rules() -> Any:
    """Return a context in which figures are made and written: matplotlib's defaults, whatever the
    reader's matplotlibrc says, and paper.mplstyle."""
    import matplotlib as mpl

    return mpl.rc_context(fname=Path(__file__).with_name("paper.mplstyle"))


def styled(build: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which then makes its figure by the rules."""

    @functools.wraps(build)
    def ruled(*args: P.args, **given: P.kwargs) -> R:
        with rules():
            return build(*args, **given)

    return ruled


def new(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, whose parts make room for each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.02, hspace=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def finish(figure: Figure) -> Figure:
    """Return the figure with its layout made once and for all, so that it is the same in every
    format."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def partial(figure: Figure, gaps: str) -> None:
    """Say on a finished figure that it lacks runs."""
    look: dict[str, Any] = {"fontsize": SMALL, "color": "#b00020", "fontweight": "bold"}
    figure.text(0.995, 0.005, f"PARTIAL: {gaps}", ha="right", va="bottom", gid="partial", **look)


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


def chosen(study: Study) -> list[Setting]:
    """Return the setting that stands for each method, in the order of the study."""
    return [study.chosen[m] for m in study.methods if m in study.chosen]


def name(text: str, width: int = 200) -> str:
    """Return a name as it is drawn, in lines of so many characters at most: broken at spaces, else
    after _, -, . or anywhere."""
    lines: list[str] = []
    words = printable(text).replace("\n", " ")
    for line in textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False):
        while len(line) > width:
            at = max((line.rfind(c, 0, width) for c in "_-."), default=-1) + 1 or width
            lines, line = [*lines, line[:at]], line[at:]
        lines.append(line)
    return "\n".join(lines)


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Draw the legend beneath everything, in as few rows as the figure's width allows and with even
    columns; the figure grows by its height."""
    columns, look = len(handles), {"columnspacing": 1.2, "handlelength": 2.2}
    where: Any = {"handles": list(handles), "loc": "outside lower center", **look}
    while True:
        made = figure.legend(ncols=columns, **where)
        even = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        box = made.get_window_extent()
        if columns == 1 or (box.width < 0.98 * figure.bbox.width and even == columns):
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        made.remove()
        columns = even if even < columns else columns - 1


def handle(study: Study, method: str, label: str) -> Any:
    """Return an entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=name(label, 44), **look(study, method))


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
    axes.set_title(
        "\n".join(name(line, int(room / (0.6 * size / 72))) for line in text.split("\n")),
        fontsize=size,
    )


# --- values ---------------------------------------------------------------------------------------

CUT = 4.0
"""Longest side of an interval that is drawn, as a factor of perplexity."""


def points(
    axes: Any,
    at: Sequence[float],
    estimates: Sequence[Estimate],
    *,
    across: bool = False,
    **style: Any,
) -> None:
    """Draw values with their intervals, upright or (across) lying: at is the other coordinate.

    No interval where it is not known; one that, in %, is wider than a factor CUT on a side is cut
    there, and has no caps (few blocks can be compatible with anything)."""
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates], dtype=np.float64).T
    ends = [100 * ((1 + value / 100) * factor - 1) for factor in (1 / CUT, CUT)]
    cut = (low < ends[0]) | (high > ends[1])
    bars = np.stack([value - np.fmax(low, ends[0]), np.fmin(high, ends[1]) - value])
    bars[:, np.isnan(low) | np.isnan(high)] = np.nan
    sides = np.asarray(at, dtype=np.float64), value
    x, y = sides[::-1] if across else sides
    axis, thin = "xerr" if across else "yerr", {"elinewidth": 0.8}
    caps = {"capsize": 1.5, "capthick": 0.8}
    axes.errorbar(x, y, **{axis: np.where(cut, np.nan, bars)}, **{**thin, **caps, **style})
    if cut.any():
        bare = {"fmt": "none", "ecolor": style.get("color"), "capsize": 0, **thin}
        axes.errorbar(x[cut], y[cut], **{axis: bars[:, cut]}, **bare)


def dodged(at: Sequence[float], place: int, of: int) -> np.ndarray:
    """Return positions beside whole numbers, one for each of several methods, so that their
    intervals do not hide each other."""
    return np.asarray(at, dtype=np.float64) + (place - (of - 1) / 2) * min(0.12, 0.72 / of)


def percent_axis(axes: Any, which: str, most: int = 6) -> None:
    """Make an axis one in % of perplexity with even steps of log loss, as which the means are
    taken: a factor is as long everywhere. Call it when everything is drawn."""
    bounds, limit, scale, automatic = (
        getattr(axes, name.format(which))
        for name in ("get_{}lim", "set_{}lim", "set_{}scale", "get_autoscale{}_on")
    )
    if automatic():  # the margins, in log loss: in % they may pass -100
        margin = axes.margins()[which == "y"]
        low, high = bounds()
        span = (high - low) / (1 + 2 * margin)
        ends = [
            math.log1p(max(x, -99.99) / 100) for x in (low + margin * span, high - margin * span)
        ]
        pad = margin * (ends[1] - ends[0])
        limit(100 * math.expm1(ends[0] - pad), 100 * math.expm1(ends[1] + pad))
    scale(
        "function",
        functions=(
            lambda p: np.log1p(np.maximum(p, -100 + 1e-9) / 100),
            lambda x: 100 * np.expm1(np.minimum(x, 700)),
        ),
    )
    ticks = ticks_percent(bounds(), most)
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks, [signed(t) for t in ticks])
    axis.set_ticks([], minor=True)


def ticks_percent(bounds: tuple[float, float], most: int = 6) -> list[float]:
    """Return round changes of perplexity in % within the bounds: even steps where these look even,
    else the roundest that are not too close in log loss."""
    from matplotlib.ticker import MaxNLocator

    low, high = sorted(bounds)
    wide = math.log1p(high / 100) - math.log1p(low / 100)
    if wide < 1.1:
        return [
            float(t)
            for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            if low <= t <= high
        ]
    powers = (100 * 10.0**k for k in range(0, 300, max(1, round(wide / 2.3 / most))))
    rough: list[float] = [0.0, *powers, -90, -99, -99.9, -50]
    rough += [m * 10.0**k for k in range(2, 20) for m in (3, 2, 5)] + [50, -75, 25, -25]
    found: list[float] = []
    for t in (t for t in rough if low <= t <= high):
        if all(abs(math.log1p(t / 100) - math.log1p(u / 100)) >= wide / most for u in found):
            found.append(t)
    return sorted(found)


def signed(x: float) -> str:
    """Return a change in %: +5, −2.5, 0; +1e6 where it would be long."""
    x = 0.0 if abs(x) < 1e-12 else x
    text = (
        "0"
        if x == 0
        else f"{x:+g}"
        if abs(x) < 1e5
        else f"{x:+.0e}".replace("e+0", "e").replace("e+", "e")
    )
    return text.replace("-", "−")


# --- bytes ----------------------------------------------------------------------------------------

METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": "gain_cl", "Creator": "gain_cl"},
    "svg": {"Date": None, "Creator": "gain_cl"},
    "png": {"Software": None},
}
"""What a file says of itself: no date and no version, so that the same figure gives the same bytes
on one matplotlib."""


@styled
def written(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """Return the figure as pdf, svg (text as outlines) or png."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=dpi, metadata=METADATA[kind])
    return out.getvalue()


vector, svg, png = (functools.partial(written, kind=kind) for kind in ("pdf", "svg", "png"))
