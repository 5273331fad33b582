"""Find the YAML files of configs/ and say what there is. Neither Hydra nor torch is
imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from gain_cl.errors import ConfigError


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
        for file in sorted(
            p.relative_to(folder) for g in groups() for p in (folder / g).rglob("*.yaml")
        ):
            if any((other / file).exists() for other in found):
                what = f"{file} has the name of another preset"
                raise ConfigError(what, where, "give it a name of its own")
        found.append(folder)
    return found


class Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, and no alias stands for so much that nobody can read
    it."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > 100:
            raise yaml.MarkedYAMLError(problem="more than 100 aliases")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            what = f"{max(keys, key=keys.count)!r} is given twice"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        return node


def read_yaml(file: Path, kind: type[Loader] = Loader) -> Any:
    """Return what a YAML file holds. YAMLError also for keys given twice."""
    loader = kind(file.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


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


def quote(text: str) -> str:
    """Return a string as Hydra's grammar quotes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
