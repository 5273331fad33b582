"""What may move. An adapter touches the model once: it adds what trains, and can fold it into the
weights."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from gain_cl.config.schema import ADAPTERS
from gain_cl.errors import ConfigError

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.config import schema

_PLUGINS: dict[str, type[Adapter]] = {}


def register(kind: str, adapter: type[Adapter]) -> None:
    """Make ``adapter.kind=KIND`` known; for plugin files and entry points of the group
    gain_cl.plugins."""
    _PLUGINS[kind] = adapter


def registered() -> dict[str, type[Adapter]]:
    """Plugin adapters by name."""
    return dict(_PLUGINS)


def pin(kind: str) -> str | None:
    """SHA-256 of the file that defines a plugin's class, for the run id; None for what gain_cl
    itself brings."""
    if kind not in _PLUGINS:
        return None
    return hashlib.sha256(Path(inspect.getfile(_PLUGINS[kind])).read_bytes()).hexdigest()


def build(settings: schema.Adapter) -> Adapter:
    """The one place that maps a name to a class."""
    keywords = settings.model_dump(
        exclude={"kind"} if settings.kind not in ADAPTERS else {"kind", "init_from"}
    )
    if settings.kind in _PLUGINS:
        return _PLUGINS[settings.kind](**keywords)
    if settings.kind in ("gain", "multiplicative_lora"):
        from gain_cl.adapters.gain import GainAdapter, MultiplicativeLoraAdapter

        return (GainAdapter if settings.kind == "gain" else MultiplicativeLoraAdapter)(**keywords)
    if settings.kind == "full":
        from gain_cl.adapters.full import FullAdapter

        return FullAdapter(**keywords)
    if settings.kind == "peft":
        from gain_cl.adapters.peft import PeftAdapter

        return PeftAdapter(**keywords)
    if settings.kind == "given":
        from gain_cl.adapters.checkpoints import GivenAdapter

        return GivenAdapter(**keywords)
    raise ConfigError(
        f"unknown adapter {settings.kind!r}",
        "adapter.kind",
        f"use one of: {', '.join([*ADAPTERS, *_PLUGINS])}",
    )
