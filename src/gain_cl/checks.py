"""What a typed configuration can still get wrong: coordinates, plugin keywords, the model's limits, secrets. Torch-free."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gain_cl import presets
from gain_cl.config import SECRET_NAME, SHA1, HubSource, Peft, RunConfig
from gain_cl.errors import ConfigError
from gain_cl.explain import suggest

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
URL_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

Origin = Callable[[str], str]  # dotted key -> where it was set


def check(config: RunConfig, plain: Mapping[str, Any], origin: Origin) -> None:
    """Everything below; plain: the configuration as composed, before pydantic converted it."""
    _booleans(plain, config.model_dump(), "", origin)
    _secrets(plain, "", origin)
    _keywords(config, origin)
    _model(config, origin)
    _device(config.compute.device, origin)
    for name, domain in config.domains.items():
        if isinstance(domain.source, HubSource):
            _commit(domain.source.revision, domain.source.path, "dataset", f"domains.{name}.source.revision", origin)
    if config.tasks.names:
        from gain_cl import tasks

        tasks.check(config.tasks, len(config.sequence.domains))


def limits(config: RunConfig, arch: Mapping[str, Any], origin: Origin = str) -> None:
    """What the model's own configuration (config.json or model.arch) rules out."""
    from gain_cl.models import context_length

    name, context = config.model.name, context_length(dict(arch))
    for key, tokens in (("train.block", config.train.block), ("eval.context", config.eval.context)):
        if context is not None and tokens > context:
            raise ConfigError(
                f"{key}={tokens} exceeds the context of {name}, {context} tokens", origin(key), f"use {key}={context} or less"
            )
    if not isinstance(config.adapter, Peft) or (rank := config.adapter.config.get("r")) is None:
        return
    width = next((int(arch[k]) for k in ("hidden_size", "n_embd", "d_model") if isinstance(arch.get(k), int)), None)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"adapter.config.r={rank!r}: a rank is a positive whole number", origin("adapter.config.r"), "use 16, say")
    if width is not None and rank > width:
        raise ConfigError(f"adapter.config.r={rank} exceeds the width of {name}", origin("adapter.config.r"), f"use {width} or less")


def _model(config: RunConfig, origin: Origin) -> None:
    model, arch = config.model, config.model.arch
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            from gain_cl.models import inspect as inspect_model

            arch = inspect_model(folder)
        elif folder.exists():
            raise ConfigError(
                f"{model.path} is a file", origin("model.path"), "give the folder that holds config.json and model.safetensors"
            )
        elif not HUB_ID.match(model.path):
            near = suggest(model.path, presets.names("model"), listing=False).replace("mean ", "mean model=")
            what = f"{model.path!r} is neither a folder nor a hub id ORG/NAME"
            raise ConfigError(what, origin("model.path"), near or "check the path")
        else:
            _commit(model.revision, model.path, "model", "model.revision", origin)
            arch = arch or _cached_config(model.path, str(model.revision))
    limits(config, arch or {}, origin)


def _cached_config(path: str, revision: str) -> dict[str, Any] | None:
    """config.json of a hub repository when it is in the cache already; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from gain_cl.models import read_config

    file = try_to_load_from_cache(path, "config.json", revision=revision)
    return read_config(Path(file).parent) if isinstance(file, str) else None


def _commit(revision: str | None, path: str, kind: Literal["model", "dataset"], key: str, origin: Origin) -> None:
    if revision is None:
        raise ConfigError(f"{path} is no local folder, and a hub repository needs a revision", key, f"give the 40-hex commit: {key}=COMMIT")
    if not SHA1.match(revision):
        from gain_cl.sources import commit

        try:
            commit(path, revision, kind)
        except ConfigError as error:
            raise ConfigError(f"{key}={revision!r} is no commit of {path}", origin(key), error.do) from None


def _device(device: str, origin: Origin) -> None:
    if not DEVICE.fullmatch(device):
        raise ConfigError(f"compute.device={device!r} is no device", origin("compute.device"), "use auto, cpu, cuda, cuda:N or mps")
    if device.startswith("cuda") and version("torch").endswith("+cpu"):  # other builds are asked once torch is imported
        raise ConfigError(
            f"compute.device={device}: this torch ({version('torch')}) has no CUDA", origin("compute.device"), "use compute.device=cpu"
        )


def _keywords(config: RunConfig, origin: Origin) -> None:
    """Keywords of adapters and guards against what their constructors take."""
    from gain_cl import adapters, guards

    if isinstance(config.adapter, Peft):
        _peft_keywords(config.adapter, origin)
    for key, settings, registered, built_in in (
        ("adapter", config.adapter, adapters.registered(), ("gain", "full", "peft")),
        ("guard", config.guard, guards.registered(), ("none",)),
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
                    f"unknown key {key}.{word}", origin(f"{key}.{word}"), suggest(word, takes) or f"{key} {kind} has no settings"
                )
        for word, parameter in takes.items():
            if (
                parameter.default is parameter.empty
                and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
                and word not in given
            ):
                raise ConfigError(f"{key}.{word} is missing", f"{key} {kind}", f"give ++{key}.{word}=VALUE")


def _peft_keywords(adapter: Peft, origin: Origin) -> None:
    """PEFT's types and keys, read from its source: importing it takes torch and seconds, and would come after stage 0."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return
    tuners = Path(found.origin).parent / "tuners"
    types = {p.parent.name.upper() for p in tuners.glob("*/config.py")}
    if adapter.peft_type not in types:
        raise ConfigError(f"PEFT has no type {adapter.peft_type!r}", origin("adapter.peft_type"), suggest(adapter.peft_type, types))
    with contextlib.suppress(KeyError, SyntaxError, OSError, StopIteration):  # laid out otherwise: PEFT itself refuses, later
        keys = _peft_keys(tuners, adapter.peft_type.lower())
        for word in (w for w in adapter.config if w not in keys):
            raise ConfigError(f"PEFT's {adapter.peft_type} has no key {word!r}", origin(f"adapter.config.{word}"), suggest(word, keys))


def _peft_keys(tuners: Path, kind: str) -> set[str]:
    """Fields of a PEFT configuration class and its bases."""
    files = [tuners / kind / "config.py", tuners.parent / "config.py", tuners / "lora" / "config.py", tuners / "lycoris_utils.py"]
    classes: dict[str, ast.ClassDef] = {}
    for file in files:
        classes |= {n.name: n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)} | classes
    registration = (tuners / kind / "__init__.py").read_text()
    names = [re.search(r"config_cls=(\w+)", registration).group(1)]  # type: ignore[union-attr]
    keys: set[str] = set()
    while names:
        if (name := names.pop()) == "PushToHubMixin":
            continue
        keys |= {n.target.id for n in classes[name].body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        names += [b.id for b in classes[name].bases if isinstance(b, ast.Name)]
    return keys


def _booleans(given: Any, checked: Any, key: str, origin: Origin) -> None:
    """YAML reads an unquoted no, off, yes, on as a boolean, which pydantic would take for 0 or 1."""
    if isinstance(given, dict) and isinstance(checked, dict):
        for k in given:
            _booleans(given[k], checked.get(k), f"{key}.{k}" if key else str(k), origin)
    elif isinstance(given, list) and isinstance(checked, list | tuple):
        for a, b in zip(given, checked, strict=False):
            _booleans(a, b, key, origin)
    elif isinstance(given, bool) and not isinstance(checked, bool):
        raise ConfigError(f"{key}={str(given).lower()} is a boolean", origin(key), "give a number; YAML reads no, off, yes, on as booleans")


def _secrets(given: Any, key: str, origin: Origin) -> None:
    """No value of a secret environment variable and no URL with a password: the configuration is written to disk."""
    if isinstance(given, dict | list):
        for k, value in given.items() if isinstance(given, dict) else ((None, v) for v in given):
            _secrets(value, key if k is None else f"{key}.{k}" if key else str(k), origin)
    elif isinstance(given, str):
        named = next((n for n, v in os.environ.items() if SECRET_NAME.search(n) and len(v) >= 8 and v in given), None)
        if named or URL_PASSWORD.search(given):
            what = f"the value of ${named}" if named else "a password"
            raise ConfigError(f"{key} holds {what}", origin(key), "leave it to the environment: the configuration is written to disk")
