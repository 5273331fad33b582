"""Where the gains of GAIN went, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from gain_cl.measure import diagnosis
from gain_cl.measure.diagnosis import EDGES, Gains
from gain_cl.paper.figures import style
from gain_cl.studies.study import Setting, Study

CAPTION = (
    "Gains s after the last stage, by layer, of each method's chosen setting: above, the "
    "mean of |s - 1| (%); beneath, how s - 1 is"
    " distributed, as the share of a layer's gains in each bin (%; white: none, so that "
    "the ends are the least and the largest). Means over"
    " the blocks that were diagnosed; no intervals."
)
MOST = 4  # columns


class Map(NamedTuple):
    """Gains of one role of layers. blocks: of the model, (layers,); drift: mean |s - 1|, (layers,);
    share: of a layer's gains in each bin of EDGES, (bins, layers)."""

    setting: Setting
    role: str
    blocks: np.ndarray
    drift: np.ndarray
    share: np.ndarray


def maps(study: Study, results_dir: Path) -> list[Map]:
    """Return the gains after the last stage, mean over the runs of a setting that were
    diagnosed."""
    found = []
    for s in study.chosen.values():
        of = [diagnosis.load_diagnosis(results_dir, run.record.run_id) for run in s.runs.values()]
        roles: dict[str, dict[int, list[Gains]]] = {}
        for x in (x for d in of if d is not None and d.end is not None for x in d.end.layers):
            if x.gains is not None:
                roles.setdefault(x.role, {}).setdefault(x.block or 0, []).append(x.gains)
        for role, layers in roles.items():
            drift = [np.mean([g.drift for g in gains]) for gains in layers.values()]
            share = [
                np.mean([np.array(g.counts) / sum(g.counts) for g in gains], axis=0)
                for gains in layers.values()
            ]
            found.append(Map(s, role, np.array(list(layers)), np.array(drift), np.array(share).T))
    return found


@style.rules()
def build(study: Study, results_dir: Path) -> Figure | None:
    """Return, for each chosen setting with gains and each role of its layers: mean |s - 1| in % by
    layer, and beneath it a map of layers by bins of s - 1, coloured by the share of the layer's
    gains in %. Means over blocks, no intervals. None where no run that was diagnosed
    (results_dir/diagnostics) has gains."""
    found = maps(study, results_dir)
    if not found:
        return None
    columns = min(len(found), MOST)
    groups = -(-len(found) // columns)
    figure = style.new(style.DOUBLE if columns > 1 else style.SINGLE, 3.4 * groups + 0.1)
    grid = figure.add_gridspec(2 * groups, columns, height_ratios=[1, 2.2] * groups)
    shades = LinearSegmentedColormap.from_list(
        "share", list(mpl.colormaps["Blues"](np.linspace(0.12, 1.0, 255)))
    )
    most = max(float(m.share.max()) for m in found)
    used = np.flatnonzero(sum(m.share.sum(1) for m in found))
    top: Any = None
    drawn: list[Any] = []
    for i, m in enumerate(found):
        group, column = divmod(i, columns)
        above = figure.add_subplot(grid[2 * group, column], sharey=top)
        under = figure.add_subplot(grid[2 * group + 1, column], sharex=above)
        top = top or above
        above.plot(m.blocks, 100 * m.drift, **style.look(study, m.setting.method), markersize=2.5)
        style.title(above, f"{m.setting.label}\n{m.role}", style.SMALL)
        above.tick_params(labelbottom=False, labelleft=column == 0)
        edges = np.arange(m.blocks.min(), m.blocks.max() + 2) - 0.5
        cells = np.full((len(m.share), len(edges) - 1), np.nan)
        cells[:, m.blocks - m.blocks.min()] = 100 * np.where(m.share > 0, m.share, np.nan)
        shown = under.pcolormesh(
            edges, np.arange(len(cells) + 1), cells, cmap=shades, vmin=0, vmax=100 * most
        )
        labelled = [k for k, e in enumerate(EDGES) if e == 1 or round(abs(e - 1), 6) >= 0.01]
        under.set_yticks(
            [k + 1 for k in labelled],
            [style.signed(round(100 * (EDGES[k] - 1), 6)) for k in labelled],
            fontsize=6,
        )
        under.set_ylim(max(used.min() - 0.5, 0), min(used.max() + 1.5, len(cells)))
        under.axhline(EDGES.index(1.0) + 1, color=style.SOFT, linewidth=0.5)
        under.tick_params(labelleft=column == 0)
        under.locator_params(axis="x", integer=True, nbins=6, min_n_ticks=1)
        under.set_xlabel("Transformer block")
        if column == 0:
            above.set_ylabel("Mean |s − 1|, %")
            under.set_ylabel("s − 1, %")
        drawn.append(under)
    top.set_ylim(bottom=0)
    figure.align_ylabels([figure.axes[0], figure.axes[1]])
    bar = figure.colorbar(shown, ax=drawn, pad=0.02, aspect=25)
    bar.set_label("Share of the layer's gains, %")
    bar.outline.set_visible(False)
    return style.finish(figure)
