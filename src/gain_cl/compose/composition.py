"""Compose presets and a command line to a checked RunConfig, by Hydra's public interface.
Torch-free.

Hydra composes twice. The first time shows which domains the sequence names. The second time adds
their presets, so that ``domains.NAME.KEY=VALUE`` can change them. Whatever goes wrong becomes one
ConfigError (messages.py). Overrides are read by Hydra's OverridesParser, as its documentation
shows for plugins that sweep.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from gain_cl import adapters, guards
from gain_cl.compose import checks
from gain_cl.compose.messages import Request, explained, invalid, key_of
from gain_cl.compose.rules import Origin
from gain_cl.config import presets
from gain_cl.config.schema import NAME, RunConfig, known_keys
from gain_cl.errors import ConfigError, PreemptedError, suggest

PACKAGE = re.compile(r"^[A-Za-z_][A-Za-z0-9_-]*$")  # what Hydra takes as one part of a package name

VALUE = re.compile(r"\+\+[\w.-]+=")  # sets a value, whether the key is there or not

MOST_JOBS = 10_000
"""Runs of one multirun. Each is composed and checked before the first starts."""

Paths = Iterable[str | Path]
Load = Callable[..., dict[str, Any]]
"""(overrides, request to tell of the chosen presets, name of the file) -> composed, plain data."""


def compose(
    overrides: Iterable[str] = (), config_dirs: Paths = (), plugins: Paths = ()
) -> RunConfig:
    """Return the checked configuration of one run.

    overrides: Hydra's grammar, plus ``domain=[a,b]`` and a bare ``model.path=``. config_dirs:
    folders with more presets. plugins: python files to import, which register adapters or guards.
    ConfigError for every mistake.
    """
    with composer(config_dirs, plugins) as one:
        return one(overrides)


@contextlib.contextmanager
def composer(
    config_dirs: Paths = (), plugins: Paths = (), execute: bool = True
) -> Iterator[Callable[[Iterable[str]], RunConfig]]:
    """Yield ``compose`` for many runs. Runs of the same presets share most of the work. execute:
    False for what only reads: no plugin file is run."""
    config_dirs, plugins = list(config_dirs), list(plugins)
    plug = load_plugins if execute else name_plugins
    with session(config_dirs) as load:
        yield lambda overrides: _compose(load, overrides, config_dirs, plugins, plug)[0]


def spell_out(overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = ()) -> list[str]:
    """Return the overrides of a valid run in plain Hydra, with what gain_cl adds to them: for
    ``--cfg job``."""
    config_dirs = list(config_dirs)
    with session(config_dirs) as load:
        words = _compose(load, overrides, config_dirs, plugins)[1]
    return [*presets.search_path(config_dirs), *words]


def jobs(overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = ()) -> list[list[str]]:
    """Check every job of a multirun before any starts, and return their overrides."""
    from hydra.core.global_hydra import GlobalHydra

    config_dirs, seen = list(config_dirs), []
    words = rewrite(overrides, config_dirs, plugins, sweep=True)
    with session(config_dirs), explained(Request(words, config_dirs)):
        parts = [
            [f"{o.get_key_element()}={value}" for value in _strings(o)]
            for o in _parse(words, GlobalHydra.instance().config_loader())
            if not o.is_hydra_override()
        ]
        if (total := math.prod(map(len, parts))) > MOST_JOBS:
            do = f"ask for {MOST_JOBS:,} at most, in several commands"
            raise ConfigError(f"{total:,} runs or more", "command line", do)
        product = [list(job) for job in itertools.product(*parts)]
    with composer(config_dirs) as one:
        for job in product:
            if (config := one(job)) in seen:
                said = " ".join(w.lstrip("+") for w in job)
                what = f"two runs of the multirun are the same: {said}"
                raise ConfigError(what, "command line", "remove the repeated value")
            seen.append(config)
    return product


def load_plugins(files: Paths) -> None:
    """Run the installed entry points of group gain_cl.plugins and the user's plugin files, each
    once a process."""
    from importlib.metadata import entry_points

    wanted: dict[str, Callable[[], Any]] = {
        f"entry point {e.name}": e.load for e in entry_points(group="gain_cl.plugins")
    }
    wanted |= {str(path): functools.partial(_import, path) for path in _plugin_files(files)}
    for where in wanted.keys() - _loaded:
        try:
            wanted[where]()
        except Exception as error:
            what, do = f"the plugin fails: {error!r}", "GAIN_CL_DEBUG=1 shows the traceback"
            raise ConfigError(what, where, do) from error
        _loaded.add(where)


_loaded: set[str] = set()


def name_plugins(files: Paths) -> None:
    """Say which files may define adapters and guards, without running them: whose experiment it is
    does not decide what runs where it is only read."""
    load_plugins(())
    for path in _plugin_files(files):
        if path not in adapters.known.unread:
            print(f"plugin {path}: only run and sweep execute it", file=sys.stderr)
            adapters.known.unread.append(path)
            guards.known.unread.append(path)


def _plugin_files(files: Paths) -> Iterator[Path]:
    for given in files:
        path = Path(given).expanduser().absolute()
        if not path.is_file():
            do = "give a python file that registers an adapter or guard"
            raise ConfigError("no such file", f"--plugin {given}", do)
        yield path


def _import(path: Path) -> None:
    """Import a python file. Its module is kept, so that a class can be traced to its file."""
    spec = importlib.util.spec_from_file_location(f"gain_cl_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "not a python file"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


# --- composing ------------------------------------------------------------------------------------

CALLED = ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging")
"""Parts of Hydra's own section that say what a multirun calls. job.env_set is one more."""


@contextlib.contextmanager
def session(config_dirs: Paths = ()) -> Iterator[Load]:
    """Open Hydra over the presets and yield a function from overrides to plain data."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig, OmegaConf, open_dict

    more = presets.search_path(config_dirs)

    @functools.cache
    def called(name: str, words: tuple[str, ...]) -> tuple[DictConfig, list[Any]]:
        composed = hydra.compose(name, overrides=[*more, *words], return_hydra_config=True)
        settings: Any = OmegaConf.to_container(composed.hydra, resolve=False)
        return composed, [settings[part] for part in CALLED] + [settings["job"]["env_set"]]

    def by_hydra(name: str, words: tuple[str, ...]) -> DictConfig:
        composed, calls = called(name, words)
        own = tuple(w for w in words if key_of(w).startswith("hydra"))
        if more and name == "run" and calls != called(name, own)[1]:
            what = "a preset sets what Hydra would call (callbacks, logging, env_set or _target_)"
            raise ConfigError(what, "hydra", "take its hydra section out")
        return copy.deepcopy(composed)

    def quickly(name: str, words: list[str]) -> DictConfig:
        """Put values into presets that may be composed already: most of Hydra's time."""
        groups = presets.groups()
        values = [w for w in words if VALUE.match(w) and key_of(w) not in groups]
        composed = by_hydra(name, tuple(w for w in words if w not in values))
        for o in _parse(values):
            OmegaConf.update(composed, o.key_or_group, o.value(), force_add=o.is_force_add())
        return composed

    def load(
        words: Iterable[str], request: Request | None = None, name: str = "run"
    ) -> dict[str, Any]:
        words = list(words)
        try:
            composed = quickly(name, words)
        except PreemptedError:
            raise
        except Exception:  # Hydra's own words say what is wrong
            composed = by_hydra(name, tuple(words))
        if request is not None:
            request.choices.update(composed.hydra.runtime.choices)
        with open_dict(composed):
            del composed["hydra"]
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))

    outer = GlobalHydra.instance().hydra  # of a multirun, or of a program that calls us
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(
            str(presets.configs_dir()), job_name="gain_cl", version_base="1.3"
        ):
            yield load
    finally:
        GlobalHydra.instance().hydra = outer


def _parse(words: Iterable[str], loader: Any = None) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return cast("list[Any]", OverridesParser.create(loader).parse_overrides(list(words)))


def _plain(word: str) -> str:
    """Return an override that Hydra reads: a plain value that begins with ~ or holds another = is
    quoted."""
    key, equals, value = word.partition("=")
    if equals and re.fullmatch(r"~?[\w./~=:@+-]+", value) and {"~", "="} & set(value):
        with contextlib.suppress(Exception):
            _parse([word])
            return word
        return f"{key}={presets.quote(value)}"
    return word


def _strings(override: Any) -> list[str]:
    """Return the value of an override, or the several of a sweep."""
    if override.is_sweep_override():  # of a range without end, no more than is refused
        return list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
    return [override.get_value_element_as_str()]


def _compose(
    load: Load,
    overrides: Iterable[str],
    config_dirs: list[str | Path],
    plugins: Paths,
    plug: Callable[[Paths], None] = load_plugins,
) -> tuple[RunConfig, list[str]]:
    """Return the configuration, and the overrides in plain Hydra that produce it. load: of a
    session over config_dirs."""
    words = rewrite(overrides, config_dirs, plugins)
    request = Request(words, config_dirs)
    with explained(request):
        late = [w for w in words if key_of(w).startswith("domains.")]
        early = [w for w in words if w not in late]
        request.overrides = words = [*early, *_implied(load(early, request), request), *late]
        plain = load(words, request)
        _check_presets(plain, request.origin)
        try:
            config = RunConfig.model_validate(plain)
        except ValidationError as error:
            raise invalid(error, plain, request.origin) from None
        plug(config.plugins)
        checks.check(config, plain, request.origin)
    return config, words


def _check_presets(plain: dict[str, Any], origin: Origin) -> None:
    """Refuse presets that fill another section than they must or leave values out. Name domains
    after their presets."""
    from omegaconf import OmegaConf

    for group in ("method", "debug"):
        if isinstance(plain.get(group), dict):
            raise ConfigError(
                f"the preset of {group} fills only {group}",
                origin(group),
                "make '# @package _global_' its first line",
            )
    for key in sorted(OmegaConf.missing_keys(plain)):
        raise ConfigError(f"{key} is missing", origin(key), f"give {key}=VALUE")
    for name, domain in (plain.get("domains") or {}).items():
        if isinstance(domain, dict) and domain.setdefault("name", name) != name:
            raise ConfigError(
                f"domain {name} names itself {domain['name']!r}",
                origin(f"domains.{name}.name"),
                f"write name: {name}",
            )


def rewrite(
    overrides: Iterable[str], config_dirs: Paths = (), plugins: Paths = (), sweep: bool = False
) -> list[str]:
    """Return the overrides in Hydra's own terms: ``domain=[a,b]``, a bare ``model.path=``, keys
    that a preset may leave out.

    sweep: several values for one key are allowed (multirun).
    """
    words, out = [_plain(word) for word in overrides], []
    with explained(Request(words)):
        parsed = _parse(words)
    given = [key_of(w) for w in words]
    for o, word, key in zip(parsed, words, given, strict=True):
        group = key in presets.groups()
        if given.count(key) > 1 or (key == "domain" and "sequence.domains" in given):
            raise ConfigError(f"{key} is given twice", "command line", "give it once")
        if o.is_sweep_override() and not sweep:
            do = f"add -m for a run of each; a list is {key}=[a,b]"
            raise ConfigError(f"several values: {word}", "command line", do)
        if key.startswith("hydra.sweeper.params"):
            raise ConfigError(
                f"{key} is given", "command line", "write -m KEY=A,B for several runs"
            )
        if o.is_hydra_override() or o.is_delete():
            out.append(word)
        elif key in ("domain", "sequence.domains"):
            lists = [v if v.startswith("[") or v == "null" else f"[{v}]" for v in _strings(o)]
            custom = ("++sequence.name=custom", "++sequence.order=null")
            out += [f"++sequence.domains={','.join(lists)}"]
            out += [c for c in custom if key_of(c) not in given]
        elif group:
            if not (o.is_sweep_override() or isinstance(o.value(), str) or word == "debug=null"):
                what = f"{key} takes the name of one preset: {word}"
                raise ConfigError(what, "command line", "run --help lists them")
            out.append(word)
        elif key.startswith("domains.") or (key in known_keys() and not o.is_add()):
            # the schema, not the preset at hand, says which keys there are
            out.append("++" + word.lstrip("+"))
        else:
            out.append(word)
    if "model.path" in given and "model" not in given:
        out.append("model=custom")
    if files := [presets.quote(str(Path(p).expanduser().absolute())) for p in plugins]:
        out.append(f"++plugins=[{','.join(files)}]")
    return out


def _implied(first: dict[str, Any], request: Request) -> list[str]:
    """Return overrides that follow from the first composition."""
    out: list[str] = []
    given = {key_of(w) for w in request.overrides}
    if "train.lr" in given and "lr_tuned_on" not in given:
        out.append("++lr_tuned_on=null")  # the user chose it
    model, sequence = first.get("model"), first.get("sequence")
    if isinstance(model, dict) and not any(model.get(k) for k in ("path", "package", "arch")):
        raise ConfigError(
            "the model has no path",
            request.origin("model.path"),
            "give model.path=FOLDER, or model.path=ORG/NAME model.revision=COMMIT",
        )
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        folder = Path(model["path"]).expanduser()
        if not model.get("name") and "model.name" not in given:
            out.append(f"++model.name={presets.quote(presets.folder_name(model['path']))}")
        if folder.is_dir() and model.get("revision") is not None:
            out.append("++model.revision=null")  # a folder has no commit: its content is hashed
        if model.get("package") is not None and "model.path" in given:
            out.append("++model.package=null")  # the path stands in for the preset's weights
    if not isinstance(sequence, dict) or not isinstance(domains := sequence.get("domains"), list):
        return out
    controls = list(sequence.get("controls") or [])
    if "sequence.domains" in given and "sequence.controls" not in given:
        # what is now trained controls nothing
        controls = [c for c in controls if c not in domains]
        out.append(f"++sequence.controls=[{','.join(map(str, controls))}]")
    both = dict.fromkeys([*domains, *controls])
    names = [n for n in both if isinstance(n, str) and NAME.fullmatch(n)]
    if wrong := [n for n in names if not PACKAGE.fullmatch(n)]:
        what = f"domain {wrong[0]!r} begins with a digit or holds a dot"
        raise ConfigError(what, request.origin("sequence.domains"), "rename its preset")
    for key in given:
        if key.startswith("domains.") and (name := key.split(".")[1]) not in names:
            do = suggest(name, names)
            raise ConfigError(f"{key}: no such domain in this run", "command line", do)
    return out + [f"+domain@domains.{n}={n}" for n in names]
