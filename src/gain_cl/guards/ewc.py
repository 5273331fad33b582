"""Elastic weight consolidation (Kirkpatrick et al. 2017, 1612.00796; online form: Schwarz et al.
2018, 1805.06370)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gain_cl.adapters.base import copied
from gain_cl.guards.base import Guard
from gain_cl.models import load
from gain_cl.models.forward import loss_sum

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream
    from gain_cl.models.load import Loaded


class EwcGuard(Guard):
    """Adds (strength / 2) * sum_i F_i (theta_i - theta*_i)^2 to the mean loss (eq. 3). theta: what
    trains, theta*: where it stood after the last stage, F: diagonal empirical Fisher information,
    summed over the stages (gamma of what was known is kept).

    Deviation: one anchor, the latest, in place of one a stage. Strengths that matter lie near 1e5,
    for F is small: sweep them by decades.
    """

    def __init__(self, strength: float, sequences: int, gamma: float = 1.0) -> None:
        self.strength, self.sequences, self.gamma = strength, sequences, gamma
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def attach(self, loaded: Loaded, adapter: Adapter, seed: int) -> None:
        self.loaded, self.parameters = loaded, adapter.parameters()

    def penalty(self) -> Tensor | None:
        if not self.fisher:
            return None
        terms = [
            (self.fisher[name] * (p - self.anchor[name]).square()).sum()
            for name, p in self.parameters.items()
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def after_stage(self, stage: int, domain: str, blocks: Stream) -> None:
        new = fisher(self.loaded, self.parameters, [blocks[i] for i in range(self.sequences)])
        self.fisher = {
            name: f if name not in self.fisher else self.gamma * self.fisher[name] + f
            for name, f in new.items()
        }
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        both = {"fisher": self.fisher, "anchor": self.anchor}
        return copied({f"{kind}/{n}": t for kind, kept in both.items() for n, t in kept.items()})

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.fisher, self.anchor = {}, {}
        for full, tensor in state.items():
            kind, name = full.split("/", 1)
            getattr(self, kind)[name] = tensor.to(self.loaded.device)


def fisher(
    loaded: Loaded, parameters: dict[str, torch.nn.Parameter], blocks: list[tuple[np.ndarray, ...]]
) -> dict[str, Tensor]:
    """Return the diagonal empirical Fisher information: the mean over the sequences of the squared
    gradient of a sequence's summed token NLL. One sequence at a time, for the square of a batch's
    mean gradient is something else; without dropout."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with load.eval_mode(loaded.model):
        for tokens_T, _, scored_T in blocks:
            loss_sum(loaded, tokens_T[None], None, scored_T[None]).backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    total[name] += p.grad.square() / len(blocks)
                    p.grad = None
    return total
