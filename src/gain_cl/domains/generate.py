"""Text drawn from a seeded grammar: for smoke runs and tests, where nothing may be downloaded."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate

VERSION = 1
WORDS, FOLLOWERS = 80, 3


def generate(seed: int, documents: int) -> Iterator[str]:
    """``documents`` texts of 400-1,200 characters: sentences of invented words in which most words
    have few followers.

    Each seed is a language of its own (syllables, words, followers). Only random.random() is used,
    whose stream is fixed across Python versions.
    """
    draw = random.Random(f"gain_cl:{seed}").random
    consonants = sorted("bcdfghjklmnpqrstvwz", key=lambda _: draw())[:9]
    vowels = sorted("aeiou", key=lambda _: draw())[:4]

    def pick(options: list[str], u: float) -> str:
        return options[int(u * len(options))]

    def word() -> str:
        return "".join(
            pick(consonants, draw()) + pick(vowels, draw()) for _ in range(1 + int(draw() * 3))
        )

    known = dict[str, None]()
    while len(known) < WORDS:
        known[word()] = None
    lexicon = [*known]
    followers = {w: [pick(lexicon, draw()) for _ in range(FOLLOWERS)] for w in lexicon}
    weights = list(accumulate(1 / (rank + 1) for rank in range(WORDS)))

    def common() -> str:
        return lexicon[bisect(weights, draw() * weights[-1])]

    for _ in range(documents):
        length = 400 + int(draw() * 800)
        sentences: list[str] = []
        while sum(map(len, sentences)) < length:
            words = [common()]
            while len(words) < 4 + int(draw() * 10):
                words.append(pick(followers[words[-1]], draw()) if draw() < 0.8 else common())
            sentences.append(" ".join(words).capitalize() + ".")
        yield " ".join(sentences)
