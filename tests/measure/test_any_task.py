"""Any task of lm-eval and one's own, by the command line: scores equal to lm-eval's own."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_hub import SHA
from gain_cl import cli
from gain_cl.config.schema import Tasks
from gain_cl.errors import ConfigError
from gain_cl.measure import record, tasks

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

SUMS = [
    {"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(7)
]
CHOICES = [{"q": f"{i} is", "options": ["odd", "even"], "label": 1 - i % 2} for i in range(6)]
TEXTS = [{"page": f"A page on the number {i}. " * (i + 1)} for i in range(5)]

YAML = {
    "sums": """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {train: sums.jsonl, test: sums.jsonl}}
output_type: generate_until
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer.split('#### ')[-1]}}"
generation_kwargs: {until: ["\\n", "7"], do_sample: false, max_gen_toks: 9}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metadata: {version: 1.5}
""",
    "parity": """
task: parity
dataset_path: json
dataset_kwargs: {data_files: choices.json}
output_type: multiple_choice
test_split: train
doc_to_text: "{{q}}"
doc_to_choice: options
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: mcc}]
""",
    "last": """
task: last
dataset_path: json
dataset_kwargs: {data_files: choices.json}
output_type: loglikelihood
test_split: train
doc_to_text: "{{q}}"
doc_to_target: " {{options[label]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "pages": """
task: pages
dataset_path: json
dataset_kwargs: {data_files: texts.jsonl}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of four tasks of one's own and their data."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    (folder / "choices.json").write_text(json.dumps(CHOICES))
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return folder


@pytest.fixture(scope="module")
def loaded() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gain_cl.models.load import Loaded, byte_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape = {**size, "num_attention_heads": 4, "max_position_embeddings": 512}
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), eos_token_id=eos, initializer_range=0.3, **shape
    )
    model = LlamaForCausalLM(config)
    return Loaded(model, tokenizer, torch.device("cpu"), eos, eos, 512, "", None)


def stock(folder: Path, loaded: Any, name: str, shots: int = 0, **prompt: Any) -> Any:
    """lm-eval's own results, by its own model class and evaluation."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    here = Path.cwd()
    os.chdir(folder)  # where lm-eval looks for data
    try:
        task = TaskManager(include_path=folder, include_defaults=False).load(name)["tasks"][name]
    finally:
        os.chdir(here)
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    lm = HFLM(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),
        batch_size=8,
        max_length=512,
        softmax_dtype="float32",
    )
    return evaluate(lm, {"tasks": {name: task}}, bootstrap_iters=0, log_samples=True, **prompt)


@pytest.mark.parametrize("name", list(YAML))
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_scores_are_lm_evals(name: str, chat: bool, own: Path, loaded: Any) -> None:
    shots = 2 if name == "sums" else 0
    keys: dict[str, Any] = {"include_path": str(own), "fewshot": shots}
    prompt: dict[str, Any] = {}
    if chat:
        keys |= {"chat_template": True, "system_instruction": "Be brief."}
        prompt = {"apply_chat_template": True, "fewshot_as_multiturn": True}
        prompt["system_instruction"] = "Be brief."
    theirs = stock(own, loaded, name, shots, **prompt)
    taskset = tasks.TaskSet(Tasks(names=[name], **keys), loaded.tokenizer, 512)
    counts, rows = taskset.score(loaded, name)
    again, _ = taskset.score(loaded, name)
    assert again == counts and counts.fewshot == shots
    expected = {k: v for k, v in theirs["results"][name].items() if "," in k and "stderr" not in k}
    assert counts.metrics == pytest.approx(expected, rel=1e-5) and expected
    samples = {sample["doc_id"]: sample for sample in theirs["samples"][name]}
    by_item = {item.id: item for item in taskset.items[name]}
    assert [i.row for i in by_item.values()] != sorted(i.row for i in by_item.values())
    for row in rows.to_dict("records"):
        sample = samples[by_item[row["item"]].row]
        assert [r.args[0] for r in by_item[row["item"]].requests] == [
            arguments[0] for arguments in sample["arguments"]
        ]
        if name == "sums":
            assert row["response"] == sample["resps"][0][0]
            assert row["right"] in (0.0, 1.0)
        else:
            nats = [r[0] if isinstance(r[0], float) else r[0][0] for r in sample["resps"]]
            assert row["logprobs"] == pytest.approx(nats, abs=2e-5, rel=1e-6)
    if name == "sums":
        assert counts.correct == sum(rows.right) and counts.correct_norm is None
        assert len(set(rows.response)) > 1 or chat
    if name == "parity":
        assert counts.correct == round(6 * expected["acc,none"])
    if name == "pages":
        assert counts.correct is None


def test_a_perplexity_beyond_float64_is_left_out(own: Path, loaded: Any) -> None:
    (own / "texts.jsonl").write_text(json.dumps({"page": "word" * 100}) + "\n")
    taskset = tasks.TaskSet(Tasks(names=["pages"], include_path=str(own)), loaded.tokenizer, 64)
    told: list[int] = []
    counts, _ = taskset.score(loaded, "pages", told.append)
    assert counts.metrics.keys() == {"byte_perplexity,none", "bits_per_byte,none"}
    assert max(told) == 1


# --- by the command line --------------------------------------------------------------------------


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run` of a tiny model in an empty folder: (exit code, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny = ["debug=smoke", "train.steps=1", "domain=[smoke_a]", "sequence.controls=[]"]
    places = ["output_dir=out", "results_dir=out"]

    def say(*words: str) -> tuple[int, str]:
        code = cli.main(["run", *tiny, *places, *words])
        return code, capsys.readouterr().err

    return say


def test_a_run_of_own_tasks(own: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Generation, a choice and perplexity at both ends; what is recorded is read by the verbs, and
    where the folder lies does not change the run."""
    names = "tasks.names=[sums,parity@4,pages]"
    code, told = say(names, f"tasks.include_path={own}", "tasks.fewshot=1")
    assert code == 0, told
    (path,) = Path("out/runs").glob("*.json")
    found = record.load(path)
    assert [set(s.tasks) for s in found.record.stages] == [{"sums", "parity@4", "pages"}] * 2
    last = found.record.stages[-1].tasks
    assert last["sums"].metrics.keys() == {
        f"{metric},{name}" for metric in ("exact_match", "bleu") for name in ("first", "whole")
    }
    assert last["parity@4"].items == 4 and last["pages"].correct is None
    pin = found.record.pins["tasks"]["sums"]
    assert len(pin["data"]["test"][0]) == 64 and pin["fewshot"] == 1
    assert found.items.response.notna().sum() == 2 * len(SUMS)
    for verb in (["show", str(path)], ["verify", str(path), "output_dir=out"]):
        assert cli.main(verb) == 0, capsys.readouterr().err
    assert "exact_match,first" in capsys.readouterr().out
    moved = own.with_name("moved")
    own.rename(moved)
    assert say(names, f"tasks.include_path={moved}", "tasks.fewshot=1")[0] == 0
    assert len(list(Path("out/runs").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tasks.names=[gsm9k]"], "unknown task 'gsm9k'"),
        (["tasks.names=[gsm8k]"], "tasks.revisions=[openai/gsm8k@COMMIT]"),
        (["tasks.names=[humaneval]", "tasks.run_code=true"], "runs the code that a model writes"),
        (["tasks.names=[evil]"], "runs Python: !function evil.run"),
        (["tasks.names=[remote]"], "takes a metric from the hub, which is code"),
        (["tasks.names=[pickled]"], "has no data set: ./pandas"),
        (["tasks.names=[random]"], "draws answers at random"),
        (["tasks.names=[sums]", "tasks.chat_template=true"], "has no chat template"),
        (["tasks.names=[sums@9]"], "sums has 7 items"),
        (["tasks.names=[jinja]"], "access to attribute '__class__'"),
        (["tasks.names=[loop]"], "maximum recursion depth exceeded"),
        (["tasks.names=[long]"], "answers of long have 2000 tokens, the model's context 1024"),
    ],
)
def test_refused_before_work(words: list[str], says: str, own: Path, say: Any) -> None:
    sums = YAML["sums"].replace("task: sums", "task: {}")
    (own / "evil.py").write_text("open('ran', 'w')\ndef run(doc): return ''\n")
    changed = {
        "evil": ("\"{{answer.split('#### ')[-1]}}\"", "!function evil.run"),
        "remote": ("exact_match, agg", "exact_match, hf_evaluate: true, agg"),
        "pickled": ("dataset_path: json", "dataset_path: ./pandas"),
        "random": ("do_sample: false", "do_sample: true"),
        "jinja": ("{{question}}", "{{question.__class__.__mro__}}"),
        "long": ("max_gen_toks: 9", "max_gen_toks: 2000"),
    }
    for name, (old, new) in changed.items():
        assert old in sums
        (own / f"{name}.yaml").write_text(sums.replace("{}", name, 1).replace(old, new))
    (own / "loop.yaml").write_text("task: loop\ninclude: loop.yaml\n")
    code, told = say(*words, f"tasks.include_path={own}")
    assert code in (64, 65) and says in told.strip().splitlines()[-1]
    assert not list(Path.cwd().rglob("ran")) and not list(Path.cwd().rglob("stages"))


def test_python_of_a_task_runs_where_it_is_allowed(own: Path, loaded: Any) -> None:
    (own / "mine.py").write_text("def target(doc):\n    return doc['answer'][-1]\n")
    text = YAML["sums"].replace("task: sums", "task: coded")
    text = text.replace("\"{{answer.split('#### ')[-1]}}\"", "!function mine.target")
    (own / "coded.yaml").write_text(text)
    asked = Tasks(names=["coded"], include_path=str(own), run_code=True)
    (pin,) = tasks.pin_tasks(asked).values()
    assert (
        len(tasks.TaskSet(asked, loaded.tokenizer).items["coded"]) == 7 and len(pin["code"]) == 64
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """ifeval grades by langdetect, which is an extra of lm-eval."""
    monkeypatch.setitem(sys.modules, "langdetect", None)
    asked = Tasks(names=["ifeval"], revisions=[f"google/IFEval@{SHA}"])
    with pytest.raises(ConfigError, match=r"ifeval needs a package: .*langdetect"):
        tasks.TaskSet(asked, loaded.tokenizer)


def test_a_task_of_lm_eval_on_pinned_hub_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Any
) -> None:
    """gsm8k: five shots as its YAML says, items of the pinned commit, of its part of the repository
    alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import constants

    folder = tmp_path / "cache/datasets--openai--gsm8k/snapshots" / SHA
    (folder / "main").mkdir(parents=True)
    parts = [
        f"- config_name: {part}\n  data_files:\n  - split: train\n    path: {part}/train-*\n"
        f"  - split: test\n    path: {part}/test-*\n"
        for part in ("main", "socratic")
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(parts)}---\n# gsm8k\n")
    for split in ("train", "test"):
        name = folder / f"main/{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(SUMS), name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, told = say("tasks.names=[gsm8k@2]", f"tasks.revisions=[openai/gsm8k@{SHA}]")
    assert code == 0, told
    (path,) = Path("out/runs").glob("*.json")
    found = record.load(path).record
    assert found.pins["tasks"]["gsm8k@2"]["revision"] == SHA
    score = found.stages[-1].tasks["gsm8k@2"]
    assert (score.items, score.fewshot, score.truncated) == (2, 5, 0)
    assert score.metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
