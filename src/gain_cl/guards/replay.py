"""Replay: part of every batch is text of the past, or what the pretrained model takes for text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gain_cl.guards.base import Batch, Guard
from gain_cl.models import load
from gain_cl.system import watchdog

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream


def draw(*parts: int | str) -> float:
    """Return a number in [0, 1) that is a function of its parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


def replaced(fraction: float, size: int, seed: int, stage: int, step: int) -> range:
    """Return the rows of a step of ``size`` sequences that make way: the last ones; a fraction of a
    sequence is a whole one now and then."""
    wanted = fraction * size
    return range(size - math.floor(wanted) - (draw(seed, stage, step) < wanted % 1), size)


class ReplayGuard(Guard):
    """Replaces ``fraction`` of the sequences of a step, on average, by sequences of the text that
    earlier stages were given: the domain is drawn uniformly, then the sequence, never one beyond a
    stage's budget. Compute stays equal. Experience replay as in Chaudhry et al. 2019 (1902.10486),
    with all of that text as memory."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.past: Sequence[Stream] = ()

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        self.seed = seed

    def before_stage(self, stage: int, past: Sequence[Stream], sequences: int) -> None:
        self.past, self.sequences = past, sequences

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        if not self.past:
            return batch
        tokens, documents, scored = (part.copy() for part in batch)
        for row in replaced(self.fraction, len(tokens), self.seed, stage, step):
            stream = self.past[int(draw(self.seed, stage, step, row, "domain") * len(self.past))]
            block = stream[int(draw(self.seed, stage, step, row, "sequence") * self.sequences)]
            tokens[row], scored[row] = block.tokens_T, block.scored_T
            documents[row] = -1 - block.documents_T  # of another domain
        return Batch(tokens, documents, scored)


class SelfReplayGuard(Guard):
    """Replaces ``fraction`` of the sequences of a step by text sampled from the pretrained model
    before the first stage: needs no stored data (language modelling as in LAMOL, Sun et al. 2020,
    1909.03329).

    Deviation: sampled once, from the pretrained model, not anew from each stage's; plain sampling
    at ``temperature``.
    """

    def __init__(self, fraction: float, samples: int, temperature: float = 1.0) -> None:
        self.fraction, self.samples, self.temperature = fraction, samples, temperature
        self.tokens_NT: Tensor | None = None

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        self.loaded, self.seed = loaded, seed

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        size, length = batch.tokens_ST.shape
        if self.tokens_NT is None:  # the very first step: nothing has moved yet
            self.tokens_NT = sample(self.loaded, self.samples, length, self.temperature, self.seed)
        tokens, documents, scored = (part.copy() for part in batch)
        for row in replaced(self.fraction, size, self.seed, stage, step):
            chosen = int(draw(self.seed, stage, step, row, "sample") * self.samples)
            tokens[row], documents[row], scored[row] = self.tokens_NT[chosen].numpy(), -1, True
        return Batch(tokens, documents, scored)

    def state(self) -> dict[str, Tensor]:
        return {} if self.tokens_NT is None else {"tokens": self.tokens_NT}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tokens_NT = state.get("tokens")


SAMPLED_AT_ONCE = 16
"""Sequences whose keys and values are in memory together."""


@torch.no_grad()
def sample(loaded: load.Loaded, count: int, length: int, temperature: float, seed: int) -> Tensor:
    """Return (count, length) int64 token ids drawn from the model, each sequence after the prefix
    token. An end token ends nothing: the model goes on, as in packed training text."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with load.eval_mode(loaded.model):
        for first in range(0, count, SAMPLED_AT_ONCE):
            ids_N1 = torch.full(
                (min(SAMPLED_AT_ONCE, count - first), 1), loaded.prefix_id, device=loaded.device
            )
            found, past = [], None
            watchdog.beat()
            for _ in range(length):
                out = loaded.model(input_ids=ids_N1, past_key_values=past, use_cache=True)
                past = out.past_key_values
                p_NV = torch.softmax(out.logits[:, -1].float().cpu() / temperature, dim=-1)
                ids_N1 = torch.multinomial(p_NV, 1, generator=generator).to(loaded.device)
                found.append(ids_N1.cpu())
            rows.append(torch.cat(found, dim=1))
    return torch.cat(rows)
