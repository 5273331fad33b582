"""Find in training text what is scored: near duplicates of scored documents, and benchmark items.

Both compare word n-grams within a document (tokens.word_hashes says what a word is) by their 64-bit
hashes, which is exact but for a chance collision. A text of fewer than n words cannot be found.
Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from scipy import sparse

from gain_cl.config import schema
from gain_cl.domains.domain import Domain, SplitName
from gain_cl.domains.tokens import word_hashes
from gain_cl.system import signals

NEAR_WORDS = 5
NEAR_SHARE = 0.5
"""A scored document has a near duplicate when at least this share of its distinct 5-grams is in one
training document."""
BENCHMARK_WORDS = 13  # as lm-eval's decontamination, after GPT-3 (arXiv 2005.14165, appendix C)

CHUNK = 1 << 11  # documents that are compared at a time, of either side
CHUNK_WORDS = 1 << 22  # words of training documents at a time, but for one that is longer


@dataclass(frozen=True)
class Near:
    """A scored document, and a training document that holds ``share`` of its distinct 5-grams.
    place: index of the scored document in its split in hash order, the order of evaluation."""

    share: float
    domain: str
    split: SplitName
    document: str
    place: int
    in_domain: str
    in_document: str


@dataclass(frozen=True)
class Shared:
    """What a task shares with a domain. items: how many the task has. long_enough: how many of
    those have 13 words. found: item id -> the first training document that holds a 13-gram of
    it."""

    task: str
    domain: str
    items: int
    long_enough: int
    found: dict[str, str]


def near_duplicates(
    domains: Mapping[str, Domain], trained: Collection[str], evaluation: schema.Eval | None = None
) -> list[Near]:
    """Return pairs of a scored document of any domain and a training document of a trained one,
    worst first.

    evaluation: its scored documents only. None: every test and dev document.
    """
    splits: tuple[SplitName, ...] = ("test", "dev") if evaluation is None else (evaluation.split,)
    limit = None if evaluation is None else evaluation.documents
    scored: list[tuple[str, SplitName, str, int]] = []  # domain, split, document, place of each row
    grams, owners = [], []
    for (name, domain), split in itertools.product(domains.items(), splits):
        ids = domain.ids(split)[:limit]
        gram, owner = ngrams(*domain.words(split), NEAR_WORDS)
        grams.append(gram[owner < len(ids)])
        owners.append(owner[owner < len(ids)] + len(scored))
        scored += [(name, split, i, place) for place, i in enumerate(ids)]
    vocabulary, column = np.unique(np.concatenate(grams), return_inverse=True)
    rows = _incidence(np.concatenate(owners), column, (len(scored), len(vocabulary)))
    size, found = np.diff(rows.indptr), []
    for name in trained:
        ids = domains[name].ids("train")
        for known, document in _training(domains[name], NEAR_WORDS, vocabulary):
            columns = _incidence(known, document, (len(vocabulary), len(ids)))
            for start in range(0, len(scored), CHUNK):
                product = (rows[start : start + CHUNK] @ columns).tocoo()
                share = product.data / size[product.row + start]
                for k in np.flatnonzero(share >= NEAR_SHARE):
                    row = scored[int(start + product.row[k])]
                    found.append(Near(float(share[k]), *row, name, ids[product.col[k]]))
    return sorted(found, key=lambda n: (-n.share, n.domain, n.document, n.in_domain, n.in_document))


def benchmark(
    domains: Mapping[str, Domain],
    trained: Collection[str],
    items: Mapping[str, Mapping[str, list[str]]],
) -> list[Shared]:
    """Return which task items share a word 13-gram with a training document, for each task and
    trained domain.

    items: task -> item id -> the texts it is shown as (tasks.texts). A 13-gram of any of them
    counts.
    """
    places = [(task, item) for task, asked in items.items() for item in asked]
    texts = [(k, word_hashes(t)) for k, (task, i) in enumerate(places) for t in items[task][i]]
    words = [np.empty(0, np.uint32), *(hashes for _, hashes in texts)]
    gram, at = ngrams(np.concatenate(words), np.cumsum([*map(len, words)]), BENCHMARK_WORDS)
    owner = np.array([place for place, _ in texts], int)[at]
    vocabulary, column = np.unique(gram, return_inverse=True)
    shared, long_enough = [], set(owner.tolist())
    for name in trained:
        ids = domains[name].ids("train")
        # The first training document with each 13-gram, and then with each item.
        holder, first = (np.full(len(of), len(ids)) for of in (vocabulary, places))
        for known, document in _training(domains[name], BENCHMARK_WORDS, vocabulary):
            np.minimum.at(holder, known, document)
        np.minimum.at(first, owner, holder[column])
        for task in items:
            own = [k for k, (of, _) in enumerate(places) if of == task]
            found = {places[k][1]: ids[first[k]] for k in own if first[k] < len(ids)}
            shared.append(Shared(task, name, len(own), len(long_enough.intersection(own)), found))
    return shared


def notes(near: list[Near], shared: list[Shared], evaluation: schema.Eval) -> list[str]:
    """Return lines for a record: what the scored documents and the tasks share with training text;
    empty when nothing."""
    lines = []
    count = evaluation.documents
    scored = [n for n in near if n.split == evaluation.split and n.place < count]
    for domain in dict.fromkeys(n.domain for n in scored):
        own = [n for n in scored if n.domain == domain]
        hit = len({n.document for n in own})
        lines.append(
            f"{domain}: {hit} of {count} scored documents have a near duplicate in training data "
            f"(worst {own[0].share:.2f} of its {NEAR_WORDS}-grams, domain {own[0].in_domain})"
        )
    for task in dict.fromkeys(s.task for s in shared):
        hits = {s.domain: s.found for s in shared if s.task == task and s.found}
        if hits:
            hit = len(set().union(*hits.values()))
            where = ", ".join(f"{domain} {len(found)}" for domain, found in hits.items())
            lines.append(
                f"{task}: {hit} items share a {BENCHMARK_WORDS}-gram with training documents "
                f"({where})"
            )
    return lines


# --- n-grams --------------------------------------------------------------------------------------


def ngrams(words: np.ndarray, offsets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (hash [G] uint64, document [G] int64) of each run of n words within a document, in
    order.

    words: word hashes [W] uint32; offsets [D+1]: where each document begins and the last ends.
    """
    documents = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if len(words) < n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    # A polynomial modulo 2**64 in an odd number, of words whose 32 bits are mixed into 64.
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(n, dtype=np.uint64)
    total = sliding_window_view(pd.util.hash_array(words), n) @ powers
    within = documents[: len(total)] == documents[n - 1 :]
    return total[within], documents[: len(total)][within]


def _training(
    domain: Domain, n: int, vocabulary: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (place in the vocabulary, training document) of the n-grams of a domain that the sorted
    vocabulary holds, some documents at a time."""
    words, offsets = domain.words("train")
    places = pd.Index(vocabulary)
    start = stop = 0
    while (start := stop) < len(offsets) - 1:
        signals.poll()
        fits = int(np.searchsorted(offsets, offsets[start] + CHUNK_WORDS, side="right")) - 1
        stop = min(max(fits, start + 1), start + CHUNK)
        edges = offsets[start : stop + 1]
        gram, document = ngrams(words[edges[0] : edges[-1]], edges - edges[0], n)
        place = places.get_indexer(pd.Index(gram))
        known = place >= 0
        yield place[known], document[known] + start


def _incidence(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Return 1 where a pair (row, column) occurs, however often."""
    counted = sparse.csr_array((np.ones(len(row), np.int32), (row, column)), shape=shape)
    return (counted > 0).astype(np.int32)
