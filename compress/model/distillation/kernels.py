"""Operators of a decoder's forward pass with closed-form gradients: few passes over memory, mixed number formats.

`NormLinear` is a norm and the linear behind it, `AddLinear` a linear and the residual addition, `Gated` SiLU gating,
`ShortAttention` rotary causal attention of short rows, `RootMeanSquare` the norm alone. On a CPU a small model spends
more time in element-wise passes and in autograd's slices and casts than in its products; these halve it. Each can be
differentiated once, and equals the plain formula in a test. Know nothing of models.

Shapes: M positions, H width, O outputs, B rows, T tokens, D head size. ``dtype`` is that of the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Grads = tuple[Tensor | None, ...]
# A CPU's bf16 products are compiled for every new number of rows, which takes longer than the product itself, and the
# compiled code is kept: rows are rounded up to this, so that batches of many sizes share a few kernels.
ROW_GRID = 256


def low(states: Tensor, dtype: torch.dtype) -> Tensor:
    """``states`` (M, ...) in ``dtype``; in bf16 on a CPU with zero rows behind, up to a multiple of `ROW_GRID`."""
    if dtype != torch.bfloat16 or states.device.type != "cpu":
        return states.to(dtype)
    rows = -(-states.shape[0] // ROW_GRID) * ROW_GRID
    padded = torch.empty(rows, *states.shape[1:], dtype=dtype)
    padded[: states.shape[0]] = states
    padded[states.shape[0] :] = 0
    return padded


def _unit(states: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``states / rms`` and ``1 / rms``, over the last dimension."""
    size = states.shape[-1]
    inverse = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(size).add_(epsilon).rsqrt_()
    return states * inverse, inverse


def _unit_backward(outer: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient through `_unit`: (outer - unit * mean(outer * unit)) * inverse; ``outer`` is overwritten."""
    along = (outer * unit).mean(dim=-1, keepdim=True)
    return outer.addcmul_(unit, along, value=-1.0).mul_(inverse)


class RootMeanSquare(torch.autograd.Function):
    """gain * x / sqrt(mean(x^2) + epsilon), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        unit, inverse = _unit(states, epsilon)
        ctx.save_for_backward(unit, inverse, gain)
        return unit * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        unit, inverse, gain = ctx.saved_tensors
        d_gain = (outer[0] * unit).flatten(0, -2).sum(0)
        return _unit_backward(outer[0] * gain, unit, inverse), d_gain, None


class NormLinear(torch.autograd.Function):
    """``linear(norm(states))``: (M, H) to (M, O) in ``dtype``; the norm's gain is folded into the weight (O, H)."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any, states: Tensor, gain: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        unit, inverse = _unit(states, epsilon)
        unit, folded = low(unit, dtype), (weight * gain).to(dtype)
        ctx.save_for_backward(unit, inverse, folded, gain, weight)
        ctx.biased = bias is not None
        return functional.linear(unit, folded, None if bias is None else bias.to(dtype))[: len(states)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        unit, inverse, folded, gain, weight = ctx.saved_tensors
        count, given = len(inverse), low(outer[0], folded.dtype)
        d_unit = (given @ folded)[:count].to(inverse.dtype)
        d_folded = (given.T @ unit).to(weight.dtype)
        d_bias = outer[0].sum(0, dtype=weight.dtype) if ctx.biased else None
        d_gain = (d_folded * weight).sum(0)
        return _unit_backward(d_unit, unit[:count], inverse), d_gain, d_folded.mul_(gain), d_bias, None, None


class AddLinear(torch.autograd.Function):
    """``states + linear(inner)``: (M, H) + (M, O) by (H, O), the product in ``dtype``, the sum in the states' own."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any, states: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        inner, short = low(inner, dtype), weight.to(dtype)
        ctx.save_for_backward(inner, short)
        ctx.kinds = weight.dtype, bias is not None
        # the sum stays in the number format of the states, which the fused product cannot give
        if dtype == states.dtype and len(inner) == len(states):
            summed = torch.addmm(states, inner, short.T)
        else:
            summed = states + (inner @ short.T)[: len(states)]
        return summed if bias is None else summed.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        inner, short = ctx.saved_tensors
        kind, biased = ctx.kinds
        count, given = len(outer[0]), low(outer[0], short.dtype)
        d_bias = outer[0].sum(0) if biased else None
        return outer[0], (given @ short)[:count], (given.T @ inner).to(kind), d_bias, None


class Gated(torch.autograd.Function):
    """``silu(gate) * up`` of a joint (M, 2F): gate first."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        ctx.save_for_backward(joint)
        gate, up = joint.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        (joint,) = ctx.saved_tensors
        gate, up = joint.chunk(2, dim=-1)
        inner = torch.empty_like(joint)
        d_gate, d_up = inner.chunk(2, dim=-1)
        torch.mul(outer[0], functional.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(outer[0] * up, gate))
        return (inner,)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads, key-value heads, the scale of the scores, and the epsilon of the heads' norms where there are any."""

    heads: int
    kv_heads: int
    scale: float
    epsilon: float = 0.0


class ShortAttention(torch.autograd.Function):
    """Causal rotary attention of rows so short that the matrix of weights may be held: (B, T, heads * D).

    ``joint`` (B, T, heads + 2 kv, D) holds query, key and value, not rotated; ``cos`` and ``sin`` are
    (1, T, 1, D / 2); the gains are those of Qwen3's norms within a head. Padding stands on the right, so that causality
    alone keeps it out. The heads of a group are stacked, so that keys and values are never copied.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any,
        joint: Tensor,
        q_gain: Tensor | None,
        k_gain: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        shape: AttentionShape,
    ) -> Tensor:
        rows, length, _, size = joint.shape
        heads, kv = shape.heads, shape.kv_heads
        kind = cos.dtype
        wide = joint.to(kind)
        ctx.units = None
        if q_gain is not None and k_gain is not None:
            parts = torch.split(wide, [heads, kv, kv], dim=2)
            ctx.units = tuple(_unit(part, shape.epsilon) for part in parts[:2])
            wide = torch.cat([ctx.units[0][0] * q_gain, ctx.units[1][0] * k_gain, parts[2]], dim=2)
        query, key, value = (wide.new_empty(rows, count, length, size) for count in (heads, kv, kv))
        _rotate_into(query.transpose(1, 2), wide[:, :, :heads], cos, sin)
        _rotate_into(key.transpose(1, 2), wide[:, :, heads : heads + kv], cos, sin)
        value.transpose(1, 2).copy_(wide[:, :, heads + kv :])
        query = query.view(rows * kv, -1, size)  # (B * kv, group * T, D)
        key, value = key.view(-1, length, size), value.view(-1, length, size)
        future = torch.full((length, length), -math.inf, dtype=kind, device=joint.device).triu_(1)
        scores = torch.baddbmm(future.repeat(heads // kv, 1), query, key.transpose(1, 2), alpha=shape.scale)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(weights, value)  # (B * kv, group * T, D)
        ctx.save_for_backward(query, key, value, weights, q_gain, k_gain, cos, sin)
        ctx.shape, ctx.kind = shape, joint.dtype
        return mixed.view(rows, heads, length, size).transpose(1, 2).to(joint.dtype).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        query, key, value, weights, q_gain, k_gain, cos, sin = ctx.saved_tensors
        heads, kv = ctx.shape.heads, ctx.shape.kv_heads
        length, size = key.shape[1:]
        rows = key.shape[0] // kv
        given = outer[0].view(rows, length, heads, size).transpose(1, 2).to(key.dtype).reshape_as(query)
        d_weights = torch.bmm(given, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        inner = torch.empty(rows, length, heads + 2 * kv, size, dtype=key.dtype, device=key.device)
        inner[:, :, heads + kv :] = (
            torch.bmm(weights.transpose(1, 2), given).view(rows, kv, length, size).transpose(1, 2)
        )
        d_query = torch.bmm(d_scores, key).mul_(ctx.shape.scale).view(rows, heads, length, size)
        d_key = torch.bmm(d_scores.transpose(1, 2), query).mul_(ctx.shape.scale).view(rows, kv, length, size)
        _rotate_into(inner[:, :, :heads], d_query.transpose(1, 2), cos, -sin)
        _rotate_into(inner[:, :, heads : heads + kv], d_key.transpose(1, 2), cos, -sin)
        d_gains: list[Tensor | None] = [None, None]
        if ctx.units is not None:
            pieces = inner[:, :, :heads], inner[:, :, heads : heads + kv]
            for index, (piece, gain) in enumerate(zip(pieces, (q_gain, k_gain), strict=True)):
                unit, inverse = ctx.units[index]
                d_gains[index] = (piece * unit).flatten(0, -2).sum(0)
                piece.copy_(_unit_backward(piece * gain, unit, inverse))
        return inner.to(ctx.kind), *d_gains, None, None, None


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the halves layout, of ``states`` (B, T, heads, D); differentiable by autograd."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotate_into(out: Tensor, states: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotated`, written into ``out``, which must not overlap ``states``."""
    (first, second), (left, right) = states.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left)
    left.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right)
    right.addcmul_(first, sin)
