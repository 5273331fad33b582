"""What a run changed in the weights, layer by layer: size, directions, intruders, gains and
attention heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from gain_cl.errors import printable
from gain_cl.paper.figures import style

if TYPE_CHECKING:
    from gain_cl.measure.diagnosis import Diagnostics, Layer, Stage

WIDE, LEAST, HIGH, UNDER = 1.75, 8.0, 6.0, 2.6
"""Inches of a panel, of all panels; of the three rows of panels, of what stands under them."""
DASHED = (0, (4, 3))


def render(found: Diagnostics, kind: str) -> bytes:
    """Return the figure as png or pdf; the same numbers give the same bytes on one matplotlib."""
    return style.written(build(found), kind, dpi=150)


@style.rules()
def build(found: Diagnostics) -> Figure:
    """Return a column for each role of linear layers, blocks from left to right in each panel:
    relative norm of the change, a line a stage; after the last stage the column-span residual, a
    line for each k (dashed: of a random change, dotted: of W); intruder dimensions, a line a stage.
    Beneath, after the last stage: the attention heads that moved."""
    end = found.stages[-1]
    roles = list(dict.fromkeys(x.role for s in found.stages for x in s.layers))
    whole = style.new(1.3 + max(WIDE * len(roles), LEAST), HIGH + UNDER)
    whole.suptitle(f"{found.model} · {found.method} · what changed in the weights", fontsize=12)
    about = f"{found.run_id}   dW: tuned minus pretrained weight, the adapter folded in"
    whole.supxlabel(about, color=style.SOFT)
    parts: Any = whole.subfigures(2, 1, height_ratios=(HIGH, UNDER))
    top = parts[0].subplots(3, max(len(roles), 1), sharey="row", squeeze=False)
    shades = mpl.colormaps["viridis_r"](np.linspace(0.25, 1.0, len(found.stages)))  # light: early
    for role, (size, span, intruders) in zip(roles, top.T, strict=False):
        size.set_title(printable(role))
        intruders.set_xlabel("block")
        for s, colour in zip(found.stages, shades, strict=True):
            layers = _of(s, role)
            label = printable(f"{s.index} {s.domain}")
            _line(size, layers, [x.relative for x in layers], color=colour, label=label)
            _line(intruders, layers, [x.intruders for x in layers], color=colour)
        layers = _of(end, role)
        for k, colour in zip(map(str, found.directions), style.COLOURS, strict=False):
            residual = [(x.residual or {}).get(k) for x in layers]
            own = [(x.own or {}).get(k) for x in layers]
            _line(span, layers, residual, color=colour, label=f"k = {k}")
            _line(span, layers, own, color=colour, linestyle=":", marker="")
            if layers and residual != [None] * len(layers):
                chance = np.sqrt(1 - int(k) / layers[0].shape[0])
                span.axhline(chance, color=colour, linewidth=0.8, linestyle=DASHED)
    texts = (
        "||dW|| / ||W||",
        "share outside the\ntop k directions of W\n(dotted: W, dashed: random)",
        "intruders",
    )
    for axes, text in zip(top[:, 0], texts, strict=True):
        axes.set_ylabel(text)
        axes.set_ylim(bottom=0)
    for axes in (a for a in top[:2, -1] if a.get_legend_handles_labels()[0]):
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _heads(parts[1], end)
    return whole


def _of(stage: Stage, role: str) -> list[Layer]:
    return [x for x in stage.layers if x.role == role]


def _line(axes: Any, layers: list[Layer], values: list[float | None], **look: Any) -> None:
    """Draw a value of each layer by its block; a gap where there is none."""
    y = np.array(values, dtype=np.float64)
    axes.plot([x.block or 0 for x in layers], y, **{"marker": "o", "markersize": 2, **look})


def _heads(figure: Any, end: Stage) -> None:
    """Draw blocks from left to right, heads from top to bottom: the relative norm of a head's
    columns of dW."""
    layers = [x for x in end.layers if x.heads is not None]
    if not layers:
        figure.suptitle("no attention output projection changed", color=style.SOFT)
        return
    axes = figure.subplots()
    cells = np.full((len(layers[0].heads or []), max((x.block or 0) for x in layers) + 1), np.nan)
    for x in layers:
        cells[:, x.block or 0] = x.heads
    shown = axes.imshow(cells, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
    axes.set_title(f"attention heads after stage {end.index} ({printable(layers[0].role)})")
    axes.set(xlabel="block", ylabel="head")
    axes.locator_params(integer=True)
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("||dW|| / ||W|| of its columns")
