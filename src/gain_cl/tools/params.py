"""Trainable parameters of every model and method, from the presets alone: nothing is downloaded, no
weight is allocated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gain_cl.compose import composition
from gain_cl.compose.messages import suggest
from gain_cl.config import presets
from gain_cl.config.schema import Adapter, Given, Model
from gain_cl.errors import ConfigError, GainError

Table = dict[str, dict[str, Any]]
"""model -> {"total": parameters, "methods": {method: trainable parameters, or why there are
none}}"""


def count(
    filters: Iterable[str] = (),
    config_dirs: Iterable[str | Path] = (),
    plugins: Iterable[str | Path] = (),
) -> Table:
    """Total and trainable parameters of models x methods.

    filters: ``model=A,B`` and ``method=A,B``; without them every preset whose architecture is
    known, and that trains something.
    """
    config_dirs = list(config_dirs)
    wanted = _filters(filters, config_dirs)
    composition.load_plugins(plugins)
    adapters, models = {}, {}
    with (
        composition.session(config_dirs) as load
    ):  # a model does not depend on the method nor the reverse: no need to compose their product
        for name in wanted.get("method") or presets.names("method", config_dirs):
            adapter = _section(load, f"method={name}", "adapter", config_dirs, TypeAdapter(Adapter))
            if "method" in wanted or not isinstance(adapter, Given):
                adapters[name] = adapter
        for name in wanted.get("model") or presets.names("model", config_dirs):
            given = name != "custom"  # which is a path to be given
            model = (
                _section(load, f"model={name}", "model", config_dirs, TypeAdapter(Model))
                if given
                else None
            )
            if model is not None and (model.arch or model.path or model.package):
                models[name] = model
            elif "model" in wanted:
                do = (
                    "give model.path= to a run, which says how many train, or write a preset "
                    "that has it (--config-dir)"
                )
                raise ConfigError(
                    "a preset without path and arch, nothing to count", f"model={name}", do
                )
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


def _section(
    load: composition.Load,
    override: str,
    key: str,
    config_dirs: list[str | Path],
    kind: TypeAdapter[Any],
) -> Any:
    """One typed section of the configuration that an override gives; mistakes are explained as a
    run would."""
    try:
        return kind.validate_python(load([override])[key])
    except Exception:
        composition.compose([override], config_dirs)
        raise


def attached(model: Model, adapter: Any) -> tuple[int, int | str]:
    """Total parameters, and how many train once the adapter is attached (or why it refuses the
    model)."""
    from gain_cl import adapters
    from gain_cl.models import load as models

    loaded = models.weightless(model)
    total = sum(p.numel() for p in loaded.model.parameters())
    built = adapters.build_adapter(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells of Conv1D layers that it handles
            built.attach(loaded)
    except GainError as error:
        return total, str(error)
    return total, sum(p.numel() for p in built.parameters().values())


def show(table: Table) -> None:
    """Print methods as rows and models as columns, in as many tables as the width takes."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    methods = list(dict.fromkeys(m for row in table.values() for m in row["methods"]))
    first = max(len(m) for m in [*methods, "method"])
    for names in _side_by_side(table, console.width - first):
        view = RichTable(box=None, pad_edge=False, padding=(0, 0, 0, GAP))
        view.add_column("method", no_wrap=True)
        for name in names:
            view.add_column(name, justify="right", no_wrap=True)
        view.add_row("total", *(f"{table[name]['total']:,}" for name in names), style="dim")
        for m in methods:
            view.add_row(
                m,
                *(
                    f"{v:,}" if isinstance(v := table[name]["methods"][m], int) else "refused"
                    for name in names
                ),
            )
        console.print("trainable parameters", style="bold")
        console.print(view)
        console.print()
    for name, row in table.items():
        for method, value in row["methods"].items():
            if isinstance(value, str):
                console.print(
                    f"{method} on {name}: {value}",
                    style="dim",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )


GAP, WIDTH = 2, 120
"""Blanks between two columns; characters of a line where the output is no terminal."""


def _side_by_side(table: Table, width: int) -> list[list[str]]:
    """The models in groups whose columns fit the width."""
    groups: list[list[str]] = []
    left = 0
    for name, row in table.items():
        needs = GAP + max(len(name), len(f"{row['total']:,}"))
        if needs > left or not groups:
            groups.append([])
            left = width
        groups[-1].append(name)
        left -= needs
    return groups


def _filters(filters: Iterable[str], config_dirs: list[str | Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in filters:
        group, equals, names = text.partition("=")
        if not equals or group not in ("model", "method"):
            raise ConfigError(
                f"cannot read {text!r}", "gain_cl params", "write model=A,B or method=A,B"
            )
        known = presets.names(group, config_dirs)
        found[group] = [n.strip() for n in names.split(",") if n.strip()]
        for name in found[group]:
            if name not in known:
                raise ConfigError(f"unknown {group} {name!r}", text, suggest(name, known))
    return found
