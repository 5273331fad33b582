"""How much of what is scored was also learned: near duplicates of scored documents, and benchmark
items, in training text.

Both compare word n-grams within a document (domains.base.word_hashes says what a word is), by their
64-bit hashes: exact but for a chance collision. What has fewer than n words cannot be found.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from gain_cl.config import schema
from gain_cl.domains import Domain
from gain_cl.domains.domain import SplitName
from gain_cl.domains.tokens import word_hashes
from gain_cl.system import signals

NEAR_WORDS = 5
NEAR_SHARE = 0.5
"""A scored document has a near duplicate when at least this share of its distinct 5-grams is in one
training document."""
BENCHMARK_WORDS = 13  # as lm-eval's decontamination, after GPT-3 (arXiv 2005.14165, appendix C)

CHUNK_WORDS = 1 << 22  # training words, and products of the comparison, in memory at a time


@dataclass(frozen=True)
class Near:
    """A scored document and a training document that holds ``share`` of its distinct 5-grams.
    place: of the scored document in its split, from 0 in hash order, which is the order of
    evaluation."""

    share: float
    domain: str
    split: SplitName
    document: str
    place: int
    in_domain: str
    in_document: str


@dataclass(frozen=True)
class Shared:
    """What a task shares with a domain. found: item id -> the first training document that holds a
    13-gram of it; items: of the task; long_enough: of those, how many have 13 words."""

    task: str
    domain: str
    items: int
    long_enough: int
    found: dict[str, str]


def near_duplicates(
    domains: Mapping[str, Domain], trained: Collection[str], evaluation: schema.Eval | None = None
) -> list[Near]:
    """Pairs of a scored document of any domain and a training document of a trained one, worst
    first.

    evaluation: its scored documents only; None: every test and dev document.
    """
    scored: list[
        tuple[str, SplitName, str, int]
    ] = []  # domain, split, document, place: of each row
    parts = []
    splits: tuple[SplitName, ...] = ("test", "dev") if evaluation is None else (evaluation.split,)
    for name, domain in domains.items():
        for split in splits:
            words, offsets = domain.words(split)
            count = (
                len(offsets) - 1
                if evaluation is None
                else min(evaluation.documents, len(offsets) - 1)
            )
            gram, document = ngrams(words[: offsets[count]], offsets[: count + 1], NEAR_WORDS)
            parts.append((gram, document + len(scored)))
            scored += [(name, split, i, place) for place, i in enumerate(domain.ids(split)[:count])]
    vocabulary, column = np.unique(np.concatenate([gram for gram, _ in parts]), return_inverse=True)
    rows = _incidence(
        np.concatenate([row for _, row in parts]), column, (len(scored), len(vocabulary))
    )
    size = np.diff(rows.indptr)
    found = []
    for name in trained:
        ids = domains[name].ids("train")
        for first, gram, document in _training(domains[name], NEAR_WORDS):
            known, at = _lookup(vocabulary, gram)
            columns = _incidence(
                at, document[known], (len(vocabulary), int(document.max(initial=0)) + 1)
            )
            for row, other, common in _products(rows, columns):
                share = common / size[row]
                for k in np.flatnonzero(share >= NEAR_SHARE):
                    scored_in, split, scored_id, place = scored[row[k]]
                    found.append(
                        Near(
                            float(share[k]),
                            scored_in,
                            split,
                            scored_id,
                            place,
                            name,
                            ids[first + int(other[k])],
                        )
                    )
    return sorted(found, key=lambda n: (-n.share, n.domain, n.document, n.in_domain, n.in_document))


def benchmark(
    domains: Mapping[str, Domain],
    trained: Collection[str],
    items: Mapping[str, Mapping[str, list[str]]],
) -> list[Shared]:
    """Which task items share a word 13-gram with a training document, for each task and trained
    domain.

    items: task -> item id -> the texts it is shown as (tasks.texts); a 13-gram of any of them
    counts.
    """
    names = [(task, item) for task, texts in items.items() for item in texts]
    counted, parts = [], []
    for row, (task, item) in enumerate(names):
        words = [word_hashes(text) for text in items[task][item]]
        gram, _ = ngrams(
            np.concatenate([np.empty(0, np.uint32), *words]),
            np.cumsum([0, *map(len, words)]),
            BENCHMARK_WORDS,
        )
        counted.append(len(gram) > 0)
        parts.append((gram, np.full(len(gram), row)))
    vocabulary, column = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(g for g, _ in parts)]), return_inverse=True
    )
    owner = np.concatenate([np.empty(0, np.int64), *(r for _, r in parts)])
    shared = []
    for name in trained:
        ids = domains[name].ids("train")
        holder = np.full(
            len(vocabulary), len(ids)
        )  # of each 13-gram, the first training document with it
        for first, gram, document in _training(domains[name], BENCHMARK_WORDS):
            known, at = _lookup(vocabulary, gram)
            np.minimum.at(holder, at, document[known] + first)
        earliest = np.full(len(names), len(ids))
        np.minimum.at(earliest, owner, holder[column])
        for task, texts in items.items():
            own = [row for row, (t, _) in enumerate(names) if t == task]
            found = {names[row][1]: ids[earliest[row]] for row in own if earliest[row] < len(ids)}
            shared.append(Shared(task, name, len(texts), sum(counted[row] for row in own), found))
    return shared


def notes(near: list[Near], shared: list[Shared], evaluation: schema.Eval) -> list[str]:
    """Lines for a record: what the scored documents and the tasks share with training text; empty
    when nothing."""
    lines = []
    scored = [n for n in near if n.split == evaluation.split and n.place < evaluation.documents]
    for domain in dict.fromkeys(n.domain for n in scored):
        own = [n for n in scored if n.domain == domain]
        count = len({n.document for n in own})
        lines.append(
            f"{domain}: {count} of {evaluation.documents} scored documents "
            f"{'has' if count == 1 else 'have'} a near duplicate "
            f"in training data (worst {own[0].share:.2f} of its {NEAR_WORDS}-grams, domain "
            f"{own[0].in_domain})"
        )
    for task in dict.fromkeys(s.task for s in shared):
        hits = {s.domain: s.found for s in shared if s.task == task and s.found}
        if hits:
            count = len({item for found in hits.values() for item in found})
            where = ", ".join(f"{domain} {len(found)}" for domain, found in hits.items())
            what = (
                f"{count} item{' shares' if count == 1 else 's share'} a "
                f"{BENCHMARK_WORDS}-gram with training documents"
            )
            lines.append(f"{task}: {what} ({where})")
    return lines


# --- n-grams --------------------------------------------------------------------------------------


def ngrams(words: np.ndarray, offsets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash [G] uint64, document [G] int64) of each run of n words within a document, in order.

    words: word hashes [W] uint32; offsets [D+1]: where each document begins and the last ends.
    """
    documents = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    mixed = _mix(words)
    total = mixed[:count].copy()
    for k in range(1, n):  # a polynomial modulo 2**64 in an odd number
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += mixed[k : k + count]
    within = documents[:count] == documents[n - 1 :]
    return total[within], documents[:count][within]


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64 of each word: sums of unmixed 32-bit numbers would collide."""
    x = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _training(domain: Domain, n: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index of the first document, hash, document from that one) of the training split,
    CHUNK_WORDS and one document at a time."""
    words, offsets = domain.words("train")
    first = 0
    while first < len(offsets) - 1:
        signals.poll()
        stop = max(
            first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK_WORDS, side="right")) - 1
        )
        yield (
            first,
            *ngrams(
                words[offsets[first] : offsets[stop]], offsets[first : stop + 1] - offsets[first], n
            ),
        )
        first = stop


def _lookup(vocabulary: np.ndarray, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the hashes that are in the sorted vocabulary, their places there)."""
    begins = np.zeros(1 << 24, bool)
    begins[vocabulary >> np.uint64(40)] = True
    known = np.flatnonzero(
        begins[grams >> np.uint64(40)]
    )  # few pass: ten times faster than to search for every hash
    at = np.searchsorted(vocabulary, grams[known])
    at[at == len(vocabulary)] = 0
    same = vocabulary[at] == grams[known]
    return known[same], at[same]


def _incidence(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """1 where a pair (row, column) occurs, however often."""
    matrix = sparse.csr_array((np.ones(len(row), np.int32), (row, column)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _products(
    rows: sparse.csr_array, columns: sparse.csr_array
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row, other, common): scored and training documents with n-grams in common, and how many,
    some rows at a time."""
    work = np.concatenate(
        [[0], np.cumsum(rows @ np.diff(columns.indptr))]
    )  # multiplications up to each row, which bound the result
    start = 0
    while start < rows.shape[0]:
        stop = max(
            start + 1, int(np.searchsorted(work, work[start] + CHUNK_WORDS, side="right")) - 1
        )
        product = (rows[start:stop] @ columns).tocoo()
        yield product.row + start, product.col, product.data
        start = stop
