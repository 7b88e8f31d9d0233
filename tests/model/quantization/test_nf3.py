"""NF3 on the integers of a 4-bit code: where the levels come from, and how near they are to the exact ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from compress.model.quantization.packing import dequantize, pack_layer, read_layer
from compress.model.quantization.rtn import NF3, round_to_nearest
from tests.reference.quantization import normal_float, round_to_levels

SHARES = [1.0, *np.linspace(1, 0.35, 21)]


def lost(values: np.ndarray, levels: np.ndarray, shares: list[float] = SHARES) -> float:
    return float(np.square(round_to_levels(values, levels, shares) - values).sum() / np.square(values).sum())


def uniform(values: np.ndarray, *, sym: bool) -> float:
    weight = torch.from_numpy(values)
    change = dequantize(*round_to_nearest(weight, bits=3, group_size=values.shape[1], sym=sym, clip_steps=40)) - weight
    return float(change.square().sum() / weight.square().sum())


def test_the_exact_levels() -> None:
    # as printed in BitDistiller's quantizer, to the digits given there
    known = [-1.0, -0.5350227355957031, -0.2469314038753510, 0.0, 0.1833375245332718, 0.3819939494132996,
             0.6229856610298157, 1.0]  # fmt: skip
    assert normal_float(3) == pytest.approx(known, abs=1e-7)
    assert len(normal_float(4)) == 16
    assert normal_float(4)[1] == pytest.approx(-0.6961928009986877, abs=1e-7)


def test_the_integers_are_the_best_way_to_round_seven_times_nf3() -> None:
    """All 32 sets in which each level is rounded up or down, on normal weights in groups of 32."""
    exact = 7 * normal_float(3)
    values = np.random.default_rng(0).standard_normal((12_000, 32))
    shares = [1.0, *np.linspace(1, 0.5, 11)]
    sides = [sorted({math.floor(level + 1e-9), math.ceil(level - 1e-9)}) for level in exact]
    tried = {levels: lost(values, np.array(levels, float), shares) for levels in itertools.product(*sides)}
    assert len(tried) == 32
    assert min(tried, key=tried.__getitem__) == NF3
    assert max(abs(np.array(NF3) - exact)) < 1


@pytest.mark.parametrize("seed", range(3))
def test_between_the_exact_levels_and_the_symmetric_grid_on_normal_weights(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((4000, 32))
    exact, ours = lost(values, normal_float(3)), lost(values, np.array(NF3, float))
    even, odd = (uniform(values, sym=sym) for sym in (True, False))
    assert exact < ours < even  # measured: 0.0273, 0.0292, 0.0320
    assert ours < 1.12 * exact
    assert ours < 0.93 * even
    # the negative control: a zero point of its own per group does more than the spacing, 0.0259
    assert odd < exact


@pytest.mark.parametrize("clip_steps", [0, 20])
def test_same_values_as_the_slow_reference(clip_steps: int) -> None:
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[2] = 0
    weight[3, :32] = -weight[3, :32].abs()
    layer = round_to_nearest(weight, bits=3, group_size=32, clip_steps=clip_steps, levels=NF3)
    shares = [1.0, *np.linspace(1, 0.35, clip_steps + 1)] if clip_steps else [1.0]
    for start, end in ((0, 32), (32, 64), (64, 80)):
        expected = round_to_levels(weight[:, start:end].numpy(), np.array(NF3, float), shares)
        got = dequantize(*layer)[:, start:end].numpy()
        assert np.allclose(got, expected, atol=2e-3 * float(weight.abs().max()))  # scales are rounded up to fp16
    assert not dequantize(*layer)[2].any()
    assert layer.scales[2].tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(layer.scales).all()


def test_the_codes_fit_a_four_bit_checkpoint() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    layer = round_to_nearest(weight, bits=3, group_size=32, clip_steps=10, levels=NF3)
    assert set((layer.codes.int() - 8).unique().tolist()) <= set(NF3)
    assert len(layer.codes.unique()) == 8
    packed = {f"x.{name}": tensor for name, tensor in pack_layer(layer, bits=4).items()}
    read = read_layer(packed, "x", bits=4)
    assert all(torch.equal(a, b) for a, b in zip(read, layer, strict=True))
