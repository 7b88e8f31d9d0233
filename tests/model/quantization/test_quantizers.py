"""Rounding that is trained through: levels and gradients against plain loops, codes that are the weights exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compress.model.quantization.clipping import clip_quantize
from compress.model.quantization.packing import QuantizedLinear, dequantize, group_index, pack_layer, read_layer
from compress.model.quantization.params import Rule
from compress.model.quantization.quantizers import FakeQuantLinear, RoundThrough, cell_weights, levels, stretched_grid
from compress.model.quantization.rtn import round_to_nearest
from tests.reference import quantization as reference

KINDS: list[tuple[Rule, int, bool]] = [
    ("affine", 2, False),
    ("affine", 3, False),
    ("affine", 2, True),
    ("lsq", 3, True),
    ("lsq", 4, True),
    ("lsq", 8, True),
    ("elastic", 2, True),
    ("ternary", 2, True),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(weight: torch.Tensor, rule: Rule, bits: int, sym: bool, *, group_size: int = 8) -> QuantizedLinear:
    if rule in ("elastic", "ternary"):
        return stretched_grid(weight, rule=rule, group_size=group_size, clip_steps=6)
    return round_to_nearest(weight, bits=bits, group_size=group_size, sym=sym, clip_steps=6)


def trained(
    rule: Rule, bits: int, sym: bool, *, group_size: int = 8, train_zero: bool = False
) -> tuple[FakeQuantLinear, torch.Tensor]:
    """A module whose weights, steps and zero points were moved away from their start, and its start weight."""
    weight = draw(6, 24, seed=4).float() * 0.1
    grid = start(weight, rule, bits, sym, group_size=group_size)
    module = FakeQuantLinear(weight, grid, bits=bits, rule=rule, train_zero=train_zero)
    with torch.no_grad():
        module.latent += 0.05 * draw(6, 24, seed=5).float()
        module.log_step += 0.3 * draw(module.log_step.numel(), seed=6).float()
        if module.zero_shift is not None:
            module.zero_shift += 0.05 * draw(module.zero_shift.numel(), seed=7).float()
    return module, weight


@pytest.mark.parametrize(("rule", "bits", "sym"), KINDS)
def test_levels_equal_plain_loops(rule: Rule, bits: int, sym: bool) -> None:
    weight, step = draw(40, 12), 0.2 + draw(40, 12, seed=1).abs()
    zero = torch.full_like(step, 1 << (bits - 1)) if sym else torch.randint(1, 1 << bits, step.shape).double()
    found, _ = levels(weight, step, zero, bits=bits, rule=rule)
    for i, j in [(i, j) for i in range(40) for j in range(12)]:
        expected = reference.trained_level(
            float(weight[i, j]), float(step[i, j]), int(zero[i, j]), bits=bits, rule=rule
        )
        assert float(found[i, j]) == expected


@pytest.mark.parametrize(("rule", "levels_of_alpha"), [("elastic", (-3, -1, 1, 3)), ("ternary", (-1, 0, 1))])
def test_stretched_levels_are_those_of_the_paper(rule: Rule, levels_of_alpha: tuple[int, ...]) -> None:
    weight = torch.linspace(-1, 1, 401).view(1, -1)  # alpha, the largest, is 1
    grid = stretched_grid(weight, rule=rule, group_size=-1)
    values = dequantize(*grid)
    unit = {"elastic": 1 / 4, "ternary": 2 / 3}[rule]
    expected = torch.tensor([level * unit for level in levels_of_alpha])
    torch.testing.assert_close(values.unique(), expected, rtol=1e-3, atol=0)  # the step is rounded to fp16
    assert grid.codes.max() < (16 if rule == "elastic" else 4)


@pytest.mark.parametrize(("rule", "bits", "sym"), KINDS)
def test_gradients_are_the_differences_of_the_surrogate(rule: Rule, bits: int, sym: bool) -> None:
    weight, step = draw(30, 8), (0.2 + draw(30, 8, seed=1).abs()) * 4 / 2**bits
    zero = torch.full_like(step, 1 << (bits - 1)) if sym else torch.randint(1, 1 << bits, step.shape).double()
    inputs = [tensor.clone().requires_grad_() for tensor in (weight, step, zero)]
    level, inside = levels(weight, step, zero, bits=bits, rule=rule)
    assert bool(inside.any())
    assert not bool(inside.all())
    RoundThrough.apply(*inputs, level, inside, 0.5).sum().backward()
    small = 1e-6
    for i, j in [(i, j) for i in range(30) for j in range(8)]:
        at = tuple(float(tensor[i, j]) for tensor in (weight, step, zero))
        for k, (tensor, factor) in enumerate(zip(inputs, (1.0, 0.5, 1.0), strict=True)):
            if k == 2 and rule in ("elastic", "ternary", "lsq"):
                continue  # no zero point to train
            up, down = list(at), list(at)
            up[k], down[k] = at[k] + small, at[k] - small
            ends = [reference.surrogate(*place, at, bits=bits, rule=rule) for place in (up, down)]
            assert tensor.grad is not None
            assert float(tensor.grad[i, j]) == pytest.approx(factor * (ends[0] - ends[1]) / (2 * small), abs=1e-7)


@pytest.mark.parametrize("group_size", [8, 24, -1, 16])  # 16 leaves a shorter group at the end
@pytest.mark.parametrize(("rule", "bits", "sym"), KINDS)
def test_codes_are_the_weights_bit_for_bit(rule: Rule, bits: int, sym: bool, group_size: int) -> None:
    module, weight = trained(rule, bits, sym, group_size=group_size, train_zero=rule == "affine" and not sym)
    moved = module.weight.detach()
    assert not torch.equal(moved, dequantize(*start(weight, rule, bits, sym, group_size=group_size)))
    layer = module.coded()
    assert torch.equal(dequantize(*layer), moved)
    width = 4 if bits == 3 or rule == "elastic" else bits
    stored = read_layer({f"x.{name}": t for name, t in pack_layer(layer, bits=width).items()}, "x", bits=width)
    assert torch.equal(dequantize(*stored), moved)
    assert int(layer.zero_points.min()) >= 1
    inputs = draw(3, 24).float()
    torch.testing.assert_close(module(inputs), inputs @ moved.T)


@pytest.mark.parametrize(("rule", "bits", "sym"), KINDS)
def test_untrained_it_is_the_grid_it_was_given(rule: Rule, bits: int, sym: bool) -> None:
    weight = draw(6, 24).float()
    grid = start(weight, rule, bits, sym)
    module = FakeQuantLinear(weight, grid, bits=bits, rule=rule, train_zero=rule == "affine" and not sym)
    assert torch.equal(module.weight, dequantize(*grid))
    assert all(torch.equal(a, b) for a, b in zip(module.coded(), grid, strict=True))


@pytest.mark.parametrize(("rule", "bits", "sym"), KINDS)
def test_fixed_codes_stay_while_their_steps_are_trained(rule: Rule, bits: int, sym: bool) -> None:
    module, _ = trained(rule, bits, sym)
    before = module.coded()
    module.freeze_codes()
    assert torch.equal(module.weight.detach(), dequantize(*before))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["log_step"]
    with torch.no_grad():
        module.log_step += 0.2
        module.latent += 1.0
    after = module.coded()
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.zero_points, before.zero_points)
    assert not torch.equal(after.scales, before.scales)
    assert torch.equal(dequantize(*after), module.weight.detach())
    module.weight.square().sum().backward()
    assert module.log_step.grad is not None
    assert bool((module.log_step.grad != 0).any())


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_latent_weights_round_to_any_codes_and_keep_what_they_may(bits: int, sym: bool) -> None:
    weight = draw(8, 24).float()
    grid = round_to_nearest(weight, bits=bits, group_size=8, sym=sym, clip_steps=5)
    assert torch.equal(cell_weights(weight, grid, bits=bits), weight)  # these codes are the nearest already
    generator = torch.Generator().manual_seed(3)
    moved = grid.codes.int() + torch.randint(-1, 2, grid.codes.shape, generator=generator)
    other = grid._replace(codes=moved.clamp(0, (1 << bits) - 1).to(torch.uint8))
    latent = cell_weights(weight, other, bits=bits)
    module = FakeQuantLinear(latent, other, bits=bits, rule="affine")
    assert torch.equal(module.coded().codes, other.codes)
    kept = other.codes == grid.codes
    assert torch.equal(latent[kept], weight[kept])
    cell = other.scales.float()[:, group_index(24, 8).long()] / 2
    assert bool((((latent - dequantize(*other)).abs() <= cell) | kept).all())


def test_a_group_of_zeros_is_no_trouble() -> None:
    weight = torch.zeros(2, 16)
    for rule in ("elastic", "ternary"):
        assert dequantize(*stretched_grid(weight, rule=rule, group_size=8, clip_steps=4)).abs().max() < 1e-6


def correlated(seed: int, inputs: int = 24) -> torch.Tensor:
    """The second moment of inputs that share a few causes, some of them large."""
    causes = draw(inputs, 6, seed=seed)
    return causes @ causes.T + 0.1 * torch.eye(inputs, dtype=torch.float64)


def unclipped(weight: torch.Tensor, bits: int, group_size: int, sym: bool) -> torch.Tensor:
    return dequantize(*round_to_nearest(weight, bits=bits, group_size=group_size, sym=sym)).double()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [8, -1, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_is_never_worse_than_none_in_any_row(bits: int, group_size: int, sym: bool) -> None:
    gains = []
    for seed in range(3):
        weight, moment = draw(12, 24, seed=seed), correlated(seed)
        plain = unclipped(weight, bits, group_size, sym)
        layer = clip_quantize(weight, moment, bits=bits, group_size=group_size, sym=sym, steps=8)
        without = reference.row_error(weight.numpy(), plain.numpy(), moment.numpy())
        with_it = reference.row_error(weight.numpy(), dequantize(*layer).double().numpy(), moment.numpy())
        assert (with_it <= without * (1 + 1e-6)).all()
        gains.append(with_it.sum() / without.sum())
    assert max(gains) < 0.9


def test_no_steps_of_the_clip_are_rounding_to_nearest() -> None:
    weight, moment = draw(5, 16), correlated(0, 16)
    plain = round_to_nearest(weight, bits=2, group_size=8, sym=False)
    for found in (
        clip_quantize(weight, moment, bits=2, group_size=8, steps=0),
        clip_quantize(weight, moment, bits=2, group_size=8, steps=4, smallest=1.0),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_clip_of_one_group_is_the_best_of_all_pairs() -> None:
    weight, moment = draw(1, 6, seed=2), correlated(5, 6)
    found = clip_quantize(weight, moment, bits=2, group_size=-1, steps=5)
    costs = []
    values = weight[0].numpy()
    for below in torch.linspace(1, 0.5, 6).tolist():
        for above in torch.linspace(1, 0.5, 6).tolist():
            ends = reference.np.array([values.min() * below, values.max() * above])
            scale, zero = reference.grid(ends, bits=2, sym=False)
            rounded = [(reference.code(float(v), scale, zero, 2) - zero) * scale for v in values]
            costs.append(reference.row_error(values[None], reference.np.array([rounded]), moment.numpy())[0])
    cost = reference.row_error(values[None], dequantize(*found).double().numpy(), moment.numpy())[0]
    assert cost == pytest.approx(min(costs), rel=1e-6)
    assert cost < costs[0]


def test_one_end_may_be_clipped_harder_than_the_other() -> None:
    """An outlier on one side that no input sees: a clip of both ends alike would cost the other side its values."""
    weight = torch.tensor([[-1.0, -0.9, 0.5, 1.0, -0.5, 4.0]], dtype=torch.float64)
    moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-6], dtype=torch.float64))
    error: Callable[[QuantizedLinear], float] = lambda layer: float(  # noqa: E731
        reference.row_error(weight.numpy(), dequantize(*layer).double().numpy(), moment.numpy())[0]
    )
    free = clip_quantize(weight, moment, bits=3, group_size=-1, steps=10, smallest=0.2)
    assert error(free) < error(clip_quantize(weight, moment, bits=3, group_size=-1, sym=True, steps=10, smallest=0.2))
