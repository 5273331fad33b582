"""Check what a typed configuration can still get wrong: text, plugin keywords, combinations, the
model's limits. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gain_cl import adapters, guards
from gain_cl.adapters import portable
from gain_cl.compose import rules
from gain_cl.compose.rules import Origin
from gain_cl.config.schema import (
    HubSource,
    PackageSource,
    Peft,
    RunConfig,
)
from gain_cl.errors import ConfigError, scrubbed
from gain_cl.system import hub

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
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


def _check_model(config: RunConfig, origin: Origin) -> None:
    """Check the place that a model comes from, and what can be read there without a download."""
    from gain_cl.models import source

    model, arch, key = config.model, config.model.arch, "model.path"
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            arch = source.inspect_model(folder)
            _check_layers(config, folder, arch)
        elif not HUB_ID.fullmatch(model.path):
            what = f"{model.path!r} is neither a folder nor a hub id ORG/NAME"
            raise ConfigError(what, origin(key), "check the path; model=NAME names a preset")
        else:
            _check_commit(model.revision, model.path, "model", "model.revision", origin)
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


# --- keywords -------------------------------------------------------------------------------------


NO_WEIGHTS = (
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING CPT PREFIX_TUNING CARTRIDGE ADAPTION_PROMPT "
    "TRAINABLE_TOKENS XLORA POLY LILY SHADOW BEFT ADALORA"
)
"""PEFT types that are no change of the weights that can be saved, put back and absorbed here."""

COMMON_TYPES = "LORA IA3 VERA HIRA OFT"
COMMON_KEYS = (
    "r lora_alpha lora_dropout target_modules feedforward_modules bias use_dora use_rslora "
    "d_initial projection_prng_key vera_dropout oft_block_size use_cayley_neumann "
    "num_cayley_neumann_terms module_dropout hira_dropout"
)
"""Types and keys that are not looked up in PEFT, because importing it takes torch and seconds."""


def check_peft(adapter: Peft, origin: Origin) -> None:
    """Check the type and the keys of a PEFT adapter. PEFT is imported for unusual ones only."""
    if (kind := adapter.peft_type) in NO_WEIGHTS.split():
        what = f"PEFT's {kind} cannot be absorbed into the weights"
        do = "use a type that changes weights, such as LORA or IA3"
        raise ConfigError(what, origin("adapter.peft_type"), do)
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
