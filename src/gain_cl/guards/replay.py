"""Replay: part of every batch is text of the past, or what the pretrained model takes for text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gain_cl.guards.base import Batch, Guard

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream
    from gain_cl.models import Loaded


def draw(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of its parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


class ReplayGuard(Guard):
    """Replaces ``fraction`` of the sequences of a step, on average, by sequences that an earlier stage trained on: the domain is
    drawn uniformly, then the sequence. Compute stays equal. Experience replay as in Chaudhry et al. 2019 (1902.10486), with all
    that was trained on as memory."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.past: Sequence[Stream] = ()

    def attach(self, loaded: Loaded, adapter: Adapter, seed: int) -> None:
        self.seed = seed

    def before_stage(self, stage: int, past: Sequence[Stream], sequences: int) -> None:
        self.past, self.sequences = past, sequences

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        if not self.past:
            return batch
        size = len(batch.tokens_ST)
        wanted = self.fraction * size
        count = math.floor(wanted) + (draw(self.seed, stage, step) < wanted % 1)  # a fraction of a sequence: now and then a whole one
        tokens, documents, scored = (part.copy() for part in batch)
        for row in range(size - count, size):
            stream = self.past[int(draw(self.seed, stage, step, row, "domain") * len(self.past))]
            block = stream[int(draw(self.seed, stage, step, row, "sequence") * self.sequences)]
            tokens[row], scored[row] = block.tokens_T, block.scored_T
            documents[row] = -1 - block.documents_T  # of another domain
        return Batch(tokens, documents, scored)


class SelfReplayGuard(Guard):
    """Replaces ``fraction`` of the sequences of a step by text sampled from the pretrained model before the first stage: needs
    no stored data (language modelling as in LAMOL, Sun et al. 2020, 1909.03329).

    Deviation: sampled once, from the pretrained model, not anew from each stage's; plain sampling at ``temperature``.
    """

    def __init__(self, fraction: float, samples: int, temperature: float = 1.0) -> None:
        self.fraction, self.samples, self.temperature = fraction, samples, temperature
        self.tokens_NT: Tensor | None = None

    def attach(self, loaded: Loaded, adapter: Adapter, seed: int) -> None:
        self.loaded, self.seed = loaded, seed

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        size, length = batch.tokens_ST.shape
        if self.tokens_NT is None:  # the very first step: nothing has moved yet
            self.tokens_NT = sample(self.loaded, self.samples, length, self.temperature, self.seed)
        wanted = self.fraction * size
        count = math.floor(wanted) + (draw(self.seed, stage, step) < wanted % 1)
        tokens, documents, scored = (part.copy() for part in batch)
        for row in range(size - count, size):
            chosen = int(draw(self.seed, stage, step, row, "sample") * self.samples)
            tokens[row], documents[row], scored[row] = self.tokens_NT[chosen].numpy(), -1, True
        return Batch(tokens, documents, scored)

    def state(self) -> dict[str, Tensor]:
        return {} if self.tokens_NT is None else {"tokens": self.tokens_NT}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tokens_NT = state.get("tokens")


@torch.no_grad()
def sample(loaded: Loaded, count: int, length: int, temperature: float, seed: int) -> Tensor:
    """(count, length) int64 token ids drawn from the model, each sequence after the prefix token. An end token ends nothing: the
    model goes on, as in packed training text."""
    generator = torch.Generator().manual_seed(seed)
    modes = {m: m.training for m in loaded.model.modules()}
    loaded.model.eval()
    ids_N1 = torch.full((count, 1), loaded.prefix_id, device=loaded.device)
    found, past = [], None
    try:
        for _ in range(length):
            out = loaded.model(input_ids=ids_N1, past_key_values=past, use_cache=True)
            past = out.past_key_values
            p_NV = torch.softmax(out.logits[:, -1].float().cpu() / temperature, dim=-1)
            ids_N1 = torch.multinomial(p_NV, 1, generator=generator).to(loaded.device)
            found.append(ids_N1.cpu())
    finally:
        for m, mode in modes.items():
            m.training = mode
    return torch.cat(found, dim=1)
