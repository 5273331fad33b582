"""A domain: tokenised documents, split by hash, memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from gain_cl.config import schema
from gain_cl.domains import stream

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("test", "dev", "train")  # in the order of the hash
ARRAYS = ("ids", "offsets", "tokens", "ends", "scored", "words", "word_offsets")


class Domain:
    """The tokenised documents of a domain, sorted by hash. Splits are ranges of that order: a
    document is in test when its hash, read as a fraction, is below ``split.test``, in dev below
    test + dev, else in train. Position decides nothing."""

    def __init__(
        self, name: str, split: schema.Split, content_hash: str, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """arrays: ids [N] S16 sorted; offsets [N+1] into tokens, ends and scored [T]; word_offsets
        [N+1] into words [W] uint32."""
        self.notes = list[str]()  # what a reader must know of its source
        self.name, self.hash, self.arrays = name, content_hash, arrays
        share = [int(i, 16) / 2**64 for i in arrays["ids"].tolist()]
        bounds = 0, *np.searchsorted(share, [split.test, split.test + split.dev]), len(share)
        self.ranges = {s: range(*map(int, bounds[k : k + 2])) for k, s in enumerate(SPLITS)}

    def _of(self, name: str, split: SplitName, more: int = 0) -> np.ndarray:
        """Return a split's part of an array, and so many entries more."""
        r = self.ranges[split]
        return self.arrays[name][r.start : r.stop + more]

    def ids(self, split: SplitName) -> list[str]:
        """Return the document ids of a split, in hash order."""
        return [i.decode() for i in self._of("ids", split).tolist()]

    def split_hash(self, split: SplitName) -> str:
        """Return the SHA-256 (hex) of the ids of a split. It is equal when the split holds the same
        documents, whatever the tokenizer."""
        return hashlib.sha256("\n".join(self.ids(split)).encode()).hexdigest()

    def n_documents(self, split: SplitName) -> int:
        """Return the number of documents of a split."""
        return len(self.ranges[split])

    def n_tokens(self, split: SplitName) -> int:
        """Return the number of tokens of a split."""
        return int(np.ptp(self._of("offsets", split, 1)))

    def n_prompt_tokens(self, split: SplitName) -> int:
        """Return how many of those tokens are read and not scored: 0 for plain text."""
        return sum(int((~document.scored).sum()) for document in self.split_documents(split))

    def n_bytes(self, split: SplitName) -> int:
        """Return the UTF-8 bytes of a split's documents, of instruction data those that are
        scored."""
        return sum(int(doc.ends[-1]) for doc in self.split_documents(split))

    def split_documents(self, split: SplitName) -> list[stream.Doc]:
        """Return the documents of a split in hash order. Their arrays are views of the
        memory-mapped arrays."""
        offsets = self._of("offsets", split, 1).tolist()
        parts = [self.arrays[name] for name in ("tokens", "ends", "scored")]
        return [
            stream.Doc(i, *(part[start:stop] for part in parts))
            for i, start, stop in zip(self.ids(split), offsets, offsets[1:], strict=False)
        ]

    def words(self, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        """Return (word hashes [W] uint32, offsets [n+1] int64). Document i of the split has the
        words offsets[i] to offsets[i+1]."""
        offsets = np.asarray(self._of("word_offsets", split, 1))
        return self.arrays["words"][offsets[0] : offsets[-1]], offsets - offsets[0]

    def train_blocks(self, seed: int, block: int, separator_id: int) -> stream.Blocks:
        """Return the training stream."""
        return stream.Blocks(self.name, self.split_documents("train"), seed, block, separator_id)
