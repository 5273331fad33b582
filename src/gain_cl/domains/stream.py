"""Deal a domain's training text out in blocks, as a pure function of (seed, domain, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Doc:
    """One document. id: first 16 hex digits of the hash of its text. tokens: [n] uint32 ids. ends:
    [n] uint32, UTF-8 bytes of the text up to the end of each token, so that the first W tokens
    cover ends[W-1] bytes. scored: [n] bool, False for what is read alone (True: all is scored).
    ends then count the bytes of what is scored."""

    id: str
    tokens: np.ndarray
    ends: np.ndarray
    scored: np.ndarray = True  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scored", np.broadcast_to(self.scored, len(self.tokens)))


class Block(NamedTuple):
    """A training sequence of T tokens, int64. documents_T: index of each token's document among
    ``ids`` of its stream (a separator belongs to the document before it). scored_T: True where the
    token counts in the loss."""

    tokens_T: np.ndarray
    documents_T: np.ndarray
    scored_T: np.ndarray


class Stream(Protocol):
    """An endless stream of training blocks. ids: of the documents they are made of."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def name(self) -> str: ...

    def __getitem__(self, index: int) -> Block: ...


class Mixture:
    """Several streams in turn. Block i belongs to round i // D. Each round takes the next block of
    each of the D streams, in an order drawn from (seed, round). After N rounds each stream has
    given its first N blocks, as training one by one does."""

    def __init__(self, name: str, streams: Sequence[Stream], seed: int) -> None:
        self.name, self.streams, self.seed = name, streams, seed
        self.ids = [i for stream in streams for i in stream.ids]
        self._first = np.cumsum([0, *(len(stream.ids) for stream in streams)])

    def __getitem__(self, index: int) -> Block:
        turn, place = divmod(index, len(self.streams))
        names = (f"{self.seed}:{self.name}:{turn}:{s.name}" for s in self.streams)
        chosen = _shuffled(names)[place]
        block = self.streams[chosen][turn]
        return block._replace(documents_T=block.documents_T + self._first[chosen])


class Blocks:
    """An endless stream of training blocks with random access.

    The documents, each followed by the separator token, are joined and cut into blocks of ``block``
    tokens. An epoch is a permutation of the blocks drawn from (seed, domain name, epoch) alone (the
    last tokens, less than a block, are left out). Blocks, not documents, are shuffled, as is usual:
    a small budget then sees many documents even where each is long. Every token is scored but those
    that a document says are not. No global random state, no dependence on the model, the place in
    the sequence or evaluation.
    """

    def __init__(
        self, name: str, documents: list[Doc], seed: int, block: int, separator_id: int
    ) -> None:
        self.name, self.seed, self.block, self.separator_id = name, seed, block, separator_id
        self._documents = documents
        self.ids = [d.id for d in documents]
        self._starts = np.cumsum([0, *(len(d.tokens) + 1 for d in documents)])  # with separators
        self.epoch_blocks = int(self._starts[-1]) // block
        assert self.epoch_blocks, "check_domains refuses less than one block"
        self._orders: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        """Return the blocks in the epoch's order."""
        if epoch not in self._orders:
            names = (f"{self.seed}:{self.name}:{epoch}:{k}" for k in range(self.epoch_blocks))
            self._orders = {epoch: _shuffled(names)}
        return self._orders[epoch]

    def __getitem__(self, index: int) -> Block:
        """Return block ``index`` >= 0. Documents are in hash order."""
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, self.epoch_blocks)
        start = self._order(epoch)[place] * self.block
        at = np.arange(start, start + self.block)
        owners = np.searchsorted(self._starts, at, side="right") - 1
        tokens = np.full(self.block, self.separator_id, np.int64)
        scored = np.ones(self.block, bool)
        for owner in np.unique(owners):
            document, here = self._documents[owner], np.flatnonzero(owners == owner)
            first = at[here[0]] - self._starts[owner]
            part = slice(first, first + len(here))
            # Where the document ends, its separator follows, which is scored.
            here = here[: len(document.tokens[part])]
            tokens[here], scored[here] = document.tokens[part], document.scored[part]
        return Block(tokens, owners, scored)


def _shuffled(names: Iterable[str]) -> list[int]:
    """Return the indices of names in the order of their hashes. Unlike a generator's shuffle it is
    the same on every numpy version, for good."""
    keys = [hashlib.sha256(name.encode()).digest() for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)
