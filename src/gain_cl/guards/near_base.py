"""Guards that hold the model near the pretrained one, and each stage's update away from those
before: no data is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gain_cl.adapters.base import copied
from gain_cl.guards.base import Guard
from gain_cl.models import load
from gain_cl.models.loss import sum_divergence

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream


class _Strong(Guard):
    """A guard that one number sets."""

    def __init__(self, strength: float) -> None:
        self.strength = strength


class KlBaseGuard(_Strong):
    """Adds strength * KL(pretrained || tuned) per token on the batch's own text: learning without
    forgetting (Li and Hoiem 2016, 1606.09282) at temperature 1 over the whole vocabulary. Costs one
    more forward pass."""

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        self.loaded, self.adapter = loaded, adapter
        adapter.keep_base()
        with adapter.disabled():  # refuses now what has no way back
            pass

    def token_penalty(
        self, inputs: dict[str, Any], rows_N: Tensor, hidden_ND: Tensor
    ) -> Tensor | None:
        loaded = self.loaded
        with (
            torch.no_grad(),
            self.adapter.disabled(),
            load.eval_mode(loaded.model),
        ):  # no dropout to learn from
            hidden = loaded.hidden(**inputs).flatten(0, 1)[rows_N.to(loaded.device)]
            weight, bias = loaded.output
            base = (hidden, weight.detach(), bias if bias is None else bias.detach())
        return self.strength * sum_divergence(hidden_ND, *loaded.output, base, loaded.softcap)


class L2BaseGuard(_Strong):
    """Adds (strength / 2) * ||W - W_pretrained||_F^2 over the effective weights: L2-SP (Li et al.
    2018, 1802.01483), in the weights, not in an adapter's parameters, so that one strength means
    one thing for every adapter."""

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        self.adapter = adapter
        adapter.keep_base()
        adapter.shift()  # refuses now what has none

    def penalty(self) -> Tensor | None:
        return self.strength / 2 * self.adapter.shift()


class OrthogonalGuard(_Strong):
    """O-LoRA (Wang et al. 2023, 2310.14152): a new LoRA for each stage, its input subspace held
    orthogonal to the earlier ones': adds strength * sum over earlier stages i and layers of ||A_i
    A_t^T||_F^2 (eq. 8). Needs handover=restart."""

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        adapter.lora_inputs()  # refuses what has none
        self.adapter = adapter

    def penalty(self) -> Tensor | None:
        terms = [
            (old @ matrices[-1].T).square().sum()
            for matrices in self.adapter.lora_inputs().values()
            for old in matrices[:-1]
        ]
        return self.strength * torch.stack(terms).sum() if terms else None


class EmaGuard(Guard):
    """After each stage the trained state becomes the exponential moving average of its values since
    the stage began: average <- decay * average + (1 - decay) * value, a step. The next stage goes
    on from the average."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def attach(self, loaded: load.Loaded, adapter: Adapter, seed: int) -> None:
        self.adapter = adapter

    def mix(self, batch: Any, stage: int, step: int) -> Any:
        if step == 0:
            self.average = {
                name: p.detach().clone() for name, p in self.adapter.parameters().items()
            }
        return batch

    @torch.no_grad()
    def after_step(self) -> None:
        for name, p in self.adapter.parameters().items():
            self.average[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def after_stage(self, stage: int, domain: str, blocks: Stream) -> None:
        for name, p in self.adapter.parameters().items():
            p.copy_(self.average[name])
        self.adapter.after_step()
        self.average = {}

    def state(self) -> dict[str, Tensor]:
        return copied(self.average)

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = next(iter(self.adapter.parameters().values())).device
        self.average = {name: t.to(device) for name, t in state.items()}
