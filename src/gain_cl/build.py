"""From presets and command line to a checked RunConfig: the only door to Hydra. Torch-free.

Hydra composes twice. The first time shows which domains the sequence names; the second adds their presets, so that
``domains.NAME.KEY=VALUE`` can change them. Whatever goes wrong becomes one ConfigError that names the key or the file.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gain_cl.config import NAME, SHA1, HubSource, Peft, RunConfig
from gain_cl.errors import ConfigError

PACKAGE_OF_DOMAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_-]*$")  # what Hydra's grammar takes as one package component
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
URL_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")

Load = Callable[[Iterable[str]], dict[str, Any]]


def compose(overrides: Iterable[str] = (), config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = ()) -> RunConfig:
    """The checked configuration of one run.

    overrides: Hydra's grammar, plus ``domain=[a,b]`` and a bare ``model.path=``. config_dirs: folders with more presets.
    plugins: python files to import, which register adapters or guards. ConfigError for every mistake.
    """
    return _build(overrides, config_dirs, plugins)[0]


def spell_out(overrides: Iterable[str], config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = ()) -> list[str]:
    """The overrides of a valid run in plain Hydra, with what gain_cl adds: for ``--cfg job``."""
    return [*search_path(config_dirs), *_build(overrides, config_dirs, plugins)[1]]


def jobs(overrides: Iterable[str], config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = ()) -> list[list[str]]:
    """The overrides of each job of a multirun, every one of them checked before any starts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _session(config_dirs):
        with _explained(list(overrides)):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(rewrite(overrides, config_dirs, plugins, sweep=True))
            task = [o for o in parsed if not o.is_hydra_override()]
            lists = BasicSweeper.split_arguments(task, None)[0]
    seen: list[RunConfig] = []
    for job in lists:
        config = compose(job, config_dirs)
        if config in seen:
            raise ConfigError(f"the multirun asks twice for {' '.join(job)}", "command line", "remove the repeated value")
        seen.append(config)
    return lists


def configs_dir() -> Path:
    """The shipped presets: $GAIN_CL_CONFIGS, else inside the installed package, else in the checkout."""
    package = Path(__file__).resolve().parent
    own = os.environ.get("GAIN_CL_CONFIGS")
    for folder in [Path(own).absolute()] if own else [package / "configs", package.parents[1] / "configs"]:
        if (folder / "run.yaml").is_file():
            return folder
    raise ConfigError("the presets are missing: no run.yaml", own or str(package / "configs"), "unset GAIN_CL_CONFIGS or install gain_cl again")


def presets(group: str, config_dirs: Iterable[str | Path] = ()) -> dict[str, Path]:
    """name -> file of every preset of a group, shipped ones first."""
    folders = [configs_dir(), *(Path(d) for d in config_dirs)]
    return {p.stem if p.suffix == ".yaml" else p.name: p for f in folders for p in sorted((f / group).glob("*.yaml"))}


def search_path(config_dirs: Iterable[str | Path]) -> list[str]:
    """Hydra's override that adds folders of presets; ConfigError for one that is none or that shadows a shipped preset."""
    shipped = configs_dir()
    groups = {p.name for p in shipped.iterdir() if p.is_dir()}
    found = []
    for given in config_dirs:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError("no such folder", f"--config-dir {given}", "give a folder that holds model/NAME.yaml, domain/NAME.yaml, ...")
        if not any((folder / g).is_dir() for g in groups):
            raise ConfigError("no presets in the folder", f"--config-dir {given}", f"put them into its subfolders {', '.join(sorted(groups))}")
        for file in sorted(p for g in groups for p in (folder / g).rglob("*.yaml")):
            if (shipped / file.relative_to(folder)).exists():
                raise ConfigError(f"{file.relative_to(folder)} has the name of a shipped preset", f"--config-dir {given}", "give it another name")
        found.append(_quote(f"file://{folder}"))
    return [f"hydra.searchpath=[{','.join(found)}]"] if found else []


def suggest(word: str, options: Iterable[str], everything: bool = True) -> str:
    """'did you mean X?' and, when there are few, what there is."""
    options = sorted(set(options))
    near = difflib.get_close_matches(word.lower(), options, n=1, cutoff=0.55) or [o for o in options if word and word.lower() in o.lower()][:3]
    mean = f"did you mean {' or '.join(near)}?" if near else ""
    there = f"there is: {', '.join(options)}" if options and (everything or not near) and len(options) <= 40 else ""
    return " ".join(t for t in (mean, there) if t)


def load_plugins(files: Iterable[str | Path]) -> None:
    """Run the user's plugin files and the installed entry points of group gain_cl.plugins, each once a process."""
    from importlib.metadata import entry_points

    wanted: list[tuple[str, Callable[[], Any]]] = [(f"entry point {e.name}", e.load) for e in entry_points(group="gain_cl.plugins")]
    for given in files:
        path = Path(given).expanduser().absolute()
        if not path.is_file():
            raise ConfigError("no such file", f"--plugin {given}", "give a python file that registers an adapter or guard")
        wanted.append((str(path), lambda path=path: _import(path)))
    for where, load in wanted:
        if where in _loaded_plugins:
            continue
        try:
            load()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"the plugin fails: {type(error).__name__}: {error}", where, "GAIN_CL_DEBUG=1 shows the traceback") from error
        _loaded_plugins.add(where)


def check_model(config: RunConfig, arch: Mapping[str, Any]) -> None:
    """What the model's own configuration (config.json or model.arch) rules out; ConfigError."""
    from gain_cl.models import context_length

    name = config.model.name
    context = context_length(dict(arch))
    for key, tokens in (("train.block", config.train.block), ("eval.context", config.eval.context)):
        if context is not None and tokens > context:
            raise ConfigError(f"{key}={tokens} exceeds the context of {name}", key, f"use at most {context}")
    width = next((arch[k] for k in ("hidden_size", "n_embd", "d_model") if isinstance(arch.get(k), int)), None)
    if isinstance(config.adapter, Peft) and "r" in config.adapter.config:
        rank = config.adapter.config["r"]
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"rank {rank!r} is no positive whole number", "adapter.config.r", "use 16, say")
        if width is not None and rank > width:
            raise ConfigError(f"rank {rank} exceeds the width of {name}", "adapter.config.r", f"use at most {width}")


# --- composing -------------------------------------------------------------------------------------------------------


def _build(overrides: Iterable[str], config_dirs: Iterable[str | Path], plugins: Iterable[str | Path]) -> tuple[RunConfig, list[str]]:
    config_dirs = list(config_dirs)
    with _session(config_dirs) as load:
        given = rewrite(overrides, config_dirs, plugins)
        with _explained(given, config_dirs):
            late = [o for o in given if _key(o).startswith("domains.")]
            first = load(o for o in given if o not in late)
            final = [*(o for o in given if o not in late), *_second(first, given), *late]
            plain = load(final)
        config = _validate(plain, final)
    return config, final


def rewrite(
    overrides: Iterable[str], config_dirs: Iterable[str | Path] = (), plugins: Iterable[str | Path] = (), sweep: bool = False
) -> list[str]:
    """The overrides in Hydra's own terms: ``domain=[a,b]``, a bare ``model.path=`` and keys that presets may leave out.

    sweep: several values for one key are allowed (multirun).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = list(overrides)
    with _explained(overrides):
        parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {p.name for d in [configs_dir(), *map(Path, config_dirs)] for p in d.iterdir() if p.is_dir()}
    known = schema()
    out: list[str] = []
    keys = [o.get_key_element().lstrip("+~") for o in parsed]
    for repeated in {k for k in keys if keys.count(k) > 1}:
        raise ConfigError(f"{repeated} is given twice", "command line", "give it once")
    for o, line, key in zip(parsed, overrides, keys, strict=True):
        if key.startswith("hydra"):
            out.append(line)
            continue
        if o.is_sweep_override() and not sweep:
            several = key == "domain" and "domain=[a,b] trains both" or f"add -m for a run of each, or write {key}=[...] for a list"
            raise ConfigError(f"several values: {line}", "command line", several)
        values = [v.strip() for v in o.sweep_string_iterator()] if o.is_sweep_override() and o.is_discrete_sweep() else [o.get_value_element_as_str()]
        if len(set(values)) < len(values):
            raise ConfigError(f"a repeated value: {line}", "command line", "give each value once")
        if key in groups - {"domain"} and isinstance(o.value(), list):
            raise ConfigError(f"{key} takes one name, not a list: {line}", "command line", f"for a run of each: -m {key}=a,b")
        if key in ("domain", "sequence.domains"):
            lists = [v if v.startswith("[") else f"[{v}]" for v in values]
            out.append(f"sequence.domains={','.join(lists)}")
            out += [d for d in ("sequence.name=custom", "sequence.order=null") if _key(d) not in keys]
        elif key.startswith("domains.") and not o.is_delete():
            out.append("++" + line.lstrip("+"))  # presets of domains leave most keys to the schema's defaults
        elif key in known and key not in groups and not o.is_delete() and not o.is_add():
            out.append("++" + line.lstrip("+"))  # the schema, not the preset at hand, says which keys there are
        else:
            out.append(line)
    if "domain" in keys and "sequence.domains" in keys:
        raise ConfigError("domain and sequence.domains are both given", "command line", "give one of them")
    if "model.path" in keys and "model" not in keys:
        out.append("model=custom")
    if files := [str(Path(p).expanduser().absolute()) for p in plugins]:
        out.append(f"++plugins=[{','.join(map(_quote, files))}]")
    return out


def _second(first: dict[str, Any], given: list[str]) -> list[str]:
    """Overrides that follow from the first composition."""
    out: list[str] = []
    keys = {_key(o) for o in given}
    model, sequence = first.get("model"), first.get("sequence")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        folder = Path(model["path"]).expanduser()
        if not model.get("name") and (name := re.sub(r"[^A-Za-z0-9._-]", "-", folder.absolute().name).lstrip(".-")):
            out.append(f"++model.name={_quote(name)}")
        if folder.is_dir() and model.get("revision") is not None:
            out.append("++model.revision=null")  # a folder has no commit; its content is hashed
        if model.get("package") is not None and "model.path" in keys:
            out.append("++model.package=null")  # the path stands in for the preset's weights
    if not isinstance(sequence, dict) or not isinstance(sequence.get("domains"), list):
        return out
    domains, controls = sequence["domains"], sequence.get("controls") or []
    if "sequence.domains" in keys and "sequence.controls" not in keys and set(map(str, controls)) & set(map(str, domains)):
        controls = [c for c in controls if c not in domains]  # what is now trained controls nothing
        out.append(f"++sequence.controls=[{','.join(map(str, controls))}]")
    names = [d for d in dict.fromkeys(map(_hashable, [*domains, *(controls if isinstance(controls, list) else [])])) if isinstance(d, str)]
    for name in names:
        if NAME.match(name) and not PACKAGE_OF_DOMAIN.match(name):
            raise ConfigError(f"domain {name!r} begins with a digit or holds a dot", "sequence.domains", "rename its preset to letters, digits, _ and -")
    names = [n for n in names if PACKAGE_OF_DOMAIN.match(n)]
    for key in sorted(k for k in keys if k.startswith("domains.")):
        if (name := key.split(".")[1]) not in names:
            raise ConfigError(f"{key}: {name} is no domain of this run", "command line", suggest(name, names))
    return out + [f"+domain@domains.{n}={n}" for n in names]


@contextlib.contextmanager
def _session(config_dirs: Iterable[str | Path]) -> Iterator[Load]:
    """Hydra over the presets; yields overrides -> composed, unresolved configuration as plain data."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    where = search_path(config_dirs)

    def load(overrides: Iterable[str]) -> dict[str, Any]:
        composed = hydra_compose("run", overrides=[*where, *overrides])
        return typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True, throw_on_missing=False))

    with initialize_config_dir(str(configs_dir()), job_name="gain_cl", version_base="1.3"):
        yield load


# --- checking --------------------------------------------------------------------------------------------------------


def _validate(plain: dict[str, Any], overrides: list[str]) -> RunConfig:
    for name, domain in (plain.get("domains") or {}).items():
        if isinstance(domain, dict) and domain.setdefault("name", name) != name:
            raise ConfigError(f"domain {name} names itself {domain['name']!r}", f"domain/{name}.yaml", f"write name: {name}")
    try:
        config = RunConfig.model_validate(plain)
    except ValidationError as error:
        raise _invalid(error, plain, overrides) from None
    _booleans(plain, config.model_dump(), "")
    _secrets(plain, "")
    load_plugins(config.plugins)
    _keywords(config)
    _model(config)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.compute.device):
        raise ConfigError(f"{config.compute.device!r} is no device", "compute.device", "use auto, cpu, cuda, cuda:N or mps")
    for domain in config.domains.values():
        if isinstance(domain.source, HubSource):
            _commit(domain.source.revision, domain.source.path, f"domains.{domain.name}.source.revision")
    if config.tasks.names:
        from gain_cl import tasks

        tasks.check(config.tasks)
    return config


def _model(config: RunConfig) -> None:
    """Coordinates of the model, and what its config.json says when it is at hand."""
    model = config.model
    arch = model.arch
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if folder.is_dir():
            from gain_cl.models import read_config

            arch = read_config(folder)
        elif folder.exists():
            raise ConfigError(f"{model.path} is a file", "model.path", "give the folder that holds config.json and model.safetensors")
        elif not HUB_ID.match(model.path) or model.path.startswith("."):
            what = f"{model.path!r} is neither a folder nor a hub id ORG/NAME"
            raise ConfigError(what, "model.path", suggest(model.path, presets("model"), everything=False).replace("mean ", "mean model=") or "check the spelling")
        else:
            _commit(model.revision, model.path, "model.revision")
    check_model(config, arch or {})


def _commit(revision: str | None, path: str, key: str) -> None:
    if revision is None:
        raise ConfigError(f"{path} is no local folder and has no revision", key, f"give the 40-hex commit: {key}=COMMIT")
    if not SHA1.match(revision):
        raise ConfigError(f"{revision!r} is no commit of {path}", key, "give 40 hex digits: a branch or tag changes under you")


def _keywords(config: RunConfig) -> None:
    """Keywords of plugin adapters and of guards against what their constructors take."""
    from gain_cl import adapters, guards

    for key, settings, registered, built_in in (
        ("adapter", config.adapter, adapters.registered, ("gain", "full", "peft")),
        ("guard", config.guard, guards.registered, ("none",)),
    ):
        kind, extra = settings.kind, settings.model_extra or {}
        if kind in built_in:
            if extra:  # only guards allow any: the built-in one takes none
                raise ConfigError(f"unknown key {key}.{next(iter(extra))}", key, f"{key} {kind} has no settings")
            continue
        if kind not in registered():
            raise ConfigError(f"unknown {key} {kind!r}", f"{key}.kind", suggest(kind, [*built_in, *registered()]) + "; --plugin FILE.py adds one")
        takes = inspect.signature(registered()[kind]).parameters
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            continue
        for word in extra:
            if word not in takes:
                raise ConfigError(f"unknown key {key}.{word}", f"{key} {kind}", suggest(word, takes))
        for word, parameter in takes.items():
            if parameter.default is parameter.empty and word not in extra and parameter.kind is not parameter.VAR_POSITIONAL:
                raise ConfigError(f"{key}.{word} is missing", f"{key} {kind}", f"give {key}.{word}=VALUE")


def _booleans(given: Any, checked: Any, key: str) -> None:
    """YAML reads an unquoted no, off, yes, on as a boolean, which pydantic would take for 0 or 1."""
    if isinstance(given, dict) and isinstance(checked, dict):
        for k in given:
            _booleans(given[k], checked.get(k), f"{key}.{k}" if key else str(k))
    elif isinstance(given, list) and isinstance(checked, list | tuple):
        for a, b in zip(given, checked, strict=False):
            _booleans(a, b, key)
    elif isinstance(given, bool) and not isinstance(checked, bool):
        raise ConfigError(f"{key} is a boolean: {str(given).lower()}", key, "quote a word such as 'no', or give a number")


def _secrets(given: Any, key: str) -> None:
    """No value of a secret environment variable and no URL with a password: the configuration is written to disk."""
    if isinstance(given, dict | list):
        pairs = given.items() if isinstance(given, dict) else ((None, v) for v in given)
        for k, v in pairs:
            _secrets(v, key if k is None else f"{key}.{k}" if key else str(k))
    elif isinstance(given, str):
        named = next((n for n, v in os.environ.items() if SECRET.search(n) and len(v) >= 8 and v in given), None)
        if named or URL_PASSWORD.search(given):
            what = f"the value of ${named}" if named else "a password"
            raise ConfigError(f"{key} holds {what}, and the configuration is written to disk", key, "leave secrets to the environment")


def schema() -> set[str]:
    """Dotted names of all keys that RunConfig knows; NAME of a domain is written *."""
    return set(_keys(RunConfig, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = prefix + name + (".*." if typing.get_origin(field.annotation) is dict else ".")
        for section in _sections(field.annotation):
            yield from _keys(section, inner)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not typing.get_origin(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, dict):
        for part in typing.get_args(annotation):
            yield from _sections(part)


# --- explaining ------------------------------------------------------------------------------------------------------


def unknown(key: str, where: str) -> ConfigError:
    """A key that does not exist, with the likeliest one that does."""
    known = schema() | {"domain"}
    parts = key.split(".")
    pattern = ".".join(["domains", "*", *parts[2:]]) if parts[0] == "domains" and len(parts) > 2 else key
    same_end = sorted(k for k in known if "." in k and k.split(".")[-1] == parts[-1] and "*" not in k)
    siblings = [k for k in known if k.rpartition(".")[0] == pattern.rpartition(".")[0]]
    near = difflib.get_close_matches(parts[-1], [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if near:
        found = [".".join([*parts[:-1], near[0]])]
    else:
        found = same_end[:3] or difflib.get_close_matches(key, known, n=1) or _near_ends(parts[-1], known)
    free = next((f for f in ("model.arch", "adapter.config", "guard") if key.startswith(f + ".")), None)
    do = f"did you mean {' or '.join(found)}?" if found else "--help lists the keys"
    if free and not near:
        do = f"to add it write ++{key}=VALUE"
    return ConfigError(f"unknown key {key}", where, do)


def _near_ends(word: str, known: Iterable[str]) -> list[str]:
    ends = {k.rpartition(".")[2]: k for k in sorted(known) if "*" not in k}
    return [ends[e] for e in difflib.get_close_matches(word, ends, n=1, cutoff=0.7)]


@contextlib.contextmanager
def _explained(overrides: list[str], config_dirs: Iterable[str | Path] = ()) -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML as one ConfigError."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError, UnicodeDecodeError, OSError, ValueError, TypeError) as error:
        raise explain(error, overrides) from error


def explain(error: BaseException, overrides: Sequence[str] = ()) -> ConfigError:
    """One line for whatever Hydra, OmegaConf or YAML raised."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, OmegaConfBaseException

    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    text = " ".join(str(error).split())
    for e in chain:
        if isinstance(e, yaml.MarkedYAMLError):
            mark = e.problem_mark or e.context_mark
            what = (e.problem or e.context or "cannot be read").replace("found duplicate key", "duplicate key")
            return ConfigError(f"bad YAML: {what}", f"{_file(mark.name)}:{mark.line + 1}" if mark else "", "correct the file")
        if isinstance(e, yaml.YAMLError | UnicodeDecodeError):
            return ConfigError(f"bad YAML: {e}", "a preset", "correct the file")
        if isinstance(e, RecursionError):
            return ConfigError("a value refers to itself through ${...}", _dollars(overrides) or "a preset", "break the circle")
        if isinstance(e, OverrideParseException):
            do = "write KEY=VALUE; quote values with spaces, commas or brackets: 'KEY=\"...\"'"
            return ConfigError(f"cannot read {e.override!r}", "command line", do)
        if isinstance(e, MissingConfigException):
            return _missing(e, overrides)
        if isinstance(e, InterpolationKeyError | InterpolationResolutionError):
            key = e.full_key or "a value"
            return ConfigError(f"{key}: {str(e).splitlines()[0]}", _origin(key, overrides), "correct the name between ${ and }")
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if "/" in key:
            return ConfigError(f"unknown group {key}", "command line", suggest(key, [p.name for p in configs_dir().iterdir() if p.is_dir()]))
        return unknown(key, "command line")
    if match := re.search(r"Could not (?:append to|delete from) config\. (.*)", text):
        return ConfigError(match.group(1), "command line", "write KEY=VALUE without a prefix")
    reason = next((str(e).splitlines()[0] for e in chain if isinstance(e, OmegaConfBaseException) and str(e)), "")
    return ConfigError(f"{text}{': ' + reason if reason and reason not in text else ''}", "configuration", "see --help")


def _missing(error: Any, overrides: Sequence[str]) -> ConfigError:
    file = error.missing_cfg_file
    if not isinstance(file, str) or "/" not in file or not error.options:
        return ConfigError(" ".join(str(error).split()), "configuration", "see --help")
    group, _, name = file.rpartition("/")
    options = [o for o in error.options if not o.startswith("hydra")]
    where = "sequence.domains" if group == "domain" else next((o for o in overrides if _key(o) == group), "configuration")
    return ConfigError(f"unknown {group} {name!r}", where, suggest(name, options))


def _invalid(error: ValidationError, plain: dict[str, Any], overrides: list[str]) -> ConfigError:
    """The first thing that pydantic found."""
    found = error.errors()
    order = {"extra_forbidden": 0}  # a misspelt key explains the missing one
    first = min(found, key=lambda e: order.get(e["type"], 1))
    key, value = _locate(first["loc"], plain)
    where = _origin(key, overrides)
    kind, context = first["type"], first.get("ctx") or {}
    if kind == "extra_forbidden":
        return unknown(key, where)
    if kind == "missing":
        return ConfigError(f"{key or 'a key'} is missing", where, f"give {key}=VALUE")
    if value == "???":
        return ConfigError(f"{key} is missing: it has no default", where, f"give {key}=VALUE")
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, dict | list) and len(shown) > 60:
        shown = "it"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind in ("literal_error", "enum"):
        options = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return ConfigError(f"{key}={value} is not possible", where, suggest(str(value), options))
    if kind == "too_short" and key in ("sequence.domains", "adapter.roles"):
        return ConfigError(f"{key} is empty", where, "name at least one, e.g. domain=[law]" if "domains" in key else "name attn_out or ffn_down")
    if kind == "value_error":
        do = "quote it in YAML: no, off, yes, on are booleans" if isinstance(value, bool) else "correct it"
        return ConfigError(f"{key}: {message}" if key and not isinstance(value, dict) else message, where, do)
    do = "quote it in YAML if it is a word" if isinstance(value, bool) else "correct the value"
    if isinstance(value, float) and not math.isfinite(value):
        message = "should be a finite number"
    return ConfigError(f"{key}={shown} {message}", where, do)


def _locate(loc: tuple[int | str, ...], plain: Any) -> tuple[str, Any]:
    """Dotted key and value of a pydantic location, without the tags of unions in it."""
    parts: list[str] = []
    node = plain
    for i, step in enumerate(loc):
        if isinstance(node, dict) and step in node:
            node = node[step]
            parts.append(str(step))
        elif isinstance(node, list | tuple) and isinstance(step, int) and step < len(node):
            node = node[step]
        elif i == len(loc) - 1 and isinstance(node, dict):
            return ".".join([*parts, str(step)]), None
    return ".".join(parts), node


def _origin(key: str, overrides: Sequence[str]) -> str:
    """Where a key was set: the override on the command line, or file:line of the last preset that sets it."""
    for o in reversed(overrides):
        k = _key(o)
        if k == key or key.startswith(k + ".") and "=" in o and o.split("=", 1)[1].startswith("{"):
            return "command line"
    try:
        return _preset_line(key, overrides) or "configuration"
    except Exception:  # the error at hand matters more than where it came from
        return "configuration"


def _preset_line(key: str, overrides: Sequence[str]) -> str | None:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    if not GlobalHydra.instance().is_initialized():
        return None
    loader = GlobalHydra.instance().config_loader()
    folders = [Path(s.path.removeprefix("file://")) for s in loader.get_sources() if s.path and s.scheme() == "file"]
    extra = [o for o in overrides if _key(o).split("@")[0].split(".")[0] != "hydra"]
    listed = loader.compute_defaults_list("run", [o for o in extra if "@" in o or "." not in _key(o)], RunMode.RUN).defaults
    place = None
    for default in listed:
        file = next((f / f"{default.config_path}.yaml" for f in folders if (f / f"{default.config_path}.yaml").is_file()), None)
        package = default.package or ""
        if file is None or default.config_path is None or default.config_path.startswith("hydra") or not (key + ".").startswith(package + "." if package else ""):
            continue
        rest = key[len(package) :].lstrip(".").split(".") if key != package else []
        line = _line(yaml.compose(file.read_text(), Loader=yaml.SafeLoader), rest)
        if line is not None:
            place = f"{_file(str(file))}:{line}"
    return place


def _line(node: yaml.Node | None, path: list[str]) -> int | None:
    if not path:
        return node.start_mark.line + 1 if node else None
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == path[0]:
                return name.start_mark.line + 1 if len(path) == 1 else _line(value, path[1:])
    return None


def _file(name: str) -> str:
    """A path as short as it can be said."""
    with contextlib.suppress(ValueError):
        return str(Path(name).relative_to(configs_dir().parent))
    return name


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _dollars(overrides: Sequence[str]) -> str:
    return next((o for o in overrides if "${" in o), "")


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else None


def _quote(text: str) -> str:
    """A string as Hydra's grammar quotes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_loaded_plugins: set[str] = set()


def _import(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"gain_cl_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
