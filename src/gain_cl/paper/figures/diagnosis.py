"""What a run changed in the weights, layer by layer: size, directions, intruders, gains and
attention heads."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gain_cl.errors import printable
from gain_cl.runs.heatmap import DPI, INK, PAPER, SOFT, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gain_cl.measure.diagnosis import Diagnostics, Layer, Stage

WIDE, LEAST = 1.75, 8.0  # inches of a panel, of all panels
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""


def render(found: Diagnostics, kind: Literal["png", "pdf"] | str) -> bytes:
    """The figure as PNG or PDF; the same numbers give the same bytes on one matplotlib (no date, no
    version inside)."""
    import matplotlib as mpl

    out = io.BytesIO()
    nothing = (
        {"Software": None}
        if kind == "png"
        else {"CreationDate": None, "Producer": None, "Creator": None}
    )
    with mpl.rc_context(defaults()):
        build(found).savefig(out, format=kind, dpi=DPI, metadata=nothing)
    return out.getvalue()


def build(found: Diagnostics) -> Figure:
    """A column for each role of linear layers, blocks from left to right in each panel: relative
    norm of the change, a line a stage; after the last stage the column-span residual, a line for
    each k (dashed: of a random change, dotted: of W); intruder dimensions, a line a stage. Beneath,
    after the last stage: the attention heads that moved, and the gains of each role if any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    end = found.stages[-1]
    roles = list(dict.fromkeys(x.role for s in found.stages for x in s.layers))
    wide = max(WIDE * len(roles), LEAST)
    whole = Figure(figsize=(1.3 + wide, 6.0 + 2.6), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(whole)
    whole.suptitle(
        f"{found.model} · {found.method} · what changed in the weights",
        fontsize=12,
        color=INK,
        fontweight="bold",
    )
    whole.supxlabel(
        f"{found.run_id}   dW: tuned minus pretrained weight, the adapter folded in",
        fontsize=8,
        color=SOFT,
    )
    parts: Any = whole.subfigures(2, 1, height_ratios=(6.0, 2.6))
    figure, under = parts
    grid = figure.add_gridspec(3, max(len(roles), 1))
    shades = _shades(len(found.stages))
    top: list[list[Any]] = [[], [], []]
    for j, role in enumerate(roles):
        for row in range(3):
            shared = top[row][0] if top[row] else None
            axes = figure.add_subplot(grid[row, j], sharey=shared)
            axes.tick_params(labelsize=7, labelleft=j == 0, color=SOFT)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
            top[row].append(axes)
        top[0][j].set_title(printable(role), fontsize=8, color=INK)
        for s, colour in zip(found.stages, shades, strict=True):
            label = printable(f"{s.index} {s.domain}")
            _line(
                top[0][j],
                _of(s, role),
                lambda x: None if x.relative is None else 100 * x.relative,
                color=colour,
                label=label,
            )
            _line(top[2][j], _of(s, role), lambda x: x.intruders, color=colour)
        for k, colour in zip(map(str, found.directions), CYCLE, strict=False):
            layers = _of(end, role)
            _line(
                top[1][j],
                layers,
                lambda x, k=k: x.residual[k] if x.residual else None,
                color=colour,
                label=f"k = {k}",
            )
            _line(
                top[1][j],
                layers,
                lambda x, k=k: x.own[k] if x.own else None,
                color=colour,
                linestyle=":",
                marker="",
            )
            chance = [
                np.sqrt(1 - int(k) / x.shape[0])
                for x in layers
                if x.residual and x.residual[k] is not None
            ]
            if chance:
                top[1][j].axhline(chance[0], color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
        top[2][j].set_xlabel("block", fontsize=8, color=SOFT)
    if roles:
        for axes, text in zip(
            (row[0] for row in top),
            ("||dW|| / ||W||, %", "share outside the\ntop k directions of W", "intruders"),
            strict=True,
        ):
            axes.set_ylabel(text, fontsize=8, color=INK)
        top[0][0].set_ylim(bottom=0)
        top[1][0].set_ylim(0, 1.03)
        top[2][0].set_ylim(-0.3, found.top + 0.3)
        top[1][-1].plot(
            [], [], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), label="in random\ndirections"
        )
        top[1][-1].plot([], [], color=SOFT, linewidth=1, linestyle=":", label="W itself")
        for axes in (top[0][-1], top[1][-1]):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(
                    fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
                )
    gains = any(x.gains for x in end.layers)
    below = under.subplots(1, 1 + gains, squeeze=False)[0]
    _heads(under, below[0], end)
    if gains:
        _histogram(below[1], found, end, roles)
    return whole


def _of(stage: Stage, role: str) -> list[Layer]:
    return [x for x in stage.layers if x.role == role]


def _line(axes: Any, layers: list[Layer], value: Any, **style: Any) -> None:
    """A value of each layer by its block; a gap where there is none."""
    points = [(x.block or 0, value(x)) for x in layers]
    if any(y is not None for _, y in points):
        y = [np.nan if y is None else y for _, y in points]
        axes.plot(
            [x for x, _ in points], y, **{"marker": "o", "markersize": 2, "linewidth": 1, **style}
        )


def _shades(n: int) -> list[Any]:
    """A colour a stage, from early (light) to late (dark), in even steps of lightness."""
    import matplotlib as mpl

    return list(mpl.colormaps["viridis_r"](np.linspace(0.25, 1.0, n) if n > 1 else [0.85]))


def _heads(figure: Any, axes: Any, end: Stage) -> None:
    """Blocks from left to right, heads from top to bottom: drift of the gains, or else the relative
    norm of a head's columns of dW."""
    layers = [x for x in end.layers if x.heads is not None]
    if not layers:
        axes.set_axis_off()
        axes.text(
            0.5,
            0.5,
            "no attention output projection changed",
            ha="center",
            va="center",
            fontsize=8,
            color=SOFT,
        )
        return
    drift = all(x.gains is not None and x.gains.heads is not None for x in layers)
    cells = np.full((len(layers[0].heads or []), max((x.block or 0) for x in layers) + 1), np.nan)
    for x in layers:
        cells[:, x.block or 0] = x.gains.heads if drift and x.gains else x.heads
    shown = axes.imshow(100 * cells, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
    axes.set_title(
        f"attention heads after stage {end.index} ({printable(layers[0].role)})",
        fontsize=8,
        color=INK,
    )
    axes.set_xlabel("block", fontsize=8, color=SOFT)
    axes.set_ylabel("head", fontsize=8, color=SOFT)
    axes.tick_params(labelsize=7, color=SOFT)
    axes.locator_params(integer=True)
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label(
        "mean |s - 1|, %" if drift else "||dW|| / ||W|| of its columns, %", fontsize=8, color=INK
    )
    bar.ax.tick_params(labelsize=7)


def _histogram(axes: Any, found: Diagnostics, end: Stage, roles: list[str]) -> None:
    """Share of the gains of each role in each bin, after the last stage; the bins are even steps on
    the axis, not in s."""
    sums = {
        r: np.sum([x.gains.counts for x in _of(end, r) if x.gains], axis=0)
        for r in roles
        if any(x.gains for x in _of(end, r))
    }
    edges = found.edges
    for (role, counts), colour in zip(sums.items(), CYCLE, strict=False):
        axes.stairs(
            100 * counts / counts.sum(),
            np.arange(-0.5, len(edges) + 1),
            label=printable(role),
            color=colour,
            linewidth=1.3,
        )
    axes.set_xticks(
        np.arange(len(edges)) + 0.5,
        [f"{x - 1:+g}" if x != 1 else "0" for x in edges],
        fontsize=6,
        rotation=90,
    )
    axes.set_title(f"gains s - 1 after stage {end.index}", fontsize=8, color=INK)
    axes.set_ylabel("% of the gains", fontsize=8, color=INK)
    axes.set_xlim(-0.5, len(edges) + 0.5)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
