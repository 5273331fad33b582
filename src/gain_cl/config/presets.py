"""Find the YAML files of configs/ and say what there is. Neither Hydra nor torch is
imported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from gain_cl.errors import ConfigError

MOST_BYTES, MOST_VALUES = 1_000_000, 100_000
"""Of a YAML file."""


def configs_dir() -> Path:
    """Return the shipped presets: inside the installed package, else in the checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / "run.yaml").is_file():
            return folder
    raise ConfigError(
        "the presets are missing: no run.yaml", str(package / "configs"), "install gain_cl again"
    )


def folders(config_dirs: Iterable[str | Path] = ()) -> list[Path]:
    """Return the folders of presets, the shipped ones first. ConfigError for a folder that holds
    none or shadows another preset."""
    found = [configs_dir()]
    for given in config_dirs:
        folder, where = Path(given).expanduser().absolute(), f"--config-dir {given}"
        if not folder.is_dir():
            do = "give a folder that holds model/NAME.yaml, domain/NAME.yaml, ..."
            raise ConfigError("no such folder", where, do)
        if not any((folder / g).is_dir() for g in groups()):
            do = f"put them into its subfolders {', '.join(groups())}"
            raise ConfigError("no presets in the folder", where, do)
        for file in sorted(p for g in groups() for p in (folder / g).rglob("*.yaml")):
            name = file.relative_to(folder)
            if any((other / name).exists() for other in found):
                what = f"{name} has the name of another preset"
                raise ConfigError(what, where, "give it a name of its own")
            if not isinstance(read_yaml(file) or {}, dict):  # Hydra knows no bounds
                raise ConfigError("a preset is a mapping of keys", short(file), "correct the file")
        found.append(folder)
    return found


class Loader(yaml.SafeLoader):
    """YAML in which no key is given twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                what = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(file: Path, kind: type[Loader] = Loader) -> Any:
    """Return what a YAML file holds. ConfigError: it is none, gives a key twice, or stands for more
    than anybody writes: aliases of aliases fill any memory."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise yaml.YAMLError(f"no regular file of at most {MOST_BYTES:,} bytes")
        loader = kind(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if _values(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values")
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = short(file) + (f":{mark.line + 1}" if mark else "")
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"bad YAML: {what}", where, "correct the file") from None


def _values(node: Any, known: dict[int, float]) -> float:
    """Return how many values a node stands for. What an alias repeats counts each time."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # if it holds itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else sum(node.value, ())
        known[id(node)] = sum(_values(part, known) for part in parts)
    return known[id(node)]


def groups() -> list[str]:
    """Return model, method, domain and the other subfolders of configs/."""
    return sorted(p.name for p in configs_dir().iterdir() if p.is_dir())


def names(group: str, config_dirs: Iterable[str | Path] = ()) -> list[str]:
    """Return the names of the presets of a group, shipped ones first."""
    return [
        p.name.removesuffix(".yaml")
        for f in folders(config_dirs)
        for p in sorted((f / group).glob("*.yaml"))
    ]


def short(path: str | Path) -> str:
    """Return a preset's path as briefly as it can be said: shipped ones from configs/ on."""
    path = Path(path)
    root = configs_dir()
    return str(Path("configs") / path.relative_to(root)) if path.is_relative_to(root) else str(path)


def search_path(config_dirs: Iterable[str | Path]) -> list[str]:
    """Return Hydra's override that adds folders of presets."""
    more = [quote(f"file://{f}") for f in folders(config_dirs)[1:]]
    return [f"hydra.searchpath=[{','.join(more)}]"] if more else []


def folder_name(path: str) -> str:
    """Return the name of a model that its folder gives it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).expanduser().absolute().name).lstrip(".-")


def quote(text: str) -> str:
    """Return a string as Hydra's grammar quotes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
