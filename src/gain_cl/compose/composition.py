"""From presets and command line to a checked RunConfig: the only door to Hydra. Torch-free.

Hydra composes twice. The first time shows which domains the sequence names; the second adds their
presets, so that ``domains.NAME.KEY=VALUE`` can change them. Whatever goes wrong becomes one
ConfigError (explain.py).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gain_cl.compose import checks
from gain_cl.compose.messages import Given, explained, invalid, key_of, schema, suggest
from gain_cl.config import presets
from gain_cl.config.schema import NAME, RunConfig
from gain_cl.errors import ConfigError

PACKAGE = re.compile(r"^[A-Za-z_][A-Za-z0-9_-]*$")  # what Hydra takes as one part of a package name

Paths = Iterable[str | Path]
Load = Callable[[Iterable[str]], dict[str, Any]]


def compose(
    overrides: Iterable[str] = (), config_dirs: Paths = (), plugins: Paths = ()
) -> RunConfig:
    """The checked configuration of one run.

    overrides: Hydra's grammar, plus ``domain=[a,b]`` and a bare ``model.path=``. config_dirs:
    folders with more presets. plugins: python files to import, which register adapters or guards.
    ConfigError for every mistake.
    """
    with composer(config_dirs, plugins) as one:
        return one(overrides)


@contextlib.contextmanager
def composer(
    config_dirs: Paths = (), plugins: Paths = ()
) -> Iterator[Callable[[Iterable[str]], RunConfig]]:
    """``compose`` for many runs: those of the same presets share most of the work."""
    config_dirs, plugins = list(config_dirs), list(plugins)
    with session(config_dirs) as load:
        yield lambda overrides: _compose(load, overrides, config_dirs, plugins)[0]


def spell_out(overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = ()) -> list[str]:
    """The overrides of a valid run in plain Hydra, with what gain_cl adds to them: for ``--cfg
    job``."""
    config_dirs = list(config_dirs)
    with session(config_dirs) as load:
        return [*search_path(config_dirs), *_compose(load, overrides, config_dirs, plugins)[1]]


def jobs(overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = ()) -> list[list[str]]:
    """The overrides of each job of a multirun; all are checked before any starts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides, config_dirs = list(overrides), list(config_dirs)
    with (
        session(config_dirs),
        explained(Given([*search_path(config_dirs), *overrides], config_dirs)),
    ):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(rewrite(overrides, config_dirs, plugins, sweep=True))
        product = BasicSweeper.split_arguments(
            [o for o in parsed if not o.is_hydra_override()], None
        )[0]
    seen: list[RunConfig] = []
    with composer(config_dirs) as one:
        for job in product:
            config = one(job)
            if config in seen:
                raise ConfigError(
                    f"two runs of the multirun are the same: {' '.join(job)}",
                    "command line",
                    "remove the repeated value",
                )
            seen.append(config)
    return product


def load_plugins(files: Paths) -> None:
    """Run the installed entry points of group gain_cl.plugins and the user's plugin files, each
    once a process."""
    from importlib.metadata import entry_points

    wanted: list[tuple[str, Callable[[], Any]]] = [
        (f"entry point {e.name}", e.load) for e in entry_points(group="gain_cl.plugins")
    ]
    for given in files:
        path = Path(given).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(
                "no such file",
                f"--plugin {given}",
                "give a python file that registers an adapter or guard",
            )
        wanted.append((str(path), lambda path=path: _import(path)))  # type: ignore[misc]
    for where, load in wanted:
        if where in _loaded:
            continue
        try:
            load()
        except Exception as error:
            raise ConfigError(
                f"the plugin fails: {type(error).__name__}: {error}",
                where,
                "GAIN_CL_DEBUG=1 shows the traceback",
            ) from error
        _loaded.add(where)


_loaded: set[str] = set()


def _import(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"gain_cl_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # so that a class can be traced to its file
    spec.loader.exec_module(module)


# --- composing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(config_dirs: Paths = ()) -> Iterator[Load]:
    """Hydra over the presets; yields overrides -> the composed configuration as plain data."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import DictConfig, OmegaConf, open_dict

    more = search_path(config_dirs)
    known: dict[
        tuple[str, ...], DictConfig
    ] = {}  # overrides that choose presets -> what they compose: most of Hydra's time

    def by_hydra(overrides: Iterable[str]) -> DictConfig:
        composed = hydra_compose("run", overrides=[*more, *overrides], return_hydra_config=True)
        _own_parts(OmegaConf.to_container(composed.hydra, resolve=False))
        OmegaConf.set_readonly(composed, False)
        with open_dict(composed):
            del composed["hydra"]
        return composed

    def quickly(overrides: list[str]) -> DictConfig:
        """As by_hydra, the values put, as it does it, into presets that may be composed already."""
        values = [o for o in overrides if _is_value(key_of(o))]
        choices = tuple(o for o in overrides if o not in values)
        if choices not in known:
            known[choices] = by_hydra(choices)
        composed = copy.deepcopy(known[choices])
        ConfigLoaderImpl._apply_overrides_to_config(
            OverridesParser.create().parse_overrides(values), composed
        )
        return composed

    def load(overrides: Iterable[str]) -> dict[str, Any]:
        overrides = list(overrides)
        try:
            composed = quickly(overrides)
        except Exception:  # its own words say what is wrong
            composed = by_hydra(overrides)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))

    outer = GlobalHydra.instance().hydra  # of a multirun, or of a program that calls us
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(
            str(presets.configs_dir()), job_name="gain_cl", version_base="1.3"
        ):
            yield load
    finally:
        GlobalHydra.instance().hydra = outer


def _is_value(key: str) -> bool:
    """Whether an override of the key sets a value and chooses no preset."""
    return (
        key.split(".")[0] in RunConfig.model_fields
        and key not in presets.groups()
        and not {"@", "/"} & set(key)
    )


HYDRAS = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)\.[\w.]+")


def _own_parts(settings: Any) -> None:
    """In a multirun Hydra calls what its own section names, callbacks, launchers and log handlers,
    also where a preset set them: only its own parts may stand there. ConfigError."""
    plugins = [
        settings[part].pop("_target_", None)
        for part in ("launcher", "sweeper")
        if isinstance(settings[part], dict)
    ]
    foreign = [p for p in plugins if p is not None and not HYDRAS.fullmatch(str(p))]
    logs = [
        log
        for log in ("hydra_logging", "job_logging")
        if {"handlers", "formatters", "filters"} & set(settings[log] or {})
    ]
    if (
        foreign
        or logs
        or settings["callbacks"]
        or settings["job"]["env_set"]
        or "_target_" in _words(settings)
    ):
        what = "a preset sets what Hydra would call (callbacks, logging, env_set or _target_)"
        raise ConfigError(what, "hydra", "take its hydra section out")


def _words(node: Any) -> set[str]:
    """Every key of nested sections."""
    inner = (
        list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    )
    return (set(node) if isinstance(node, dict) else set()).union(*map(_words, inner))


def search_path(config_dirs: Paths) -> list[str]:
    """Hydra's override that adds folders of presets."""
    more = [_quote(f"file://{f}") for f in presets.folders(config_dirs)[1:]]
    return [f"hydra.searchpath=[{','.join(more)}]"] if more else []


def _compose(
    load: Load, overrides: Iterable[str], config_dirs: list[str | Path], plugins: Paths
) -> tuple[RunConfig, list[str]]:
    """The configuration, and the overrides in plain Hydra that produce it. load: of a session over
    config_dirs."""
    words = rewrite(overrides, config_dirs, plugins)
    where = search_path(config_dirs)
    with explained(Given([*where, *words], config_dirs)):
        late = [o for o in words if key_of(o).startswith("domains.")]
        early = [o for o in words if o not in late]
        final = [*early, *_implied(load(early), Given([*where, *words], config_dirs)), *late]
        given = Given([*where, *final], config_dirs)
        plain = load(final)
        _whole(plain, given)
        try:
            config = RunConfig.model_validate(plain)
        except ValidationError as error:
            raise invalid(error, plain, given) from None
        load_plugins(config.plugins)
        checks.check(config, plain, given.origin)
    return config, final


def _whole(plain: dict[str, Any], given: Given) -> None:
    """What a composed configuration may lack before its values are looked at; names domains after
    their presets."""
    for group in ("method", "debug"):
        if isinstance(plain.get(group), dict):
            raise ConfigError(
                f"the preset of {group} fills only {group}",
                given.origin(group),
                "make '# @package _global_' its first line",
            )
    if (missing := _missing(plain)) is not None:
        raise ConfigError(f"{missing} is missing", given.origin(missing), f"give {missing}=VALUE")
    for name, domain in (plain.get("domains") or {}).items():
        if isinstance(domain, dict) and domain.setdefault("name", name) != name:
            raise ConfigError(
                f"domain {name} names itself {domain['name']!r}",
                given.origin(f"domains.{name}.name"),
                f"write name: {name}",
            )


def rewrite(
    overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = (), sweep: bool = False
) -> list[str]:
    """The overrides in Hydra's own terms: ``domain=[a,b]``, a bare ``model.path=``, keys that a
    preset may leave out.

    sweep: several values for one key are allowed (multirun).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = list(overrides)
    with explained(Given(overrides)):
        parsed = OverridesParser.create().parse_overrides(overrides)
    known = schema()
    keys = [key_of(o) for o in overrides]
    for key in keys:
        if keys.count(key) > 1 or (key == "domain" and "sequence.domains" in keys):
            raise ConfigError(f"{key} is given twice", "command line", "give it once")
    out: list[str] = []
    for o, line, key in zip(parsed, overrides, keys, strict=True):
        if o.is_hydra_override() or o.is_delete():
            out.append(line)
            continue
        values = _values(o, line, key, sweep)
        if key in ("domain", "sequence.domains"):
            lists = [v if v.startswith("[") or v == "null" else f"[{v}]" for v in values]
            custom = [
                d for d in ("sequence.name=custom", "sequence.order=null") if key_of(d) not in keys
            ]
            out += [f"sequence.domains={','.join(lists)}", *custom]
        elif key in presets.groups():
            if (
                not o.is_sweep_override()
                and not isinstance(o.value(), str)
                and not (o.value() is None and key == "debug")
            ):
                do = suggest(values[0], presets.names(key, config_dirs))
                raise ConfigError(f"{key} takes the name of one preset: {line}", "command line", do)
            if key == "debug" and (
                absent := [v for v in values if v not in ("null", *presets.names(key, config_dirs))]
            ):
                do = suggest(
                    absent[0], presets.names(key, config_dirs)
                )  # Hydra takes what is optional for absent, and says nothing
                raise ConfigError(f"debug has no preset {absent[0]!r}", "command line", do)
            out.append(line)
        elif key.startswith("domains.") or (key in known and not o.is_add()):
            out.append(
                "++" + line.lstrip("+")
            )  # the schema, not the preset at hand, says which keys there are
        else:
            out.append(line)
    if "model.path" in keys and "model" not in keys:
        out.append("model=custom")
    if files := [_quote(str(Path(p).expanduser().absolute())) for p in plugins]:
        out.append(f"++plugins=[{','.join(files)}]")
    return out


def _values(override: Any, line: str, key: str, sweep: bool) -> list[str]:
    """The value of an override, or the several of a sweep."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not sweep:
        several = "" if key in presets.groups() else f"; a list is {key}=[a,b]"
        raise ConfigError(
            f"several values: {line}",
            "command line",
            f"add -m for a run of each{several}" if key != "domain" else "write domain=[a,b]",
        )
    if not override.is_discrete_sweep() or "glob(" in line:
        return [line.split("=", 1)[1]]
    values = [v.strip() for v in override.sweep_string_iterator()]
    if len(set(values)) < len(values):
        raise ConfigError(f"a repeated value: {line}", "command line", "give each value once")
    return values


def _implied(first: dict[str, Any], given: Given) -> list[str]:
    """Overrides that follow from the first composition."""
    out: list[str] = []
    keys = {key_of(o) for o in given.overrides}
    if "train.lr" in keys and "lr_tuned_on" not in keys:
        out.append("++lr_tuned_on=null")  # the user chose it
    model, sequence = first.get("model"), first.get("sequence")
    if isinstance(model, dict) and not any(model.get(k) for k in ("path", "package", "arch")):
        raise ConfigError(
            "the model has no path",
            given.origin("model.path"),
            "give model.path=FOLDER, or model.path=ORG/NAME model.revision=COMMIT",
        )
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        folder = Path(model["path"]).expanduser()
        if not model.get("name") and "model.name" not in keys:
            out.append(
                f"++model.name={_quote(re.sub(r'[^A-Za-z0-9._-]', '-', folder.absolute().name).lstrip('.-'))}"
            )
        if folder.is_dir() and model.get("revision") is not None:
            out.append("++model.revision=null")  # a folder has no commit: its content is hashed
        if model.get("package") is not None and "model.path" in keys:
            out.append("++model.package=null")  # the path stands in for the preset's weights
    if not isinstance(sequence, dict) or not isinstance(domains := sequence.get("domains"), list):
        return out
    controls = list(sequence.get("controls") or [])
    if (
        "sequence.domains" in keys
        and "sequence.controls" not in keys
        and any(c in domains for c in controls)
    ):
        controls = [c for c in controls if c not in domains]  # what is now trained controls nothing
        out.append(f"++sequence.controls=[{','.join(map(str, controls))}]")
    names = list(
        dict.fromkeys(n for n in [*domains, *controls] if isinstance(n, str) and NAME.fullmatch(n))
    )
    for name in (n for n in names if not PACKAGE.fullmatch(n)):
        raise ConfigError(
            f"domain {name!r} begins with a digit or holds a dot",
            given.origin("sequence.domains"),
            "rename its preset to letters, digits, _ and -",
        )
    for key in (k for k in keys if k.startswith("domains.") and k.split(".")[1] not in names):
        raise ConfigError(
            f"{key}: no such domain in this run", "command line", suggest(key.split(".")[1], names)
        )
    return out + [f"+domain@domains.{n}={n}" for n in names]


def _missing(plain: Any, key: str = "") -> str | None:
    """The first key that a preset left to be given (???)."""
    if isinstance(plain, dict):
        return next(
            (
                m
                for k, v in plain.items()
                if (m := _missing(v, f"{key}.{k}" if key else str(k))) is not None
            ),
            None,
        )
    return key if plain == "???" else None


def _quote(text: str) -> str:
    """A string as Hydra's grammar quotes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
