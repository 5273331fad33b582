"""Cross-entropy from hidden states without ever holding all logits.

Axes: N tokens, D model width, V vocabulary. A 152k vocabulary x 2048 tokens in fp32 is 1.2 GB per
sequence; here only ``chunk`` rows of logits exist at a time, in training and in evaluation, and the
softmax is taken in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

InPlace = Callable[[Tensor, Tensor, float | None, bool], Tensor]
"""The form of ``cross_entropy_in_place``."""

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Logits held at a time, by device: 32 MiB in fp32 stay in a CPU's cache (a fifth faster than 128
MiB), a GPU wants more."""


def _chunk(weight_VD: Tensor, rows: int, compiled: bool = False) -> int:
    """Return the rows of a chunk. On a GPU all rows are halved until they fit, so that the chunks
    are alike; twice as many fit where no fp32 copy of their logits is made."""
    most = max(1, CHUNK_LOGITS.get(weight_VD.device.type, 2**25) // weight_VD.shape[0])
    if weight_VD.device.type != "cuda":
        return most
    while rows > most * (1 + compiled):
        rows = (rows + 1) // 2
    return rows


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@torch.no_grad()
def token_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Return -ln p of each target, (N,) fp32."""
    step = _chunk(weight_VD, len(hidden_ND))
    parts = [
        F.cross_entropy(_logits(h, weight_VD, bias_V, softcap), t, reduction="none")
        for h, t in zip(hidden_ND.split(step), targets_N.split(step), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def token_answers(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ln p of each target, (N,) fp32, and True where no token is more likely, (N,)."""
    step, logps, best = _chunk(weight_VD, len(hidden_ND)), [], []
    for h, t in zip(hidden_ND.split(step), targets_N.split(step), strict=True):
        logits = _logits(h, weight_VD, bias_V, softcap)
        logps.append(-F.cross_entropy(logits, t, reduction="none"))
        best.append(logits.argmax(-1) == t)
    return torch.cat(logps), torch.cat(best)


@torch.no_grad()
def token_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    base: tuple[Tensor, Tensor, Tensor | None],
    softcap: float | None = None,
) -> Tensor:
    """Return KL(base || tuned) = sum_v p_base (ln p_base - ln p_tuned) over the whole vocabulary,
    in nats, (N,) fp32; exactly 0 where the logits are equal. base: hidden states (N, D), weight and
    bias of the base on the same tokens; the rest is the tuned model's.

    Summed as p (ln p - ln q) - p + q, whose last two terms add to 0: an error of ln sum exp, common
    to a row, then enters by its square (measured in fp32 on 49,152 tokens: 1e-8 nats off, not
    1e-7).
    """
    step = _chunk(weight_VD, len(hidden_ND))
    parts = []
    for h, h_base in zip(hidden_ND.split(step), base[0].split(step), strict=True):
        log_p_NV = F.log_softmax(_logits(h_base, base[1], base[2], softcap), dim=-1)
        log_q_NV = F.log_softmax(_logits(h, weight_VD, bias_V, softcap), dim=-1)
        p_NV, ratio_NV = log_p_NV.exp(), log_p_NV - log_q_NV
        parts.append((p_NV * ratio_NV + (log_q_NV.exp_() - p_NV)).sum(-1))
    return torch.cat(parts)


def _sum_chunks(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    part: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
    compiled: Callable[[slice, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum over chunks of rows of a function of the logits. part: rows, their logits -> the
    function's sum over these rows, and its gradient in the logits (which may take their place in
    memory). compiled: takes the place of part and of the cap, rows, what the head gives -> the sum;
    the gradient takes the place of what the head gave.

    The gradients of hidden, weight and bias are taken chunk by chunk in the forward pass and kept
    in ctx, so that logits are made once and never kept.
    """
    total = torch.zeros(
        (),
        dtype=torch.float64 if hidden.device.type != "mps" else torch.float32,
        device=hidden.device,
    )
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    grad_bias = (
        torch.zeros_like(bias, dtype=torch.float32)
        if bias is not None and ctx.needs_input_grad[2]
        else None
    )
    step = _chunk(weight, len(hidden), compiled is not None)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        h = hidden[rows]
        if compiled is not None:
            g = F.linear(h, weight, bias)
            value = compiled(rows, g)
        else:
            logits = _logits(h, weight, bias, softcap)
            slope = 1 - (logits / softcap).square() if softcap else None
            value, g = part(rows, logits)
            if slope is not None:
                g *= slope
        total += value
        if grad_bias is not None:
            grad_bias += g.sum(0)
        g = g.to(h.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = g @ weight
        if grad_weight is not None:
            grad_weight += (g.T @ h).float()
    ctx.grads = (grad_hidden, grad_weight, grad_bias)
    ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
    return total.float()


def _scaled(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Return the kept gradients times that of the sum."""
    scale = grads[0]
    hidden, weight, bias = ctx.grads
    return (
        hidden * scale.to(hidden.dtype) if hidden is not None else None,
        (weight * scale).to(ctx.dtypes[0]) if weight is not None else None,
        (bias * scale).to(ctx.dtypes[1]) if bias is not None else None,
        *[None] * (len(ctx.needs_input_grad) - 3),
    )


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        compiled: InPlace | None,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)

        def part(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            t = targets[rows]
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            value = (lse.squeeze(-1) - logits.gather(1, t[:, None]).squeeze(1)).sum()
            if not wanted:
                return value, logits
            g = logits.sub_(lse).exp_()
            g[torch.arange(len(t), device=t.device), t] -= 1
            return value, g

        def whole(rows: slice, logits: Tensor) -> Tensor:
            assert compiled is not None
            return compiled(logits, targets[rows], softcap, wanted)

        return _sum_chunks(ctx, hidden, weight, bias, softcap, part, compiled and whole)

    backward = staticmethod(_scaled)


class _SumDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base: tuple[Tensor, Tensor, Tensor | None],
        softcap: float | None,
    ) -> Tensor:
        def part(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            log_p = F.log_softmax(logits, dim=-1)
            log_base = F.log_softmax(_logits(base[0][rows], base[1], base[2], softcap), dim=-1)
            value = (log_base.exp() * (log_base - log_p)).sum()
            return value, log_p.exp_() - log_base.exp_()  # the difference of the probabilities

        return _sum_chunks(ctx, hidden, weight, bias, softcap, part)

    backward = staticmethod(_scaled)


def cross_entropy_in_place(
    logits_NV: Tensor, targets_N: Tensor, softcap: float | None, wanted: bool
) -> Tensor:
    """Return the sum of -ln p of the targets, fp32. wanted: its gradient takes the logits' place.

    Compiled (models/compiled.py), it reads the logits three times and writes them once, in their
    own dtype. Line by line it would pass over them in fp32 at each."""
    x, slope = logits_NV.float(), None
    if softcap:
        squashed = torch.tanh(x / softcap)
        x, slope = softcap * squashed, 1 - squashed.square()
    lse_N1 = torch.logsumexp(x, dim=-1, keepdim=True)
    value = (lse_N1 - x.gather(1, targets_N[:, None])).sum()
    if wanted:
        hit_NV = torch.arange(x.shape[1], device=x.device) == targets_N[:, None]
        g = (x - lse_N1).exp() - hit_NV.float()
        logits_NV.copy_(g if slope is None else g * slope)
    return value


def sum_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None = None,
    compiled: InPlace | None = None,
) -> Tensor:
    """Sum over tokens of -ln p, a scalar with gradients to hidden, and to weight and bias when they
    require them. compiled: ``cross_entropy_in_place`` as compiled."""
    total: Tensor = _SumCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, softcap, compiled
    )
    return total


def sum_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    base: tuple[Tensor, Tensor, Tensor | None],
    softcap: float | None = None,
) -> Tensor:
    """Sum over tokens of KL(base || tuned) in nats, a scalar with gradients to hidden, weight and
    bias. base: hidden states, weight and bias of the model it is measured from, without
    gradients."""
    total: Tensor = _SumDivergence.apply(hidden_ND, weight_VD, bias_V, base, softcap)
    return total
