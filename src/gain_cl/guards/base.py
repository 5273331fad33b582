"""The contract of a guard; the base class guards nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream
    from gain_cl.models.load import Loaded


class Batch(NamedTuple):
    """One optimiser step of S sequences of T tokens. tokens_ST: token ids to predict; documents_ST:
    index of each token's document in the training split, negative for what a guard put in;
    scored_ST: whether a token counts in the loss."""

    tokens_ST: np.ndarray
    documents_ST: np.ndarray
    scored_ST: np.ndarray


class Guard:
    """Called by the trainer at these points. Whatever it draws at random is a function of (seed,
    stage, step)."""

    def attach(self, loaded: Loaded, adapter: Adapter, seed: int) -> None:
        """Begin, once the adapter is attached. The model still computes what the pretrained one
        does."""

    def before_stage(self, stage: int, past: Sequence[Stream], sequences: int) -> None:
        """Prepare before a stage begins, and again when it is resumed. past: the training streams
        of the stages before, in order, each of which trained on its first ``sequences`` blocks; the
        streams of the stages to come are not known."""

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        """Replace part of a batch; its size must not change, so that compute stays equal between
        methods."""
        return batch

    def token_penalty(
        self, inputs: dict[str, Any], rows_N: Tensor, hidden_ND: Tensor
    ) -> Tensor | None:
        """Return what is added to the sum of the losses of a forward pass: a sum over its N scored
        tokens. inputs: what the model's body was called with; rows_N: places of the scored tokens
        among all; hidden_ND: their hidden states. None: nothing."""
        return None

    def penalty(self) -> Tensor | None:
        """Return what is added to the mean loss of every step, with gradients to the adapter's
        parameters; None: nothing."""
        return None

    def after_step(self) -> None:
        """Note an optimiser step, after each."""

    def after_stage(self, stage: int, domain: str, blocks: Stream) -> None:
        """Remember what the stage that just ended needs; blocks: its endless stream of training
        sequences."""

    def state(self) -> dict[str, Tensor]:
        """Return the guard's memory; empty when it has none."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a saved memory back."""
