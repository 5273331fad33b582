"""The forgetting matrix as a picture: perplexity in every cell, its colour the change from the
pretrained model."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.stats.format import perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gain_cl.measure.record import Run

DPI = 150
BOUNDS = (5, 10, 20, 30, 40, 50)
"""Ends of the colour scale in % of perplexity: the first that holds every cell. At least 5, so that
noise stays pale; at most 50, so that one runaway cell does not bleach the others (the scale then
shows that it was cut)."""

CELL_HIGH, CELL_WIDE, CELL_WIDEST = 0.44, 0.74, 1.05  # inches
SMALLER = 0.68
"""Type and distances where the width is limited, as a share of the others': 6.8 points in the
cells."""
GAP = 0.28  # between trained domains and controls, in cells
INK, PALE_INK, SOFT, PAPER, UNSCORED = "#1a1a1a", "#ffffff", "#5f5f5f", "#ffffff", "#d9d9d9"


def build(run: Run, setting: str | None = None, width: float | None = None) -> Figure:
    """Stages (0 = pretrained, at the top) by domains in training order, controls set apart on the
    right; the domain learned in a stage is outlined. Blue: perplexity fell since stage 0, red: it
    rose (a map that colour-blind readers can tell apart, white at no change); a cell that was not
    scored is grey. setting: how the run is called in its title (default: its method); width: in
    inches, with smaller type and narrow cells, more only where many domains need it (default: as
    wide as is easy to read)."""
    import matplotlib as mpl

    with mpl.rc_context(defaults()):
        return _build(run, setting, width)


def png(run: Run) -> bytes:
    """The picture as PNG; the same run gives the same bytes on one matplotlib (no date, no version
    inside)."""
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context(defaults()):
        _build(run).savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def defaults() -> Any:
    """matplotlib's own defaults, so that the reader's matplotlibrc changes nothing; names are never
    read as formulas."""
    import matplotlib as mpl

    drawn = ("axes", "figure", "font", "patch", "savefig", "text", "xtick", "ytick")
    return {k: v for k, v in mpl.rcParamsDefault.items() if k.split(".")[0] in drawn} | {
        "text.parse_math": False
    }


def _build(run: Run, setting: str | None = None, most: float | None = None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    r = run.record
    names = r.trained + r.controls
    losses = r.losses()
    change = 100 * np.expm1(np.clip(losses - losses[0], None, 700.0))
    rows, columns = losses.shape
    left = np.arange(columns) + GAP * (np.arange(columns) >= len(r.trained)) * bool(
        r.trained
    )  # left edge of each column

    bound, cut = scale(change)
    colours = shades(bound)

    k = 1.0 if most is None else SMALLER
    figure = Figure(facecolor=PAPER)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def width(text: str, size: float) -> float:
        """Inches."""
        drawn = figure.text(0, 0, text, fontsize=size * k)
        inches = float(drawn.get_window_extent(renderer).width) / figure.dpi
        drawn.remove()
        return inches

    # All sizes are in inches, from the text they must hold: nothing is clipped, whatever the names.
    stages = [f"{s.index}  {s.domain or 'pretrained'}" for s in r.stages]
    longest = max(width(n, 10) for n in names)
    before = max(width(s, 10) for s in stages) + 0.55 * k
    bar_wide = max(0.45 * k + width("change from", 9), 0.75 * k + width("+2.5%", 9))
    slanting = longest * math.cos(math.radians(35))  # of the last tilted name, beyond its column
    wide = k * min(max(CELL_WIDE, longest / k + 0.14), CELL_WIDEST)
    if most is not None:
        room = (most - before - max(bar_wide, slanting) - 0.2 * k) / (float(left[-1]) + 1)
        wide = min(wide, max(room, max(width(perplexity(x), 10) for x in losses.ravel()) + 0.06))
    tilted = longest + 0.1 * k > wide
    title = (
        f"{r.model} · {setting or r.method} · {r.sequence} · seed "
        f"{r.seed}{' · TAINTED' if r.tainted else ''}"
    )
    legend = "Perplexity after each stage. Outlined: the domain learned in that stage."
    high = k * CELL_HIGH
    across, down = wide * (float(left[-1]) + 1), high * rows
    beyond = max(bar_wide, slanting if tilted else 0.0) + 0.2 * k
    over = 0.95 * k + (longest * math.sin(math.radians(35)) + 0.1 * k if tilted else 0.2 * k)
    under = 0.78 * k
    about = f"{r.run_id}   {r.protocol}"
    shrunk = {
        t: 1.0 if most is None else min(1.0, (most - 0.5 * k) / (1.08 * width(t, size)))
        for t, size in ((title, 13), (about, 8))
    }
    size_wide = max(
        before + across + beyond,
        0.5 * k
        + max(
            width(title, 13) * 1.08 * shrunk[title],
            width(legend, 10),
            width(about, 8) * shrunk[about],
        ),
    )
    size_high = over + down + under
    figure.set_size_inches(size_wide, size_high)

    def place(x: float, y: float, w: float, h: float) -> Any:
        """Axes at x, y inches from the left and the top."""
        return figure.add_axes(
            (x / size_wide, 1 - (y + h) / size_high, w / size_wide, h / size_high)
        )

    axes = place(before, over, across, down)
    axes.set(xlim=(0, float(left[-1]) + 1), ylim=(rows, 0))
    for stage in range(rows):
        for j in range(columns):
            scored = bool(np.isfinite(losses[stage, j]))
            fill = colours.to_rgba(change[stage, j]) if scored else UNSCORED
            axes.add_patch(
                Rectangle(
                    (left[j], stage), 1, 1, facecolor=fill, edgecolor=PAPER, linewidth=1.2 * k
                )
            )
            axes.text(
                left[j] + 0.5,
                stage + 0.5,
                perplexity(losses[stage, j]),
                ha="center",
                va="center_baseline",
                fontsize=10 * k,
                color=ink(fill),
            )
    for stage, domain in enumerate(s.domain for s in r.stages):
        if domain in r.trained:
            x = left[r.trained.index(domain)]
            inset_x, inset_y = 0.022, 0.022 * wide / high
            box = Rectangle(
                (x + inset_x, stage + inset_y),
                1 - 2 * inset_x,
                1 - 2 * inset_y,
                fill=False,
                joinstyle="miter",
            )
            box.set(
                edgecolor=INK,
                linewidth=1.8 * k,
                path_effects=[withStroke(linewidth=3.6 * k, foreground=PAPER)],
            )
            axes.add_patch(box)
    axes.xaxis.tick_top()
    slope: dict[str, Any] = (
        {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if tilted else {}
    )
    axes.set_xticks(left + (0.35 if tilted else 0.5), names, fontsize=10 * k, color=INK, **slope)
    axes.set_yticks(np.arange(rows) + 0.5, stages, fontsize=10 * k, color=INK)
    for label in axes.get_yticklabels():
        label.set_ha("left")
    axes.tick_params(length=0, pad=5 * k)
    axes.tick_params(axis="y", pad=(before - 0.45 * k) * 72)
    axes.spines[:].set_visible(False)

    def caption(first: int, last: int, text: str) -> None:
        """A bracket with its text under columns first..last."""
        y = rows + 0.16
        axes.plot(
            [left[first] + 0.04, left[last] + 0.96],
            [y, y],
            color=SOFT,
            linewidth=1.2,
            clip_on=False,
            solid_capstyle="butt",
        )
        axes.text(
            (left[first] + left[last] + 1) / 2,
            y + 0.14,
            text,
            ha="center",
            va="top",
            fontsize=9 * k,
            color=SOFT,
        )

    if r.trained:
        caption(
            0, len(r.trained) - 1, "trained, in this order" if len(r.trained) > 1 else "trained"
        )
    if r.controls:
        caption(len(r.trained), columns - 1, "never trained" if len(r.controls) > 1 else "control")

    bar = place(before + across + 0.32 * k, over, 0.17 * k, down)
    figure.colorbar(colours, cax=bar, extend=cut, extendfrac=0.04)
    ticks = np.linspace(-bound, bound, 5)
    bar.set_yticks(ticks, [f"{t:+g}%" if t else "0%" for t in ticks], fontsize=9 * k, color=INK)
    bar.tick_params(length=3, color=SOFT)
    bar.set_title("change from\npretrained", fontsize=9 * k, color=SOFT, pad=8 * k, loc="left")
    bar.spines["outline"].set_visible(False)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / size_wide, 1 - y / size_high, text, ha="left", **style)

    write(
        before - max(width(s, 10) for s in stages) - 0.1 * k,
        over - 0.07 * k,
        "stage",
        va="bottom",
        fontsize=9 * k,
        color=SOFT,
    )
    write(
        0.25 * k,
        0.2 * k,
        title,
        va="top",
        fontsize=13 * k * shrunk[title],
        color=INK,
        fontweight="bold",
    )
    write(0.25 * k, 0.47 * k, legend, va="top", fontsize=10 * k, color=SOFT)
    write(
        0.25 * k,
        size_high - 0.1 * k,
        about,
        va="bottom",
        fontsize=8 * k * shrunk[about],
        color=SOFT,
    )
    return figure


def shades(bound: float) -> Any:
    """Colours of changes from -bound to bound, in %: a ScalarMappable."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shown = mpl.colormaps["RdBu_r"](
        np.linspace(0.08, 0.92, 255)
    )  # without its darkest ends, which hide the outlines
    return ScalarMappable(
        Normalize(-bound, bound), LinearSegmentedColormap.from_list("change", list(shown))
    )


def scale(change: np.ndarray) -> tuple[float, str]:
    """End of the colour scale in %, and on which side cells go beyond it (a colour bar's
    ``extend``)."""
    known = change[~np.isnan(change)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    bound = next((b for b in BOUNDS if max(-low, high) <= b), BOUNDS[-1])
    return float(bound), {
        (False, False): "neither",
        (True, False): "min",
        (False, True): "max",
    }.get((low < -bound, high > bound), "both")


def ink(fill: Any) -> str:
    """Dark or white text, whichever is easier to read on the fill (by its relative luminance, WCAG
    2)."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.25 else PALE_INK
