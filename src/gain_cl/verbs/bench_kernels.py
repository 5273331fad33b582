"""Experimental Triton kernels of the gains, measured by ``bench``: no fp32 copy of an activation is ever written.

Axes: N rows (tokens), F features. Gradients of s are summed over blocks of rows in fp32 and then over the blocks, in a fixed order.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 256


@triton.jit
def _scale_forward(x, s, y, n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = row[:, None] * f + column[None, :]
    gain = tl.load(s + column, mask=column < f, other=0.0)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * gain[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scale_backward(x, s, grad, grad_x, parts, n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = row[:, None] * f + column[None, :]
    gain = tl.load(s + column, mask=column < f, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + place, (g * gain[None, :]).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0) * f + column, tl.sum(g * value, axis=0), mask=column < f)


@triton.jit
def _swiglu_forward(gate, up, s, y, n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = row[:, None] * f + column[None, :]
    gain = tl.load(s + column, mask=column < f, other=0.0)
    a = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (a * tl.sigmoid(a) * b * gain[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate, up, s, grad, grad_gate, grad_up, parts, n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < f)[None, :]
    place = row[:, None] * f + column[None, :]
    gain = tl.load(s + column, mask=column < f, other=0.0)
    a = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    half = tl.sigmoid(a)
    silu = a * half
    scaled = g * gain[None, :]
    tl.store(grad_gate + place, (scaled * b * (half + silu * (1.0 - half))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + place, (scaled * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0) * f + column, tl.sum(g * silu * b, axis=0), mask=column < f)


def _grid(x: Tensor) -> tuple[tuple[int, int], int, int]:
    n, f = x.numel() // x.shape[-1], x.shape[-1]
    return (triton.cdiv(n, ROWS), triton.cdiv(f, COLUMNS)), n, f


class Scale(torch.autograd.Function):
    """x * s in x's dtype, the product in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        x, s = x.contiguous(), s.contiguous()
        grid, n, f = _grid(x)
        y = torch.empty_like(x)
        _scale_forward[grid](x, s, y, n, f, ROWS, COLUMNS)
        ctx.save_for_backward(x, s)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, s = ctx.saved_tensors
        grid, n, f = _grid(x)
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        parts = torch.empty(grid[0], f, device=x.device, dtype=torch.float32)
        _scale_backward[grid](x, s, grad, grad_x, parts, n, f, ROWS, COLUMNS)
        return grad_x, parts.sum(0)


class SwiGLU(torch.autograd.Function):
    """SiLU(gate) * up * s in gate's dtype, in fp32 inside; gate and up are kept, nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, s: Tensor) -> Tensor:
        gate, up, s = gate.contiguous(), up.contiguous(), s.contiguous()
        grid, n, f = _grid(gate)
        y = torch.empty_like(gate)
        _swiglu_forward[grid](gate, up, s, y, n, f, ROWS, COLUMNS)
        ctx.save_for_backward(gate, up, s)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, s = ctx.saved_tensors
        grid, n, f = _grid(gate)
        grad, grad_gate, grad_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        parts = torch.empty(grid[0], f, device=gate.device, dtype=torch.float32)
        _swiglu_backward[grid](gate, up, s, grad, grad_gate, grad_up, parts, n, f, ROWS, COLUMNS)
        return grad_gate, grad_up, parts.sum(0)
