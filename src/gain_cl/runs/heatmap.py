"""Draw the forgetting matrix: perplexity in every entry, its colour the change from the pretrained
model."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.stats.format import perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gain_cl.measure.record import Run

DPI = 150
BOUNDS = (5, 10, 20, 30, 40, 50)
"""Ends of the colour scale in % of perplexity: the first that holds every entry. At least 5, so
that noise stays pale. At most 50, so that one runaway entry does not bleach the others (the scale
then shows that it was cut)."""

CELL_HIGH, CELL_WIDE, CELL_WIDEST = 0.44, 0.74, 1.05  # inches
SMALLER = 0.68
"""Type and distances where the width is limited, as a share of the others': 6.8 points in the
entries."""
GAP = 0.28  # between trained domains and controls, in entries
INK, PALE_INK, SOFT, PAPER, UNSCORED = "#1a1a1a", "#ffffff", "#5f5f5f", "#ffffff", "#d9d9d9"


def draw_matrix(run: Run, setting: str | None = None, width: float | None = None) -> Figure:
    """Draw stages (0 = pretrained, at the top) by domains in training order, controls set apart on
    the right; the domain learned in a stage is outlined. Blue: perplexity fell since stage 0, red:
    it rose (a map that colour-blind readers can tell apart, white at no change); an entry that was
    not scored is grey.

    setting: how the run is called in its title (default: its method); width: in inches, with
    smaller type and narrow entries, more only where many domains need it (default: as wide as is
    easy to read)."""
    import matplotlib as mpl

    with mpl.rc_context(defaults()):
        return _Sheet(run, width).draw(setting)


def matrix_png(run: Run) -> bytes:
    """Return the picture as PNG. The same run gives the same bytes on one matplotlib (no date, no
    version inside)."""
    import matplotlib as mpl

    out = io.BytesIO()
    with mpl.rc_context(defaults()):
        draw_matrix(run).savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def defaults() -> Any:
    """Return matplotlib's own defaults, so that the reader's matplotlibrc changes nothing. Names
    are never read as formulas."""
    import matplotlib as mpl

    drawn = ("axes", "figure", "font", "patch", "savefig", "text", "xtick", "ytick")
    return {k: v for k, v in mpl.rcParamsDefault.items() if k.split(".")[0] in drawn} | {
        "text.parse_math": False
    }


@dataclass
class _Sheet:
    """A picture of a run. All sizes are in inches, from the text they must hold: nothing is
    clipped, whatever the names. most: the width where it is limited."""

    run: Run
    most: float | None

    def __post_init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(facecolor=PAPER)
        FigureCanvasAgg(self.figure)  # the figure keeps it
        self.k = 1.0 if self.most is None else SMALLER
        r, self.losses = self.run.record, self.run.record.losses()
        self.names, self.trained = r.trained + r.controls, len(r.trained)
        self.stages = [f"{s.index}  {s.domain or 'pretrained'}" for s in r.stages]
        columns = np.arange(len(self.names))
        # left edge of each column, in entries
        self.left: Any = columns + GAP * (columns >= self.trained)
        self.change = 100 * np.expm1(np.clip(self.losses - self.losses[0], None, 700.0))

    def width(self, *texts: str, size: float = 10) -> float:
        """Return the width of the widest text. size: in points, before k."""
        widest = 0.0
        for text in texts:
            drawn = self.figure.text(0, 0, text, fontsize=size * self.k)
            widest = max(widest, drawn.get_window_extent().width / self.figure.dpi)
            drawn.remove()
        return widest

    def place(self, x: float, y: float, w: float, h: float) -> Any:
        """Return axes at x, y from the left and the top."""
        wide, high = self.figure.get_size_inches()
        return self.figure.add_axes((x / wide, 1 - (y + h) / high, w / wide, h / high))

    def write(self, x: float, y: float, text: str, size: float, color: str, **style: Any) -> None:
        """Write at x, y from the left and the top."""
        figure, size = self.figure, size * self.k
        inches, y = figure.dpi_scale_trans, figure.get_figheight() - y
        figure.text(x, y, text, transform=inches, fontsize=size, color=color, **style)

    def draw(self, setting: str | None) -> Figure:
        """Measure, then draw the entries, the colour bar and the texts around them."""
        r, k, most, rows = self.run.record, self.k, self.most, len(self.losses)
        longest, label = self.width(*self.names), self.width(*self.stages)
        before, columns = label + 0.55 * k, float(self.left[-1]) + 1
        bar = max(
            0.45 * k + self.width("change from", size=9), 0.75 * k + self.width("+2.5%", size=9)
        )
        slanting = longest * math.cos(math.radians(35))  # of the last tilted name, past its column
        wide = k * min(max(CELL_WIDE, longest / k + 0.14), CELL_WIDEST)
        if most is not None:
            room = (most - before - max(bar, slanting) - 0.2 * k) / columns
            numbers = self.width(*map(perplexity, self.losses.ravel()))
            wide = min(wide, max(room, numbers + 0.06))
        tilted = longest + 0.1 * k > wide
        high, across, down = k * CELL_HIGH, wide * columns, k * CELL_HIGH * rows
        over = 0.95 * k + (longest * math.sin(math.radians(35)) + 0.1 * k if tilted else 0.2 * k)
        title = f"{r.model} · {setting or r.method} · {r.sequence} · seed {r.seed}"
        title += " · TAINTED" * bool(r.tainted)
        legend = "Perplexity after each stage. Outlined: the domain learned in that stage."
        about = f"{r.run_id}   {r.protocol}"
        texts = self.width(legend)
        sizes = []
        for text, size, bold in ((title, 13, 1.08), (about, 8, 1.0)):
            drawn, share = self.width(text, size=size), 1.0
            if most is not None:
                share = min(1.0, (most - 0.5 * k) / (1.08 * drawn))
            sizes.append(size * share)
            texts = max(texts, drawn * bold * share)
        beyond = max(bar, slanting if tilted else 0.0) + 0.2 * k
        size_high = over + down + 0.78 * k
        self.figure.set_size_inches(max(before + across + beyond, 0.5 * k + texts), size_high)

        axes = self.place(before, over, across, down)
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        colours = self.fill(axes, wide / high)
        slope = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if tilted else {}
        axes.xaxis.tick_top()
        edge = self.left + (0.35 if tilted else 0.5)
        axes.set_xticks(edge, self.names, fontsize=10 * k, color=INK, **slope)
        axes.set_yticks(np.arange(rows) + 0.5, self.stages, fontsize=10 * k, color=INK, ha="left")
        axes.tick_params(length=0, pad=5 * k)
        axes.tick_params(axis="y", pad=(before - 0.45 * k) * 72)
        axes.spines[:].set_visible(False)
        self.scale_bar(self.place(before + across + 0.32 * k, over, 0.17 * k, down), *colours)
        self.write(before - label - 0.1 * k, over - 0.07 * k, "stage", 9, SOFT, va="bottom")
        self.write(0.25 * k, 0.2 * k, title, sizes[0], INK, va="top", fontweight="bold")
        self.write(0.25 * k, 0.47 * k, legend, 10, SOFT, va="top")
        self.write(0.25 * k, size_high - 0.1 * k, about, sizes[1], SOFT, va="bottom")
        return self.figure

    def fill(self, axes: Any, shape: float) -> tuple[Any, str, float]:
        """Draw the entries, the outlines, and what the columns are. shape: width by height of an
        entry. Return the colours, and where and on which side they end."""
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        r, k, left = self.run.record, self.k, self.left
        bound, cut = scale(self.change)
        colours = shades(bound)
        for (stage, j), loss in np.ndenumerate(self.losses):
            fill = colours.to_rgba(self.change[stage, j]) if np.isfinite(loss) else UNSCORED
            corner, centre = (left[j], stage), {"ha": "center", "va": "center_baseline"}
            entry = Rectangle(corner, 1, 1, facecolor=fill, edgecolor=PAPER, linewidth=1.2 * k)
            axes.add_patch(entry)
            x, y, shown = left[j] + 0.5, stage + 0.5, perplexity(loss)
            axes.text(x, y, shown, fontsize=10 * k, color=ink(fill), **centre)
        x_in, y_in = 0.022, 0.022 * shape
        halo = [withStroke(linewidth=3.6 * k, foreground=PAPER)]
        for stage, domain in enumerate(s.domain for s in r.stages):
            if domain in r.trained:
                corner = (left[r.trained.index(domain)] + x_in, stage + y_in)
                box = Rectangle(corner, 1 - 2 * x_in, 1 - 2 * y_in, fill=False, joinstyle="miter")
                box.set(edgecolor=INK, linewidth=1.8 * k, path_effects=halo)
                axes.add_patch(box)
        one = self.trained == 1
        self.caption(axes, left[: self.trained], "trained" if one else "trained, in this order")
        if r.controls:
            one = len(r.controls) == 1
            self.caption(axes, left[self.trained :], "control" if one else "never trained")
        return colours, cut, bound

    def caption(self, axes: Any, left: np.ndarray, text: str) -> None:
        """Draw a bracket with its text under columns."""
        y, ends = len(self.losses) + 0.16, [left[0] + 0.04, left[-1] + 0.96]
        axes.plot(ends, [y, y], color=SOFT, linewidth=1.2, clip_on=False, solid_capstyle="butt")
        x, style = (left[0] + left[-1] + 1) / 2, {"ha": "center", "va": "top"}
        axes.text(x, y + 0.14, text, fontsize=9 * self.k, color=SOFT, **style)

    def scale_bar(self, bar: Any, colours: Any, cut: str, bound: float) -> None:
        """Draw what the colours mean."""
        size = 9 * self.k
        self.figure.colorbar(colours, cax=bar, extend=cut, extendfrac=0.04)
        ticks = np.linspace(-bound, bound, 5)
        shown = [f"{t:+g}%" if t else "0%" for t in ticks]
        bar.set_yticks(ticks, shown, fontsize=size, color=INK)
        bar.tick_params(length=3, color=SOFT)
        bar.set_title(
            "change from\npretrained", fontsize=size, color=SOFT, pad=8 * self.k, loc="left"
        )
        bar.spines["outline"].set_visible(False)


def shades(bound: float) -> Any:
    """Return the colours of changes from -bound to bound, in %: a ScalarMappable."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # without its darkest ends, which hide the outlines
    shown = mpl.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 255))
    return ScalarMappable(
        Normalize(-bound, bound), LinearSegmentedColormap.from_list("change", list(shown))
    )


def scale(change: np.ndarray) -> tuple[float, str]:
    """Return the end of the colour scale in %, and on which side entries go beyond it (a colour
    bar's ``extend``)."""
    known = np.append(change[~np.isnan(change)], 0.0)
    low, high = float(known.min()), float(known.max())
    bound = next((b for b in BOUNDS if max(-low, high) <= b), BOUNDS[-1])
    cut = ("neither", "min", "max", "both")[(low < -bound) + 2 * (high > bound)]
    return float(bound), cut


def ink(fill: Any) -> str:
    """Return the colour of text, dark or white, that is easier to read on the fill (by its relative
    luminance, WCAG 2)."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.25 else PALE_INK
