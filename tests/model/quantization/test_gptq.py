"""GPTQ of one matrix: against the textbook in float64, against rounding, and where a Hessian gives way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.model.quantization.gptq import gptq_quantize, output_error, pieces
from compress.model.quantization.packing import dequantize
from compress.model.quantization.rtn import round_to_nearest
from tests.reference import quantization as reference


def problem(
    out: int = 12, inputs: int = 48, *, seed: int = 0, mix: float = 0.6, dead: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) and the second moment (in, in) of inputs that share a few directions, fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    shared = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    spread = torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    rows = mix * shared @ spread + torch.randn(400, inputs, generator=generator, dtype=torch.float64)
    rows *= torch.rand(inputs, generator=generator, dtype=torch.float64) + 0.2
    rows[:, list(dead)] = 0
    return weight, rows.T @ rows / 400


CASES: list[dict[str, Any]] = [
    {"group_size": 16},
    {"group_size": 16, "bits": 2},
    {"group_size": 16, "bits": 3, "sym": False},
    {"group_size": -1, "bits": 8},
    {"group_size": 20, "sym": False},  # does not divide: the last group is shorter
    {"group_size": 16, "act_order": True},
    {"group_size": 20, "act_order": True, "sym": False},
    {"group_size": 20, "act_order": True, "keep_groups": False},
    {"group_size": 16, "damp_frac": 0.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dead", [(), (0, 17, 18, 47)], ids=["", "dead"])
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_same_codes_as_the_textbook(case: dict[str, Any], dead: tuple[int, ...], block_size: int) -> None:
    weight, hessian = problem(dead=dead)
    params = {"bits": 4, "sym": True} | case
    result = gptq_quantize(weight, hessian, block_size=block_size, **params)
    codes, scales, zero_points, index = reference.gptq(weight.numpy(), hessian.numpy(), **params)
    assert torch.equal(result.layer.codes.long(), torch.from_numpy(codes))
    assert torch.equal(result.layer.scales.double(), torch.from_numpy(scales))
    assert torch.equal(result.layer.zero_points.long(), torch.from_numpy(zero_points))
    assert result.layer.g_idx.tolist() == index
    assert (result.dead, result.retries, result.fell_back) == (len(dead), 0, False)


def test_groups_longer_than_a_piece_and_a_block() -> None:
    weight, hessian = problem(8, 300, seed=5)
    for group_size in (100, 150, -1):
        result = gptq_quantize(weight, hessian, bits=3, group_size=group_size, block_size=64)
        codes, *_ = reference.gptq(weight.numpy(), hessian.numpy(), bits=3, group_size=group_size, sym=True)
        assert torch.equal(result.layer.codes.long(), torch.from_numpy(codes))


def test_fp32_gives_the_codes_of_fp64_but_for_ties() -> None:
    weight, hessian = problem(96, 256, seed=2)
    exact = gptq_quantize(weight, hessian, bits=4, group_size=32)
    fast = gptq_quantize(weight.float(), hessian, bits=4, group_size=32)
    assert float((exact.layer.codes != fast.layer.codes).float().mean()) < 0.002
    found, best = (output_error(weight, result.layer, hessian) for result in (fast, exact))
    assert found == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip_steps", [0, 10])
def test_a_diagonal_hessian_gives_rounding_to_nearest(bits: int, act_order: bool, clip_steps: int) -> None:
    weight, _ = problem(seed=3)
    diagonal = torch.rand(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    equal = torch.full_like(diagonal, 0.7)  # the clip search weighs by the diagonal; rounding alone does not
    hessian = torch.diag(equal if clip_steps else diagonal)
    result = gptq_quantize(weight, hessian, bits=bits, group_size=16, act_order=act_order, clip_steps=clip_steps)
    plain = round_to_nearest(weight, bits=bits, group_size=16, clip_steps=clip_steps)
    assert all(torch.equal(a, b) for a, b in zip(result.layer, plain, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_output_error_than_rounding_on_correlated_inputs(bits: int, seed: int) -> None:
    weight, hessian = problem(64, 96, seed=seed)
    plain = output_error(weight, round_to_nearest(weight, bits=bits, group_size=32), hessian)
    result = gptq_quantize(weight, hessian, bits=bits, group_size=32)
    assert output_error(weight, result.layer, hessian) < 0.8 * plain
    # the negative control: compensation for other inputs than these must not help
    _, other = problem(64, 96, seed=seed + 50)
    wrong = gptq_quantize(weight, other, bits=bits, group_size=32)
    assert output_error(weight, wrong.layer, hessian) > plain


def test_the_search_and_the_order_help() -> None:
    losses: dict[str, float] = {}
    for seed in range(4):
        weight, hessian = problem(64, 96, seed=seed, mix=1.0)
        for name, options in {
            "plain": {},
            "clip": {"clip_steps": 30},
            "order": {"act_order": True},
            "free order": {"act_order": True, "keep_groups": False},
        }.items():
            result = gptq_quantize(weight, hessian, bits=3, group_size=32, **options)  # type: ignore[arg-type]
            losses[name] = losses.get(name, 0.0) + output_error(weight, result.layer, hessian)
    assert losses["clip"] < losses["plain"]
    assert losses["order"] < losses["plain"]
    assert losses["free order"] < losses["plain"]


def test_the_output_error_is_the_mean_squared_change_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    hessian = rows.T @ rows / 50
    result = gptq_quantize(weight, hessian, bits=4, group_size=16)
    change = rows @ (dequantize(*result.layer).double() - weight).T
    assert output_error(weight, result.layer, hessian) == pytest.approx(float(change.square().sum(1).mean()), rel=1e-9)


def test_a_singular_hessian_is_damped_more_and_counted() -> None:
    weight, _ = problem()
    rows = torch.randn(10, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = gptq_quantize(weight, rows.T @ rows, bits=4, group_size=16, damp_frac=0.0)  # rank 10 of 48
    assert result.retries >= 1
    assert result.damp_frac > 0
    assert not result.fell_back
    nearest = round_to_nearest(weight, bits=4, group_size=16)
    assert output_error(weight, result.layer, rows.T @ rows) < output_error(weight, nearest, rows.T @ rows)


@pytest.mark.parametrize("kind", ["zero", "nan", "negative"])
def test_a_hessian_beyond_repair_gives_rounding_and_says_so(kind: str) -> None:
    weight, hessian = problem()
    bad = {"zero": hessian * 0, "nan": hessian.clone(), "negative": hessian - 1e7 * torch.ones(48, 48)}[kind]
    if kind == "nan":
        bad[3, 4] = torch.nan
    result = gptq_quantize(weight, bad, bits=4, group_size=16)
    assert result.fell_back
    assert torch.equal(result.layer.codes, round_to_nearest(weight, bits=4, group_size=16).codes)


def test_dead_inputs_keep_rounded_weights() -> None:
    weight, hessian = problem(dead=(5, 6))
    result = gptq_quantize(weight, hessian, bits=8, group_size=16)
    assert torch.allclose(dequantize(*result.layer)[:, [5, 6]].double(), weight[:, [5, 6]], atol=0.03)


def test_pieces_cover_every_column_once_and_keep_short_groups_whole() -> None:
    groups = torch.tensor([0] * 20 + [1] * 20 + [2] * 5 + [3] * 100 + [4] * 3)
    blocks = list(pieces(groups, 48))
    flat = [piece for block in blocks for piece in block]
    assert [column for start, end in flat for column in range(start, end)] == list(range(148))
    for block in blocks:
        assert block[-1][1] - block[0][0] <= 48
    starts = {block[0][0] for block in blocks}
    assert 45 in starts  # the long group begins a block of its own
    assert not starts & {*range(1, 20), *range(21, 40)}
