"""``python -m gain_cl params``: trainable parameters of models and methods, from the presets alone:
nothing is downloaded, no weight is allocated."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import ADAPTERS, Adapter, Given, Model, Peft
from gain_cl.errors import GainError
from gain_cl.tools.command import Parser, print_report

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

Counts = dict[str, dict[str, Any]]
"""model -> {"total": parameters, "methods": {method: trainable parameters, or why there are
none}}"""

KINDS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "model": ("model", TypeAdapter(Model)),
    "method": ("adapter", TypeAdapter(Adapter)),
}
"""Group of presets -> the section that it fills."""


def main(argv: list[str]) -> int:
    """Print the table, or JSON."""
    parser = Parser("params", "--json", "--config-dir", "--plugin")
    for group in KINDS:
        parser.option(f"--{group}", f"{group}=A,B: only these", "")
    args = parser.read(argv)
    table = count(args.model, args.method, args.config_dir, args.plugin)
    return print_report(table, args.json, print_counts)


def count(
    models: str = "",
    methods: str = "",
    config_dirs: Sequence[str | Path] = (),
    plugins: Sequence[str | Path] = (),
) -> Counts:
    """Return total and trainable parameters of models x methods: A,B. Without them, every preset
    whose architecture is known and that trains something."""
    composition.load_plugins(plugins)
    # a model does not depend on the method nor the reverse: their product need not be composed
    with composition.session(config_dirs) as load:

        def sections(group: str, chosen: str) -> dict[str, Any]:
            names = filter(None, chosen.split(",")) if chosen else presets.names(group, config_dirs)
            key, kind = KINDS[group]
            found = {}
            for name in names:
                try:
                    found[name] = kind.validate_python(load((), None, f"{group}/{name}")[key])
                except Exception:
                    if chosen or name != "custom":  # which is a path to be given
                        # what is wrong with it is told as a run would
                        config = composition.compose([f"{group}={name}"], config_dirs)
                        found[name] = getattr(config, key)
            return found

        adapters, known = sections("method", methods), sections("model", models)
    if not methods:
        adapters = {name: a for name, a in adapters.items() if not isinstance(a, Given)}
    if not models:
        known = {name: model for name, model in known.items() if model.arch is not None}
    counted: dict[str, Any] = {}
    for model in known.values():
        if (same := repr((model.arch or model, model.roles))) not in counted:
            counted[same] = count_row(model, adapters)  # qwen2.5 is qwen2.5_7b
    return {name: counted[repr((m.arch or m, m.roles))] for name, m in known.items()}


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
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else second
        return first + (depth - 1) * (second - first)

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
    """Print methods as rows and models as columns, and why a method is refused."""
    from gain_cl.paper.table import Row, Table, Value, count, print_table

    numbers = {name: {"total": of["total"], **of["methods"]} for name, of in counted.items()}
    rows, notes = [], []
    for method in next(iter(numbers.values()), {}):
        of_models = {name: of[method] for name, of in numbers.items()}
        refused = {name: why for name, why in of_models.items() if isinstance(why, str)}
        notes += [f"{method} on {name}: {why}" for name, why in refused.items()]
        cells = [n if isinstance(n, str) else Value(n, write=count) for n in of_models.values()]
        rows.append(Row([method, *("refused" if isinstance(c, str) else c for c in cells)]))
    print_table(Table("params", "trainable parameters", ["method", *counted], rows, notes))
