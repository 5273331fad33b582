"""Errors of Hydra, OmegaConf, YAML and pydantic as one ConfigError that says what, where and what
to do. Torch-free."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gain_cl.config import presets
from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError, GainError

FREE = ("model.arch", "adapter.config", "guard", "adapter")
"""Sections that take keys of their own; plain Hydra needs ++ to add one."""


def suggest(word: str, options: Iterable[str], listing: bool = True) -> str:
    """'did you mean X?' and, unless listing is off, what there is."""
    lower = {o.lower(): o for o in sorted(options)}
    near = [lower[m] for m in difflib.get_close_matches(word.lower(), lower, n=1)] or [
        o for o in lower.values() if word and word.lower() in o.lower()
    ][:3]
    mean = [f"did you mean {' or '.join(near)}?"] if near else []
    there = [f"there is: {', '.join(lower.values())}"] if listing and lower else []
    return " ".join(mean + there)


def key_of(override: str) -> str:
    """``++train.lr=1`` -> ``train.lr``."""
    return override.split("=", 1)[0].lstrip("+~")


@dataclass(frozen=True)
class Given:
    """What the user gave: overrides (in Hydra's terms) and folders of presets. Says where a key was
    set."""

    overrides: Sequence[str] = ()
    config_dirs: Sequence[str | Path] = ()

    def origin(self, key: str) -> str:
        """The command line, else file:line of the last preset that sets the key, else the key
        itself.

        Files are found within the Hydra session in which the configuration was composed.
        """
        for o in self.overrides:
            if (
                key_of(o) == key
                or (key and key_of(o).startswith(key + "."))
                or (key.startswith(key_of(o) + ".") and "={" in o)
            ):
                return "command line"
        with contextlib.suppress(
            Exception
        ):  # the error at hand matters more than where it came from
            if place := self._preset_line(key):
                return place
        return key or "configuration"

    def _preset_line(self, key: str) -> str | None:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.types import RunMode

        chosen = [
            o
            for o in self.overrides
            if "@" in o or "." not in key_of(o) or o.startswith("hydra.searchpath")
        ]
        place = None
        for default in (
            GlobalHydra.instance()
            .config_loader()
            .compute_defaults_list("run", chosen, RunMode.RUN)
            .defaults
        ):
            path, package = default.config_path or "", default.package or ""
            file = next(
                (
                    f / f"{path}.yaml"
                    for f in presets.folders(self.config_dirs)
                    if (f / f"{path}.yaml").is_file()
                ),
                None,
            )
            if file is None or not f"{key}.".startswith(f"{package}." if package else ""):
                continue
            inside = key.removeprefix(package).lstrip(".")
            line = _line(
                yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader),
                inside.split(".") if inside else [],
            )
            if line is not None:
                place = f"{presets.short(file)}:{line}"
        return place


def schema() -> set[str]:
    """Dotted names of all keys of RunConfig; the name of a domain is written *."""
    return set(_keys(RunConfig, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = prefix + name + (".*." if typing.get_origin(field.annotation) is dict else ".")
        for section in _sections(field.annotation):
            yield from _keys(section, inner)


def _settings(path: list[str]) -> dict[str, list[str]]:
    """Kind -> the other keys of a section of that kind; empty for one that has no kinds."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [
            s for field in fields for s in _sections(field.annotation)
        ] or models  # the name of a domain is no field
    kinds = [
        (typing.get_args(m.model_fields["kind"].annotation), m)
        for m in models
        if "kind" in m.model_fields
    ]
    return {kind: sorted(m.model_fields.keys() - {"kind"}) for named, m in kinds for kind in named}


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, dict):
        for part in typing.get_args(annotation):
            yield from _sections(part)
    elif (
        isinstance(annotation, type)
        and not typing.get_origin(annotation)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation


def unknown(key: str, where: str, section: Any = None) -> ConfigError:
    """A key that does not exist, with the likeliest one that does. section: what it stands in; of
    its kind, if it has one."""
    known = schema() | {"domain", "debug"}
    parts = key.split(".")
    if (
        isinstance(section, dict)
        and (takes := _settings(parts[:-1]).get(kind := str(section.get("kind")))) is not None
    ):
        near = difflib.get_close_matches(parts[-1], takes, n=1)
        there = f"{parts[-2]} {kind} has {', '.join(takes) or 'no settings'}"
        return ConfigError(
            f"unknown key {key}",
            where,
            f"did you mean {'.'.join([*parts[:-1], *near])}?" if near else there,
        )
    pattern = (
        ".".join(["domains", "*", *parts[2:]]) if parts[0] == "domains" and len(parts) > 2 else key
    )
    siblings = [
        k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == pattern.rpartition(".")[0]
    ]
    ends = {k.rpartition(".")[2]: k for k in sorted(known) if "*" not in k}
    elsewhere = sorted(
        k for k in known if "." in k and "*" not in k and k.split(".")[-1] == parts[-1]
    )[:3]
    beside = [
        ".".join([*parts[:-1], k]) for k in difflib.get_close_matches(parts[-1], siblings, n=1)
    ]
    found = (
        elsewhere
        or beside
        or [f.replace("*", parts[1]) for f in difflib.get_close_matches(key, known, n=1)]
        or [ends[e] for e in difflib.get_close_matches(parts[-1], ends, n=1)]
    )
    if not beside and any(key.startswith(f + ".") for f in FREE):
        return ConfigError(f"unknown key {key}", where, f"to add it write ++{key}=VALUE")
    return ConfigError(
        f"unknown key {key}",
        where,
        f"did you mean {' or '.join(found)}?" if found else "run --help lists the keys",
    )


@contextlib.contextmanager
def explained(given: Given) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML raise inside into one ConfigError."""
    try:
        yield
    except GainError:
        raise
    except Exception as error:
        raise explain(error, given) from error


def explain(error: BaseException, given: Given = Given()) -> ConfigError:
    """One line for whatever Hydra, OmegaConf or YAML raised; what is none of theirs is raised
    again."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import (
        InterpolationKeyError,
        InterpolationResolutionError,
        OmegaConfBaseException,
    )

    chain = [error]
    while (
        inner := chain[-1].__cause__
        or (None if chain[-1].__suppress_context__ else chain[-1].__context__)
    ) is not None and inner not in chain:
        chain.append(inner)
    for e in chain:
        match e:
            case ConfigError():
                return e
            case yaml.MarkedYAMLError():
                mark = e.problem_mark or e.context_mark
                return ConfigError(
                    f"bad YAML: {e.problem or e.context}",
                    f"{presets.short(mark.name)}:{mark.line + 1}" if mark else "",
                    "correct the file",
                )
            case UnicodeDecodeError() | yaml.YAMLError():
                return ConfigError(f"bad YAML: {e}", _undecodable(given), "save it as UTF-8 text")
            case RecursionError():
                return ConfigError(
                    "a value refers to itself through ${...}",
                    next((o for o in given.overrides if "${" in o), "a preset"),
                    "break the circle",
                )
            case OverrideParseException():
                return ConfigError(
                    f"cannot read {e.override!r}",
                    "command line",
                    "write KEY=VALUE, and quote what holds spaces or commas: 'KEY=\"a, b\"'",
                )
            case MissingConfigException():
                return _no_preset(e, given)
            case InterpolationKeyError() | InterpolationResolutionError():
                key = e.full_key or "a value"
                return ConfigError(
                    f"{key}: {str(e).splitlines()[0]}",
                    given.origin(key),
                    "correct the name between ${ and }",
                )
            case OSError():
                return ConfigError(
                    f"cannot read: {e.strerror}",
                    presets.short(str(e.filename)),
                    "check the file and its permissions",
                )
    text = " ".join(str(error).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        if "/" in key or "@" in key:
            return ConfigError(
                f"unknown group {key}", "command line", suggest(key, presets.groups())
            )
        return unknown(key, "command line")
    if found := re.search(r"Could not (?:append to|delete from) config\. (.*?)(?: Either|$)", text):
        return ConfigError(
            found.group(1).rstrip("."), "command line", "write KEY=VALUE without a prefix"
        )
    if found := re.match(
        r"In '([^']+)': \w+ raised while composing config: (.*?)(?: full_key.*)?$", text
    ):
        return ConfigError(
            found.group(2),
            f"{found.group(1)}.yaml",
            "correct the file: a preset is a mapping of keys to values",
        )
    if not any(
        isinstance(e, HydraException | OmegaConfBaseException | ValueError | TypeError)
        for e in chain
    ):
        raise error
    reason = next(
        (str(e).splitlines()[0] for e in chain if isinstance(e, OmegaConfBaseException) and str(e)),
        "",
    )
    return ConfigError(
        text + (f": {reason}" if reason not in text else ""),
        "configuration",
        "run --help shows the grammar",
    )


def _no_preset(error: Any, given: Given) -> ConfigError:
    file = error.missing_cfg_file
    if not isinstance(file, str) or "/" not in file:
        return ConfigError(
            " ".join(str(error).split()), "configuration", "run --help lists the presets"
        )
    group, _, name = file.rpartition("/")
    where = (
        "sequence.domains"
        if group == "domain"
        else next((o for o in given.overrides if key_of(o) == group), "configuration")
    )
    if named := re.match(r"In '([^']+)'", str(error)):
        where = where if named[1] == "run" else f"{named[1]}.yaml"
    return ConfigError(
        f"unknown {group} {name!r}",
        where,
        suggest(name, error.options or presets.names(group, given.config_dirs)),
    )


def _undecodable(given: Given) -> str:
    """The preset of the user's that is no UTF-8."""
    for file in sorted(
        f for d in presets.folders(given.config_dirs)[1:] for f in d.rglob("*.yaml")
    ):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(file)
    return "a preset"


def invalid(error: ValidationError, plain: dict[str, Any], given: Given) -> ConfigError:
    """The first thing that pydantic found in the composed configuration."""
    first = min(
        error.errors(), key=lambda e: e["type"] != "extra_forbidden"
    )  # a misspelt key explains the missing one
    key, value = _locate(first["loc"], plain)
    where, kind, context = given.origin(key), first["type"], first.get("ctx") or {}
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    quote = "quote it: YAML reads no, off, yes, on as booleans" if isinstance(value, bool) else ""
    if kind == "extra_forbidden":
        section: Any = plain
        for part in key.split(".")[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        return unknown(key, where, section)
    if kind == "missing":
        what = f"{key} has too few values" if isinstance(value, list) else f"{key} is missing"
        return ConfigError(
            what, where if isinstance(value, list) else "configuration", f"give {key}=VALUE"
        )
    if kind in ("literal_error", "enum"):
        return ConfigError(
            f"{key}={_say(value)} is not possible",
            where,
            quote or suggest(str(value), re.findall(r"'([^']*)'", str(context.get("expected")))),
        )
    if kind == "union_tag_invalid":
        key, options = (
            f"{key}.{context['discriminator'].strip(chr(39))}",
            re.findall(r"'([^']*)'", context["expected_tags"]),
        )
        return ConfigError(
            f"{key}={context['tag']!r} is not possible",
            given.origin(key),
            suggest(context["tag"], options),
        )
    if kind == "too_short":
        return ConfigError(f"{key} is empty", where, "name at least one")
    if kind == "value_error":
        what, _, do = message.partition("; ")  # validators say what; what to do
        if (
            named := re.match(r"[a-z]\w*(?:\.\w+)+(?==)", what)
        ) is not None:  # a rule about several keys names the first
            where = given.origin(named[0])
        return ConfigError(
            what if isinstance(value, dict) else f"{key}: {what}",
            where,
            quote or do or "correct it",
        )
    if isinstance(value, dict):
        return ConfigError(f"{key} {message}", where, "correct the section")
    if isinstance(value, float) and not math.isfinite(value):
        message = "should be a finite number"
    return ConfigError(
        f"{key}={_say(value)} {message.partition(',')[0]}", where, quote or "correct the value"
    )


def _say(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )


def _locate(loc: tuple[int | str, ...], plain: Any) -> tuple[str, Any]:
    """Dotted key and value at a pydantic location, leaving out the tags of unions that stand in
    it."""
    parts: list[str] = []
    node = plain
    for i, step in enumerate(loc):
        if isinstance(node, dict) and step in node:
            node = node[step]
            parts.append(str(step))
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
        elif i == len(loc) - 1 and isinstance(node, dict):
            return ".".join([*parts, str(step)]), None
    return ".".join(parts), node


def _line(node: yaml.Node | None, path: list[str]) -> int | None:
    """Line of a dotted key in a YAML document."""
    if not path:
        return node.start_mark.line + 1 if node else None
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == path[0]:
                return int(name.start_mark.line) + 1 if len(path) == 1 else _line(value, path[1:])
    return None
