"""Adapters in PEFT's format: written, so that anybody loads them without gain_cl, and read, to
begin from (adapter.init_from).

Importing this module imports neither torch nor peft: what an adapter folder holds is read from its
JSON file and the head of its safetensors file.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.models import families
from gain_cl.models import source as source_
from gain_cl.system import hashes
from gain_cl.system import hub as sources

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.adapters.base import Adapter
    from gain_cl.models.load import Loaded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's name of a module is this before the model's own."""

HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})")
KEY, CHECKPOINT = "adapter.init_from", "gain_cl score"


# --- torch-free: what to begin from ---------------------------------------------------------------


def source(adapter: schema.Adapter) -> str | None:
    """adapter.init_from, of the adapters that have it."""
    return adapter.init_from if isinstance(adapter, schema.Gain | schema.Peft) else None


def place(given: str, key: str = KEY) -> Path | tuple[str, str]:
    """A folder, or (repository, commit). ConfigError names the key when it is neither."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if hub := HUB.fullmatch(given):
        return hub[1], hub[2]
    raise ConfigError(
        f"{given!r} is neither a folder nor ORG/NAME@COMMIT",
        key,
        "give a folder of PEFT's, or a hub id and its 40-hex commit",
    )


def checkpoint_pin(given: str) -> dict[str, Any]:
    """What identifies a checkpoint that was trained elsewhere, an adapter or a whole model, for the
    run id. Downloads nothing. DataError when a folder is neither."""
    where = place(given, CHECKPOINT)
    if isinstance(where, tuple):
        return {"hub": where[0], "revision": where[1]}
    if (where / CONFIG).exists():
        inspect(where)
        return {"adapter": {name: hashes.file_sha256(where / name) for name in (CONFIG, WEIGHTS)}}
    source_.inspect(where)
    return {"folder": hashes.folder_pin(where, source_.WEIGHTS + source_.SMALL_FILES)}


def pin(adapter: schema.Adapter) -> dict[str, Any] | None:
    """What identifies the adapter to begin from, for the run id: the SHA-256 of its two files, or
    repository and commit.

    None where there is none. Downloads nothing. DataError when a file is missing."""
    if (given := source(adapter)) is None:
        return None
    found = place(given)
    if isinstance(found, tuple):
        return {"hub": found[0], "revision": found[1]}
    inspect(found)
    return {"files": {name: hashes.file_sha256(found / name) for name in (CONFIG, WEIGHTS)}}


def at_hand(adapter: schema.Adapter) -> Path | None:
    """The folder to begin from, fetched when it is a hub repository; None where there is none."""
    if (given := source(adapter)) is None:
        return None
    found = place(given)
    return sources.snapshot(*found, [CONFIG, WEIGHTS]) if isinstance(found, tuple) else found


def inspect(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """adapter_config.json, and the shape of every tensor by name. DataError names the fault;
    nothing but JSON is read."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise DataError(
                f"{CONFIG} names no peft_type", str(folder), "give a folder that PEFT has saved"
            )
    except FileNotFoundError:
        raise DataError(
            f"no {CONFIG}: not a PEFT adapter", str(folder), "give a folder that PEFT has saved"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}",
            str(folder / CONFIG),
            "check the file and its permissions",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{CONFIG} is not JSON: {error}", str(folder), "save the adapter again"
        ) from None
    if not (folder / WEIGHTS).is_file():
        if pickles := sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt")]):
            do = "convert them to safetensors: opening a pickle can run code"
            raise DataError(f"only pickle weights ({pickles[0]})", str(folder), do)
        raise DataError(f"no {WEIGHTS}", str(folder), "give a folder that PEFT has saved")
    return config, source_.weight_shapes(folder, WEIGHTS)


def check(
    adapter: schema.Adapter, folder: Path, family: str | None, names: dict[str, str] | None
) -> None:
    """Whether a saved adapter is of the method's kind: ConfigError names what differs.

    family: model_type, None where it is not known yet; names: model.roles. The exact layers are
    compared by ``begin``."""
    saved, shapes = inspect(folder)
    kind = (
        "IA3"
        if isinstance(adapter, schema.Gain)
        else adapter.peft_type
        if isinstance(adapter, schema.Peft)
        else ""
    )
    if saved["peft_type"] != kind:
        raise ConfigError(
            f"a {saved['peft_type']} adapter, not {kind}",
            f"{KEY}: {folder}",
            "begin from an adapter of the same kind",
        )
    if isinstance(adapter, schema.Peft):
        _compare(saved, adapter.config, folder)
        return
    assert isinstance(adapter, schema.Gain)
    if adapter.basis != "own":
        raise ConfigError(
            "an IA3 adapter scales the model's own basis, not adapter.basis=random",
            KEY,
            "use adapter.basis=own",
        )
    layers = _ia3_layers(shapes, folder)
    for layer, shape in layers.items():
        side = "input" if shape[0] == 1 else "output"
        if side != adapter.side:
            what = f"it scales the {side} of {layer}, adapter.side={adapter.side}"
            raise ConfigError(
                what,
                f"{KEY}: {folder}",
                f"use adapter.side={side}, if that holds of all its layers",
            )
    if (table := names or families.ROLES.get(family or "")) is None:
        return
    ends = {role: f".{suffix}" for role, suffix in table.items()}
    wanted = tuple(ends[r] for r in adapter.roles if r in ends)
    if other := [n for n in layers if not f".{n}".endswith(wanted)]:
        role = next((r for r, end in ends.items() if f".{other[0]}".endswith(end)), None)
        what = f"it scales {other[0]}, which plays none of adapter.roles={list(adapter.roles)}"
        raise ConfigError(
            what,
            f"{KEY}: {folder}",
            f"add the role {role}" if role else "begin from another adapter",
        )
    for role in adapter.roles:
        if role in ends and not any(f".{n}".endswith(ends[role]) for n in layers):
            raise ConfigError(
                f"it scales no layer of role {role} ({table[role]})",
                f"{KEY}: {folder}",
                "leave the role out of adapter.roles",
            )


def _ia3_layers(shapes: dict[str, list[int]], folder: Path) -> dict[str, list[int]]:
    """Layer -> shape of its gains: (1, in) where inputs are scaled, (out, 1) where outputs are."""
    layers = {
        n.removeprefix(PREFIX).removesuffix(".ia3_l"): s
        for n, s in shapes.items()
        if n.endswith(".ia3_l")
    }
    if (
        len(layers) < len(shapes)
        or any(len(s) != 2 or 1 not in s for s in layers.values())
        or not layers
    ):
        raise DataError(
            "its tensors are not those of an IA3 adapter alone",
            str(folder),
            "save the adapter again, without modules_to_save",
        )
    return layers


ELSEWHERE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type", "runtime_config",
             "target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out"}  # fmt: skip
"""Keys that do not change what is computed, or whose effect is seen in the names and shapes of the
tensors."""


def _compare(saved: dict[str, Any], own: dict[str, Any], folder: Path) -> None:
    """ConfigError names the first key in which a saved PEFT configuration differs from the
    run's."""
    for key, value in own.items():
        if key in ELSEWHERE or key.startswith("init_") or key not in saved:
            continue
        if _plain(value) != _plain(saved[key]):
            what = (
                f"it was saved with {key}={_plain(saved[key])!r}, adapter.config.{key} is "
                f"{_plain(value)!r}"
            )
            raise ConfigError(
                what, f"{KEY}: {folder}", f"use adapter.config.{key}={_plain(saved[key])}"
            )


def _plain(value: Any) -> Any:
    """A value as JSON holds it, sets and lists of names sorted."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return (
        value
        if isinstance(value, str | int | float | bool | None)
        else getattr(value, "value", str(value))
    )


# --- with torch -----------------------------------------------------------------------------------


def fits(adapter: schema.Adapter) -> None:
    """As ``check`` for the keys that the run leaves to PEFT's defaults; before anything is
    scored."""
    if source(adapter) is None or not isinstance(adapter, schema.Peft):
        return
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    folder = at_hand(adapter)
    assert folder is not None
    kinds = {k.value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    own = kinds[adapter.peft_type](
        **{k: v for k, v in adapter.config.items() if k not in ELSEWHERE}
    ).to_dict()
    _compare(inspect(folder)[0], own, folder)


def begin(settings: schema.Adapter, adapter: Adapter, loaded: Loaded) -> None:
    """Put the values of adapter.init_from, where it is given, into a freshly attached adapter. They
    train on from there.

    ConfigError when its layers are not the adapter's, DataError when a width differs."""
    folder = at_hand(settings)
    if folder is None:
        return
    import torch
    from safetensors.torch import load_file

    from gain_cl.adapters.gain import GainAdapter

    tensors = load_file(folder / WEIGHTS)
    if bad := next((n for n, t in tensors.items() if not torch.isfinite(t).all()), None):
        raise DataError(f"{bad} is not finite", str(folder / WEIGHTS), "begin from another adapter")
    if isinstance(adapter, GainAdapter):
        check(settings, folder, loaded.model.config.model_type, loaded.roles)
        found = {
            n.removeprefix(PREFIX).removesuffix(".ia3_l"): t.float().flatten() - 1
            for n, t in tensors.items()
        }
        _same(found, adapter.parameters(), folder)
        adapter.load_state(found)
        return
    import peft

    model: Any = adapter.peft  # type: ignore[attr-defined]
    _same(tensors, peft.get_peft_model_state_dict(model), folder)
    peft.set_peft_model_state_dict(model, tensors)


def _same(found: dict[str, Tensor], own: Any, folder: Path) -> None:
    """The same names and shapes."""
    if differing := sorted(found.keys() ^ own.keys()):
        lacks = "does not have" if differing[0] in own else "has, and the method does not,"
        what = f"{len(differing)} tensors differ: it {lacks} {differing[0]}"
        raise ConfigError(
            what, f"{KEY}: {folder}", "its target_modules are not those of this method and model"
        )
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            raise DataError(
                f"{name} has shape {shapes}", f"{KEY}: {folder}", "it belongs to another model"
            )


def files(adapter: Adapter, loaded: Loaded, base: str, revision: str | None) -> dict[str, bytes]:
    """The two files of PEFT's format that, on the base model, compute what the attached adapter
    computes.

    base, revision: how the base model is called in them. ConfigError when PEFT's format cannot say
    it.
    """
    from safetensors.torch import save

    from gain_cl.adapters.gain import GainAdapter, MultiplicativeLoraAdapter
    from gain_cl.adapters.peft import PeftAdapter

    if isinstance(adapter, GainAdapter) and adapter.basis == "own":
        config, tensors = _ia3(adapter, loaded)
    elif isinstance(adapter, MultiplicativeLoraAdapter):
        config, tensors = _lora(adapter, loaded)
    elif isinstance(adapter, PeftAdapter):
        config, tensors = _peft(adapter)
    else:
        kind = (
            f"{type(adapter).__name__} with basis=random"
            if isinstance(adapter, GainAdapter)
            else type(adapter).__name__
        )
        raise _no_form(f"what {kind} learns")
    config.inference_mode, config.base_model_name_or_path, config.revision = True, base, revision
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        plain = json.loads((Path(temporary) / CONFIG).read_bytes())
        plain = {
            k: _plain(v) if k.endswith("_modules") else v for k, v in plain.items()
        }  # sets, which have no order
    text = (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    return {CONFIG: text, WEIGHTS: save(whole, metadata={"format": "pt"})}


def _no_form(what: str) -> ConfigError:
    return ConfigError(f"{what} has no form among PEFT's adapters", "to=peft", "to=merged works")


def _layout(adapter: Any, loaded: Loaded) -> dict[str, Any]:
    """What PEFT's configuration says of the layers: the ends of their names, and whether weights
    are stored (in, out)."""
    table = loaded.roles or families.ROLES[loaded.model.config.model_type]
    turned = all(families.is_conv1d(layer) for layer in adapter.gains.layers.values())
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": [table[role] for role in adapter.roles],
        "fan_in_fan_out": turned,
    }


def _ia3(adapter: Any, loaded: Loaded) -> tuple[Any, dict[str, Tensor]]:
    """Gains as (IA)^3: it multiplies the input of its feedforward modules and the output of the
    others, its bias included."""
    import peft

    into, layout = adapter.side == "input", _layout(adapter, loaded)
    config = peft.IA3Config(
        **layout, feedforward_modules=layout["target_modules"] if into else []
    )  # None would be PEFT's own choice
    scales = {
        f"{PREFIX}{name}.ia3_l": gain.s().detach() for name, gain in adapter.gains.gains.items()
    }
    return config, {name: s[None] if into else s[:, None] for name, s in scales.items()}


def _lora(adapter: Any, loaded: Loaded) -> tuple[Any, dict[str, Tensor]]:
    """W M with M = M_1 ... M_n, M_i = I + c B_i A_i, is W + c [W B_1, W M_1 B_2, ...] [A_1; A_2;
    ...]: a LoRA of rank n r."""
    import peft
    import torch

    tensors: dict[str, Tensor] = {}
    times = 1
    with torch.no_grad():
        for name, layer in adapter.gains.layers.items():
            factor = adapter.gains.gains[name]
            rows_OI = (layer.weight.T if families.is_conv1d(layer) else layer.weight).double()
            ups = []
            for a, b in factor.pairs():  # rows_OI: W M_1 ... M_{i-1}
                ups.append(rows_OI @ b.double())
                rows_OI = rows_OI + factor.scale * ups[-1] @ a.double()
            times = len(ups)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([a for a, _ in factor.pairs()])
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat(ups, dim=1).float()
    return peft.LoraConfig(
        **_layout(adapter, loaded), r=times * adapter.rank, lora_alpha=times * adapter.alpha
    ), tensors


def _peft(adapter: Any) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's own adapter; several of one kind (handover=restart) as one: LoRAs side by side, gains
    multiplied."""
    import peft
    import torch

    model = adapter.peft
    names = list(model.peft_config)
    config = copy.deepcopy(model.peft_config[names[0]])
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        raise _no_form(f"LoRA with init_lora_weights={start}, which changes the base weights,")
    saved = [peft.get_peft_model_state_dict(model, adapter_name=name) for name in names]
    if len(saved) == 1:
        return config, saved[0]
    kinds = {
        key: re.search(r"\.(ia3_l|lora_(?:embedding_)?[AB](?:\.weight)?)$", key) for key in saved[0]
    }
    if (
        config.peft_type.value not in ("LORA", "IA3")
        or getattr(config, "use_dora", False)
        or not all(kinds.values())
    ):
        raise _no_form(f"a {config.peft_type.value} on top of earlier ones (handover=restart)")
    joined = {}
    for key in saved[0]:
        parts = [tensors[key] for tensors in saved]
        joined[key] = (
            torch.stack(parts).prod(0)
            if key.endswith("ia3_l")
            else torch.cat(parts, dim=0 if "_A" in key[-9:] else 1)
        )
    if config.peft_type.value == "LORA":
        n = len(saved)
        wider = (
            n**0.5 if config.use_rslora else n
        )  # the scaling alpha / r, or alpha / sqrt(r), stays
        config.r, config.lora_alpha = n * config.r, wider * config.lora_alpha
        config.rank_pattern = {k: n * v for k, v in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {k: wider * v for k, v in (config.alpha_pattern or {}).items()}
    return config, joined
