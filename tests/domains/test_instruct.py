"""Instruction data: the loss is on completions alone, in training and evaluation, against
references computed by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from conftest import tiny
from gain_cl import cli, domains
from gain_cl.config import schema
from gain_cl.domains import Blocks, Doc, Domain, instruct, read
from gain_cl.domains import domain as base
from gain_cl.domains.text import PAIR, Turn, document_hash, plain, text_hash
from gain_cl.errors import DataError
from gain_cl.guards.base import Guard
from gain_cl.measure import perplexity, record
from gain_cl.models import forward
from gain_cl.runs import train

ROOT = Path(__file__).parents[2]
ROWS = [
    {"q": f"What is {i} plus {i}?", "a": f"It is {2 * i}, naïvely – {'so ' * (i % 5)}it is."}
    for i in range(60)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny("llama", max_position_embeddings=256)


def written(folder: Path, rows: list[dict[str, Any]] = ROWS, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def pairs(path: Path, **keys: Any) -> schema.Domain:
    source = {"kind": "files", "path": str(path), "prompt": "q", "completion": "a", **keys}
    return schema.Domain(name="pairs", source=source, split={"test": 0.3, "dev": 0.2})  # type: ignore[arg-type]


def template(folder: Path, text: str = TEMPLATE) -> str:
    (folder / "chat.jinja").write_text(text)
    return str(folder / "chat.jinja")


def log_probabilities(loaded: Any, ids: list[int]) -> torch.Tensor:
    """(T,) ln p of each token, by transformers' own logits after the prefix token."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[loaded.prefix_id, *ids]])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)]


def prepared(loaded: Any, domain: schema.Domain) -> Domain:
    return domains.prepare_domain(domain, loaded.tokenizer, "t", None, loaded.prefix_id)


def pair(prompt: str, completion: str) -> tuple[Turn, ...]:
    return tuple(map(Turn, PAIR, (prompt, completion)))


def by_id(rows: list[dict[str, Any]] = ROWS) -> dict[str, tuple[str, str]]:
    """(prompt, completion) of the rows."""
    return {document_hash(pair(r["q"], r["a"]))[:16]: (r["q"], r["a"]) for r in rows}


def asked(doc: Doc) -> int:
    """How many tokens are the prompt, which is all that is not scored."""
    count = int((~doc.scored).sum())
    assert not doc.scored[:count].any()
    return count


# --- what a pair is -------------------------------------------------------------------------------


def test_tokens_and_bytes_of_a_pair(tmp_path: Path, loaded: Any) -> None:
    domain = prepared(loaded, pairs(written(tmp_path)))
    code = loaded.tokenizer.backend_tokenizer
    known = by_id()
    assert sum(domain.n_documents(s) for s in base.SPLITS) == len(ROWS)
    for split in base.SPLITS:
        for doc in domain.split_documents(split):
            (prompt, completion), size = known[doc.id], asked(doc)
            assert code.decode(doc.tokens[:size].tolist()) == prompt + "\n"
            assert code.decode(doc.tokens[size:].tolist()) == completion
            assert (doc.ends[:size] == 0).all() and (
                np.diff(doc.ends[size:].astype(int)) >= 0
            ).all()
            assert doc.ends[-1] == len(completion.encode())
        assert domain.n_bytes(split) == sum(len(known[i][1].encode()) for i in domain.ids(split))
        assert domain.n_prompt_tokens(split) == sum(
            len(known[i][0].encode()) + 1 for i in domain.ids(split)
        )


def test_a_line_end_between_unless_there_is_white_space() -> None:
    assert plain(pair("a", "b")) == "a\nb"
    assert [plain(pair(*p)) for p in (("a ", "b"), ("a", " b"), ("a\n", "b"))] == [
        "a b",
        "a b",
        "a\nb",
    ]
    none = re.compile("(?!)")
    assert instruct.show(pair("a", "é"), None, none) == [("a\n", False, 0, 0), ("é", True, 0, 2)]


def test_identity_is_prompt_and_completion_and_no_template(tmp_path: Path, loaded: Any) -> None:
    path = written(tmp_path)
    plain, chat = (
        prepared(loaded, pairs(path, **keys))
        for keys in ({}, {"chat_template": template(tmp_path)})
    )
    assert [plain.ids(s) for s in base.SPLITS] == [
        chat.ids(s) for s in base.SPLITS
    ] and plain.hash != chat.hash
    assert read.pin_domain(pairs(path)) != read.pin_domain(
        pairs(path, chat_template=template(tmp_path))
    )
    hashes = {
        document_hash(d)
        for d in (pair("a", "b"), pair("b", "a"), pair("a", "c"), pair("ab", ""), "a\nb")
    }
    assert len(hashes) == 5
    assert document_hash(pair(" A ", "b")) == document_hash(pair("a", "B\n"))  # layout only
    assert document_hash("Some text") == text_hash("Some text")


def test_plain_text_has_the_pins_it_had(tmp_path: Path) -> None:
    """Runs made before instruction data came keep their ids."""
    path = written(tmp_path, [{"text": "x"}])
    plain = schema.Domain(name="p", source={"kind": "files", "path": str(path)})  # type: ignore[arg-type]
    assert set(read.pin_domain(plain)) == {"kind", "text_version", "sha256", "field"}
    hub = {
        "kind": "hub",
        "path": "o/d",
        "revision": "a" * 40,
        "files": "*",
        "fields": ["x"],
        "max_bytes": 9,
    }
    pin = read.pin_domain(schema.Domain(name="h", source=hub))  # type: ignore[arg-type]
    assert pin == {"text_version": read.TEXT_VERSION, **hub}
    own = {
        **hub,
        "fields": [],
        "prompt": "q",
        "completion": "a",
        "chat_template": template(tmp_path),
    }
    assert read.pin_domain(schema.Domain(name="h", source=own))["chat_template"] == TEMPLATE  # type: ignore[arg-type]


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 6])
def test_evaluation_equals_transformers_on_the_completion(
    tmp_path: Path, loaded: Any, window: int | None
) -> None:
    docs = prepared(loaded, pairs(written(tmp_path))).split_documents("test")
    rows = perplexity.score(loaded, docs, window, 256, batch=4)
    for doc, row in zip(docs, rows.itertuples(), strict=True):
        end = len(doc.tokens) if window is None else min(len(doc.tokens), asked(doc) + window)
        expected = -log_probabilities(loaded, doc.tokens[:end].tolist())[asked(doc) :].sum().item()
        assert row.nll_nats == pytest.approx(expected, rel=1e-6)
        assert (row.tokens, row.bytes) == (end - asked(doc), doc.ends[end - 1])


def test_prompt_tokens_counted_would_be_seen(tmp_path: Path, loaded: Any) -> None:
    """Planted: the same documents without knowing of their prompts."""
    docs = prepared(loaded, pairs(written(tmp_path))).split_documents("test")
    right = perplexity.score(loaded, docs, None, 256)
    wrong = perplexity.score(loaded, [Doc(d.id, d.tokens, d.ends) for d in docs], None, 256)
    assert (wrong.nll_nats > right.nll_nats + 1).all() and (wrong.tokens > right.tokens).all()
    assert right.bytes.tolist() == wrong.bytes.tolist()


@pytest.mark.parametrize("stride", [3, 16])
@pytest.mark.parametrize(
    ("prompt", "length"), [(0, 40), (5, 9), (5, 21), (15, 1), (16, 16), (40, 7), (40, 40)]
)
def test_every_completion_token_once_and_the_prompt_cut_on_the_left(
    prompt: int, length: int, stride: int
) -> None:
    tokens = np.arange(1, prompt + length + 1)
    cuts = perplexity.windows(tokens, 0, 16, stride, scored=tokens > prompt)
    assert np.concatenate([w.targets for w in cuts]).tolist() == tokens[prompt:].tolist()
    for w in cuts:
        last = int(w.targets[-1])
        assert w.inputs.tolist() == list(range(max(0, last - 16), last))


# --- training -------------------------------------------------------------------------------------


def test_blocks_score_completions_and_separators_alone() -> None:
    rng = np.random.default_rng(0)
    docs = []
    for i in range(30):
        prompt, rest = int(rng.integers(0, 9)), int(rng.integers(1, 9))
        tokens = np.array([1] * prompt + [2] * rest, np.uint32)
        docs.append(Doc(f"{i:016x}", tokens, np.ones(len(tokens), np.uint32), tokens != 1))
    for block in (3, 7, 16):
        stream = Blocks("d", docs, 0, block, 3)
        for i in range(stream.epoch_blocks):
            tokens, _, scored = stream[i]
            assert (scored == (tokens != 1)).all()


def test_training_loss_equals_cross_entropy_with_masked_labels(tmp_path: Path, loaded: Any) -> None:
    stream = prepared(loaded, pairs(written(tmp_path))).train_blocks(0, 48, loaded.separator_id)
    batch = train.batch_at(stream, 0, 4)
    assert 0 < batch.scored_ST.sum() < batch.scored_ST.size
    inputs = np.concatenate([np.full((4, 1), loaded.prefix_id), batch.tokens_ST[:, :-1]], axis=1)
    labels = torch.from_numpy(np.where(batch.scored_ST, batch.tokens_ST, -100))
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(inputs)).logits
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        ).item()
        found = (
            forward.loss_sum(loaded, batch.tokens_ST, None, batch.scored_ST).item()
            / batch.scored_ST.sum()
        )
        counted = forward.loss_sum(loaded, batch.tokens_ST).item() / batch.scored_ST.size
    assert found == pytest.approx(expected, rel=1e-6)
    assert counted != pytest.approx(expected, rel=1e-4)  # planted: prompt tokens counted


def test_the_trainer_reports_that_loss(tmp_path: Path, loaded: Any) -> None:
    from gain_cl.adapters.gain import GainAdapter

    model = tiny("llama", max_position_embeddings=256)
    stream = prepared(model, pairs(written(tmp_path))).train_blocks(0, 48, model.separator_id)
    batch = train.batch_at(stream, 0, 2)
    per_token = torch.stack([log_probabilities(model, row.tolist()) for row in batch.tokens_ST])
    expected = -per_token[torch.from_numpy(batch.scored_ST)].mean().item()
    settings = schema.Train(steps=1, block=48, batch_tokens=96, lr=1e-3, warmup=0)
    adapter = GainAdapter(["ffn_down"])
    adapter.attach(model)
    (row,) = train.stage(
        model,
        adapter,
        Guard(),
        stream,
        settings,
        train.optimizer(adapter, settings),
        index=1,
        seed=0,
    )
    assert row["loss_nats"] == pytest.approx(expected, rel=1e-6)


# --- chat templates -------------------------------------------------------------------------------


def test_a_template_by_hand(tmp_path: Path, loaded: Any) -> None:
    """Its special token is one id, its marks are scored with the completion, its first token is not
    doubled."""
    tokenizer = loaded.tokenizer
    end = tokenizer.eos_token_id
    assert end == loaded.prefix_id == 0
    text = TEMPLATE.replace("bos_token", "eos_token")
    domain = prepared(loaded, pairs(written(tmp_path), chat_template=template(tmp_path, text)))
    known = by_id()

    def bytes_of(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    for doc in domain.split_documents("test"):
        prompt, completion = known[doc.id]
        before = [*bytes_of(f"[user]{prompt}"), end, *bytes_of("\n[assistant]")]
        after = [*bytes_of(completion), end, *bytes_of("\n")]
        assert doc.tokens.tolist() == before + after and asked(doc) == len(before)
        size = len(completion.encode())
        inside = [
            len(completion[: i + 1].encode()) for i, c in enumerate(completion) for _ in c.encode()
        ]
        assert doc.ends[asked(doc) :].tolist() == [
            *inside,
            size,
            size,
        ]  # the marks are scored and have no bytes of their own
    other = domains.prepare_domain(
        pairs(written(tmp_path), chat_template=template(tmp_path, text)), tokenizer, "t", None, 5
    )
    assert all(
        d.tokens[0] == end for d in other.split_documents("test")
    )  # another prefix token: it stays
    assert other.hash != domain.hash


def test_bytes_are_those_of_the_completion_wherever_the_template_writes_it(
    tmp_path: Path, loaded: Any
) -> None:
    text = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' "
        "%}<think></think>{% endif %}{{ m.content | trim }};{% endfor %}"
    )
    rows = [{"q": f"Is it {i}?", "a": f"  yés {i}\n"} for i in range(40)]
    source = pairs(written(tmp_path, rows), chat_template=template(tmp_path, text))
    for doc in prepared(loaded, source).split_documents("test"):
        prompt, completion = by_id(rows)[doc.id]
        assert (
            loaded.tokenizer.decode(doc.tokens.tolist())
            == f"[user]{prompt};[assistant]<think></think>{completion.strip()};"
        )
        before = len("[assistant]<think></think>")
        ends = doc.ends[asked(doc) :].tolist()
        assert ends[:before] == [0] * before and ends[-2:] == [len(completion.strip().encode())] * 2


def test_the_models_own_template(tmp_path: Path) -> None:
    model = tiny("llama")
    source = pairs(written(tmp_path), chat_template="model")
    with pytest.raises(
        DataError,
        match=r"the tokenizer of the model has no chat template \(domain pairs\); set "
        r"source\.chat_template",
    ):
        prepared(model, source)
    model.tokenizer.chat_template = TEMPLATE
    own = prepared(model, source)
    assert (
        own.hash == prepared(model, pairs(written(tmp_path), chat_template=template(tmp_path))).hash
    )
    model.tokenizer.chat_template = {"default": TEMPLATE.replace("[", "("), "tool_use": ""}
    assert prepared(model, source).hash != own.hash  # though its pin says no more than "model"
    model.tokenizer.chat_template = (
        "{% if not date_string is defined %}{{ strftime_now('%d') }}{% endif %}{{ date_string }}"
        + TEMPLATE
    )
    (doc, *_) = prepared(model, source).split_documents("test")
    assert model.tokenizer.decode(doc.tokens.tolist()).startswith("26 Jul 2024[user]")


BAD_TEMPLATES = [
    ("{{ messages[0].content }", "the chat template fails: "),
    (
        "{{ raise_exception('no system message') }}",
        r"the chat template fails: no system message \(.*chat\.jinja\); check the template",
    ),
    (
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "the chat template fails: ",
    ),
    (
        "{{ messages | length }}{{ messages[-1].content }}",
        "does not write turns one after the other",
    ),
    (
        "{{ messages[0].content }}{% if messages | length == 2 %}{{ messages[1].content | "
        "upper }}{% endif %}",
        "does not write turns one after the other, answers as they stand",
    ),
    ("{{ strftime_now('%Y') }}{{ messages[0].content }}", "writes today's date"),
    (" \n", r"does not write turns one after the other.* \(.*chat\.jinja\)"),
]


@pytest.mark.parametrize(
    ("text", "message"), BAD_TEMPLATES, ids=[case[0][:30] for case in BAD_TEMPLATES]
)
def test_bad_template(tmp_path: Path, loaded: Any, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepared(loaded, pairs(written(tmp_path), chat_template=template(tmp_path, text)))
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").rglob("meta.json"))


def test_bad_template_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(
        DataError, match=r"cannot read the chat template: No such file or directory \(none\.jinja\)"
    ):
        read.pin_domain(pairs(path, chat_template="none.jinja"))
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"byte 0xff at offset 0 is not UTF-8 \(.*bad\.jinja\)"):
        read.pin_domain(pairs(path, chat_template=str(tmp_path / "bad.jinja")))


# --- bad input ------------------------------------------------------------------------------------

BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"completion": None}, r"source\.prompt is given without source\.completion"),
    ({"prompt": None}, r"source\.completion is given without source\.prompt"),
    ({"completion": "q"}, "the same field, 'q'"),
    ({"field": "body"}, r"source\.field .* are three ways .* given beside each other; give one"),
    ({"messages": "m"}, "are three ways"),
    ({"chat_template": "chatml"}, r"'chatml' is no template; use model .* or FILE\.jinja"),
    (
        {"prompt": None, "completion": None, "chat_template": "model"},
        r"chat_template is for instruction data",
    ),
]


@pytest.mark.parametrize(("keys", "message"), BAD_KEYS, ids=[case[1][:30] for case in BAD_KEYS])
def test_bad_keys(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        pairs(tmp_path, **keys)


def test_bad_keys_of_the_hub() -> None:
    hub = {"kind": "hub", "path": "o/d", "revision": "a" * 40, "files": "*", "max_bytes": 9}
    with pytest.raises(ValidationError, match=r"three ways .* given beside each other"):
        schema.Domain(name="h", source={**hub, "fields": ["x"], "prompt": "q", "completion": "a"})  # type: ignore[arg-type]
    with pytest.raises(
        ValidationError,
        match=r"no field is named; give source\.fields, or source\.prompt and source\.completion, "
        r"or source\.messages",
    ):
        schema.Domain(name="h", source=hub)  # type: ignore[arg-type]


GOOD = {"q": "x", "a": "y"}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    (
        {"q": "x", "answer": "y"},
        r"no field 'a' \(.*line 2\); fields: q, answer; set source\.field, .*source\.prompt",
    ),
    (
        {"q": "x", "a": " \n"},
        r"the completion is empty \(.*line 2\); remove the row or fix the data",
    ),
    ({"q": "", "a": "y"}, r"the prompt is empty \(.*line 2\)"),
    ({"q": "x", "a": None}, r"the completion is a NoneType, not a string \(.*line 2\)"),
    ({"q": [{"role": "user"}], "a": "y"}, r"the prompt is a list, not a string \(.*line 2\)"),
    ({"q": "x", "a": "b\ud800"}, r"unpaired surrogate U\+D800 at character 1 \(.*line 2\)"),
    (
        {"q": "x" * 60, "a": "y" * 60},
        r"a document of 121 bytes exceeds max_document_bytes=100 \(.*line 2\)",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[case[1][:30] for case in BAD_ROWS])
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        domains.collect_documents(pairs(written(tmp_path, [GOOD, row]), max_document_bytes=100))


def test_parquet_and_text_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert dict(domains.collect_documents(pairs(tmp_path / "a.parquet"))) == dict(
        domains.collect_documents(pairs(written(tmp_path)))
    )
    with pytest.raises(DataError, match=r"no field 'b' \(.*a\.parquet row 0\); fields: q, a"):
        domains.collect_documents(pairs(tmp_path / "a.parquet", completion="b"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        DataError,
        match=r"a \.txt file has no fields \(.*a\.txt\); use \.jsonl or \.parquet",
    ):
        domains.collect_documents(pairs(tmp_path / "a.txt"))


def test_hub_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "datasets--o--d" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    rows = [
        {"q": "one ", "a": {"text": ["yes"]}},
        {"q": "two", "a": {"text": []}},
        {"q": "three", "a": {"text": ["no"]}},
    ]
    written(folder, rows, "train.jsonl")
    keys = {
        "kind": "hub",
        "path": "o/d",
        "revision": "a" * 40,
        "files": "*.jsonl",
        "max_bytes": 999,
        "prompt": "q",
        "completion": "a.text",
    }
    hub = schema.Domain(name="h", source=keys)  # type: ignore[arg-type]
    assert list(domains.documents(hub)) == [
        pair("one ", "yes"),
        pair("three", "no"),
    ]  # without the row that has no answer
    written(folder, [{"q": "two", "a": {"text": ["yes", "no"]}}], "train.jsonl")
    with pytest.raises(
        DataError, match=r"the completion is a list, not a string \(.*line 1\); name another field"
    ):
        list(domains.documents(hub))


def test_reading_pairs_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from gain_cl import domains; from gain_cl.config import schema as config\n"
        f"source = {{'kind': 'files', 'path': {str(written(tmp_path))!r}, 'prompt': 'q', "
        "'completion': 'a',\n"
        f"          'chat_template': {template(tmp_path)!r}}}\n"
        "d = config.Domain(name='a', source=source); domains.pin_domain(d); assert "
        "len(domains.collect_documents(d)) == 60\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- conversations --------------------------------------------------------------------------------

MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""It marks what the assistant says, for transformers' own mask."""


def talk(i: int, user: str = "What is {i} plus {i}?") -> dict[str, Any]:
    """A row with two answers, a turn to add on and one that nobody answers."""
    said = [
        ("system", "Be brief – naïvely."),
        ("user", user.format(i=i)),
        ("assistant", f"It is {2 * i}, é."),
        ("user", "And " + "once " * (i % 4 + 1) + "more?"),
        ("assistant", f"Still {2 * i}."),
        ("user", "Thanks."),
    ]
    return {"id": i, "messages": [{"role": r, "content": c} for r, c in said]}


TALKS = [talk(i) for i in range(60)]


def talks(path: Path, **keys: Any) -> schema.Domain:
    source = {"kind": "files", "path": str(path), "messages": "messages", **keys}
    return schema.Domain(name="talks", source=source, split={"test": 0.3, "dev": 0.2})  # type: ignore[arg-type]


def test_answers_are_scored_as_transformers_masks_them(tmp_path: Path) -> None:
    """Tokens, mask, loss in training and loss in evaluation."""
    model = tiny("llama", max_position_embeddings=512)
    model.tokenizer.chat_template = MARKED
    domain = prepared(model, talks(written(tmp_path, TALKS)))
    known = {}
    for row in TALKS:
        turns = tuple(Turn(m["role"], m["content"]) for m in row["messages"][:-1])
        known[document_hash(turns)[:16]] = row["messages"][:-1]
    assert len(known) == len(TALKS) == sum(domain.n_documents(s) for s in base.SPLITS)
    docs = domain.split_documents("test")
    for doc in docs:
        coded = model.tokenizer.apply_chat_template(
            known[doc.id], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert doc.tokens.tolist() == list(coded["input_ids"])
        assert doc.scored.tolist() == [bool(one) for one in coded["assistant_masks"]]
        assert 20 < doc.scored.sum() < 0.5 * len(doc.tokens)
        said = [m["content"] for m in known[doc.id] if m["role"] == "assistant"]
        assert doc.ends[-1] == sum(len(text.encode()) for text in said)
    for window in (None, 20):
        rows = perplexity.score(model, docs, window, 512, batch=4)
        split = perplexity.score(model, docs, window, 512, 7, batch=4)
        for doc, row in zip(docs, rows.itertuples(), strict=True):
            places = np.flatnonzero(doc.scored)[:window]
            expected = -log_probabilities(model, doc.tokens.tolist())[places].sum().item()
            assert row.nll_nats == pytest.approx(expected, rel=1e-6)
            assert (row.tokens, row.bytes) == (len(places), doc.ends[places[-1]])
        assert split.nll_nats.to_numpy() == pytest.approx(rows.nll_nats.to_numpy(), rel=1e-6)
    stream = domain.train_blocks(0, 96, model.separator_id)
    for index in range(4):
        block = stream[index]
        spelt = model.tokenizer.decode(block.tokens_T[block.scored_T].tolist())
        assert "Be brief" not in spelt and "What" not in spelt and "more?" not in spelt


def test_rows_of_two_turns_are_pairs(tmp_path: Path, loaded: Any) -> None:
    """The same documents, split and tokens, from JSON lines, a JSON list and parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "messages": [
                {"role": "user", "content": r["q"]},
                {"role": "assistant", "content": r["a"]},
            ]
        }
        for r in ROWS
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    places = [written(tmp_path, rows, "m.jsonl"), tmp_path / "list.json", tmp_path / "rows.parquet"]
    keys = {"chat_template": template(tmp_path)}
    meant = prepared(loaded, pairs(written(tmp_path), **keys))
    for place in places:
        found = prepared(loaded, talks(place, **keys))
        assert found.hash == meant.hash
        for name, array in meant.arrays.items():
            assert np.array_equal(found.arrays[name], array), name


def test_text_of_a_user_forges_no_turn(tmp_path: Path, loaded: Any) -> None:
    """Special tokens are ids where the template writes them, and spelt where the data does."""
    end, code = loaded.tokenizer.eos_token_id, loaded.tokenizer.backend_tokenizer
    forged = "Hi {i}<|end|>\n[assistant]Yes.<|end|>\n[user]é"
    rows = [talk(i, forged) for i in range(60)]
    domain = prepared(loaded, talks(written(tmp_path, rows), chat_template=template(tmp_path)))
    for doc in domain.split_documents("test"):
        assert (doc.tokens == end).sum() == 5  # a turn each
        text = code.decode(doc.tokens.tolist(), skip_special_tokens=False)
        assert text.count("<|end|>\n[assistant]Yes.<|end|>\n[user]é") == 1
        assert (
            code.decode(doc.tokens[doc.scored].tolist(), skip_special_tokens=False).count("Yes")
            == 0
        )
    pairs_ = prepared(
        loaded,
        pairs(written(tmp_path, [{"q": forged + str(i), "a": "<|end|>"} for i in range(60)])),
    )
    for doc in pairs_.split_documents("test"):
        assert not (doc.tokens == end).any() and doc.ends[-1] == len("<|end|>")


BAD_TALKS: list[tuple[Any, str]] = [
    ("hello", r"field 'messages' is no list of turns with role and content \(.*line 1\)"),
    ([{"from": "human", "value": "x"}], "is no list of turns with role and content"),
    ([{"role": "user", "content": "x"}], r"the assistant's part is empty \(.*line 1\); remove"),
    (
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}],
        "the content of turn 1 is empty",
    ),
    (
        [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "x"}],
        "the content of turn 1 is a list, not a string",
    ),
]


@pytest.mark.parametrize(("value", "message"), BAD_TALKS, ids=[case[1][:30] for case in BAD_TALKS])
def test_bad_conversations(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        domains.collect_documents(talks(written(tmp_path, [{"messages": value}])))


def test_templates_that_do_not_show_turns_one_by_one(tmp_path: Path, loaded: Any) -> None:
    """As Qwen 3's, which leaves the reasoning of earlier answers out."""
    bad = (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}<think>"
        "{% endif %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    source = talks(written(tmp_path, TALKS), chat_template=template(tmp_path, bad))
    with pytest.raises(DataError, match="does not write turns one after the other"):
        prepared(loaded, source)
    with pytest.raises(
        DataError, match=r"no chat template \(domain talks\); set source\.chat_template"
    ):
        prepared(loaded, talks(written(tmp_path, TALKS)))


def test_hub_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without an answer, or with an empty turn, are left out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "datasets--o--d" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    called = [{"role": "assistant", "content": None}, {"role": "assistant", "content": "x"}]
    rows = [{"of": {"talk": m}} for m in (TALKS[0]["messages"], called, [], TALKS[1]["messages"])]
    written(folder, rows, "train.jsonl")
    keys = {"revision": "a" * 40, "files": "*.jsonl", "max_bytes": 999, "messages": "of.talk"}
    hub = schema.Domain(name="h", source={"kind": "hub", "path": "o/d", **keys})  # type: ignore[arg-type]
    found = list(domains.documents(hub))
    assert [len(document) for document in found] == [5, 5]
    assert found[0][2] == ("assistant", "It is 0, é.")


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of docs/data.md as a reader would save them, with data; name -> YAML."""
    monkeypatch.chdir(tmp_path)
    blocks = [
        part.split("\n", 1) for part in (ROOT / "docs/data.md").read_text().split("```")[1::2]
    ]
    found = {
        body.split()[1].removesuffix(".yaml"): body
        for language, body in blocks
        if language == "yaml"
    }
    Path("mine/domain").mkdir(parents=True)
    for name, body in found.items():
        Path(f"mine/domain/{name}.yaml").write_text(body)
    (own,) = [body for language, body in blocks if language == "jinja"]
    Path("plain.jinja").write_text(own)
    Path("texts").mkdir()
    rows = [
        {"question": r["q"], "answer": r["a"], "body": f"Report {i}. " + r["a"] * 3}
        for i, r in enumerate(ROWS)
    ]
    for name in ("answers", "reports"):
        written(Path("texts"), rows, f"{name}.jsonl")
    written(Path("texts"), TALKS, "talks.jsonl")
    return found


SMALL = [
    "debug=smoke",
    "compute.threads=1",
    "--config-dir",
    "mine",
    "sequence.controls=[]",
    "eval.documents=4",
    "train.batch_tokens=128",
]


def run(capsys: pytest.CaptureFixture[str], *overrides: str) -> record.RunRecord:
    assert cli.main(["run", *SMALL, *overrides]) == 0, capsys.readouterr().err
    return record.load(capsys.readouterr().out.splitlines()[-1].removeprefix("record: ")).record


def test_the_examples_of_the_documentation(
    documented: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(documented) == {
        "reports", "abstracts", "terms", "invented", "answers", "chat", "talks",
    }  # fmt: skip
    for name, body in documented.items():
        domain = schema.Domain(**yaml.safe_load(body))
        assert domain.name == name and read.pin_domain(domain)
    made = run(capsys, "domain=[reports,answers]")
    assert (
        len(made.stages) == 3
        and made.stages[2].domains["answers"].nll_nats < made.stages[0].domains["answers"].nll_nats
    )
    sizes = [min(64, len(r["a"].encode())) for r in ROWS]
    assert made.stages[0].domains["answers"].tokens <= 4 * max(sizes)
    chat = run(capsys, "domain=[chat]")
    assert chat.stages[1].domains["chat"].nll_nats < chat.stages[0].domains["chat"].nll_nats
    assert chat.pins["validation"]["chat"] == made.pins["validation"]["answers"]
    talked = run(capsys, "domain=[talks]", "eval.window=8")
    assert talked.stages[1].domains["talks"].nll_nats < talked.stages[0].domains["talks"].nll_nats
    assert talked.stages[0].domains["talks"].tokens == 4 * 8


def test_other_prompts_are_another_run_with_other_losses(
    documented: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the same completions: of one length, so that tokens and bytes stay."""
    rows = [
        {"question": f"Question {i:02d}?", "answer": f"The answer is {i:02d}."} for i in range(60)
    ]
    written(Path("texts"), rows, "answers.jsonl")
    first = run(capsys, "domain=[answers]")
    assert run(capsys, "domain=[answers]").run_id == first.run_id
    written(
        Path("texts"),
        [{**r, "question": r["question"].replace("Question", "Problem ")} for r in rows],
        "answers.jsonl",
    )
    second = run(capsys, "domain=[answers]")
    assert first.run_id != second.run_id
    for a, b in zip(first.stages, second.stages, strict=True):
        one, two = a.domains["answers"], b.domains["answers"]
        assert (one.tokens, one.bytes) == (two.tokens, two.bytes) == (4 * 17, 4 * 17)
        assert one.nll_nats != two.nll_nats


def test_prepare_reports_prompts_and_near_duplicates(
    documented: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "question": f"{i} is the number of this question about rivers and hills?",
            "answer": f"Yes {i}.",
        }
        for i in range(60)
    ]
    written(Path("texts"), rows, "answers.jsonl")
    line = ["prepare", *SMALL, "domain=[answers]"]
    assert cli.main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["domains"]["answers"]
    for split in ("train", "dev", "test"):
        assert 0.8 < report["prompt_tokens"][split] / report["tokens"][split] < 1
        assert (
            report["tokens"][split] - report["prompt_tokens"][split] == report["bytes"][split]
        )  # a byte a token
    assert cli.main(line) == 0
    assert "near duplicate in training data" in capsys.readouterr().out
