"""The operators with closed-form gradients: equal to plain formulas, and their gradients pass gradcheck."""

from __future__ import annotations

import pytest
import torch

from compress.model.distillation import kernels
from compress.model.distillation.kernels import (
    AddLinear,
    AttentionShape,
    CausalAttention,
    Gated,
    NormLinear,
    RootMeanSquare,
    rotated,
)

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).requires_grad_()


def norm(states, gain, epsilon=1e-6):
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon) * gain


def check(function, plain, *inputs):
    torch.testing.assert_close(function(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(function, inputs)


def test_norm():
    check(lambda x, g: RootMeanSquare.apply(x, g, 1e-6), norm, draw(2, 3, 8), draw(8, seed=1))


@pytest.mark.parametrize("biased", [False, True])
def test_norm_and_linear(biased):
    inputs = [draw(5, 8), draw(8, seed=1), draw(6, 8, seed=2)] + [draw(6, seed=3)] * biased

    def function(x, gain, weight, bias=None):
        return NormLinear.apply(x, gain, weight, bias, 1e-6, WIDE)

    def plain(x, gain, weight, bias=None):
        return torch.nn.functional.linear(norm(x, gain), weight, bias)

    check(function, plain, *inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_and_addition(biased):
    inputs = [draw(5, 8), draw(5, 6, seed=1), draw(8, 6, seed=2)] + [draw(8, seed=3)] * biased

    def function(x, inner, weight, bias=None):
        return AddLinear.apply(x, inner, weight, bias, WIDE)

    def plain(x, inner, weight, bias=None):
        return x + torch.nn.functional.linear(inner, weight, bias)

    check(function, plain, *inputs)


def test_gating():
    def plain(joint):
        gate, up = joint.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    check(Gated.apply, plain, draw(4, 10))


@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("queries", [2, 3, 64])
def test_attention(heads, kv, gains, queries, monkeypatch):
    monkeypatch.setattr(kernels, "QUERIES", queries)  # 2 and 3: several blocks, the last one smaller, a row at a time
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 1 if queries < 64 else 1 << 18)
    rows, length, size = 2, 5, 4
    angles = torch.arange(length, dtype=WIDE)[:, None] * torch.tensor([1.0, 0.1], dtype=WIDE)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    shape = AttentionShape(heads, kv, scale=0.37, epsilon=1e-6)
    inputs = [draw(rows, length, heads + 2 * kv, size)] + [draw(size, seed=1), draw(size, seed=2)] * gains

    def function(joint, q_gain=None, k_gain=None):
        return CausalAttention.apply(joint, q_gain, k_gain, cos, sin, shape)

    def plain(joint, q_gain=None, k_gain=None):
        query, key, value = torch.split(joint, [heads, kv, kv], dim=2)
        if q_gain is not None:
            query, key = norm(query, q_gain), norm(key, k_gain)
        query, key = (rotated(part, cos, sin).transpose(1, 2) for part in (query, key))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True, scale=0.37, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2)

    check(function, plain, *inputs)
