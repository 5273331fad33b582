"""Draw the forgetting matrix: perplexity in every entry, its colour the change from the pretrained
model."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.stats.format import perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gain_cl.measure.record import Run

BOUNDS = (5, 10, 20, 30, 40, 50)
"""Ends of the colour scale in % of perplexity: the first that holds every entry. At least 5, so
that noise stays pale. At most 50, so that one runaway entry does not bleach the others (the scale
then shows that it was cut)."""

ENTRY_WIDE, ENTRY_HIGH = 0.74, 0.44  # inches
GAP = 0.28  # between trained domains and controls, in entries
INK, PALE_INK, SOFT, PAPER, UNSCORED = "#1a1a1a", "#ffffff", "#5f5f5f", "#ffffff", "#d9d9d9"
LEGEND = "Perplexity after each stage. Outlined: learned in it. After a gap: never trained."


def rules() -> Any:
    """Return a context of matplotlib's own defaults, so that the reader's matplotlibrc changes
    nothing. Names are never read as formulas."""
    from matplotlib import style

    return style.context(["default", {"text.parse_math": False}])


def matrix_png(run: Run) -> bytes:
    """Return the picture as PNG. The same run gives the same bytes on one matplotlib (no date, no
    version inside)."""
    out = io.BytesIO()
    with rules():
        draw_matrix(run).savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def draw_matrix(run: Run, setting: str | None = None) -> Figure:
    """Draw stages (0 = pretrained, at the top) by domains in training order, controls set apart on
    the right; the domain learned in a stage is outlined. Blue: perplexity fell since stage 0, red:
    it rose (a map that colour-blind readers can tell apart, white at no change); an entry that was
    not scored is grey. It is as wide as is easy to read.

    setting: how the run is called in its title (default: its method)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    r = run.record
    title = f"{r.model} · {setting or r.method} · {r.sequence} · seed {r.seed}"
    title += " · TAINTED" * bool(r.tainted)
    about = f"{LEGEND}\n{r.run_id}   {r.protocol}"
    with rules():
        figure = Figure((20, 20), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)  # the figure keeps it
        axes = figure.add_subplot()
        fill(axes, run)
        left = {"x": 0.01, "ha": "left"}
        texts = [
            figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", **left),
            figure.supxlabel(about, fontsize=9, color=SOFT, **left),
        ]
        figure.draw_without_rendering()  # which tells the room that names and colour bar need
        wide, high = np.subtract(figure.bbox.size, axes.bbox.size) / figure.dpi
        needed = 1.05 * max(text.get_window_extent().width for text in texts) / figure.dpi + 0.1
        wide = max(wide + ENTRY_WIDE * axes.get_xlim()[1], needed)
        figure.set_size_inches(wide, high + ENTRY_HIGH * axes.get_ylim()[0])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the same in every format
    return figure


def fill(axes: Any, run: Run) -> None:
    """Draw the entries, the outlines, and what columns, rows and colours are."""
    from matplotlib.patches import Rectangle

    r, losses = run.record, run.record.losses()
    names, trained = r.trained + r.controls, len(r.trained)
    columns, rows = np.arange(len(names)), np.arange(len(losses))
    left: Any = columns + GAP * (columns >= trained)  # edge of each column, in entries
    change = changes(losses)
    bound, cut = scale(change)
    colours = shades(bound)
    for (i, j), loss in np.ndenumerate(losses):
        colour = colours.to_rgba(change[i, j]) if np.isfinite(loss) else UNSCORED
        look: Any = {"facecolor": colour, "edgecolor": PAPER, "linewidth": 1.2}
        axes.add_patch(Rectangle((left[j], i), 1, 1, **look))
        place = {"ha": "center", "va": "center_baseline", "fontsize": 10}
        axes.text(left[j] + 0.5, i + 0.5, perplexity(loss), color=ink(colour), **place)
        if names[j] == r.stages[i].domain:
            outline: Any = {"fill": False, "edgecolor": INK, "linewidth": 1.8, "zorder": 2}
            axes.add_patch(Rectangle((left[j], i), 1, 1, **outline))
    axes.set(xlim=(0, left[-1] + 1), ylim=(len(losses), 0))
    slope = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(left + 0.6, names, fontsize=10, color=INK, **slope)
    stages = [f"{s.index}  {s.domain or 'pretrained'}" for s in r.stages]
    axes.set_yticks(rows + 0.5, stages, fontsize=10, color=INK)
    axes.set_ylabel("stage", fontsize=9, color=SOFT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(colours, ax=axes, extend=cut, pad=0.02, aspect=30)
    ticks = np.linspace(-bound, bound, 5)
    bar.set_ticks(ticks, labels=[f"{t:+g}%" if t else "0%" for t in ticks], fontsize=9)
    bar.set_label("change from pretrained", fontsize=9, color=SOFT)
    bar.outline.set_visible(False)


def changes(losses: np.ndarray) -> np.ndarray:
    """Return the change of perplexity since stage 0 of each entry, in %. losses: (stages,
    domains)."""
    return np.asarray(100 * np.expm1(np.clip(losses - losses[0], None, 700.0)))


def shades(bound: float) -> Any:
    """Return the colours of changes from -bound to bound, in %: a ScalarMappable."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # without its darkest ends, which hide the outlines
    shown = mpl.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 255))
    return ScalarMappable(Normalize(-bound, bound), ListedColormap(shown))


def scale(change: np.ndarray) -> tuple[float, str]:
    """Return the end of the colour scale in %, and on which side entries go beyond it (a colour
    bar's ``extend``)."""
    known = np.append(change[~np.isnan(change)], 0.0)
    low, high = float(known.min()), float(known.max())
    bound = next((b for b in BOUNDS if max(-low, high) <= b), BOUNDS[-1])
    cut = ("neither", "min", "max", "both")[(low < -bound) + 2 * (high > bound)]
    return float(bound), cut


def ink(fill: Any) -> str:
    """Return the colour of text, dark or white, that is easier to read on the fill."""
    from matplotlib.colors import to_rgb

    luma = np.dot(to_rgb(fill), (0.2126, 0.7152, 0.0722))
    return INK if luma > 0.5 else PALE_INK
