"""Deal a domain's training text out in blocks, as a pure function of (seed, domain, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from gain_cl.errors import DataError


@dataclass(frozen=True)
class Doc:
    """One document. id: first 16 hex digits of the hash of its text; tokens [n] uint32 ids; ends
    [n] uint32: UTF-8 bytes of the text up to the end of each token, so that the first W tokens
    cover ends[W-1] bytes. prompt: how many tokens from the first on are a prompt, which is read and
    not scored; ends are then 0 in it and count the completion's bytes."""

    id: str
    tokens: np.ndarray
    ends: np.ndarray
    prompt: int = 0


class Block(NamedTuple):
    """A training sequence of T tokens, int64. documents_T: index of each token's document among
    ``ids`` of its stream (a separator belongs to the document before it); scored_T: whether the
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
    """Several streams in turn: block i belongs to round i // D; each round takes the next block of
    each of the D streams, in an order drawn from (seed, round). After N rounds each stream has
    given its first N blocks, as training one by one does."""

    def __init__(self, name: str, streams: Sequence[Stream], seed: int) -> None:
        self.name, self.streams, self.seed = name, streams, seed
        self.ids = [i for stream in streams for i in stream.ids]
        self._first = np.cumsum([0, *(len(stream.ids) for stream in streams)])

    def __getitem__(self, index: int) -> Block:
        turn, place = divmod(index, len(self.streams))
        keys = [
            hashlib.sha256(f"{self.seed}:{self.name}:{turn}:{s.name}".encode()).digest()
            for s in self.streams
        ]
        chosen = sorted(range(len(keys)), key=keys.__getitem__)[place]
        block = self.streams[chosen][turn]
        return block._replace(documents_T=block.documents_T + self._first[chosen])


class Blocks:
    """An endless stream of training blocks with random access.

    The documents, each followed by the separator token, are joined and cut into blocks of ``block``
    tokens; an epoch is a permutation of the blocks drawn from (seed, domain name, epoch) alone (the
    last tokens, less than a block, are left out). Blocks, not documents, are shuffled, as is usual:
    a small budget then sees many documents even where each is long. Every token is scored but those
    of prompts. No global random state, no dependence on the model, the place in the sequence or
    evaluation.
    """

    def __init__(
        self, name: str, documents: list[Doc], seed: int, block: int, separator_id: int
    ) -> None:
        self.name, self.seed, self.block, self.separator_id = name, seed, block, separator_id
        self._documents = documents
        self.ids = [d.id for d in documents]
        self._starts = np.cumsum(
            [0, *(len(d.tokens) + 1 for d in documents)]
        )  # separators included
        self.epoch_blocks = int(self._starts[-1]) // block
        if not self.epoch_blocks:
            raise DataError(
                f"less than one block of {block} tokens to train on",
                f"domain {name}",
                "give more text, a smaller train.block or smaller shares for test and dev",
            )
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        """The blocks in the epoch's order."""
        if epoch not in self._orders:
            # Sorting by a hash, not a generator's shuffle: the same on every numpy version, for
            # good.
            keys = [
                hashlib.sha256(f"{self.seed}:{self.name}:{epoch}:{k}".encode()).digest()
                for k in range(self.epoch_blocks)
            ]
            self._orders = {epoch: np.array(sorted(range(self.epoch_blocks), key=keys.__getitem__))}
        return self._orders[epoch]

    def __getitem__(self, index: int) -> Block:
        """Block ``index`` >= 0; documents are in hash order."""
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, self.epoch_blocks)
        start = int(self._order(epoch)[place]) * self.block
        tokens, owners, scored = (
            np.empty(self.block, np.int64),
            np.empty(self.block, np.int64),
            np.ones(self.block, bool),
        )
        filled = 0
        while filled < self.block:
            owner = int(np.searchsorted(self._starts, start + filled, side="right")) - 1
            skip = start + filled - int(self._starts[owner])
            part = np.asarray(
                self._documents[owner].tokens[skip : skip + self.block - filled], dtype=np.int64
            )
            stop = filled + len(part)
            tokens[filled:stop], owners[filled:stop] = part, owner
            scored[
                filled : filled + max(0, min(len(part), self._documents[owner].prompt - skip))
            ] = False
            if stop < self.block:  # the document ended: its separator follows
                tokens[stop], owners[stop] = self.separator_id, owner
                stop += 1
            filled = stop
        return Block(tokens, owners, scored)
