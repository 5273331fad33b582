"""Trainable parameters of every model and method, from the presets alone: nothing is downloaded, no weight is allocated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gain_cl import build, presets
from gain_cl.config import Adapter, Model
from gain_cl.errors import ConfigError, GainError
from gain_cl.explain import suggest

Table = dict[str, dict[str, Any]]
"""model -> {"total": parameters, "methods": {method: trainable parameters, or why there are none}}"""


def count(filters: Iterable[str] = (), config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = ()) -> Table:
    """Total and trainable parameters of models x methods.

    filters: ``model=A,B`` and ``method=A,B``; without them every preset whose architecture is known.
    """
    config_dirs = list(config_dirs)
    wanted = _filters(filters, config_dirs)
    build.load_plugins(plugins)
    adapters, models = {}, {}
    with build.session(config_dirs) as load:  # a model does not depend on the method nor the reverse: no need to compose their product
        for name in wanted.get("method") or presets.names("method", config_dirs):
            adapters[name] = _section(load, f"method={name}", "adapter", config_dirs, TypeAdapter(Adapter))
        for name in wanted.get("model") or presets.names("model", config_dirs):
            given = name != "custom"  # which is a path to be given
            model = _section(load, f"model={name}", "model", config_dirs, TypeAdapter(Model)) if given else None
            if model is not None and (model.arch or model.path or model.package):
                models[name] = model
            elif "model" in wanted:
                do = "give model.path= to a run, which says how many train, or write a preset that has it (--config-dir)"
                raise ConfigError("a preset without path and arch, nothing to count", f"model={name}", do)
    counted: dict[str, tuple[int, int | str]] = {}
    table: Table = {}
    for name, model in models.items():
        if model.arch is None and "model" not in wanted:
            continue
        table[name] = {"total": 0, "methods": {}}
        for method, adapter in adapters.items():
            same = repr((model.arch or model, model.roles, adapter))  # qwen2.5 is qwen2.5_7b
            if same not in counted:
                counted[same] = attached(model, adapter)
            table[name]["total"], table[name]["methods"][method] = counted[same]
    return table


def _section(load: build.Load, override: str, key: str, config_dirs: list[str | Path], kind: TypeAdapter[Any]) -> Any:
    """One typed section of the configuration that an override gives; mistakes are explained as a run would."""
    try:
        return kind.validate_python(load([override])[key])
    except Exception:
        build.compose([override], config_dirs)
        raise


def attached(model: Model, adapter: Any) -> tuple[int, int | str]:
    """Total parameters, and how many train once the adapter is attached (or why it refuses the model)."""
    import torch

    from gain_cl import adapters, models

    net: Any = models.meta(model)
    total = sum(p.numel() for p in net.parameters())
    no_text: Any = None
    loaded = models.Loaded(net, no_text, torch.device("meta"), 0, 0, 1, "", model.roles)  # attaching reads no text
    built = adapters.build(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells of Conv1D layers that it handles
            built.attach(loaded)
    except GainError as error:
        return total, str(error)
    return total, sum(p.numel() for p in built.parameters().values())


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
        known = presets.names(group, config_dirs)
        found[group] = [n.strip() for n in names.split(",") if n.strip()]
        for name in found[group]:
            if name not in known:
                raise ConfigError(f"unknown {group} {name!r}", text, suggest(name, known))
    return found
