"""Figures of an experiment: a module each, ``build(study) -> Figure | None``."""

from __future__ import annotations

from types import ModuleType

from gain_cl.paper.figures import ages, curves, forest, fronts, gains, margins

ALL: dict[str, ModuleType] = {
    m.__name__.rpartition(".")[2]: m for m in (fronts, forest, curves, ages, margins, gains)
}
"""By name, in the order in which they are looked at."""
