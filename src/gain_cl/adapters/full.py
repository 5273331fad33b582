"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gain_cl.adapters.base import Adapter

if TYPE_CHECKING:
    from gain_cl.models import Loaded


class FullAdapter(Adapter):
    """The optimiser works on fp32 master weights; the model computes in its own dtype, so that it starts as the base
    bit for bit and is measured on the same path. For an fp32 model masters and weights are the same tensors."""

    keep_stages = False

    def attach(self, loaded: Loaded) -> None:
        self.masters: dict[str, nn.Parameter] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for name, weight in loaded.model.named_parameters():
            weight.requires_grad_(True)
            if weight.dtype == torch.float32:
                self.masters[name] = weight
                continue
            master = self.masters[name] = nn.Parameter(weight.detach().float())
            self.weights[name] = weight
            weight.register_post_accumulate_grad_hook(_collector(master))

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.masters

    @torch.no_grad()
    def after_step(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.masters[name])

    def absorb(self) -> None:
        for weight in (*self.masters.values(), *self.weights.values()):
            weight.requires_grad_(False)


def _collector(master: nn.Parameter):  # type: ignore[no-untyped-def]
    """Moves a low-precision gradient into the master's fp32 one, so that micro-batches add up in fp32."""

    def collect(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        grad = weight.grad.float()
        master.grad = grad if master.grad is None else master.grad + grad
        weight.grad = None

    return collect
