"""What a run changed in the weights, layer by layer: size, directions, intruders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from gain_cl.errors import printable
from gain_cl.paper.figures import style

if TYPE_CHECKING:
    from gain_cl.measure.diagnosis import Diagnostics, Layer

WIDE, LEAST, HIGH = 1.75, 8.0, 1.8
"""Inches of a panel, of all panels beside each other; of a row of panels."""


def render(found: Diagnostics, kind: str) -> bytes:
    """Return the figure as png or pdf; the same numbers give the same bytes on one matplotlib."""
    return style.written(build(found), kind, dpi=150)


@style.rules()
def build(found: Diagnostics) -> Figure:
    """Return a column for each role of linear layers, blocks from left to right in each panel, a
    line a stage: relative norm of the change, its column-span residual for each k (dashed: of a
    random change), intruder dimensions."""
    roles = list(dict.fromkeys(x.role for s in found.stages for x in s.layers))
    rows: dict[str, Callable[[Layer], float | None]] = {"||dW|| / ||W||": lambda x: x.relative}
    for k in found.directions:
        outside = f"share outside the\ntop {k} directions of W"
        rows[outside] = lambda x, k=str(k): (x.residual or {}).get(k)  # type: ignore[misc]
    rows["intruders"] = lambda x: x.intruders
    size = 1.3 + max(WIDE * len(roles), LEAST), 1 + HIGH * len(rows)
    figure: Any = Figure(size, layout="constrained")
    figure.suptitle(f"{found.model} · {found.method} · what changed in the weights", fontsize=12)
    about = f"{found.run_id}   dW: tuned minus pretrained weight, the adapter folded in"
    figure.supxlabel(about, color=style.SOFT)
    panels = figure.subplots(len(rows), max(len(roles), 1), sharey="row", squeeze=False)
    shades = mpl.colormaps["viridis_r"](np.linspace(0.25, 1.0, len(found.stages)))  # light: early
    for role, column in zip(roles, panels.T, strict=False):
        column[0].set_title(printable(role))
        column[-1].set_xlabel("block")
        for axes, of in zip(column, rows.values(), strict=True):
            for s, colour in zip(found.stages, shades, strict=True):
                layers = [x for x in s.layers if x.role == role]
                values = np.array([of(x) for x in layers], dtype=np.float64)  # nan: a gap
                look: Any = {"color": colour, "marker": "o", "markersize": 2}
                look["label"] = printable(f"{s.index} {s.domain}")
                axes.plot([x.block or 0 for x in layers], values, **look)
        for axes, k in zip(column[1:], found.directions, strict=False):
            shape = next(x.shape for s in found.stages for x in s.layers if x.role == role)
            axes.axhline(max(1 - k / shape[0], 0) ** 0.5, color=style.SOFT, linestyle=style.DASHED)
    for axes, name in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    if roles:
        column[0].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return style.finish(figure)
