"""GAIN: W_new = S W with a learned diagonal S and W frozen (arXiv 2604.04516).

S multiplies the attention output projection (role attn_out: method gain_attn) and also the FFN down
projection (role ffn_down: gain_ffn). Which side of W the paper means is ambiguous in print
(docs/design.md, "Which side"):

- side=input (default): W diag(s) in nn.Linear's (out, in) layout; the input features are scaled, x
  -> s * x;
- side=output: diag(s) W; the layer's output is scaled. Deviation: where the layer has a bias
  (GPT-2), it is scaled with the rest, y -> s * (W x + b), as PEFT's (IA)^3 does, so that the gain
  stays one diagonal on the activation.

Controls of the same shape: gains in a fixed random orthogonal basis Q, W Q diag(s) Q^T
(RotatedGain), which are as many but not diagonal in the model's own basis; and multiplicative LoRA,
W (I + B A) (LowRankFactor), which preserves the column span of W as gains do, but is not diagonal.

The parameter is delta = S - 1, in fp32: S itself in bf16 could not move from 1 by less than 0.4%,
and weight decay would pull S to 0. Scaling the activation costs one elementwise product; scaling W
would cost a matrix and its gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from gain_cl.adapters.base import Adapter, compare_tensors
from gain_cl.adapters.portable import PREFIX
from gain_cl.models import families

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

Side = Literal["input", "output"]


class _Scale(torch.autograd.Function):
    """x * s. The gradient of s is summed over blocks of rows that fit a CPU's cache: autograd would
    first make a second product of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return (x * s).to(x.dtype)  # bf16 * fp32 promotes to fp32: rounded once, after the product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, s = ctx.saved_tensors
        grad = grads[0]
        rows = 128 if x.device.type == "cpu" else x.numel()
        parts = zip(
            x.reshape(-1, len(s)).split(rows), grad.reshape(-1, len(s)).split(rows), strict=True
        )
        grad_s = sum(((a.float() * b).sum(0) for a, b in parts), torch.zeros_like(s))
        return (grad * s).to(x.dtype) if ctx.needs_input_grad[0] else None, grad_s


class Factor(nn.Module):
    """A square matrix M that multiplies a weight; the identity at the start. Weights and
    activations are rows: (..., width).

    forward(x): x M^T, M applied to each vector of x, in x's dtype; transposed(x): x M; restart():
    keep M as it is, frozen, and begin with the identity on top of it; change(rows): ||rows M -
    rows||_F^2 of constant rows, without a second matrix of their size."""

    def transposed(self, x: Tensor) -> Tensor:
        """Return x M, of a symmetric M."""
        found: Tensor = self(x)
        return found


class DiagonalGain(Factor):
    """M = diag(s), s = past * (1 + delta); delta (width,) fp32 and zero at the start, past: what
    earlier stages left frozen."""

    past: Tensor | None

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        self.register_buffer("past", None)
        self.energy: Tensor | None = None

    def s(self) -> Tensor:
        """Return S, (width,) fp32."""
        return 1 + self.delta if self.past is None else self.past * (1 + self.delta)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = _Scale.apply(x, self.s())
        return scaled

    @torch.no_grad()
    def restart(self) -> None:
        self.past = self.s().detach().clone()
        self.delta.zero_()

    def change(self, rows: Tensor) -> Tensor:
        if self.energy is None:
            self.energy = self._energy(rows.float())
        return ((self.s() - 1).square() * self.energy).sum()

    def _energy(self, rows: Tensor) -> Tensor:
        """Return the (width,) squared length of each column of the rows, which never changes."""
        return rows.square().sum(0)


class RotatedGain(DiagonalGain):
    """M = Q diag(s) Q^T with Q (width, width) fp32, orthogonal and fixed."""

    def __init__(self, width: int, device: torch.device, basis: Tensor) -> None:
        super().__init__(width, device)
        self.register_buffer("basis", basis, persistent=False)
        self.basis: Tensor

    def forward(self, x: Tensor) -> Tensor:
        turned = x.float() @ self.basis
        return (x + (turned * (self.s() - 1)) @ self.basis.T).to(x.dtype)  # exactly x where s is 1

    def _energy(self, rows: Tensor) -> Tensor:
        return (rows @ self.basis).square().sum(0)  # a rotation keeps lengths


class LowRankFactor(Factor):
    """M = past (I + alpha / r B A), A (r, width) as LoRA's (uniform, Kaiming), B (width, r) zero at
    the start; fp32."""

    def __init__(self, width: int, device: torch.device, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, width, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(width, rank, dtype=torch.float32, device=device))
        self._draw()
        self.frozen = 0

    def _draw(self) -> None:
        if self.a.device.type != "meta":
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (A, B) of each factor, the oldest first."""
        return [
            (getattr(self, f"past_a{i}"), getattr(self, f"past_b{i}")) for i in range(self.frozen)
        ] + [(self.a, self.b)]

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        for a, b in reversed(self.pairs()):  # the newest is nearest to x
            y = y + self.scale * (y @ a.T) @ b.T
        return y.to(x.dtype)

    def transposed(self, x: Tensor) -> Tensor:
        y = x.float()
        for a, b in self.pairs():
            y = y + self.scale * (y @ b) @ a
        return y.to(x.dtype)

    def change(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        ups: list[Tensor] = []
        downs = torch.cat([a for a, _ in self.pairs()])
        for i, (_, b) in enumerate(self.pairs()):  # rows (M_1 .. M_i-1) B_i
            up = rows @ b
            for j in range(i):
                up = up + ups[j] @ (self.pairs()[j][0] @ b)
            ups.append(self.scale * up)
        u = torch.cat(ups, dim=1)
        return ((u.T @ u) * (downs @ downs.T)).sum()  # tr((U A)^T U A)

    @torch.no_grad()
    def restart(self) -> None:
        self.register_buffer(f"past_a{self.frozen}", self.a.detach().clone())
        self.register_buffer(f"past_b{self.frozen}", self.b.detach().clone())
        self.frozen += 1
        self._draw()
        self.b.zero_()


class Gains(Adapter):
    """Factors on some layers of a model. The layers keep their class, name and weights: the factors
    act by hooks."""

    def attach(self, loaded: Loaded) -> None:
        """Do nothing: ``put`` is given the layers."""

    def put(
        self,
        layers: dict[str, nn.Module],
        side: Side,
        make: Callable[[int, torch.device], Factor] | None = None,
    ) -> None:
        """Put identity factors on the layers. make: width, device -> Factor; None: diagonal
        gains."""
        self.layers, self.side, self.active = layers, side, True
        self.gains: dict[str, Any] = {}
        self._hooks: list[Any] = []
        for name, layer in layers.items():
            width = families.input_width(layer) if side == "input" else families.output_width(layer)
            gain = self.gains[name] = (make or DiagonalGain)(width, layer.weight.device)  # type: ignore[arg-type]
            if side == "input":
                self._hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, gain=gain: (self._apply(gain, args[0]), *args[1:])
                    )
                )
            else:
                self._hooks.append(
                    layer.register_forward_hook(
                        lambda _, args, output, gain=gain: self._apply(gain, output)
                    )
                )

    def _apply(self, gain: Factor, x: Tensor) -> Tensor:
        found: Tensor = gain(x) if self.active else x
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return delta = S - 1 of each layer, by module name; of other factors NAME.PARAMETER."""
        own = {name: gain.named_parameters() for name, gain in self.gains.items()}
        return {
            name if key == "delta" else f"{name}.{key}": p
            for name, found in own.items()
            for key, p in found
        }

    def frozen(self) -> dict[str, Tensor]:
        """Return what earlier stages left (handover=restart), as NAME.BUFFER."""
        kept = {name: gain.state_dict() for name, gain in self.gains.items()}
        return {
            f"{name}.{key}": t
            for name, found in kept.items()
            for key, t in found.items()
            if key.startswith("past")
        }

    def restart(self) -> None:
        """Freeze every factor as it is and begin with the identity on top."""
        for gain in self.gains.values():
            gain.restart()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model the base for the block."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def shift(self) -> Tensor:
        """Return ||W_new - W||_F^2 over the layers (and of their biases, on the output side)."""
        terms = []
        for name, layer in self.layers.items():
            gain, weight_OI, bias = self.gains[name], families.out_in(layer), _bias(layer)
            rows = weight_OI if self.side == "input" else weight_OI.T
            if self.side == "output" and bias is not None:
                rows = torch.cat([rows, bias[None]])
            terms.append(gain.change(rows))
        return torch.stack(terms).sum()

    def saved(self) -> dict[str, Tensor]:
        return {**self.parameters(), **self.frozen()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        while self.saved().keys() < state.keys():
            before = len(self.frozen())
            self.restart()
            if len(self.frozen()) == before:
                break  # it is of another kind: told below
        super().load_state(state)

    def remove(self) -> None:
        """Take the gains off: the model is the base again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def absorb(self) -> None:
        """Fold each factor into the weights: the product in fp32, rounded once to the weight's
        dtype; then remove the gains.

        Input side: W M of an (out, in) weight; output side: M W, and M b. Conv1D stores (in, out).
        ConfigError when the weights are quantised.
        """
        families.can_merge(self.layers)
        for name, layer in self.layers.items():
            gain, weight_OI, bias = self.gains[name], families.out_in(layer), _bias(layer)
            rows = weight_OI.float()
            new_OI = gain.transposed(rows) if self.side == "input" else gain(rows.T).T
            weight_OI.copy_(new_OI.to(weight_OI.dtype))
            if self.side == "output" and bias is not None:
                bias.copy_(gain(bias.float()).to(bias.dtype))
        self.remove()


def _bias(layer: nn.Module) -> Tensor | None:
    return cast("Tensor | None", getattr(layer, "bias", None))


def attach_gains(
    model: nn.Module,
    roles: list[str] | tuple[str, ...] = ("attn_out", "ffn_down"),
    side: Side = "input",
    names: dict[str, str] | None = None,
) -> Gains:
    """Put identity gains on any transformers causal LM: freezes the model and returns the handle
    that trains.

    names: role -> suffix of module names, for a family gain_cl does not know. Raises ConfigError
    listing the candidates.
    """
    model.requires_grad_(False)
    gains = Gains()
    gains.put(families.targets(model, list(roles), names), side)
    return gains


def random_basis(width: int, seed: int, device: torch.device) -> Tensor:
    """Return a (width, width) fp32 matrix, orthogonal, uniform over rotations (Haar): Q of a
    Gaussian matrix's QR, with R's diagonal made positive (Mezzadri 2007, math-ph/0609050). In
    float64, rounded once."""
    if device.type == "meta":
        return torch.empty(width, width, device=device)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().to(device)


class GainAdapter(Gains):
    """roles: attn_out, ffn_down; side: input or output; basis: own, or random (one Q for all layers
    of a width)."""

    def __init__(
        self, roles: list[str], side: Side = "input", basis: str = "own", basis_seed: int = 0
    ) -> None:
        self.roles, self.side, self.basis, self.basis_seed = roles, side, basis, basis_seed

    def attach(self, loaded: Loaded) -> None:
        bases: dict[int, Tensor] = {}

        def turned(width: int, device: torch.device) -> Factor:
            if width not in bases:
                bases[width] = random_basis(width, self.basis_seed, device)
            return RotatedGain(width, device, bases[width])

        loaded.model.requires_grad_(False)
        layers = families.targets(loaded.model, self.roles, loaded.roles)
        self.put(layers, self.side, turned if self.basis == "random" else None)

    def to_peft(self, loaded: Loaded) -> tuple[Any, dict[str, Tensor]]:
        """Return gains as (IA)^3, which multiplies the input of its feedforward modules and the
        output of the others, its bias included."""
        import peft

        if self.basis != "own":
            raise self._no_form(f"what {type(self).__name__} with basis=random learns")
        into, table = self.side == "input", loaded.roles
        table = table or families.ROLES[loaded.model.config.model_type]
        targets = [table[role] for role in self.roles]
        config = peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=targets,
            feedforward_modules=targets if into else [],  # None would be PEFT's own choice
            fan_in_fan_out=all(map(families.is_conv1d, self.layers.values())),
        )
        scales = {n: gain.s().detach() for n, gain in self.gains.items()}
        return config, {
            f"{PREFIX}{n}.ia3_l": s[None] if into else s[:, None] for n, s in scales.items()
        }

    def begin_from(self, tensors: dict[str, Tensor], folder: Path) -> None:
        found = {
            n.removeprefix(PREFIX).removesuffix(".ia3_l"): t.float().flatten() - 1
            for n, t in tensors.items()
        }
        compare_tensors(found, self.parameters(), str(folder))
        self.load_state(found)

    def remarks(self, dtype: torch.dtype) -> list[str]:
        fine = torch.finfo(dtype).eps / 4  # half a unit in the last place, where it is least
        moved = torch.cat([(gain.s() - 1).abs().flatten() for gain in self.gains.values()]).detach()
        lost = (moved < fine).float().mean().item()
        if dtype == torch.float32 or lost < 0.1:
            return []
        what = (
            f"{100 * lost:.0f}% of the gains moved by less than {dtype} resolves in an "
            f"activation ({fine:.1e})"
        )
        return [f"{what}: they do nothing; a forgetting near 0 may be that"]


class MultiplicativeLoraAdapter(Gains):
    """W (I + alpha / rank B A) on the layers of these roles."""

    def __init__(self, roles: list[str], rank: int, alpha: float) -> None:
        self.roles, self.rank, self.alpha = roles, rank, alpha

    def attach(self, loaded: Loaded) -> None:
        make = lambda width, device: LowRankFactor(width, device, self.rank, self.alpha)  # noqa: E731
        loaded.model.requires_grad_(False)
        self.put(families.targets(loaded.model, self.roles, loaded.roles), "input", make)
