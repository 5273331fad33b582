"""One way from a name to a class: built-in classes, imported when they are asked for, and those
that a plugin registers. Torch-free."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from gain_cl.errors import ConfigError, suggest
from gain_cl.system.files import sha256

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by the name that ``section.kind`` of a configuration gives.

    section: of the configuration; built_in: name -> "module:Class", the module within gain_cl;
    typed: names whose settings the schema checks. Settings of other names are checked against the
    constructor of their class."""

    def __init__(self, section: str, built_in: dict[str, str], typed: Collection[str]) -> None:
        self.section, self.built_in, self.typed = section, built_in, typed
        self.plugins: dict[str, type[T]] = {}
        self.unread: list[Path] = []  # plugin files that are not run where a run is only read

    def register(self, kind: str, made: type[T]) -> None:
        """Make a kind known, for plugin files and entry points of the group gain_cl.plugins."""
        self.plugins[kind] = made

    def find(self, kind: str, origin: Callable[[str], str] = str) -> type[T]:
        """Return the class of a kind. origin: dotted key -> where it was set. ConfigError: there is
        none."""
        if kind in self.plugins:
            return self.plugins[kind]
        if kind not in self.built_in:
            what = f"unknown {self.section} {kind!r}"
            do = suggest(kind, [*self.built_in, *self.plugins]) + "; --plugin FILE.py adds one"
            raise ConfigError(what, origin(f"{self.section}.kind"), do)
        module, _, name = self.built_in[kind].partition(":")
        found: type[T] = getattr(importlib.import_module(f"gain_cl.{module}"), name)
        return found

    def check(self, settings: BaseModel, origin: Callable[[str], str] = str) -> None:
        """Check the kind, and the keywords of a class that the schema does not know against its
        constructor. origin: dotted key -> where it was set. ConfigError."""
        section, kind = self.section, settings.kind  # type: ignore[attr-defined]
        unread = kind not in self.plugins and self._file(kind)  # by a verb that runs no plugin
        if kind in self.typed or unread:
            return
        takes = inspect.signature(self.find(kind, origin))
        try:
            takes.bind(**settings.model_extra or {})
        except TypeError as error:
            do = f"it takes: {', '.join(takes.parameters) or 'nothing'}"
            where = origin(f"{section}.kind")
            raise ConfigError(f"{section} {kind}: {error}", where, do) from None

    def pin(self, kind: str) -> str | None:
        """Return the SHA-256 of the file that defines a plugin's class, for the run id; None for
        what gain_cl itself brings."""
        file = self._file(kind)
        return None if file is None else sha256(file)

    def _file(self, kind: str) -> Path | None:
        """Return the file of a plugin's class: where it was defined, or the unread one that names
        the kind."""
        if kind in self.plugins:
            return Path(inspect.getfile(self.plugins[kind]))
        quoted = re.compile(rf"""(["']){re.escape(kind)}\1""")
        texts = ((p, p.read_text(encoding="utf-8", errors="replace")) for p in self.unread)
        there = (p for p, text in texts if quoted.search(text))
        return None if kind in self.built_in else next(there, None)

    def build(self, settings: BaseModel) -> T:
        """Return an instance of the class that a section of the configuration names. Its other keys
        are keyword arguments, but for init_from of the classes that the schema knows."""
        kind: Any = settings.kind  # type: ignore[attr-defined]
        apart = {"kind", "init_from"} if kind in self.typed else {"kind"}
        return self.find(kind)(**settings.model_dump(exclude=apart))
