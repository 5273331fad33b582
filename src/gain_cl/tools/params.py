"""Trainable parameters of every model and method, from the presets alone: nothing is downloaded, no
weight is allocated."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import ADAPTERS, Adapter, Given, Model, Peft
from gain_cl.errors import ConfigError, GainError, suggest
from gain_cl.tools.command import Parser, print_report

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

Counts = dict[str, dict[str, Any]]
"""model -> {"total": parameters, "methods": {method: trainable parameters, or why there are
none}}"""


def main(argv: list[str]) -> int:
    """Print the table, or JSON."""
    about = "Trainable parameters of models and methods, counted without weights from the presets."
    parser = Parser("params", "--json", "--config-dir", "--plugin", description=about)
    parser.add_argument("filters", nargs="*", metavar="model=A,B method=A,B", help="only these")
    args = parser.read(argv)
    table = count(args.filters, args.config_dir, args.plugin)
    return print_report(table, args.json, print_counts)


def count(
    filters: Iterable[str] = (),
    config_dirs: Iterable[str | Path] = (),
    plugins: Iterable[str | Path] = (),
) -> Counts:
    """Return total and trainable parameters of models x methods.

    filters: ``model=A,B`` and ``method=A,B``. Without them, every preset whose architecture is
    known and that trains something.
    """
    config_dirs = list(config_dirs)
    wanted = _filters(filters, config_dirs)
    composition.load_plugins(plugins)
    adapters, models = {}, {}
    # a model does not depend on the method nor the reverse: their product need not be composed
    with composition.session(config_dirs) as load:
        for name in wanted.get("method") or presets.names("method", config_dirs):
            adapter = _section(load, "method", name, config_dirs, TypeAdapter(Adapter))
            if "method" in wanted or not isinstance(adapter, Given):
                adapters[name] = adapter
        for name in wanted.get("model") or presets.names("model", config_dirs):
            given = name != "custom"  # which is a path to be given
            model = (
                _section(load, "model", name, config_dirs, TypeAdapter(Model)) if given else None
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
    counted: dict[str, Any] = {}
    table: Counts = {}
    for name, model in models.items():
        if model.arch is None and "model" not in wanted:
            continue
        same = repr((model.arch or model, model.roles))  # qwen2.5 is qwen2.5_7b
        if same not in counted:
            counted[same] = count_row(model, adapters)
        table[name] = counted[same]
    return table


def _section(
    load: composition.Load,
    group: str,
    name: str,
    config_dirs: list[str | Path],
    kind: TypeAdapter[Any],
) -> Any:
    """Return the typed section that a preset fills. What is wrong with it is told as a run
    would."""
    key = "adapter" if group == "method" else "model"
    try:
        return kind.validate_python(load((), None, f"{group}/{name}")[key])
    except Exception:
        return getattr(composition.compose([f"{group}={name}"], config_dirs), key)


DEPTH = ("num_hidden_layers", "n_layer")
"""Keys of an architecture that say how many layers it has."""


def count_row(model: Model, adapters: dict[str, Any]) -> dict[str, Any]:
    """Return a model's row of the table.

    Layers that are alike are counted once: a model of n layers has what one of 1 layer has, and
    n - 1 times what a second layer adds. The totals tell whether its layers are alike.
    """
    from gain_cl.models import load

    arch = model.arch or {}
    depth = next((arch[k] for k in DEPTH if k in arch), 0)

    @functools.cache
    def weightless(layers: int) -> load.Loaded:
        changed: dict[str, Any] = {"attention": "eager"}
        if depth:
            changed["arch"] = arch | {k: layers for k in DEPTH if k in arch}
        return load.weightless(model.model_copy(update=changed))

    def trained(layers: int, adapter: Any) -> int | str:
        return _attached(copy.deepcopy(weightless(layers)), adapter)

    def extrapolated(adapter: Any) -> int | str:
        first, second = trained(1, adapter), trained(2, adapter)
        if isinstance(first, int) and isinstance(second, int):
            return first + (depth - 1) * (second - first)
        return first if isinstance(first, str) else second

    total = trained(depth, None)
    alike = depth > 2 and extrapolated(None) == total
    known: dict[str, int | str] = {}
    for adapter in adapters.values():
        if (same := repr(adapter)) not in known:
            short = alike and not _names_layers(adapter)
            known[same] = extrapolated(adapter) if short else trained(depth, adapter)
    return {"total": total, "methods": {name: known[repr(a)] for name, a in adapters.items()}}


def _names_layers(adapter: Any) -> bool:
    """True if an adapter may treat some layers otherwise than others."""
    if not isinstance(adapter, Peft):
        return adapter.kind not in ADAPTERS
    modules = [v for k, v in adapter.config.items() if k.endswith("modules")]
    return bool(re.search(r"layer|pattern|\d", f"{[*adapter.config]} {modules}"))


def _attached(loaded: Loaded, adapter: Any) -> int | str:
    """Return how many parameters train once the adapter is attached, or why it refuses the model.
    None for the adapter: those of the model."""
    from gain_cl import adapters

    if adapter is None:
        return sum(p.numel() for p in loaded.model.parameters())
    built = adapters.build_adapter(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells of Conv1D layers that it handles
            built.attach(loaded)
    except GainError as error:
        return str(error)
    return sum(p.numel() for p in built.parameters().values())


def print_counts(counted: Counts) -> None:
    """Print methods as rows and models as columns."""
    from gain_cl.paper.table import Row, Table, Value, count, print_table, say

    def number(n: int | str) -> Value | str:
        return "refused" if isinstance(n, str) else Value(n, write=count)

    methods = list(dict.fromkeys(m for of in counted.values() for m in of["methods"]))
    rows = [Row(["total", *(number(of["total"]) for of in counted.values())])]
    rows += [Row([m, *(number(of["methods"][m]) for of in counted.values())]) for m in methods]
    print_table(Table("params", "trainable parameters", ["method", *counted], rows))
    for name, of in counted.items():
        for method, value in of["methods"].items():
            if isinstance(value, str):
                say(f"{method} on {name}: {value}", "dim")


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
