"""What defines a task, and where its items come from: the stock tasks, any other task of the
installed lm-eval by its name, and YAML files in a folder of one's own.

Torch-free. lm-eval is found, not imported. Nothing that a definition names is run here.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from gain_cl.config import presets
from gain_cl.config.schema import Tasks
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.system import hub
from gain_cl.system.hashes import file_sha256, folder_pin, json_sha256


class Stock(BaseModel):
    """A stock lm-eval task: a row of stock.yaml, which says what each field is."""

    folder: str
    split: str
    items: int
    member: str
    read: str
    repo: str
    revision: str
    files: str


_ROWS = presets.read_yaml(Path(__file__).with_name("stock.yaml"))
STOCK = {name: Stock(**row) for name, row in _ROWS.items()}
"""The tasks whose items are in a pinned archive too. One row adds one."""

LOCAL = ("arrow", "csv", "json", "parquet", "text")
"""Kinds of local files that a definition may read (dataset_path). Others may hold pickles."""

REFUSED = {
    "class": "is Python that fetches its own data",
    "custom_dataset": "makes its own data by Python",
    "unsafe_code": "runs the code that a model writes",
    "doc_to_image": "shows pictures",
    "doc_to_audio": "plays sound",
}
"""Key of a definition -> what it would mean. Such a task is refused."""


class Function(str):
    """The name of a function in a definition (!function): what YAML gives for it here."""


class _Loader(presets.Loader):
    """YAML in which a function's name stays a name."""


_Loader.add_constructor("!function", lambda loader, node: Function(node.value))


class Definition(NamedTuple):
    """A task. path: of its YAML file. settings: what it and the files that it includes say. own: it
    is the user's."""

    task: str
    path: Path
    settings: dict[str, Any]
    own: bool

    @property
    def version(self) -> str:
        """Return the version its author gave it, which changes with prompts or scoring."""
        about = self.settings.get("metadata") or {}
        return str(about.get("version") if isinstance(about, dict) else about)

    def shots(self, asked: Tasks) -> int:
        """Return how many examples a prompt shows."""
        own = self.settings.get("num_fewshot") or 0
        return own if asked.fewshot is None else asked.fewshot

    def pin(self, asked: Tasks) -> dict[str, Any]:
        """Return what identifies prompts and items. Nothing is downloaded."""
        pin: dict[str, Any] = {"definition": json_sha256(repr(self.settings))}
        if self.own and any(_functions(self.settings)):
            pin["code"] = folder_pin(self.path.parent, ["*.py"])
        if self.settings.get("dataset_path") in LOCAL:
            files = self._files().items()
            data = {split: [file_sha256(Path(p)) for p in paths] for split, paths in files}
            return {**pin, "data": data}
        repo, revision = self._repository(asked)
        return {**pin, "repo": repo, "revision": revision}

    def rows(self, asked: Tasks) -> Any:
        """Return the data set, split -> rows. Hub data are those of the pinned commit. DataError:
        they cannot be read."""
        from datasets import load_dataset

        name = str(self.settings.get("dataset_path"))
        mine = ("data_files", "revision", "streaming", "trust_remote_code")
        given = self.settings.get("dataset_kwargs") or {}
        keys: dict[str, Any] = {k: v for k, v in given.items() if k not in mine}
        if name in LOCAL:
            keys["data_files"] = self._files()
        else:
            repo, revision = self._repository(asked)
            if "data_files" in given:
                keys["data_files"] = given["data_files"]
            patterns = list(_paths(given.get("data_files"))) or self._patterns(repo, revision)
            name = str(hub.snapshot(repo, revision, patterns, repo_type="dataset"))
        try:  # no cache: the library's knows sizes and times of files, not what they hold
            with tempfile.TemporaryDirectory() as cache:
                part = self.settings.get("dataset_name")
                return load_dataset(name, part, cache_dir=cache, keep_in_memory=True, **keys)
        except Exception as error:  # the library's own errors and those of its readers
            what = f"cannot read the items of {self.task}: {error}".splitlines()[0]
            raise DataError(what, name, "check the data and the task's YAML") from None

    def _files(self) -> dict[str, list[str]]:
        """Return split -> paths of local data, which lie beside the YAML or where the program was
        started."""
        given = (self.settings.get("dataset_kwargs") or {}).get("data_files")
        found = {}
        for split, names in (given if isinstance(given, dict) else {"train": given}).items():
            found[split] = [str(self._file(name)) for name in _paths(names)]
        if not any(found.values()):
            do = "name local files: dataset_kwargs: {data_files: {test: FILE}}"
            raise ConfigError(f"{self.task} names no data", str(self.path), do)
        return found

    def _file(self, name: str) -> Path:
        for path in (self.path.parent / name, Path(name)):
            if path.is_file():
                return path.absolute()
        what = f"{self.task} names {name!r}, which is no local file"
        raise ConfigError(what, str(self.path), "put it beside the YAML file")

    def _repository(self, asked: Tasks) -> tuple[str, str]:
        """Return hub repository and commit. ConfigError: there is none, or no commit is pinned."""
        repo = str(self.settings.get("dataset_path"))
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", repo):
            do = f"use a hub data set or one of {', '.join(LOCAL)} with data_files"
            raise ConfigError(f"{self.task} has no data set: {repo}", str(self.path), do)
        pinned = {s.repo: s.revision for s in STOCK.values()}
        pinned |= dict(p.rsplit("@", 1) for p in asked.revisions if "@" in p)
        try:
            return repo, hub.commit(repo, pinned.get(repo), "dataset")
        except ConfigError as error:
            what = f"{self.task}: {error.what}"
            do = f"tasks.revisions=[{repo}@COMMIT]; {error.do}"
            raise ConfigError(what, "tasks.revisions", do) from None

    def _patterns(self, repo: str, revision: str) -> list[str]:
        """Return the files of this part of a repository, by its card; all where it tells
        nothing."""
        try:
            folder = hub.snapshot(repo, revision, ["README.md"], repo_type="dataset")
        except DataError:
            return ["*"]
        text = (folder / "README.md").read_text(encoding="utf-8")
        about = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        told = presets.Loader(about[1]).get_single_data() if about else {}
        parts = told.get("configs") or []
        name = self.settings.get("dataset_name") or "default"
        parts = [p for p in parts if p.get("config_name") == name] or parts
        return [path for part in parts for path in _paths(part.get("data_files"))] or ["*"]


def _paths(given: Any) -> Iterator[str]:
    """Yield the paths in what may be a path, a list of them or a mapping of splits."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict):
        for part in [given["path"]] if "path" in given else given.values():
            yield from _paths(part)
    else:
        for part in given or []:
            yield from _paths(part)


def _functions(value: Any) -> Iterator[str]:
    """Yield the functions that a definition names."""
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


@functools.cache
def stock_root() -> Path:
    """Return the folder of lm-eval's tasks. It is found, not imported, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        do = "pip install lm-eval, or use tasks=none"
        raise ConfigError("lm-eval is not installed", "tasks.names", do)
    return Path(spec.submodule_search_locations[0]) / "tasks"


@functools.cache
def _index(root: Path) -> dict[str, Path]:
    """Return task -> YAML file of a folder. Of each file one line is read."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        if name := re.search(rb"(?m)^task:[ \t]*[\"']?([^\s\"'#]+)", path.read_bytes()):
            found.setdefault(name[1].decode(), path)
    return found


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    """Return what a YAML file and those it includes say, the including one last."""
    try:
        settings: dict[str, Any] = presets.read_yaml(path, _Loader)
        included = settings.pop("include", [])
    except AttributeError:
        raise ConfigError("a task is a mapping of keys", str(path), "mend the file") from None
    for name in [included] if isinstance(included, str) else included:
        settings = {**_read(path.parent / name), **settings}
    return settings


@functools.cache
def find(task: str, include_path: str | None, run_code: bool) -> Definition:
    """Return the definition of a task. ConfigError: there is no such task, or one that is not run
    here, or it would run Python of the user's that is not allowed."""
    own = _index(Path(include_path)) if include_path else {}
    if task in STOCK and task in own:
        raise ConfigError(f"{task} is a stock task", str(own[task]), "give it a name of its own")
    root = stock_root() / STOCK[task].folder if task in STOCK else stock_root()
    path = own.get(task) or _index(root).get(task)
    if path is None:
        here = suggest(task, {**_index(stock_root()), **own, **STOCK}, listing=False)
        do = here or "`lm_eval ls tasks` lists lm-eval's, tasks.include_path=FOLDER adds your own"
        raise ConfigError(f"unknown task {task!r}", "tasks.names", do)
    found = Definition(task, path, _read(path), task in own)
    settings, code = found.settings, next(_functions(found.settings), None)
    greedy = settings.get("generation_kwargs") or {}
    why = [text for key, text in REFUSED.items() if settings.get(key)]
    if settings.get("repeats", 1) > 1 or greedy.get("do_sample") or greedy.get("temperature"):
        why.append("draws answers at random, and here they are the most likely ones")
    if any(metric.get("hf_evaluate") for metric in settings.get("metric_list") or []):
        why.append("takes a metric from the hub, which is code")
    if why:
        raise ConfigError(f"{task} {why[0]}", "tasks.names", "leave it out")
    if found.own and code and not run_code:
        do = "read it, then allow it with tasks.run_code=true"
        raise ConfigError(f"{task} runs Python: !function {code}", str(path), do)
    return found
