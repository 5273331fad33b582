"""Domain: tokenised documents, split by hash, memory-mapped; Blocks: the endless training stream as
a pure function."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from gain_cl.config import schema
from gain_cl.domains import stream, tokens

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("test", "dev", "train")  # in the order of the hash


class Domain:
    """The tokenised documents of a domain, sorted by hash. Splits are ranges of that order: a
    document is in test when its hash, read as a fraction, is below ``split.test``, in dev below
    test + dev, else in train. Never by position."""

    def __init__(
        self, name: str, split: schema.Split, content_hash: str, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """arrays: ids [N] S16 sorted; offsets [N+1] into tokens and ends [T]; prompts [N], of which
        so many tokens are the prompt; word_offsets [N+1] into words [W] uint32."""
        self.name, self.hash = name, content_hash
        (
            self._ids,
            self._offsets,
            self._tokens,
            self._ends,
            self._prompts,
            self._words,
            self._word_offsets,
        ) = (arrays[k] for k in tokens._ARRAYS)
        share = np.array([int(i, 16) / 2**64 for i in self._ids.tolist()])
        first, second = (
            int(np.searchsorted(share, bound)) for bound in (split.test, split.test + split.dev)
        )
        self._ranges = {
            "test": range(first),
            "dev": range(first, second),
            "train": range(second, len(share)),
        }

    def ids(self, split: SplitName) -> list[str]:
        """Document ids of a split, in hash order."""
        r = self._ranges[split]
        return [i.decode() for i in self._ids[r.start : r.stop].tolist()]

    def split_hash(self, split: SplitName) -> str:
        """SHA-256 (hex) of the ids of a split: equal when it holds the same documents, whatever the
        tokenizer."""
        return hashlib.sha256("\n".join(self.ids(split)).encode()).hexdigest()

    def n_documents(self, split: SplitName) -> int:
        return len(self._ranges[split])

    def n_tokens(self, split: SplitName) -> int:
        r = self._ranges[split]
        return int(self._offsets[r.stop] - self._offsets[r.start])

    def n_prompt_tokens(self, split: SplitName) -> int:
        """Of those tokens, how many are prompts: 0 for plain text."""
        r = self._ranges[split]
        return int(self._prompts[r.start : r.stop].sum())

    def n_bytes(self, split: SplitName) -> int:
        """UTF-8 bytes of the split's documents; of instruction data, of the completions."""
        return sum(int(doc.ends[-1]) for doc in self.split_documents(split))

    def split_documents(self, split: SplitName) -> list[stream.Doc]:
        """Documents of a split in hash order; tokens and ends are views of the memory-mapped
        arrays."""
        parts = [
            (i, slice(int(self._offsets[i]), int(self._offsets[i + 1])))
            for i in self._ranges[split]
        ]
        return [
            stream.Doc(
                self._ids[i].decode(), self._tokens[part], self._ends[part], int(self._prompts[i])
            )
            for i, part in parts
        ]

    def words(self, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        """(word hashes [W] uint32, offsets [n+1] int64): document i of the split has the words
        offsets[i] to offsets[i+1]."""
        r = self._ranges[split]
        offsets = np.asarray(self._word_offsets[r.start : r.stop + 1])
        return self._words[offsets[0] : offsets[-1]], offsets - offsets[0]

    @property
    def largest_token(self) -> int:
        return int(self._tokens.max())

    def train_blocks(self, seed: int, block: int, separator_id: int) -> stream.Blocks:
        """The training stream; see Blocks."""
        return stream.Blocks(self.name, self.split_documents("train"), seed, block, separator_id)
