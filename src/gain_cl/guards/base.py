"""The contract of a guard; the base class guards nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Blocks
    from gain_cl.models import Loaded


class Batch(NamedTuple):
    """One optimiser step. tokens_ST: token ids to predict; documents_ST: index of each token's document; S sequences of
    T tokens."""

    tokens_ST: np.ndarray
    documents_ST: np.ndarray


class Guard:
    """Called by the trainer at four points. Whatever it draws at random is a function of (seed, stage, step)."""

    def attach(self, loaded: Loaded, adapter: Adapter, seed: int) -> None:
        """Once, after the adapter is attached."""

    def mix(self, batch: Batch, stage: int, step: int) -> Batch:
        """Replace part of a batch; its size must not change, so that compute stays equal between methods."""
        return batch

    def penalty(self) -> Tensor | None:
        """Added to the mean loss of every step, with gradients to the adapter's parameters; None: nothing."""
        return None

    def after_stage(self, stage: int, domain: str, blocks: Blocks) -> None:
        """Remember what the stage that just ended needs; blocks: its endless stream of training sequences."""

    def state(self) -> dict[str, Tensor]:
        """The guard's memory; empty when it has none."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a saved memory back."""
