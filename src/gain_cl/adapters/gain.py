"""GAIN: W_new = S W with a learned diagonal S and W frozen (arXiv 2604.04516).

S multiplies the attention output projection (role attn_out: method gain_attn) and also the FFN down projection (role
ffn_down: gain_ffn). Which side of W the paper means is ambiguous in print (docs/design.md, "Which side"):

- side=input (default): W diag(s) in nn.Linear's (out, in) layout; the input features are scaled, x -> s * x;
- side=output: diag(s) W; the layer's output is scaled. Deviation: where the layer has a bias (GPT-2), it is scaled with
  the rest, y -> s * (W x + b), as PEFT's (IA)^3 does, so that the gain stays one diagonal on the activation.

The parameter is delta = S - 1, in fp32: S itself in bf16 could not move from 1 by less than 0.4%, and weight decay
would pull S to 0. Scaling the activation costs one elementwise product; scaling W would cost a matrix and its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gain_cl import models
from gain_cl.adapters.base import Adapter

if TYPE_CHECKING:
    from gain_cl.models import Loaded

Side = Literal["input", "output"]


class _Scale(torch.autograd.Function):
    """x * (1 + delta). The gradient of delta is summed over blocks of rows that fit a CPU's cache: autograd would first make
    a second product of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        return (x * (1 + delta)).to(x.dtype)  # bf16 * fp32 promotes to fp32: rounded once, after the product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, delta = ctx.saved_tensors
        grad = grads[0]
        rows = 128 if x.device.type == "cpu" else x.numel()
        parts = zip(x.reshape(-1, len(delta)).split(rows), grad.reshape(-1, len(delta)).split(rows), strict=True)
        grad_delta = sum(((a.float() * b).sum(0) for a, b in parts), torch.zeros_like(delta))
        return (grad * (1 + delta)).to(x.dtype) if ctx.needs_input_grad[0] else None, grad_delta


class DiagonalGain(nn.Module):
    """s = 1 + delta, delta (width,) fp32 and zero at the start. forward: x (..., width) -> s * x in x's dtype."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = _Scale.apply(x, self.delta)
        return scaled


class Gains:
    """Diagonal gains on some layers of a model. The layers keep their class, name and weights: gains act by hooks."""

    def __init__(self, layers: dict[str, nn.Module], side: Side) -> None:
        self.layers, self.side = layers, side
        self.gains: dict[str, DiagonalGain] = {}
        self._hooks: list[Any] = []
        for name, layer in layers.items():
            width = models.input_width(layer) if side == "input" else models.output_width(layer)
            gain = self.gains[name] = DiagonalGain(width, layer.weight.device)  # type: ignore[arg-type]
            if side == "input":
                self._hooks.append(layer.register_forward_pre_hook(lambda _, args, gain=gain: (gain(args[0]), *args[1:])))
            else:
                self._hooks.append(layer.register_forward_hook(lambda _, args, output, gain=gain: gain(output)))

    def parameters(self) -> dict[str, nn.Parameter]:
        """delta = S - 1 of each layer, by module name."""
        return {name: gain.delta for name, gain in self.gains.items()}

    def remove(self) -> None:
        """Take the gains off: the model is the base again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def absorb(self) -> None:
        """Fold S into the weights: the product in fp32, rounded once to the weight's dtype; then remove the gains.

        Input side: columns of an (out, in) weight; output side: rows, and the bias. Conv1D stores (in, out).
        """
        for name, layer in self.layers.items():
            s = 1 + self.gains[name].delta
            along_rows = (self.side == "output") != models.is_conv1d(layer)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.copy_((weight.float() * (s[:, None] if along_rows else s[None, :])).to(weight.dtype))
            if self.side == "output" and getattr(layer, "bias", None) is not None:
                bias: Tensor = layer.bias  # type: ignore[assignment]
                bias.copy_((bias.float() * s).to(bias.dtype))
        self.remove()


def attach_gains(
    model: nn.Module,
    roles: list[str] | tuple[str, ...] = ("attn_out", "ffn_down"),
    side: Side = "input",
    names: dict[str, str] | None = None,
) -> Gains:
    """Put identity gains on any transformers causal LM: freezes the model and returns the handle that trains.

    names: role -> suffix of module names, for a family gain_cl does not know. Raises ConfigError listing the candidates.
    """
    model.requires_grad_(False)
    return Gains(models.targets(model, list(roles), names), side)


class GainAdapter(Adapter):
    """roles: attn_out, ffn_down; side: input or output."""

    def __init__(self, roles: list[str], side: Side = "input") -> None:
        self.roles, self.side = roles, side

    def attach(self, loaded: Loaded) -> None:
        self.gains = attach_gains(loaded.model, self.roles, self.side, loaded.roles)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.gains.parameters()

    def absorb(self) -> None:
        self.gains.absorb()
