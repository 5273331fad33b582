"""Full fine-tuning: every weight moves, or those of the normalisation layers alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from gain_cl.adapters.base import Adapter

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded


class FullAdapter(Adapter):
    """The optimiser works on fp32 master weights; the model computes in its own dtype, so that it
    starts as the base bit for bit and is measured on the same path. For an fp32 model masters and
    weights are the same tensors.

    select: all, or norms (layers whose class is a ...Norm).
    """

    def __init__(self, select: Literal["all", "norms"] = "all") -> None:
        self.select = select
        self.keep_stages = select == "norms"

    def attach(self, loaded: Loaded) -> None:
        self.masters: dict[str, nn.Parameter] = {}
        self.tuned: dict[str, nn.Parameter] = {}  # the model's own
        self.base: dict[str, Tensor] = {}
        loaded.model.requires_grad_(False)
        norms = {
            id(p)
            for m in loaded.model.modules()
            if "norm" in type(m).__name__.lower()
            for p in m.parameters(recurse=False)
        }
        for name, weight in loaded.model.named_parameters():
            if self.select == "norms" and id(weight) not in norms:
                continue
            weight.requires_grad_(True)
            self.masters[name] = self.tuned[name] = weight
            if weight.dtype != torch.float32:
                master = self.masters[name] = nn.Parameter(weight.detach().float())
                weight.register_post_accumulate_grad_hook(_collector(master))

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.masters

    @torch.no_grad()
    def after_step(self) -> None:
        for name, weight in self.tuned.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def keep_base(self) -> None:
        self.base = {name: weight.detach().clone() for name, weight in self.tuned.items()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        before = {name: weight.data for name, weight in self.tuned.items()}
        for name, weight in self.tuned.items():
            weight.data = self.base[name]  # a swap, not a copy: what autograd saved stays as it was
        try:
            yield
        finally:
            for name, weight in self.tuned.items():
                weight.data = before[name]

    def shift(self) -> Tensor:
        return torch.stack(
            [(p - self.base[name].float()).square().sum() for name, p in self.masters.items()]
        ).sum()

    def absorb(self) -> None:
        for weight in (*self.masters.values(), *self.tuned.values()):
            weight.requires_grad_(False)


def _collector(master: nn.Parameter):  # type: ignore[no-untyped-def]
    """Return a hook that moves a low-precision gradient into the master's fp32 one, so that
    micro-batches add up in fp32."""

    def collect(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad  # in fp32, without a copy
        weight.grad = None

    return collect
