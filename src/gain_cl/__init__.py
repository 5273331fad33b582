"""Continual-learning experiments for language models. From Python: ``run``, ``load``, ``attach_gains`` (see api.py).

Importing the package imports nothing heavy; its names are resolved when they are used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gain_cl.api import attach_gains, load, run

__all__ = ["__version__", "attach_gains", "load", "run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gain_cl")
    if name == "load":  # without torch
        from gain_cl.record import load

        return load
    if name == "attach_gains":
        from gain_cl.api import attach_gains

        return attach_gains
    if name == "run":
        import importlib

        return importlib.import_module("gain_cl.run")
    raise AttributeError(f"module 'gain_cl' has no attribute {name!r}")


class _Run(ModuleType):
    """The module run.py, which can be called: ``gain_cl.run(...)`` is api.run, whatever was imported before."""

    def __call__(self, *overrides: str, **options: Any) -> Any:
        from gain_cl import api

        return api.run(*overrides, **options)


class _Package(ModuleType):
    """Importing gain_cl.run binds the module to the package's ``run``, over any function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "run" and isinstance(value, ModuleType):
            value.__class__ = _Run
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
