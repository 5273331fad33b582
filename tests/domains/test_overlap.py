"""Near duplicates and benchmark overlap: against a reference by hand, and with planted
violations."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gain_cl.config import schema
from gain_cl.domains import Domain, overlap
from gain_cl.domains.overlap import Near, Shared, benchmark, near_duplicates, notes
from gain_cl.domains.tokens import word_hashes
from gain_cl.measure import tasks

SPLIT = schema.Split(test=0.25, dev=0.25)
FIRST = {"test": "0", "dev": "5", "train": "9"}  # digits of ids that fall into the split
TWO = schema.Eval(documents=2)


def domain(name: str, **texts: list[str]) -> Domain:
    """A domain of these texts by split; ids: the split's digit and the place."""
    ids, words = [], []
    for split in ("test", "dev", "train"):
        ids += [f"{FIRST[split]}{i:015x}".encode() for i in range(len(texts.get(split, [])))]
        words += [word_hashes(text) for text in texts.get(split, [])]
    offsets = np.arange(len(ids) + 1)
    arrays = {
        "ids": np.array(ids),
        "offsets": offsets,
        "tokens": np.ones(len(ids)),
        "ends": np.ones(len(ids)),
        "scored": np.ones(len(ids), bool),
    }
    lengths = np.cumsum([0, *map(len, words)])
    return Domain(
        name, SPLIT, "h", {**arrays, "words": np.concatenate(words), "word_offsets": lengths}
    )


def numbered(first: int, stop: int) -> str:
    """The words w<first> to w<stop - 1>: every n-gram of them occurs once."""
    return " ".join(f"w{i}" for i in range(first, stop))


def by_hand(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# --- near duplicates ------------------------------------------------------------------------------


def random_domains(seed: int) -> dict[str, dict[str, list[str]]]:
    """Texts of few words and many repetitions, some too short for an n-gram, some empty."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice("abc") for _ in range(draw.choice([0, 3, 5, 8, 20, 40])))

    return {
        name: {split: [text() for _ in range(draw.randint(1, 6))] for split in FIRST}
        for name in ("x", "y", "control")
    }


@pytest.mark.parametrize(("chunk", "words"), [(1, 99), (50, 20), (overlap.CHUNK, 1 << 22)])
@pytest.mark.parametrize("seed", range(8))
def test_near_duplicates_equal_a_count_by_hand(
    seed: int, chunk: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    monkeypatch.setattr(overlap, "CHUNK_WORDS", words)
    texts = random_domains(seed)
    expected = set()
    for name, splits in texts.items():
        for split in ("test", "dev"):
            for place, text in enumerate(splits[split]):
                own = by_hand(text, 5)
                for other in ("x", "y"):
                    for i, learned in enumerate(texts[other]["train"]):
                        share = len(own & by_hand(learned, 5)) / len(own) if own else 0
                        if share >= 0.5:
                            ids = f"{FIRST[split]}{place:015x}", f"9{i:015x}"
                            expected.add(Near(share, name, split, ids[0], place, other, ids[1]))  # type: ignore[arg-type]
    found = near_duplicates({n: domain(n, **splits) for n, splits in texts.items()}, ["x", "y"])
    assert set(found) == expected and len(found) == len(expected) > 0
    assert [n.share for n in found] == sorted((n.share for n in found), reverse=True)


def test_a_planted_near_duplicate_is_found() -> None:
    copied = (
        numbered(0, 60).upper().replace(" ", ", ")
    )  # layout, case and punctuation are not what makes a text another
    trained = domain(
        "a",
        test=[numbered(500, 560)],
        train=[numbered(900, 950), copied + " and " + numbered(700, 800)],
    )
    control = domain("b", dev=[numbered(0, 60)], train=[numbered(500, 560)])
    assert near_duplicates({"a": trained, "b": control}, ["a"]) == [
        Near(1.0, "b", "dev", "5" + "0" * 15, 0, "a", "9" + "0" * 14 + "1"),
    ]  # what the control would train on is never learned


def test_the_share_is_of_the_scored_document_and_half_of_it_counts() -> None:
    def share(common: int) -> list[float]:
        # 16 5-grams, of which ``common`` are learned
        scored = f"{numbered(0, common + 4)} {numbered(100, 116 - common)}"
        assert len(by_hand(scored, 5)) == 16
        learned = f"{numbered(0, common + 4)} {numbered(200, 400)}"
        return [
            n.share
            for n in near_duplicates({"a": domain("a", test=[scored], train=[learned])}, ["a"])
        ]

    assert share(8) == [0.5] and share(12) == [0.75] and share(7) == []


def test_words_of_two_documents_make_no_gram() -> None:
    """What a comparison of the joined text, after packing, would find."""
    scored = numbered(0, 8)
    apart = domain("a", test=[scored], train=[numbered(0, 4), numbered(4, 8)])
    assert near_duplicates({"a": apart}, ["a"]) == []
    joined = domain("a", test=[scored], train=[numbered(0, 8)])
    assert len(near_duplicates({"a": joined}, ["a"])) == 1


def test_only_what_is_evaluated_when_asked() -> None:
    texts = [numbered(0, 20), numbered(100, 120), numbered(200, 220)]
    both = {"a": domain("a", test=texts, dev=texts, train=texts)}
    assert {(n.split, n.place) for n in near_duplicates(both, ["a"])} == {
        (s, i) for s in ("test", "dev") for i in range(3)
    }
    assert {(n.split, n.place) for n in near_duplicates(both, ["a"], TWO)} == {
        ("test", 0),
        ("test", 1),
    }
    on_dev = schema.Eval(documents=7, split="dev")
    assert {(n.split, n.place) for n in near_duplicates(both, ["a"], on_dev)} == {
        ("dev", 0),
        ("dev", 1),
        ("dev", 2),
    }


# --- benchmarks -----------------------------------------------------------------------------------


def found(domains: Mapping[str, Domain], items: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    return {s.domain: s.found for s in benchmark(domains, list(domains), {"t": items})}


def test_a_planted_benchmark_item_is_found() -> None:
    law = domain(
        "law", train=[numbered(500, 600), numbered(0, 13), numbered(0, 30)], test=[numbered(50, 80)]
    )
    news = domain("news", train=[numbered(17, 60)])
    items = {
        "in both": [
            numbered(900, 930) + ". " + numbered(0, 30).upper() + "?"
        ],  # 13 words in law, 13 in news
        "twelve words": [numbered(488, 512)],
        "short": [numbered(500, 512)],
        "held out": [numbered(60, 75)],
        "by its second choice": [numbered(800, 830), numbered(550, 563)],
        "by two choices joined": [numbered(530, 537), numbered(537, 545)],
    }
    shared = benchmark(
        {"law": law, "news": news}, ["law", "news"], {"t": items, "u": {"other": [numbered(0, 5)]}}
    )
    assert shared == [
        Shared(
            "t",
            "law",
            6,
            4,
            {"in both": "9" + "0" * 14 + "1", "by its second choice": "9" + "0" * 15},
        ),
        Shared("u", "law", 1, 0, {}),
        Shared("t", "news", 6, 4, {"in both": "9" + "0" * 15}),
        Shared("u", "news", 1, 0, {}),
    ]
    assert notes([], shared, TWO) == [
        "t: 2 items share a 13-gram with training documents (law 2, news 1)"
    ]


@pytest.mark.parametrize("seed", range(4))
def test_benchmark_overlap_equals_a_search_by_hand(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "CHUNK", 60)
    draw = random.Random(seed)
    texts = [
        " ".join(draw.choice("ab") for _ in range(draw.choice([5, 60, 200]))) for _ in range(20)
    ]
    items = {
        f"i{k}": [" ".join(draw.choice("ab") for _ in range(16)) for _ in range(2)]
        for k in range(60)
    }
    expected = {}
    for name, shown in items.items():
        grams = set().union(*(by_hand(text, 13) for text in shown))
        if holders := [i for i, text in enumerate(texts) if grams & by_hand(text, 13)]:
            expected[name] = f"9{holders[0]:015x}"
    assert found({"d": domain("d", train=texts)}, items) == {"d": expected}
    assert 5 < len(expected) < 60


def test_words_are_those_of_lm_eval(capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.decontamination.janitor import Janitor, word_ngrams

    capsys.readouterr()  # it complains of a module in C++
    text = (
        "The U.S.A.'s law, §3(b): \"No-one\" -- but_one --\n may\tappeal to the court's "
        "judge_s; twice THE law 3b."
    )
    theirs = list(word_ngrams(Janitor().normalize_string(text), 1))
    ours = word_hashes(text).tolist()
    assert len(ours) == len(theirs) == 16
    pairs = set(zip(theirs, ours, strict=True))
    assert (
        len(pairs) == len(set(theirs)) == len(set(ours)) == 13
    )  # one hash a word, one word a hash: "the" and "law" come again


def test_an_item_is_compared_as_it_is_shown_and_without_its_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        {
            "question": f"is the river {i} long",
            "passage": f"River {i} -- The river {i} is {i} km long.",
            "idx": i,
            "label": i % 2,
        }
        for i in range(6)
    ]
    monkeypatch.setattr(tasks, "docs", lambda task, source, split=None: rows)
    plain = tasks.texts(tasks.TaskSet(schema.Tasks(names=["boolq"]), None))  # type: ignore[arg-type]
    shots = tasks.TaskSet(schema.Tasks(names=["boolq"], source="hub", fewshot=2), None)  # type: ignore[arg-type]
    assert tasks.texts(shots) == plain
    shown = next(t for t in plain["boolq"].values() if "River 3" in t[0])
    assert shown == [
        f"River 3 -- The river 3 is 3 km long.\nQuestion: is the river 3 long?\nAnswer: {a}"
        for a in ("no", "yes")
    ]
    learned = domain(
        "d", train=["... the river 3 is 3 km long question IS the river 3 long, answer"]
    )
    assert len(found({"d": learned}, plain["boolq"])["d"]) == 1


# --- notes ----------------------------------------------------------------------------------------


def pair(share: float, document: str, **other: Any) -> Near:
    given: dict[str, Any] = {
        "domain": "science",
        "split": "test",
        "place": 0,
        "in_domain": "medicine",
        "in_document": "f",
        **other,
    }
    return Near(share=share, document=document, **given)


def test_notes_count_documents_that_are_scored() -> None:
    near = [
        pair(0.934, "a"),
        pair(0.9, "b", place=1),
        pair(0.8, "a", in_document="g"),
        pair(0.7, "c", domain="law", place=1),
    ]
    assert notes(near, [], TWO) == [
        "science: 2 of 2 scored documents have a near duplicate in training data (worst 0.93 "
        "of its 5-grams, domain medicine)",
        "law: 1 of 2 scored documents have a near duplicate in training data (worst 0.70 of "
        "its 5-grams, domain medicine)",
    ]
    assert notes([pair(1.0, "a", place=2), pair(1.0, "b", split="dev")], [], TWO) == []
    assert notes([], [Shared("boolq@100", "law", 100, 100, {"i": "d"})], TWO) == [
        "boolq@100: 1 items share a 13-gram with training documents (law 1)"
    ]
