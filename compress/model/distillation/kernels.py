"""Operators of a decoder's forward pass with closed-form gradients: few passes over memory, mixed number formats.

`NormLinear` is a norm and the linear behind it, `AddLinear` a linear and the residual addition, `Gated` SiLU gating,
`CausalAttention` rotary causal attention, `RootMeanSquare` the norm alone. On a CPU a small model spends
more time in element-wise passes and in autograd's slices and casts than in its products; these halve it. Each can be
differentiated once, and equals the plain formula in a test. Know nothing of models.

Shapes: M positions, H width, O outputs, B rows, T tokens, D head size. ``dtype`` is that of the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
QUERIES = 64  # of one block of attention: the more, the more is computed above the diagonal
BLOCK_ELEMENTS = 1 << 18  # attention weights of one block: a megabyte, so that they and their gradient stay in cache


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
        ctx.save_for_backward(unit, inverse, gain, weight)  # not the folded weight: it is soon made again
        ctx.biased, ctx.dtype = bias is not None, dtype
        return functional.linear(unit, folded, None if bias is None else bias.to(dtype))[: len(states)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        unit, inverse, gain, weight = ctx.saved_tensors
        folded = (weight * gain).to(ctx.dtype)
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


def _apart(
    joint: Tensor, gains: tuple[Tensor | None, Tensor | None], turn: tuple[Tensor, Tensor], shape: AttentionShape
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Rotated query (B * kv, group, T, D), key and value (B * kv, T, D) of ``joint``; and what the norms leave."""
    rows, length, _, size = joint.shape
    heads, kv = shape.heads, shape.kv_heads
    wide, units = joint.to(turn[0].dtype), None
    if gains[0] is not None and gains[1] is not None:
        parts = torch.split(wide, [heads, kv, kv], dim=2)
        units = tuple(_unit(part, shape.epsilon) for part in parts[:2])
        wide = torch.cat([units[0][0] * gains[0], units[1][0] * gains[1], parts[2]], dim=2)
    query, key, value = (wide.new_empty(rows, count, length, size) for count in (heads, kv, kv))
    _rotate_into(query.transpose(1, 2), wide[:, :, :heads], *turn)
    _rotate_into(key.transpose(1, 2), wide[:, :, heads : heads + kv], *turn)
    value.transpose(1, 2).copy_(wide[:, :, heads + kv :])
    return query.view(rows * kv, -1, length, size), key.view(-1, length, size), value.view(-1, length, size), units


def _together(  # noqa: PLR0917 - the gradients of three things, and what they were made of
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    gains: tuple[Tensor | None, Tensor | None],
    turn: tuple[Tensor, Tensor],
    units: Any,
    shape: AttentionShape,
) -> tuple[Tensor, list[Tensor | None]]:
    """The way back through `_apart`: (B, T, heads + 2 kv, D) and the gradients of the gains.

    ``d_query`` (B * kv, D, group, T), ``d_key`` and ``d_value`` (B * kv, D, T) are as the thin products give them.
    """
    heads, kv = shape.heads, shape.kv_heads
    rows, size, length = len(d_key) // kv, *d_key.shape[1:]
    inner = torch.empty(rows, length, heads + 2 * kv, size, dtype=d_key.dtype, device=d_key.device)
    by_head = d_query.view(rows, kv, size, -1, length).permute(0, 4, 1, 3, 2)  # (B, T, kv, group, D)
    _rotate_into(inner[:, :, :heads], by_head.reshape(rows, length, heads, size), turn[0], -turn[1])
    back = d_key.view(rows, kv, size, length).permute(0, 3, 1, 2)
    _rotate_into(inner[:, :, heads : heads + kv], back, turn[0], -turn[1])
    inner[:, :, heads + kv :] = d_value.view(rows, kv, size, length).permute(0, 3, 1, 2)
    d_gains: list[Tensor | None] = [None, None]
    if units is not None:
        pieces = inner[:, :, :heads], inner[:, :, heads : heads + kv]
        for index, (piece, gain) in enumerate(zip(pieces, gains, strict=True)):
            assert gain is not None, "norms have gains"
            unit, inverse = units[index]
            d_gains[index] = (piece * unit).flatten(0, -2).sum(0)
            piece.copy_(_unit_backward(piece * gain, unit, inverse))
    return inner, d_gains


def _future(count: int, length: int, like: Tensor) -> Tensor:
    """(count, length): -inf where a key stands behind the query, the last ``count`` of ``length`` being the queries."""
    mask = torch.full((count, length), -math.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(1 + length - count)


def _blocks(query: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Which rows, which queries of them, and up to which key these look; so that a block's weights stay in cache."""
    count, group, length, _ = query.shape
    rows = max(1, BLOCK_ELEMENTS // (group * min(QUERIES, length) * length))
    for start in range(0, count, rows):
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            yield slice(start, start + rows), slice(first, end), end


class CausalAttention(torch.autograd.Function):
    """Causal rotary attention on a CPU: (B, T, heads * D).

    ``joint`` (B, T, heads + 2 kv, D) holds query, key and value, not rotated; ``cos`` and ``sin`` are
    (1, T, 1, D / 2); the gains are those of Qwen3's norms within a head. Padding stands on the right, so that causality
    alone keeps it out. The heads of a group are stacked, so that keys and values are never copied. Blocks of queries
    see the keys before them alone, and their weights are computed again on the way back: neither the upper half nor the
    matrix of weights exists. A product whose result is as thin as a head is written transposed: several times faster.
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
        query, key, value, ctx.units = _apart(joint, (q_gain, k_gain), (cos, sin), shape)
        count, group, length, size = query.shape
        mixed = query.new_empty(count, size, group, length)
        for rows, places, end in _blocks(query):
            weights = _weights(query[rows, :, places].flatten(1, 2), key[rows, :end], group, shape.scale)
            thin = torch.bmm(value[rows, :end].mT, weights.mT)  # (n, D, group * queries)
            mixed[rows, :, :, places] = thin.view(*thin.shape[:2], group, -1)
        ctx.save_for_backward(query, key, value, q_gain, k_gain, cos, sin)
        ctx.shape, ctx.kind = shape, joint.dtype
        by_head = mixed.view(len(joint), -1, size, group, length).permute(0, 4, 1, 3, 2)  # (B, T, kv, group, D)
        return by_head.to(joint.dtype).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Grads:
        query, key, value, q_gain, k_gain, cos, sin = ctx.saved_tensors
        count, group, length, size = query.shape
        scale = ctx.shape.scale
        given = outer[0].view(-1, length, ctx.shape.kv_heads, group, size)
        given = given.permute(0, 2, 3, 1, 4).to(key.dtype).reshape_as(query)
        d_query = query.new_empty(count, size, group, length)
        d_key, d_value = query.new_zeros(count, size, length), query.new_zeros(count, size, length)
        for rows, places, end in _blocks(query):
            asked, wanted = (one[rows, :, places].flatten(1, 2) for one in (query, given))
            weights = _weights(asked, key[rows, :end], group, scale)
            d_value[rows, :, :end] += torch.bmm(wanted.mT, weights)
            d_weights = torch.bmm(wanted, value[rows, :end].mT)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            thin = torch.bmm(key[rows, :end].mT, d_scores.mT)
            d_query[rows, :, :, places] = thin.view(*thin.shape[:2], group, -1)
            d_key[rows, :, :end] += torch.bmm(asked.mT, d_scores)
        gains, turn = (q_gain, k_gain), (cos, sin)
        inner, d_gains = _together(d_query.mul_(scale), d_key.mul_(scale), d_value, gains, turn, ctx.units, ctx.shape)
        return inner.to(ctx.kind), *d_gains, None, None, None


def _weights(query: Tensor, key: Tensor, group: int, scale: float) -> Tensor:
    """Attention weights (n, group * queries, keys) of ``query`` (n, group * queries, D), the last of the keys' rows."""
    future = _future(query.shape[1] // group, key.shape[1], query).repeat(group, 1)
    return torch.softmax(torch.baddbmm(future, query, key.mT, alpha=scale), dim=-1)


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
