"""gain_cl from Python and notebooks: the command line's run, its records as data frames, and gains on any model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gain_cl.adapters.gain import Gains, attach_gains
from gain_cl.record import Run, load

__all__ = ["Gains", "Run", "attach_gains", "load", "run"]

Paths = str | Path | Iterable[str | Path]


def run(*overrides: str, config_dirs: Paths = (), plugins: Paths = ()) -> Run:
    """Carry out a run and return it: ``run("model=smollm2", "method=gain_ffn").matrix``.

    overrides: Hydra overrides, as on the command line; config_dirs, plugins: as --config-dir and --plugin, one or several.
    A finished run is read, not repeated (unless ``force=true``).
    Raises errors.GainError, whose text is the command line's one-line message.
    """
    from gain_cl import build, spine

    config = build.compose(overrides, *([given] if isinstance(given, str | Path) else given for given in (config_dirs, plugins)))
    return spine.execute(config, spine.prepare(config))
