"""Domains: reading, cleaning, splitting, tokenising, the training stream, and every planted fault
of bad data."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gain_cl.config import schema
from gain_cl.config.schema import SHA1
from gain_cl.domains import (
    Blocks,
    Doc,
    Domain,
    check_domains,
    collect_documents,
    documents,
    pin_domain,
    prepare_domain,
    text,
    tokenize,
    tokens,
)
from gain_cl.domains import domain as base
from gain_cl.domains.recipes import RECIPES
from gain_cl.errors import ConfigError, DataError, PreemptedError
from gain_cl.system import hashes as hashes_
from gain_cl.system import signals

CONFIGS = Path(__file__).parents[2] / "configs"
DOMAINS = {
    path.stem: schema.Domain(**yaml.safe_load(path.read_text()))
    for path in sorted((CONFIGS / "domain").glob("*.yaml"))
}
SEQUENCES = {
    path.stem: schema.Sequence(**yaml.safe_load(path.read_text()))
    for path in sorted((CONFIGS / "sequence").glob("*.yaml"))
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A small byte-level BPE: tokens of several characters, characters of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    inner.train_from_iterator(["some words that come again and again", "some other words"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def generated(name: str, seed: int = 1, count: int = 60, **split: float) -> schema.Domain:
    source = {"kind": "generated", "seed": seed, "documents": count}
    return schema.Domain(name=name, source=source, split=split or {"test": 0.3, "dev": 0.2})  # type: ignore[arg-type]


def files(path: Path, name: str = "own", **keys: Any) -> schema.Domain:
    split = keys.pop("split", {"test": 0.3, "dev": 0.2})
    return schema.Domain(
        name=name, source={"kind": "files", "path": str(path), **keys}, split=split
    )  # type: ignore[arg-type]


def train(**keys: Any) -> schema.Train:
    return schema.Train(**{"steps": 2, "block": 32, "batch_tokens": 64, "lr": 1e-3, **keys})


def evaluation(count: int = 4, **keys: Any) -> schema.Eval:
    return schema.Eval(documents=count, **keys)


# --- the shipped YAMLs ----------------------------------------------------------------------------


def test_shipped_domains_are_named_pinned_and_licensed() -> None:
    for name, domain in DOMAINS.items():
        assert domain.name == name and domain.licence != "unknown" and domain.note
        assert domain.split.test + domain.split.dev < 1
        found = pin_domain(domain)  # recipe known, hash or commit given
        assert json.dumps(found, allow_nan=False)
        if domain.source.kind == "hub":
            assert SHA1.match(domain.source.revision or "") and domain.source.fields
    used = {d.source.recipe for d in DOMAINS.values() if d.source.kind == "package"}
    assert used == set(RECIPES)


def test_shipped_sequences_name_shipped_domains() -> None:
    assert {"offline", "paper", "smoke"} <= set(SEQUENCES)
    for name, sequence in SEQUENCES.items():
        assert sequence.name == name
        assert set(sequence.domains + sequence.controls) <= set(DOMAINS)
    assert SEQUENCES["offline"].trained == [
        "medicine",
        "law",
        "code",
        "maths",
        "news",
        "science",
        "politics",
        "scripture",
    ]
    assert SEQUENCES["offline"].controls == ["geography", "encyclopedia"]
    assert len(SEQUENCES["paper"].domains) == 8
    assert all(
        DOMAINS[d].source.kind == "generated"
        for d in SEQUENCES["smoke"].domains + SEQUENCES["smoke"].controls
    )


def test_reading_domains_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    program = (
        "import sys; from gain_cl import domains; from gain_cl.config import schema as config\n"
        f"d = config.Domain(name='a', source={{'kind': 'files', 'path': {str(tmp_path)!r}}})\n"
        "domains.pin_domain(d); list(domains.documents(d))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "GAIN_CL_CACHE": str(tmp_path / "cache")},
    )


# SHA-256 (first 12 digits) over the sorted documents. When one changes on purpose, raise the
# recipe's version too.
GOLDEN = {
    "medicine": "1ad68cf33d55",
    "law": "8eeefc330240",
    "code": "e1df958a4168",
    "maths": "ea5a98f837ba",
    "news": "a6ad85abb408",
    "science": "39170cb8f7ed",
    "politics": "3a32256d8681",
    "scripture": "e407d95a6691",
    "geography": "e6d95ea67a2e",
    "encyclopedia": "5503935ecc68",
}
DEBRIS = {
    "encyclopedia": ["[[", "]]", "{{", "}}", "<ref", "|thumb", "&nbsp;"],
    "geography": ["<p>", "<br", "&amp;", "{'"],
    "science": ["BIBREF", "SECREF", "FIGREF", "INLINEFORM", "DISPLAYFORM"],
    "scripture": ['"""', "bible =", "[was]"],
    "medicine": ["<br>", "<b>"],
    "maths": ["[asy]"],
    "law": ["spdx_license_key:"],
}


@pytest.mark.data
@pytest.mark.parametrize("name", GOLDEN)
def test_offline_domain(name: str) -> None:
    texts = collect_documents(DOMAINS[name])
    size = sum(len(t.encode()) for _, t in texts)
    assert size > 2_000_000 and (size <= 4_000_000 or DOMAINS[name].source.max_bytes is None)  # type: ignore[union-attr]
    assert all(
        len(t) >= 200 and t == t.strip() and "\0" not in t and "\r" not in t and "\ufffd" not in t
        for _, t in texts
    )
    for mark in DEBRIS.get(name, []):
        assert sum(mark in t for _, t in texts) == 0, mark
    share = [int(key, 16) / 2**256 for key, _ in texts]
    split = DOMAINS[name].split
    test, dev = (
        sum(u < split.test for u in share),
        sum(split.test <= u < split.test + split.dev for u in share),
    )
    assert test >= (64 if name != "encyclopedia" else 32) and dev >= 32, (test, dev)
    assert (
        hashlib.sha256("".join(k + t for k, t in texts).encode()).hexdigest()[:12] == GOLDEN[name]
    )


# --- text -----------------------------------------------------------------------------------------


def test_text_hash_ignores_layout_only() -> None:
    assert (
        text.text_hash("Some  words\n")
        == text.text_hash("some words")
        != text.text_hash("some word")
    )


def test_wikitext_leaves_sentences() -> None:
    adobe = (
        "'''Adobe''' ({{IPA|x}}; from Spanish: ''{{lang|es|adobe}}'',) is a [[building "
        "material|material]] made from [[earth]]."
    )
    rest = """<ref name="x">A {{cite|y}} book.</ref> It weighs {{convert|99|lb|kg}} or so.<ref name=y />
[[File:a.jpg|thumb|A [[house]] of adobe]]
{| class="wikitable"
| cell || cell
|}
== Empty ==
== History ==
=== Early ===
* a list item that is long enough to be taken for a sentence
The history of adobe is long and much has been [http://example.org written] about it.
[[Category:Materials]] Here an unclosed [[link in a sentence stays, only the marks go away.
==References==
Nothing from here on should be kept at all, however long the sentence is."""
    assert text.strip_wikitext(adobe + rest) == (
        "Adobe (from Spanish: adobe) is a material made from earth. It weighs 99 lb or "
        "so.\n\nHistory\n\nEarly\n\n"
        "The history of adobe is long and much has been written about it.\n\n"
        "Here an unclosed link in a sentence stays, only the marks go away."
    )


def test_html_leaves_text() -> None:
    assert (
        text.strip_html("<p>Fish &amp; chips<br>since   1860</p><b>note:</b> x")
        == "Fish & chips\nsince 1860\nnote: x"
    )


# --- recipes, on archives made here ---------------------------------------------------------------


def run_recipe(name: str, *contents: bytes) -> list[str]:
    return list(RECIPES[name][0]((f"{i:02d}.txt", data) for i, data in enumerate(contents)))


def requests(*docs: dict[str, Any]) -> bytes:
    return gzip.compress("\n".join(json.dumps({"doc": d}) for d in docs for _ in range(2)).encode())


def test_recipes() -> None:
    line = "A sentence about genes that is certainly longer than sixty characters."
    assert run_recipe(
        "medicine", requests({"context": f"{line}\nshort\n{line}"}, {"context": f"{line}<br>"})
    ) == [line, ""]
    assert run_recipe("maths", requests({"problem": "1+1?[asy]draw;[/asy]", "solution": "2"})) == [
        "Problem. 1+1?\n\nSolution. 2"
    ]
    assert run_recipe(
        "scripture",
        b'x = """\n1. In [the] beginning. 2. And 7 days.\n1. New chapter.\n"""\ny = """no"""',
    ) == [
        "1. In the beginning.\n2. And 7 days.",
        "1. New chapter.",
    ]
    country = {
        "Government": {"Country name": {"conventional short form": {"text": "X"}}},
        "Area": {"total": {"text": "<b>5</b> km"}, "none": {}},
    }
    assert run_recipe("geography", json.dumps(country).encode())[0].startswith(
        "X\n\nGovernment\nCountry name: conventional short form: X\n\nArea"
    )
    paper = {
        "title": "T",
        "abstract": "Abstract.",
        "full_text": {
            "section_name": ["A ::: B", "Acknowledgments"],
            "paragraphs": [
                [
                    "As shown BIBREF1 , BIBREF2 in Section SECREF3 and FIGREF4 , this paragraph "
                    "is long enough to be kept as it is.",
                    "x INLINEFORM0 " * 9,
                ],
                ["t" * 99],
            ],
        },
    }
    (science,) = run_recipe("science", requests(paper))
    assert (
        science
        == "T\n\nAbstract.\n\nB\n\nAs shown in Section and the figure, this paragraph is long "
        "enough to be kept as it is."
    )
    assert run_recipe("politics", b"[As delivered]\n\nFellow citizens:\r\nwe") == [
        "Fellow citizens:\nwe"
    ]
    assert run_recipe("code", b"a = 1\n\n\ndef f():\n    pass\n") == [
        "a = 1\n\n\ndef f():\n    pass"
    ]
    page = "<mediawiki xmlns='x'><page><title>A</title><ns>0</ns><revision><text>{}</text></revision></page></mediawiki>"
    assert run_recipe(
        "encyclopedia",
        bz2.compress(page.format("'''A''' is a letter, the first one of the alphabet.").encode()),
    )[0].startswith("A\n\nA is a")
    redirect = page.replace("<ns>", "<redirect title='B'/><ns>").format("x")
    assert run_recipe("encyclopedia", bz2.compress(redirect.encode())) == []


def test_law_drops_variants_and_other_languages() -> None:
    words = " ".join(f"clause{i} binds the parties" for i in range(80))
    front = "---\nkey: a\nlanguage: fr\n---\n"
    found = run_recipe(
        "law",
        words.encode(),
        f"# {words} and more #".encode(),
        (front + words.replace("clause", "article")).encode(),
        b"too short",
    )
    assert found == [words]


def package(cache: Path, members: dict[str, bytes]) -> None:
    folder = cache / "packages" / "demo==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "demo-1.0-py3-none-any.whl", "w") as pack:
        for name, data in members.items():
            pack.writestr(name, data)


def test_max_bytes_takes_a_fair_sample(cache: Path) -> None:
    """The cut must not follow the hash that splits: it would leave test documents only."""
    package(cache, {f"demo/{i:03d}.txt": f"speech {i} ".encode() * 40 for i in range(300)})
    source = {
        "kind": "package",
        "recipe": "politics",
        "files": {"package": "demo==1.0", "members": "*.txt"},
    }
    whole = schema.Domain(name="d", source=source)  # type: ignore[arg-type]
    part = schema.Domain(name="d", source={**source, "max_bytes": 40_000})  # type: ignore[arg-type]
    assert len(collect_documents(whole)) == 300
    texts = collect_documents(part)
    assert 80 < len(texts) < 130 and set(texts) < set(collect_documents(whole))
    assert 0.05 < sum(int(key, 16) / 2**256 < 0.15 for key, _ in texts) / len(texts) < 0.3


def test_recipe_on_the_wrong_archive(cache: Path) -> None:
    package(cache, {"demo/x.json": b"[1, 2"})
    source = {
        "kind": "package",
        "recipe": "geography",
        "files": {"package": "demo==1.0", "members": "*.json"},
    }
    with pytest.raises(DataError, match="recipe geography cannot read it"):
        collect_documents(schema.Domain(name="d", source=source))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no recipe 'cooking'.*available: medicine"):
        pin_domain(schema.Domain(name="d", source={**source, "recipe": "cooking"}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no sha256 is pinned"):
        pin_domain(schema.Domain(name="d", source=source))  # type: ignore[arg-type]


# --- generated ------------------------------------------------------------------------------------


def test_generated_text_is_fixed_and_differs_by_seed() -> None:
    one, again, two = (list(documents(generated("g", seed))) for seed in (1, 1, 2))
    assert one == again and len(set(one)) == 60 and not set(one) & set(two)
    assert hashlib.sha256("".join(one).encode()).hexdigest()[:12] == "493c7fd8a6af"


# --- local files: what works ----------------------------------------------------------------------


def test_files_of_every_kind(tmp_path: Path, cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(
        b"\xef\xbb\xbfwith a mark\r\nand a second line"
    )  # a byte-order mark is not text
    (folder / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}')
    (folder / "deep" / "c.txt").write_text("deep")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "notes.md").write_text("not read")
    pq.write_table(pa.table({"text": ["three", "four"]}), folder / "d.parquet")
    assert list(documents(files(folder))) == [
        "with a mark\nand a second line",
        "one",
        "two",
        "three",
        "four",
        "deep",
    ]
    (folder / "b.jsonl").write_text('{"body": "one"}')
    assert list(documents(files(folder / "b.jsonl", field="body"))) == ["one"]


def test_a_single_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i} " * 60 for i in range(20)))
    found = list(documents(files(path)))
    assert 5 < len(found) < 10 and all(len(d) >= 2000 for d in found[:-1])
    assert "".join(found).replace("\n", "").split() == path.read_text().split()


def test_pin_follows_the_content(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = pin_domain(files(path))
    path.write_text("two!")
    assert pin_domain(files(path)) != first
    path.rename(tmp_path / "b.txt")
    assert str(tmp_path) not in json.dumps(first)  # the place of a file is not its identity


# --- local files: planted faults, each one line ---------------------------------------------------

BAD: list[tuple[str, str, bytes, str]] = [
    (
        "not UTF-8",
        "a.txt",
        b"caf\xe9 au lait",
        r"byte 0xe9 at offset 3 is not UTF-8 \(.*a\.txt\); convert",
    ),
    ("not UTF-8 after a mark", "a.txt", b"\xef\xbb\xbfcaf\xe9 au lait", r"byte 0xe9 at offset 6"),
    (
        "not UTF-8 in JSONL",
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"byte 0xff at offset 10 is not UTF-8 \(.*a\.jsonl line 2\)",
    ),
    ("UTF-16", "a.txt", "text".encode("utf-16"), r"byte 0xff at offset 0 .*iconv"),
    (
        "UTF-16 in JSONL",
        "a.jsonl",
        '{"text": "a"}'.encode("utf-16"),
        r"byte 0xff at offset 0 is not",
    ),
    ("UTF-16 without a mark", "a.txt", "text".encode("utf-16-le"), r"NUL byte at offset 1"),
    (
        "gzip named .txt",
        "a.txt",
        gzip.compress(b"text"),
        r"byte 0x8b at offset 1 .*a\.txt\).*unpack",
    ),
    (
        "gzip named .jsonl",
        "a.jsonl",
        gzip.compress(b'{"text": "a"}'),
        r"byte 0x8b at offset 1 is not UTF-8",
    ),
    ("empty", "a.txt", b"", r"no text in it: empty, or blank documents only"),
    ("blank documents", "a.jsonl", b'{"text": "  "}\n{"text": "\\n"}\n', r"no text in it"),
    ("bad JSON", "a.jsonl", b'{"text": "a"}\n{"text": \n', r"bad JSON: .*a\.jsonl line 2\)"),
    ("no object", "a.jsonl", b'["text"]\n', r"the row is a str, not an object \(.*row 0\)"),
    (
        "no such field",
        "a.jsonl",
        b'{"body": "a", "title": "b"}\n',
        r"no field 'text' \(.*line 1\); fields: body, title",
    ),
    (
        "text is a number",
        "a.jsonl",
        b'{"text": "a"}\n{"text": 3}\n',
        r"the text is a int, not a string \(.*line 2\)",
    ),
    ("text is null", "a.jsonl", b'{"text": null}\n', r"the text is a NoneType, not a string"),
    (
        "unpaired surrogate",
        "a.jsonl",
        b'{"text": "ab\\ud800"}\n',
        r"unpaired surrogate U\+D800 at character 2 \(.*line 1\)",
    ),
    (
        "not parquet",
        "a.parquet",
        b"PAR1 or so",
        r"not a readable file of rows: Parquet magic bytes",
    ),
    (
        "unknown kind",
        "a.docx",
        b"PK",
        r"there is no \.txt, \.jsonl, \.parquet, \.json file \(.*a\.docx\)",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_file(tmp_path: Path, cache: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        collect_documents(files(path))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 65


def test_bad_places(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        pin_domain(files(tmp_path / "nothing.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no \.txt, \.jsonl, \.parquet, \.json file"):
        pin_domain(files(tmp_path / "empty"))
    secret = tmp_path / "secret.txt"
    secret.write_text("text")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(DataError, match="Permission denied"):
            pin_domain(files(secret))


def test_parquet_without_the_field_and_a_document_over_the_limit(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no field 'text' \(.*a\.parquet row 0\); fields: body, n"):
        collect_documents(files(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"the text is a int, not a string \(.*a\.parquet row 0\)"):
        collect_documents(files(tmp_path / "a.parquet", field="n"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "é" * 60}))
    with pytest.raises(DataError, match=r"a document of 120 bytes exceeds max_document_bytes=100"):
        collect_documents(files(tmp_path / "b.jsonl", max_document_bytes=100))


# --- hub data sets, from a cache tree -------------------------------------------------------------


@pytest.fixture
def hub_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """The snapshot folder of org/data in an offline hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "datasets--org--data" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    return folder


def hub(
    pattern: str, fields: list[str], max_bytes: int = 10_000, revision: str | None = "a" * 40
) -> schema.Domain:
    source = {
        "kind": "hub",
        "path": "org/data",
        "revision": revision,
        "files": pattern,
        "fields": fields,
        "max_bytes": max_bytes,
    }
    return schema.Domain(name="h", source=source)  # type: ignore[arg-type]


def test_hub_parquet_joins_fields_and_stops_at_the_budget(hub_tree: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"context": {"contexts": [f"{i} first " * 20, "second " * 20]}, "answer": "end " * 5}
        for i in range(40)
    ]
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[20 * part : 20 * part + 20]),
            hub_tree / f"train-0000{part}-of-00002.parquet",
        )
    found = list(documents(hub("train-*.parquet", ["context.contexts", "answer"])))
    assert (
        found[0]
        == f"{('0 first ' * 20).strip()}\n\n{('second ' * 20).strip()}\n\n{('end ' * 5).strip()}"
    )
    size = [len(d.encode()) for d in found]
    assert (
        sum(size) >= 10_000 > sum(size[:-1])
    )  # read until the budget is reached, across files, no further
    assert len(list(documents(hub("train-*.parquet", ["context.contexts"], 10**9)))) == 40
    with pytest.raises(
        DataError, match=r"no field 'body' \(.*train-00000.*fields: context, answer"
    ):
        list(documents(hub("train-*.parquet", ["body"])))
    with pytest.raises(DataError, match=r"no field 'context\.body'.*fields: contexts"):
        list(documents(hub("train-*.parquet", ["context.body"])))


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.zst"])
def test_hub_json_lines_packed_or_not(hub_tree: Path, ending: str) -> None:
    import pyarrow as pa

    lines = "".join(json.dumps({"content": f"{i} " * 200}) + "\n" for i in range(5)).encode()
    path = hub_tree / f"file{ending}"
    kind = {".gz": "gzip", "zst": "zstd"}.get(ending[-3:])
    with pa.output_stream(str(path), compression=kind) as out:
        out.write(lines)
    assert len(list(documents(hub(f"*{ending}", ["content"])))) == 5
    if kind:
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(DataError):
            list(documents(hub(f"*{ending}", ["content"])))


def test_hub_revision_must_be_a_commit(hub_tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"revision 'main' of org/data is not a commit"):
        pin_domain(hub("*", ["text"], revision="main"))
    with pytest.raises(ConfigError, match="org/data has no revision"):
        pin_domain(hub("*", ["text"], revision=None))


# --- split and tokens -----------------------------------------------------------------------------


def test_split_is_by_hash_of_the_document(cache: Path, tokenizer: Any) -> None:
    domain = prepare_domain(generated("g", count=200, test=0.3, dev=0.2), tokenizer, "t")
    counts = {split: domain.n_documents(split) for split in ("train", "dev", "test")}
    assert sum(counts.values()) == 200 and 40 < counts["test"] < 80 and 25 < counts["dev"] < 55
    for split, low, high in (("test", 0, 0.3), ("dev", 0.3, 0.5), ("train", 0.5, 1)):
        shares = [int(i, 16) / 16**16 for i in domain.ids(split)]  # type: ignore[arg-type]
        assert shares == sorted(shares) and all(low <= s < high for s in shares)
    by_id = {text.text_hash(t)[:16]: t for t in documents(generated("g", count=200))}
    for doc in domain.split_documents("test"):
        assert tokenizer.decode(doc.tokens.tolist()) == by_id[doc.id]
        assert doc.ends[-1] == len(by_id[doc.id].encode()) and len(doc.ends) == len(doc.tokens)
    assert domain.n_tokens("test") == sum(len(d.tokens) for d in domain.split_documents("test"))
    assert domain.n_bytes("test") == sum(len(by_id[i].encode()) for i in domain.ids("test"))


def test_split_does_not_depend_on_position_or_company(
    tmp_path: Path, cache: Path, tokenizer: Any
) -> None:
    texts = list(documents(generated("g", count=50)))
    where = {}
    for name, chosen in (("a", texts), ("b", texts[::-2])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in [*chosen, chosen[0].upper()])
        )  # one duplicate but for case
        domain = prepare_domain(files(path, name), tokenizer, "t")
        where[name] = {i: split for split in ("train", "dev", "test") for i in domain.ids(split)}  # type: ignore[arg-type]
        assert len(where[name]) == len(chosen)
    assert where["b"].items() <= where["a"].items()


def test_ends_count_bytes_of_the_text(tokenizer: Any) -> None:
    texts = ["plain words again", "naïve café – 漢字 😀 end", "é", ""]
    for source, (ids, ends) in zip(texts, tokenize(texts, tokenizer), strict=True):
        assert ids.dtype == ends.dtype == np.uint32 and len(ids) == len(ends)
        assert (np.diff(ends.astype(int)) >= 0).all()
        if source:
            assert ends[-1] == len(source.encode())
        for n, end in enumerate(
            ends, 1
        ):  # a prefix of tokens covers at least its bytes, at most the rest of a character
            covered = tokenizer.backend_tokenizer.decode(ids[:n].tolist()).rstrip("\ufffd").encode()
            assert len(covered) <= end <= len(covered) + 4
            assert source.encode()[:end].decode()


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="is not a fast tokenizer"):
        tokenize(["x"], object())


def test_token_cache(cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = generated("g")
    first = prepare_domain(settings, tokenizer, "t")
    (folder,) = (cache / "tokens").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        "meta.json",
        *(f"{name}.npy" for name in base.ARRAYS),
    }
    assert all(isinstance(array, np.memmap) for array in first.arrays.values())
    written = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert (
        prepare_domain(settings, None, "t").hash == first.hash
    )  # no tokenizer needed: it comes from the cache
    assert written == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    other = prepare_domain(settings, tokenizer, "another tokenizer")
    assert other.hash != first.hash and len(list((cache / "tokens").iterdir())) == 2
    assert (
        prepare_domain(
            settings.model_copy(update={"split": schema.Split(test=0.5, dev=0.0)}), None, "t"
        ).n_documents("dev")
        == 0
    )

    data = bytearray((folder / "tokens.npy").read_bytes())
    data[-2] ^= 1  # one bit
    (folder / "tokens.npy").write_bytes(data)
    again = prepare_domain(settings, tokenizer, "t")
    assert "token cache of g is damaged" in capsys.readouterr().err
    assert again.hash == first.hash and [
        d.tokens.tolist() for d in again.split_documents("test")
    ] == [d.tokens.tolist() for d in first.split_documents("test")]
    (folder / "ends.npy").unlink()
    assert prepare_domain(settings, tokenizer, "t").hash == first.hash

    # The hash that goes into the record, and what the tokens were made of and by, are protected
    # too.
    sound = json.loads((folder / "meta.json").read_text())
    for change in (
        {"hash": "0" * 64},
        {"identity": {**sound["identity"], "tokenizer": "u"}},
        {"seal": None},
        {"sha256": None},
    ):
        (folder / "meta.json").write_text(json.dumps(sound | change))
        assert prepare_domain(settings, tokenizer, "t").hash == first.hash
        assert "token cache of g is damaged" in capsys.readouterr().err
    shutil.rmtree(folder)
    shutil.copytree(next((cache / "tokens").iterdir()), folder)  # whole, but another tokenizer's
    assert (
        prepare_domain(settings, tokenizer, "t").hash == first.hash
        and "damaged (meta.json changed)" in capsys.readouterr().err
    )


def test_token_cache_is_written_by_many_at_once(cache: Path, tokenizer: Any) -> None:
    hashes: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: hashes.append(prepare_domain(generated("g"), tokenizer, "t").hash)
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashes) == 6 and len(set(hashes)) == 1
    assert [p.name.startswith(".") for p in (cache / "tokens").iterdir()] == [False]


def test_words_are_kept_with_the_tokens(cache: Path, tokenizer: Any) -> None:
    domain = prepare_domain(generated("g", count=40), tokenizer, "t")
    by_id = {text.text_hash(t)[:16]: t for t in documents(generated("g", count=40))}
    for split in base.SPLITS:
        words, offsets = domain.words(split)
        assert (
            words.dtype == np.uint32
            and len(offsets) == domain.n_documents(split) + 1
            and offsets[-1] == len(words)
        )
        for i, name in enumerate(domain.ids(split)):
            assert (
                words[offsets[i] : offsets[i + 1]].tolist()
                == tokens.word_hashes(by_id[name]).tolist()
                != []
            )
    assert (
        tokens.word_hashes("One, two!  ONE\n--").tolist()
        == tokens.word_hashes("one TWO one").tolist()
    )
    assert (
        tokens.word_hashes("one")[0] == 1_189_970_830
    )  # the same on every machine: it lies in caches


def test_split_hash_names_the_documents(cache: Path, tokenizer: Any) -> None:
    """Equal whenever the same documents are scored, whatever tokenises them; another as soon as one
    differs."""
    domain, other = (
        prepare_domain(generated("g"), tokenizer, t) for t in ("t", "another tokenizer")
    )
    assert domain.hash != other.hash and domain.split_hash("test") == other.split_hash("test")
    fewer = prepare_domain(generated("g", test=0.28, dev=0.22), tokenizer, "t")
    assert domain.n_documents("test") == fewer.n_documents("test") + 1 and domain.ids(
        "train"
    ) == fewer.ids("train")
    assert domain.split_hash("test") != fewer.split_hash("test") and domain.split_hash(
        "train"
    ) == fewer.split_hash("train")
    assert len({domain.split_hash(split) for split in base.SPLITS}) == 3


def test_asked_to_stop_while_tokenising(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out within a batch, nothing half done left, and the next attempt does the work."""
    batches = []

    def tokenize_then_ask(texts: list[str], tokenizer: Any) -> Any:
        batches.append(len(texts))
        monkeypatch.setattr(signals, "_asked", "SIGTERM")
        return tokenize(texts, tokenizer)

    monkeypatch.setattr(tokens, "BATCH", 25)
    monkeypatch.setattr(tokens, "tokenize", tokenize_then_ask)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM"):
        prepare_domain(generated("g"), tokenizer, "t")
    assert batches == [25] and not (cache / "tokens").exists()
    monkeypatch.setattr(tokens, "tokenize", tokenize)
    monkeypatch.setattr(signals, "_asked", None)
    assert prepare_domain(generated("g"), tokenizer, "t").n_documents("train") > 0


# --- the training stream --------------------------------------------------------------------------


def some(*lengths: int) -> list[Doc]:
    start, out = 1, []
    for i, n in enumerate(lengths):
        out.append(
            Doc(
                f"{i:016x}",
                np.arange(start, start + n, dtype=np.uint32),
                np.arange(1, n + 1, dtype=np.uint32),
            )
        )
        start += n
    return out


def test_every_epoch_is_another_permutation_of_the_same_blocks() -> None:
    docs = some(5, 1, 12, 30, 2, 7)
    blocks = Blocks("d", docs, seed=3, block=8, separator_id=0)
    assert blocks.epoch_blocks == (57 + 6) // 8
    joined = np.concatenate([np.append(d.tokens, 0) for d in docs]).astype(np.int64)
    owner = np.concatenate([[i] * (len(d.tokens) + 1) for i, d in enumerate(docs)])
    cuts = [tuple(joined[8 * k : 8 * k + 8]) for k in range(7)]
    orders = []
    for epoch in range(3):
        part = [blocks[7 * epoch + i] for i in range(7)]
        orders.append([cuts.index(tuple(tokens)) for tokens, _, _ in part])
        assert sorted(orders[-1]) == list(range(7))
        for k, (drawn, owners, scored) in zip(orders[-1], part, strict=True):
            assert drawn.dtype == owners.dtype == np.int64 and scored.all()
            assert (owners == owner[8 * k : 8 * k + 8]).all()
    assert orders[0] != orders[1] != orders[2]


def test_blocks_are_a_pure_function() -> None:
    docs = some(*range(1, 40))
    straight = Blocks("d", docs, seed=0, block=16, separator_id=0)
    expected = [straight[i] for i in range(200)]
    np.random.seed(7)
    jumping = Blocks("d", docs, seed=0, block=16, separator_id=0)
    for i in (150, 3, 199, 0, 77, 3):
        assert (jumping[i][0] == expected[i][0]).all() and (jumping[i][1] == expected[i][1]).all()
    np.random.seed(7)
    first = np.random.rand()
    np.random.seed(7)
    _ = jumping[42]
    assert np.random.rand() == first  # no global random state
    for other in (Blocks("d", docs, 1, 16, 0), Blocks("e", docs, 0, 16, 0)):
        assert any((other[i][0] != expected[i][0]).any() for i in range(5))
    with pytest.raises(IndexError):
        straight[-1]


def test_an_order_fixed_for_good() -> None:
    assert [Blocks("medicine", some(*[1] * 8), 0, 2, 0)[i][1][0] for i in range(8)] == ORDER


ORDER = [2, 5, 7, 3, 6, 1, 0, 4]  # computed from sha256 by hand


# --- checks, each with a planted violation --------------------------------------------------------


@pytest.fixture
def pair(cache: Path, tokenizer: Any) -> dict[str, Domain]:
    return {
        name: prepare_domain(generated(name, seed), tokenizer, "t")
        for seed, name in enumerate(("a", "b"))
    }


def test_sound_domains_pass(pair: dict[str, Domain]) -> None:
    assert check_domains(pair, train(), evaluation(), vocab=300) == []


def test_token_ids_beyond_the_embedding(pair: dict[str, Domain]) -> None:
    with pytest.raises(
        DataError, match=r"token id \d+ is beyond the model's 90 embedding rows \(domain a\)"
    ):
        check_domains(pair, train(), evaluation(), vocab=90)


def test_domain_shorter_than_a_block(pair: dict[str, Domain]) -> None:
    long = train(block=65536, batch_tokens=65536)
    with pytest.raises(
        DataError, match=r"\d+ training tokens are less than one block of 65536 \(domain a\)"
    ):
        check_domains(pair, long, evaluation(), vocab=300)
    check_domains(
        pair, long, evaluation(), vocab=300, controls=["a", "b"]
    )  # a control is never trained


def test_too_few_documents_to_score(pair: dict[str, Domain], cache: Path, tokenizer: Any) -> None:
    with pytest.raises(
        DataError,
        match=r"\d+ test documents, eval\.documents=50 \(domain a\); lower eval\.documents",
    ):
        check_domains(pair, train(), evaluation(50), vocab=300)
    none = {"n": prepare_domain(generated("n", 5, test=0.0, dev=0.0), tokenizer, "t")}
    with pytest.raises(DataError, match="0 dev documents"):
        check_domains(none, train(), evaluation(split="dev"), vocab=300)
    no_dev = {"n": prepare_domain(generated("n", 5, test=0.5, dev=0.0), tokenizer, "t")}
    with pytest.raises(DataError, match=r"no dev document, but train\.dev_every is set"):
        check_domains(no_dev, train(dev_every=1), evaluation(), vocab=300)
    with pytest.raises(AssertionError, match="less than one block"):
        Domain(
            "x",
            schema.Split(test=0.99, dev=0.0),
            "h",
            arrays([b"0" * 16], tokens=1),
        ).train_blocks(0, 8, 0)


def test_overlap_across_domains(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    texts = list(documents(generated("g", count=80)))
    for name, chosen in (("a", texts[:60]), ("b", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in chosen)
        )
    same = {
        n: prepare_domain(files(tmp_path / f"{n}.jsonl", n), tokenizer, "t") for n in ("a", "b")
    }
    # The same split by the same hash: shared documents are on the same side, which is a warning.
    (warning,) = check_domains(same, train(), evaluation(), vocab=300)
    assert "training documents are in both a and b" in warning
    other = {
        **same,
        "b": prepare_domain(
            files(tmp_path / "b.jsonl", "b", split={"test": 0.6, "dev": 0.1}), tokenizer, "t"
        ),
    }
    shared = len(set(other["a"].ids("train")) & {*other["b"].ids("test"), *other["b"].ids("dev")})
    assert shared > 0
    with pytest.raises(
        DataError,
        match=f"{shared} documents are in the training split of a and in the test or dev "
        "split of b",
    ):
        check_domains(other, train(), evaluation(), vocab=300)
    with pytest.raises(
        DataError, match="training split of a"
    ):  # a control that holds what is trained is no control
        check_domains(other, train(), evaluation(), vocab=300, controls=["b"])
    check_domains(other, train(), evaluation(), vocab=300, controls=["a", "b"])


def arrays(ids: list[bytes], tokens: int) -> dict[str, np.ndarray]:
    """Documents of ``tokens`` tokens each, document i of tokens i alone."""
    offsets = np.arange(len(ids) + 1) * tokens
    found = {
        "ids": np.array(ids),
        "offsets": offsets,
        "tokens": np.repeat(np.arange(len(ids), dtype=np.uint32), tokens),
    }
    return {
        **found,
        "ends": np.ones(offsets[-1], np.uint32),
        "scored": np.ones(offsets[-1], bool),
        "words": np.ones(len(ids), np.uint32),
        "word_offsets": np.arange(len(ids) + 1),
    }


def test_split_is_by_document_before_packing() -> None:
    """No trained block holds a token of a scored document. Planted: blocks of everything, packed
    first and split afterwards."""
    domain = Domain(
        "d",
        schema.Split(test=0.3, dev=0.2),
        "h",
        arrays([f"{i:x}{'0' * 15}".encode() for i in range(16)], tokens=5),
    )
    scored = {int(d.tokens[0]) for split in ("test", "dev") for d in domain.split_documents(split)}  # type: ignore[arg-type]
    assert len(scored) == 8

    def leaked(blocks: Blocks, chosen: range) -> set[int]:
        return scored & {int(t) for i in chosen for t in blocks[i][0]}

    blocks = domain.train_blocks(seed=0, block=8, separator_id=99)
    assert leaked(blocks, range(3 * blocks.epoch_blocks)) == set()
    everything = [d for split in base.SPLITS for d in domain.split_documents(split)]
    packed = Blocks("d", everything, seed=0, block=8, separator_id=99)
    assert leaked(packed, range(packed.epoch_blocks // 2, packed.epoch_blocks)) != set()


def test_overlap_within_a_domain() -> None:
    """The split makes it impossible; a split by position would not (planted here: the same id on
    both sides)."""
    domain = Domain(
        "d",
        schema.Split(test=0.5, dev=0.0),
        "h",
        arrays([b"0" * 16, b"f" * 16, b"0" * 16], tokens=50),
    )
    domain.ranges = {"test": range(1), "dev": range(0), "train": range(1, 3)}
    with pytest.raises(DataError, match="1 documents are in the training split of d"):
        check_domains(
            {"d": domain},
            train(),
            schema.Eval.model_construct(documents=1, split="test"),
            vocab=300,
        )


def test_file_changed_since_pinned(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    """Another content is another pin, so that neither the run id nor the token cache can be
    mistaken."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(generated("g"))))
    first = prepare_domain(files(path), tokenizer, "t")
    path.write_text(
        "".join(json.dumps({"text": t + " changed"}) + "\n" for t in documents(generated("g")))
    )
    assert prepare_domain(files(path), tokenizer, "t").hash != first.hash
    assert len(list((hashes_.cache_dir() / "tokens").iterdir())) == 2


def test_file_changed_during_the_run(
    tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run id names the text that was pinned: what is read must be that text."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t}) + "\n" for t in documents(generated("g"))]
    path.write_text("".join(lines))
    pinned = pin_domain(files(path))
    prepare_domain(files(path), tokenizer, "t", pinned)
    path.write_text("".join(lines[1:]))
    with pytest.raises(
        DataError,
        match=r"the text of own changed since the run began \(.*a\.jsonl\); leave the files alone",
    ):
        prepare_domain(files(path), tokenizer, "t", pinned)

    def read_and_change(domain: schema.Domain) -> list[tuple[str, str]]:
        path.write_text("".join(lines[2:]))
        return collect_documents(domain)

    monkeypatch.setattr(tokens, "collect_documents", read_and_change)
    with pytest.raises(DataError, match="the text of own changed while it was read"):
        prepare_domain(files(path), tokenizer, "t")
    assert len(list((cache / "tokens").iterdir())) == 1
