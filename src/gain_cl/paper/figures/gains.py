"""Where the gains of GAIN went, layer by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from gain_cl.measure import diagnosis
from gain_cl.measure.diagnosis import EDGES
from gain_cl.paper.figures import style
from gain_cl.studies.study import Setting, Study

CAPTION = (
    "Gains s after the last stage, by layer, of each method's chosen setting: above, the "
    "mean of |s - 1| (%); beneath, how s - 1 is"
    " distributed, as the share of a layer's gains in each bin (%; white: none, so that "
    "the ends are the least and the largest). Means over"
    " the blocks that were diagnosed; no intervals."
)
WIDE = 1.75  # inches of a column, where there are many


class Map(NamedTuple):
    """Gains of one role of layers. blocks: of the model, (layers,); drift: mean |s - 1|, (layers,);
    share: of a layer's gains in each bin of EDGES, (bins, layers)."""

    setting: Setting
    role: str
    blocks: np.ndarray
    drift: np.ndarray
    share: np.ndarray


def maps(study: Study) -> list[Map]:
    """Return the gains after the last stage, mean over the runs of a setting that were
    diagnosed."""
    found = []
    for s in study.chosen.values():
        of = (diagnosis.load_diagnosis(r.path.parents[1], r.record.run_id) for r in s.runs.values())
        roles: dict[str, dict[int, list[np.ndarray]]] = {}
        for x in (x for d in of if d and d.end for x in d.end.layers):
            if x.gains is not None:
                counts = np.array(x.gains.counts)
                numbers = np.append(counts / counts.sum(), x.gains.drift)
                roles.setdefault(x.role, {}).setdefault(x.block or 0, []).append(numbers)
        for role, layers in roles.items():
            *share, drift = np.array([np.mean(numbers, axis=0) for numbers in layers.values()]).T
            found.append(Map(s, role, np.array([*layers]), drift, np.array(share)))
    return found


@style.rules()
def build(study: Study) -> Figure | None:
    """Return, for each chosen setting with gains and each role of its layers: mean |s - 1| in % by
    layer, and beneath it a map of layers by bins of s - 1, coloured by the share of the layer's
    gains in %. Means over blocks, no intervals. None where no run that was diagnosed (diagnostics/
    beside its record's folder) has gains."""
    found = maps(study)
    if not found:
        return None
    figure = Figure((max(style.DOUBLE, WIDE * len(found)), 3.5), layout="constrained")
    shape: Any = {"squeeze": False, "sharex": "col", "sharey": "row", "height_ratios": [1, 2.2]}
    top, low = figure.subplots(2, len(found), **shape)
    most = max(float(m.share.max()) for m in found)
    used = np.flatnonzero(sum(m.share.sum(1) for m in found))
    for m, above, under in zip(found, top, low, strict=True):
        above.plot(m.blocks, 100 * m.drift, **style.look(study, m.setting.method), markersize=2.5)
        above.set_title(style.name(f"{m.setting.label}\n{m.role}", 24), fontsize=style.SMALL)
        cells = np.full((len(m.share), m.blocks.max() - m.blocks.min() + 1), np.nan)
        cells[:, m.blocks - m.blocks.min()] = 100 * np.where(m.share > 0, m.share, np.nan)
        sides = m.blocks.min() - 0.5, m.blocks.max() + 0.5, 0, len(cells)
        look: Any = {"cmap": "YlGnBu", "vmin": 0, "vmax": 100 * most, "aspect": "auto"}
        shown = under.imshow(cells, origin="lower", extent=sides, interpolation="nearest", **look)
        under.axhline(EDGES.index(1.0) + 1, color=style.SOFT, linewidth=0.5)
        under.locator_params(axis="x", integer=True, nbins=6, min_n_ticks=1)
        under.set_xlabel("Transformer block")
    edges = np.round(np.subtract(EDGES, 1), 6)
    every = np.flatnonzero((edges == 0) | (abs(edges) > 0.005))
    low[0].set_yticks(every + 1, [style.signed(100 * x) for x in edges[every]], fontsize=6)
    low[0].set_ylim(max(used.min() - 0.5, 0), min(used.max() + 1.5, len(EDGES) + 1))
    low[0].set_ylabel("s − 1, %")
    top[0].set_ylabel("Mean |s − 1|, %")
    top[0].set_ylim(bottom=0)
    bar = figure.colorbar(shown, ax=list(low), pad=0.02, aspect=25)
    bar.set_label("Share of the layer's gains, %")
    return style.finish(figure)
