"""Continual-learning experiments for language models. From Python: ``run``, ``load``, ``compare``,
``attach_gains`` (see api.py).

Importing the package imports nothing heavy; its names are resolved when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gain_cl.api import attach_gains, compare, load, run

__all__ = ["__version__", "attach_gains", "compare", "load", "run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gain_cl")
    if name == "load":  # without torch
        from gain_cl.measure.record import load

        return load
    if name in ("attach_gains", "compare", "run"):
        from gain_cl import api

        return getattr(api, name)
    raise AttributeError(f"module 'gain_cl' has no attribute {name!r}")
