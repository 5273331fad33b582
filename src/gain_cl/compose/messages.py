"""Errors of Hydra, OmegaConf, YAML and pydantic as one ConfigError that says what, where and what
to do. Torch-free."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gain_cl.config import presets
from gain_cl.errors import ConfigError, GainError, suggest

if TYPE_CHECKING:
    from pydantic import ValidationError

FREE = ("model.arch.", "adapter.config.", "guard.", "adapter.")
"""Sections that take keys of their own. Plain Hydra needs ++ to add one."""


def key_of(override: str) -> str:
    """``++train.lr=1`` -> ``train.lr``."""
    return override.split("=", 1)[0].lstrip("+~")


@dataclass
class Request:
    """What the user asked for: overrides (in Hydra's terms) and folders of presets. Says where a
    key was set."""

    overrides: Sequence[str] = ()
    config_dirs: Sequence[str | Path] = ()
    choices: dict[str, str] = field(default_factory=dict)
    """Hydra's group or GROUP@PACKAGE -> name of its preset, the last first; empty until it
    composed."""

    def origin(self, key: str) -> str:
        """Return the command line, else file:line of the last preset that sets the key, else the
        key itself."""
        for word in self.overrides:
            given = key_of(word)
            if f"{given}.".startswith(f"{key}.") or (key.startswith(given + ".") and "={" in word):
                return "command line"
        with contextlib.suppress(Exception):  # the error at hand matters more than its place
            for group, name in [*self.choices.items(), ("", "run")]:
                if place := self._preset_line(group, name, key):
                    return place
        return key or "configuration"

    def _preset_line(self, group: str, name: str, key: str) -> str | None:
        """Return file:line at which the preset of a group sets the key."""
        group, _, package = group.partition("@")
        for folder in presets.folders(self.config_dirs):
            if (file := folder / group / f"{name}.yaml").is_file():
                text = file.read_text(encoding="utf-8")
                start = "" if "@package _global_" in text else f"{package or group}."
                if f"{key}.".startswith(start.lstrip(".")):
                    path = f"{key}.".removeprefix(start).split(".")[:-1]
                    line = _line(yaml.compose(text, Loader=yaml.SafeLoader), path)
                    return f"{presets.short(file)}:{line}" if line else None
        return None


def _line(node: Any, path: list[str]) -> int | None:
    """Return the line of a dotted key in a YAML document."""
    if not path:
        return int(node.start_mark.line) + 1
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if name.value == path[0]:
            return _line(value if path[1:] else name, path[1:])
    return None


def unknown(key: str, where: str, section: Any = None) -> ConfigError:
    """Return the error for a key that does not exist, with the likeliest one that does.

    section: what the key stands in. Its kind, if it has one, says which keys there are."""
    from gain_cl.config import schema

    what, (stem, _, last) = f"unknown key {key}", key.rpartition(".")
    if isinstance(section, dict) and (takes := _takes(kind := section.get("kind"))) is not None:
        there = f"{stem.rpartition('.')[2]} {kind} has {', '.join(takes) or 'no settings'}"
        mean = difflib.get_close_matches(last, takes, n=1)
        return ConfigError(what, where, f"did you mean {stem}.{mean[0]}?" if mean else there)
    domain = key.split(".")[1] if key.startswith("domains.") else "*"
    known = sorted(["domain", "debug", *(k.replace("*", domain) for k in schema.known_keys())])
    ends = {k.rpartition(".")[2]: k for k in reversed(known) if "*" not in k}
    near = difflib.get_close_matches(key, known, n=1)
    near += (ends[k] for k in difflib.get_close_matches(last, ends, n=1))
    found = ends.get(last, near[0] if near else "")
    if key.startswith(FREE) and found.rpartition(".")[0] != stem:
        return ConfigError(what, where, f"to add it write ++{key}=VALUE")
    return ConfigError(what, where, f"did you mean {found}?" if found else "run --help lists keys")


def _takes(kind: object) -> list[str] | None:
    """Return the keys of a section of a kind, besides kind itself. None for a plugin's."""
    from gain_cl.config import schema

    for section in vars(schema).values():
        fields = getattr(section, "model_fields", {})
        if "kind" in fields and kind in typing.get_args(fields["kind"].annotation):
            return sorted(fields.keys() - {"kind"})
    return None


@contextlib.contextmanager
def explained(request: Request) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise inside into one ConfigError."""
    try:
        yield
    except GainError:
        raise
    except Exception as error:
        raise explain(error, request) from error


def explain(error: BaseException, request: Request) -> ConfigError:
    """Return one line for whatever Hydra, OmegaConf or YAML raised. Raise again what is none of
    theirs."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    chain: list[BaseException | None] = [error]
    while (e := chain[-1]) is not None:
        chain.append(e.__cause__ or (None if e.__suppress_context__ else e.__context__))
    for e in chain:
        match e:
            case ConfigError():
                return e
            case OverrideParseException():
                do = "write KEY=VALUE, and quote what holds spaces or commas: 'KEY=\"a, b\"'"
                return ConfigError(f"cannot read {e.override!r}", "command line", do)
            case MissingConfigException():
                return _no_preset(e, request)
            case InterpolationResolutionError():
                what = f"{e.full_key or 'a value'}: {str(e).splitlines()[0]}"
                where = request.origin(e.full_key or "")
                return ConfigError(what, where, "correct the name between ${ and }")
            case BrokenPipeError():  # of what prints the help
                raise e
            case OSError():
                where = presets.short(e.filename) if e.filename else "the folder this runs in"
                do = "check it and its permissions"
                return ConfigError(f"cannot read: {e.strerror}", where, do)
    theirs = HydraException | OmegaConfBaseException | ValueError | TypeError
    if not any(isinstance(e, theirs) for e in chain):
        raise error
    text = " ".join(str(error).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        if {"/", "@"} & set(key := found[1]):
            do = suggest(key, presets.groups())
            return ConfigError(f"unknown group {key}", "command line", do)
        return unknown(key, "command line")
    said = [str(e).splitlines()[0] for e in chain if isinstance(e, OmegaConfBaseException)]
    what = text + "".join(f": {reason}" for reason in said[:1] if reason not in text)
    return ConfigError(what, "configuration", "run --help shows the grammar")


def _no_preset(error: Any, request: Request) -> ConfigError:
    """Return the error for a preset that does not exist."""
    group, slash, name = str(error.missing_cfg_file).rpartition("/")
    if not slash:
        what = " ".join(str(error).split())
        return ConfigError(what, "configuration", "run --help lists the presets")
    named = re.match(r"In '([^']+)'", str(error))
    if named and named[1] != "run":
        where = f"{named[1]}.yaml"
    elif group == "domain":
        where = "sequence.domains"
    else:
        where = next((o for o in request.overrides if key_of(o) == group), "configuration")
    options = error.options or presets.names(group, request.config_dirs)
    return ConfigError(f"unknown {group} {name!r}", where, suggest(name, options))


def invalid(
    error: ValidationError, plain: dict[str, Any], origin: typing.Callable[[str], str]
) -> ConfigError:
    """Return the first thing that pydantic found in the composed configuration. origin: dotted key
    -> where it was set."""
    # a misspelt key explains the missing one
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key, value, section = _locate(first["loc"], plain)
    where, kind, context = origin(key), first["type"], first.get("ctx") or {}
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    quote = "quote it: YAML reads no, off, yes, on as booleans" if isinstance(value, bool) else ""
    said = (
        "null" if value is None else str(value).lower() if value in (True, False) else repr(value)
    )
    said = said if len(said) <= 100 else f"{said[:97]}..."
    if kind == "extra_forbidden":
        return unknown(key, where, section)
    if kind == "missing":
        few = isinstance(value, list)
        what = f"{key} has too few values" if few else f"{key} is missing"
        return ConfigError(what, where if few else "configuration", f"give {key}=VALUE")
    if kind == "union_tag_invalid":
        key, value = f"{key}.kind", context["tag"]
        where, said = origin(key), repr(value)
    if options := context.get("expected") or context.get("expected_tags"):
        do = quote or suggest(str(value), re.findall(r"'([^']*)'", options))
        return ConfigError(f"{key}={said} is not possible", where, do)
    if kind == "value_error":
        what, _, do = message.partition("; ")  # validators say what; what to do
        if named := re.match(r"[a-z]\w*(?:\.\w+)+(?==)", what):
            where = origin(named[0])  # a rule about several keys names the first
        what = what if isinstance(value, dict) else f"{key}: {what}"
        return ConfigError(what, where, quote or do or "correct it")
    if isinstance(value, dict):
        return ConfigError(f"{key} {message}", where, "correct the section")
    if isinstance(value, float) and not math.isfinite(value):
        message = "should be a finite number"
    what = f"{key}={said} {message.partition(',')[0]}"
    return ConfigError(what, where, quote or "correct the value")


def _locate(loc: tuple[int | str, ...], plain: Any) -> tuple[str, Any, Any]:
    """Return the dotted key and the value at a pydantic location, and the section that the key
    stands in. Tags of unions, which stand in the location too, are left out."""
    parts, node, section = [], plain, plain
    for step in loc:
        if isinstance(node, dict) and (step in node or step is loc[-1]):
            section, node = node, node.get(step)
            parts.append(str(step))
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
    return ".".join(parts), node, section
