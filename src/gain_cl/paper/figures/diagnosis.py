"""What a run changed in the weights, layer by layer: size, directions, intruders, gains and
attention heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.errors import printable
from gain_cl.paper.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gain_cl.measure.diagnosis import Diagnostics, Layer, Stage

WIDE, LEAST, HIGH, UNDER = 1.75, 8.0, 6.0, 2.6
"""Inches of a panel, of all panels; of the three rows of panels, of what stands under them."""
DASHED = (0, (4, 3))
Number = Callable[["Layer"], "float | None"]


def render(found: Diagnostics, kind: str) -> bytes:
    """Return the figure as png or pdf; the same numbers give the same bytes on one matplotlib."""
    return style.written(build(found), kind, dpi=150)


@style.styled
def build(found: Diagnostics) -> Figure:
    """Return a column for each role of linear layers, blocks from left to right in each panel:
    relative norm of the change, a line a stage; after the last stage the column-span residual, a
    line for each k (dashed: of a random change, dotted: of W); intruder dimensions, a line a stage.
    Beneath, after the last stage: the attention heads that moved, and the gains of each role if
    any."""
    import matplotlib as mpl

    end = found.stages[-1]
    roles = list(dict.fromkeys(x.role for s in found.stages for x in s.layers))
    whole = style.new(1.3 + max(WIDE * len(roles), LEAST), HIGH + UNDER)
    whole.suptitle(
        f"{found.model} · {found.method} · what changed in the weights",
        fontsize=12,
        fontweight="bold",
    )
    whole.supxlabel(
        f"{found.run_id}   dW: tuned minus pretrained weight, the adapter folded in",
        color=style.SOFT,
    )
    parts: Any = whole.subfigures(2, 1, height_ratios=(HIGH, UNDER))
    figure, under = parts
    top = figure.subplots(3, max(len(roles), 1), sharey="row", squeeze=False)
    # a colour a stage, from early (light) to late (dark), in even steps of lightness
    lightness = np.linspace(0.25, 1.0, len(found.stages)) if len(found.stages) > 1 else [0.85]
    shades = mpl.colormaps["viridis_r"](lightness)
    for role, (size, span, intruders) in zip(roles, top.T, strict=False):
        for axes in (size, span, intruders):
            axes.grid(axis="y", color=style.FAINT, linewidth=0.6)
        size.set_title(printable(role))
        intruders.set_xlabel("block")
        for s, colour in zip(found.stages, shades, strict=True):
            label = printable(f"{s.index} {s.domain}")
            _line(size, _of(s, role), _relative, color=colour, label=label)
            _line(intruders, _of(s, role), lambda x: x.intruders, color=colour)
        for k, colour in zip(map(str, found.directions), style.COLOURS, strict=False):
            layers = _of(end, role)
            _line(span, layers, partial(_share, "residual", k), color=colour, label=f"k = {k}")
            _line(span, layers, partial(_share, "own", k), color=colour, linestyle=":", marker="")
            there = [x for x in layers if _share("residual", k, x) is not None]
            if there:
                chance = np.sqrt(1 - int(k) / there[0].shape[0])
                span.axhline(chance, color=colour, linewidth=0.8, linestyle=DASHED)
    if roles:
        limits = (
            ("||dW|| / ||W||, %", 0, None),
            ("share outside the\ntop k directions of W", 0, 1.03),
            ("intruders", -0.3, found.top + 0.3),
        )
        for axes, (text, low, high) in zip(top[:, 0], limits, strict=True):
            axes.set_ylabel(text)
            axes.set_ylim(low, high)
        last = top[1, -1]
        for line, text in ((DASHED, "in random\ndirections"), (":", "W itself")):
            last.plot([], [], color=style.SOFT, linewidth=0.9, linestyle=line, label=text)
        for axes in (top[0, -1], last):
            axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    gains = any(x.gains for x in end.layers)
    below = under.subplots(1, 1 + gains, squeeze=False)[0]
    _heads(under, below[0], end)
    if gains:
        _histogram(below[1], found, end, roles)
    return whole


def _of(stage: Stage, role: str) -> list[Layer]:
    return [x for x in stage.layers if x.role == role]


def _relative(x: Layer) -> float | None:
    return None if x.relative is None else 100 * x.relative


def _share(of: str, k: str, x: Layer) -> float | None:
    """Return the share of a layer's change (residual) or of its weight (own) outside the top k
    directions."""
    shares: dict[str, float | None] | None = getattr(x, of)
    return shares[k] if shares else None


def _line(axes: Any, layers: list[Layer], value: Number, **look: Any) -> None:
    """Draw a value of each layer by its block; a gap where there is none."""
    y = [np.nan if (found := value(x)) is None else found for x in layers]
    if not np.isnan(y).all():
        at = [x.block or 0 for x in layers]
        axes.plot(at, y, **{"marker": "o", "markersize": 2, **look})


def _heads(figure: Any, axes: Any, end: Stage) -> None:
    """Draw blocks from left to right, heads from top to bottom: drift of the gains, or else the
    relative norm of a head's columns of dW."""
    layers = [x for x in end.layers if x.heads is not None]
    if not layers:
        axes.set_axis_off()
        text = "no attention output projection changed"
        axes.text(0.5, 0.5, text, ha="center", va="center", color=style.SOFT)
        return
    drift = all(x.gains is not None and x.gains.heads is not None for x in layers)
    cells = np.full((len(layers[0].heads or []), max((x.block or 0) for x in layers) + 1), np.nan)
    for x in layers:
        cells[:, x.block or 0] = x.gains.heads if drift and x.gains else x.heads
    shown = axes.imshow(100 * cells, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
    axes.set_title(f"attention heads after stage {end.index} ({printable(layers[0].role)})")
    axes.set(xlabel="block", ylabel="head")
    axes.locator_params(integer=True)
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("mean |s - 1|, %" if drift else "||dW|| / ||W|| of its columns, %")


def _histogram(axes: Any, found: Diagnostics, end: Stage, roles: list[str]) -> None:
    """Draw the share of the gains of each role in each bin, after the last stage; the bins are even
    steps on the axis, not in s."""
    edges = found.edges
    places = np.arange(-0.5, len(edges) + 1)
    of = {r: [x.gains.counts for x in _of(end, r) if x.gains] for r in roles}
    gained = [(r, np.sum(counts, axis=0)) for r, counts in of.items() if counts]
    for (role, counts), colour in zip(gained, style.COLOURS, strict=False):
        look = {"label": printable(role), "color": colour, "linewidth": 1.3}
        axes.stairs(100 * counts / counts.sum(), places, **look)
    names = [f"{x - 1:+g}" if x != 1 else "0" for x in edges]
    axes.set_xticks(places[1:-1], names, fontsize=6, rotation=90)
    axes.set_title(f"gains s - 1 after stage {end.index}")
    axes.set_ylabel("% of the gains")
    axes.set(xlim=(-0.5, len(edges) + 0.5), ylim=(0, None))
    axes.legend(fontsize=7)
