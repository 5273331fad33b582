"""How the past is kept. A guard touches the stream, the loss and its own memory; ``none`` does
nothing."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from gain_cl.config.schema import GUARDS
from gain_cl.errors import ConfigError

if TYPE_CHECKING:
    from gain_cl.config import schema
    from gain_cl.guards.base import Guard

_PLUGINS: dict[str, type[Guard]] = {}


def register(kind: str, guard: type[Guard]) -> None:
    """Make ``guard.kind=KIND`` known; for plugin files and entry points of the group
    gain_cl.plugins."""
    _PLUGINS[kind] = guard


def registered() -> dict[str, type[Guard]]:
    """Plugin guards by name."""
    return dict(_PLUGINS)


def pin(kind: str) -> str | None:
    """SHA-256 of the file that defines a plugin's class, for the run id; None for what gain_cl
    itself brings."""
    if kind not in _PLUGINS:
        return None
    return hashlib.sha256(Path(inspect.getfile(_PLUGINS[kind])).read_bytes()).hexdigest()


def build(settings: schema.Guard) -> Guard:
    """The one place that maps a name to a class."""
    keywords = settings.model_dump(exclude={"kind"})
    if settings.kind in _PLUGINS:
        return _PLUGINS[settings.kind](**keywords)
    if settings.kind not in GUARDS:
        raise ConfigError(
            f"unknown guard {settings.kind!r}",
            "guard.kind",
            f"use one of: {', '.join([*GUARDS, *_PLUGINS])}",
        )
    from gain_cl.guards import base, ewc, near_base, replay

    kinds: dict[str, type[Guard]] = {
        "none": base.Guard,
        "ewc": ewc.EwcGuard,
        "replay": replay.ReplayGuard,
        "self_replay": replay.SelfReplayGuard,
        "kl_base": near_base.KlBaseGuard,
        "l2_base": near_base.L2BaseGuard,
        "orthogonal": near_base.OrthogonalGuard,
        "ema": near_base.EmaGuard,
    }
    return kinds[settings.kind](**keywords)
