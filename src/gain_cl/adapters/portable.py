"""Adapters in PEFT's format: written, so that anybody loads them without gain_cl, and read, to
begin from (adapter.init_from).

Importing this module imports neither torch nor peft: what an adapter folder holds is read from its
JSON file and the head of its safetensors file. What an adapter makes of it is its own method
(``to_peft``, ``begin_from``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.models import source
from gain_cl.system import hashes, hub

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.models.load import Loaded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's name of a module is this before the model's own."""

HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})")
KEY, CHECKPOINT = "adapter.init_from", "gain_cl score"


# --- torch-free: what to begin from ---------------------------------------------------------------


def place(given: str, key: str = KEY) -> Path | tuple[str, str]:
    """Return a folder, or (repository, commit). ConfigError names the key when it is neither."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if found := HUB.fullmatch(given):
        return found[1], found[2]
    do = "give a folder of PEFT's, or a hub id and its 40-hex commit"
    raise ConfigError(f"{given!r} is neither a folder nor ORG/NAME@COMMIT", key, do)


def checkpoint_pin(given: str) -> dict[str, Any]:
    """Return what identifies a checkpoint that was trained elsewhere, an adapter or a whole model,
    for the run id. Download nothing. DataError when a folder is neither."""
    where = place(given, CHECKPOINT)
    if isinstance(where, tuple):
        return {"hub": where[0], "revision": where[1]}
    if (where / CONFIG).exists():
        return {"adapter": _hashes(where)}
    source.inspect_model(where)
    return {"folder": hashes.folder_pin(where, source.WEIGHTS + source.SMALL_FILES)}


def _given(adapter: schema.Adapter) -> str | None:
    """Return adapter.init_from, of the adapters that have it."""
    return adapter.init_from if isinstance(adapter, schema.Gain | schema.Peft) else None


def init_pin(adapter: schema.Adapter) -> dict[str, Any] | None:
    """Return what identifies the adapter to begin from, for the run id: the SHA-256 of its two
    files, or repository and commit; None where there is none. Download nothing. DataError when a
    file is missing."""
    if (given := _given(adapter)) is None:
        return None
    found = place(given)
    if isinstance(found, tuple):
        return {"hub": found[0], "revision": found[1]}
    return {"files": _hashes(found)}


def _hashes(folder: Path) -> dict[str, str]:
    inspect_adapter(folder)
    return {name: hashes.file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}


def _fetched(given: str) -> Path:
    """Return the folder to begin from, fetched when it is a hub repository."""
    found = place(given)
    return hub.snapshot(*found, [CONFIG, WEIGHTS]) if isinstance(found, tuple) else found


def inspect_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return adapter_config.json, and the shape of every tensor by name. DataError names the fault.
    Nothing but JSON is read."""
    do, where = "give a folder that PEFT has saved", str(folder)
    if not (folder / CONFIG).exists():
        raise DataError(f"no {CONFIG}: not a PEFT adapter", where, do)
    config = source.json_object(folder / CONFIG, "save the adapter again")
    if not isinstance(config.get("peft_type"), str):
        raise DataError(f"{CONFIG} names no peft_type", where, do)
    if not (folder / WEIGHTS).is_file():
        source.refuse_pickles(folder)
        raise DataError(f"no {WEIGHTS}", where, do)
    return config, source.weight_shapes(folder, WEIGHTS)


def check_init(adapter: schema.Adapter, fetch: bool = False) -> None:
    """Compare the adapter to begin from, where there is one, with the method. fetch: also one on
    the hub. ConfigError names what differs; ``begin`` compares the exact layers."""
    given = _given(adapter)
    if given is not None and (fetch or isinstance(place(given), Path)):
        _check(adapter, _fetched(given))


def _check(adapter: schema.Adapter, folder: Path) -> None:
    saved, shapes = inspect_adapter(folder)
    where = f"{KEY}: {folder}"
    kind = adapter.peft_type if isinstance(adapter, schema.Peft) else "IA3"
    if saved["peft_type"] != kind:
        what = f"a {saved['peft_type']} adapter, not {kind}"
        raise ConfigError(what, where, "begin from an adapter of the same kind")
    if isinstance(adapter, schema.Peft):
        compare_settings(saved, adapter.config, folder)
        return
    assert isinstance(adapter, schema.Gain)
    if adapter.basis != "own":
        what = "an IA3 adapter scales the model's own basis, not adapter.basis=random"
        raise ConfigError(what, KEY, "use adapter.basis=own")
    for name, shape in shapes.items():  # (1, in) where inputs are scaled, (out, 1) where outputs
        if not name.endswith(".ia3_l"):
            do = "save the adapter again, without modules_to_save"
            raise DataError(f"{name} is no tensor of an IA3 adapter", str(folder), do)
        side = "input" if shape[:1] == [1] else "output"
        if side != adapter.side:
            what = f"it scales the {side} of {name.removeprefix(PREFIX)}"
            do = f"use adapter.side={side}, if that holds of all its layers"
            raise ConfigError(f"{what}, adapter.side={adapter.side}", where, do)


ELSEWHERE = """base_model_name_or_path revision inference_mode peft_version auto_mapping task_type
runtime_config target_modules feedforward_modules exclude_modules fan_in_fan_out"""
"""Keys that do not change what is computed, or whose effect is seen in the names and shapes of the
tensors."""


def compare_settings(saved: dict[str, Any], own: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError that names the first key in which a saved PEFT configuration differs from
    the run's."""
    for key, value in own.items():
        if key in ELSEWHERE.split() or key.startswith("init_") or key not in saved:
            continue
        ours, theirs = _plain(value), _plain(saved[key])
        if ours != theirs:
            what = f"it was saved with {key}={theirs!r}, adapter.config.{key} is {ours!r}"
            raise ConfigError(what, f"{KEY}: {folder}", f"use adapter.config.{key}={theirs}")


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it, a set as a sorted list."""

    def other(part: Any) -> Any:
        return sorted(part) if isinstance(part, set) else getattr(part, "value", str(part))

    return json.loads(json.dumps(value, default=other, allow_nan=False))


# --- with torch -----------------------------------------------------------------------------------


def begin(settings: schema.Adapter, adapter: Adapter, loaded: Loaded) -> None:
    """Put the values of adapter.init_from, where it is given, into a freshly attached adapter. They
    train on from there.

    ConfigError when its settings are not the adapter's, DataError when its layers or their widths
    are not."""
    if (given := _given(settings)) is None:
        return
    import torch
    from safetensors.torch import load_file

    folder = _fetched(given)
    _check(settings, folder)
    tensors = load_file(folder / WEIGHTS)
    if bad := next((n for n, t in tensors.items() if not torch.isfinite(t).all()), None):
        raise DataError(f"{bad} is not finite", str(folder / WEIGHTS), "begin from another adapter")
    adapter.begin_from(tensors, folder)


def adapter_files(
    adapter: Adapter, loaded: Loaded, base: str, revision: str | None
) -> dict[str, bytes]:
    """Return the two files of PEFT's format that, on the base model, compute what the attached
    adapter computes.

    base, revision: how the base model is called in them. ConfigError when PEFT's format cannot say
    it.
    """
    from safetensors.torch import save

    config, tensors = adapter.to_peft(loaded)
    config.inference_mode, config.base_model_name_or_path, config.revision = True, base, revision
    plain = _plain(config.to_dict())
    text = (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    return {CONFIG: text, WEIGHTS: save(whole, metadata={"format": "pt"})}
