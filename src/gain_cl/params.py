"""Trainable parameters of every model and method, from the presets alone: nothing is downloaded, no weight is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl import build
from gain_cl.errors import ConfigError

if TYPE_CHECKING:
    from gain_cl.config import RunConfig

Table = dict[str, dict[str, Any]]
"""model -> {"total": parameters, "methods": {method: trainable parameters, or why there are none}}"""


def count(filters: Iterable[str] = (), config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = ()) -> Table:
    """Total and trainable parameters of models x methods.

    filters: ``model=A,B`` and ``method=A,B``; without them every preset. Models that are given by path alone are left
    out unless named, for their width is not in the preset.
    """
    config_dirs = list(config_dirs)
    build.search_path(config_dirs)
    wanted = _filters(filters, config_dirs)
    methods = wanted.get("method") or list(build.presets("method", config_dirs))
    models = wanted.get("model") or [m for m in build.presets("model", config_dirs) if m != "custom"]
    table: Table = {}
    # a model does not depend on the method nor the reverse: compose each once, not their product
    adapters = {m: build.compose([f"method={m}", *_LIGHT], config_dirs, plugins).adapter for m in methods}
    for name in models:
        config = build.compose([f"model={name}", *_LIGHT], config_dirs, plugins)
        if config.model.arch is None and not wanted.get("model"):
            continue
        table[name] = {"total": 0, "methods": {}}
        for method, adapter in adapters.items():
            table[name]["total"], table[name]["methods"][method] = _attach(config.model_copy(update={"adapter": adapter}))
    return table


_LIGHT = ("sequence=smoke", "tasks=none", "eval.context=2", "train.block=2", "train.batch_tokens=2")  # what counts do not depend on


def _attach(config: RunConfig) -> tuple[int, int | str]:
    """Total parameters, and how many train once the adapter is attached (or why it refuses the model)."""
    import torch

    from gain_cl import adapters, models

    model: Any = models.meta(config.model)
    total = sum(p.numel() for p in model.parameters())
    loaded = models.Loaded(
        model=model, tokenizer=None, device=torch.device("meta"), prefix_id=0, separator_id=0, context=1, tokenizer_hash="", roles=config.model.roles
    )  # type: ignore[arg-type]  # attaching reads no text
    adapter = adapters.build(config.adapter)
    try:
        adapter.attach(loaded)
    except ConfigError as error:
        return total, str(error)
    return total, sum(p.numel() for p in adapter.parameters().values())


def show(table: Table) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table as RichTable

    methods = list(dict.fromkeys(m for row in table.values() for m in row["methods"]))
    view = RichTable(title="trainable parameters", title_justify="left", box=None, pad_edge=False)
    view.add_column("model")
    for header in ["total", *methods]:
        view.add_column(header, justify="right")
    for name, row in table.items():
        cells = [f"{v:,}" if isinstance(v := row["methods"][m], int) else "refused" for m in methods]
        view.add_row(name, f"{row['total']:,}", *cells)
    console = Console()
    if not console.is_terminal:
        console.width = 400  # a pipe has no width: one line a model
    console.print(view)
    for name, row in table.items():
        for method, value in row["methods"].items():
            if isinstance(value, str):
                console.print(f"{method} on {name}: {value}", style="dim", markup=False)


def _filters(filters: Iterable[str], config_dirs: list[str | Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in filters:
        group, equals, names = text.partition("=")
        if not equals or group not in ("model", "method"):
            raise ConfigError(f"cannot read {text!r}", "gain_cl params", "write model=A,B or method=A,B")
        known = build.presets(group, config_dirs)
        found[group] = [n.strip() for n in names.split(",") if n.strip()]
        for name in found[group]:
            if name not in known:
                raise ConfigError(f"unknown {group} {name!r}", text, build.suggest(name, known))
    return found
