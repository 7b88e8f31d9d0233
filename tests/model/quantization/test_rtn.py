"""Grids: the error bound, zero on the grid, zero groups, the clip search, against the slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ModelError
from compress.model.quantization.packing import WIDTHS, dequantize
from compress.model.quantization.rtn import fit, round_to_nearest
from tests.reference.quantization import code, grid


def weights(out: int, inputs: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) + shift


@given(
    bits=st.sampled_from(WIDTHS),
    sym=st.booleans(),
    size=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 0.7, -3.0, 3.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_no_weight_is_further_than_half_a_scale(bits: int, sym: bool, size: float, shift: float, seed: int) -> None:
    weight = weights(6, 40, seed, shift) * size
    layer = round_to_nearest(weight, bits=bits, group_size=16, sym=sym)
    error = (dequantize(*layer) - weight).abs()
    bound = layer.scales.float()[:, layer.g_idx.long()] / 2
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert int(layer.zero_points.min()) >= 1  # stored as zero - 1, where 0 would wrap around


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("shift", [0.0, 2.5, -2.5])
def test_same_codes_as_the_slow_reference(bits: int, sym: bool, shift: float) -> None:
    weight = weights(5, 44, seed=bits, shift=shift).double()
    layer = round_to_nearest(weight, bits=bits, group_size=16, sym=sym)
    assert layer.scales.shape == (5, 3)
    for row in range(5):
        for column in range(44):
            group = column // 16
            scale, zero = grid(weight[row, group * 16 : (group + 1) * 16].numpy(), bits=bits, sym=sym)
            assert float(layer.scales[row, group]) == scale
            assert int(layer.zero_points[row, group]) == zero
            assert int(layer.codes[row, column]) == code(float(weight[row, column]), scale, zero, bits)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("clip_steps", [0, 10])
def test_a_group_of_zeros_stays_zero_with_scale_one(sym: bool, clip_steps: int) -> None:
    weight = torch.zeros(3, 32)
    weight[0, 16:] = 1.0
    layer = round_to_nearest(weight, bits=4, group_size=16, sym=sym, clip_steps=clip_steps)
    assert layer.scales[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert not dequantize(*layer)[:, :16].any()


@pytest.mark.parametrize("sym", [True, False])
def test_zero_is_on_every_grid(sym: bool) -> None:
    weight = weights(8, 32, seed=3, shift=5.0)  # all positive
    weight[:, ::4] = 0
    layer = round_to_nearest(weight, bits=3, group_size=32, sym=sym, clip_steps=8)
    assert not dequantize(*layer)[:, ::4].any()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_search_never_loses_and_gains_at_low_bits(bits: int, sym: bool) -> None:
    weight = weights(64, 128, seed=7)
    plain = round_to_nearest(weight, bits=bits, group_size=64, sym=sym)
    searched = round_to_nearest(weight, bits=bits, group_size=64, sym=sym, clip_steps=30)
    before, after = ((dequantize(*layer) - weight).square().view(64, 2, 64).sum(2) for layer in (plain, searched))
    assert bool((after <= before + 1e-6).all())
    assert float(after.sum() / before.sum()) < {2: 0.75, 3: 0.85, 4: 0.95}[bits]


def test_the_clip_search_follows_the_importance() -> None:
    values = torch.tensor([[0.1, -0.13, 0.07, 0.11, 1.0]])
    spare = fit(values, bits=2, sym=True, clip_steps=60, importance=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    keep = fit(values, bits=2, sym=True, clip_steps=60, importance=torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert float(spare[0]) < float(keep[0])
    assert float((torch.round(values[0, 4] / keep[0].float()).clamp(-2, 1) * keep[0].float() - 1.0).abs()) < 0.01


def test_one_group_per_row() -> None:
    weight = weights(4, 50, seed=1)
    layer = round_to_nearest(weight, bits=8, group_size=-1)
    assert layer.scales.shape == (4, 1)
    assert np.allclose(layer.scales[:, 0].float(), weight.abs().amax(1) * 2 / 255, rtol=1e-3)


def test_a_scale_beyond_16_bits_is_refused() -> None:
    with pytest.raises(ModelError, match="at most 65504"):
        round_to_nearest(torch.full((1, 16), 1e7), bits=4, group_size=16)
