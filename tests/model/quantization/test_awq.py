"""AWQ in its parts: scales against stored activations, folding without a change, the clip, and what must not help."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.model.layers import decoder_layers, linears
from compress.model.quantization.awq import (
    channel_scales,
    fold_scales,
    round_clipped,
    scale_layer,
    search_scales,
    share_over_heads,
)
from compress.model.quantization.gptq import output_error
from compress.model.quantization.packing import dequantize
from compress.model.quantization.rtn import fit, round_to_nearest
from tests.reference import quantization as reference
from tests.tiny import ARCHITECTURES, tiny_model

STEPS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def problem(seed: int, *, inputs: int = 64, outputs: tuple[int, ...] = (24, 40)) -> tuple[list[torch.Tensor], Any]:
    """Weights of linears that share inputs (400, in) of which a few are far larger than the rest, fp64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, inputs, generator=generator, dtype=torch.float64)
    sizes = torch.rand(inputs, generator=generator, dtype=torch.float64) + 0.2
    sizes[torch.randperm(inputs, generator=generator)[:4]] *= 20
    weights = [torch.randn(out, inputs, generator=generator, dtype=torch.float64) for out in outputs]
    return weights, rows * sizes


def rounding(bits: int, group_size: int = 32, sym: bool = True) -> Any:
    return lambda _name, w: dequantize(*round_to_nearest(w, bits=bits, group_size=group_size, sym=sym))


def chosen(weights: list[torch.Tensor], rows: torch.Tensor, bits: int, **options: Any) -> Any:
    named = {str(at): weight for at, weight in enumerate(weights)}
    return search_scales(named, rows.abs().mean(0), rows.T @ rows / len(rows), rounding(bits), **options)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_the_error_is_that_of_stored_activations(bits: int, sym: bool) -> None:
    weights, rows = problem(bits, outputs=(5, 7))
    slow = reference.awq_errors(
        [w.numpy() for w in weights], rows.numpy(), bits=bits, group_size=16, sym=sym, points=7
    )  # fmt: skip
    named = {str(at): weight for at, weight in enumerate(weights)}
    moment = rows.T @ rows / len(rows)
    found = search_scales(named, rows.abs().mean(0), moment, rounding(bits, 16, sym), grid_points=7)
    best = int(np.argmin(slow))
    assert found.alpha == best / 7
    assert found.error == pytest.approx(slow[best], rel=1e-4)  # scales are fp32 here
    assert found.error_plain == pytest.approx(slow[0], rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_large_inputs_gain_and_shuffled_sizes_do_not(bits: int, seed: int) -> None:
    weights, rows = problem(seed)
    found = chosen(weights, rows, bits)
    assert found.error < 0.8 * found.error_plain
    # the negative control: the same scales on other inputs
    moment = rows.T @ rows / len(rows)
    sizes = rows.abs().mean(0)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    wrong = channel_scales(sizes, 0.5)
    errors = [
        sum(float((((d := rounding(bits)("", w * s) / s - w) @ moment) * d).sum()) for w in weights)
        for s in (wrong, torch.ones(64))
    ]
    assert errors[0] > errors[1]


def test_one_point_is_rounding_to_nearest_bit_for_bit() -> None:
    weights, rows = problem(0)
    found = chosen(weights, rows, 3, grid_points=1)
    assert (found.alpha, found.error) == (0, found.error_plain)
    assert torch.equal(found.scales, torch.ones(64))
    for weight in weights:
        fast, plain = (
            round_to_nearest(w, bits=3, group_size=32) for w in (weight.float() * found.scales, weight.float())
        )
        assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))


def test_scales_of_dead_inputs_are_one() -> None:
    sizes = torch.tensor([0.0, 4.0, 1.0, 0.25, 0.0])
    assert channel_scales(sizes, 0.5).tolist() == [1, 2, 1, 0.5, 1]
    assert channel_scales(torch.zeros(3), 0.5).tolist() == [1, 1, 1]
    assert torch.isfinite(channel_scales(torch.tensor([1e-30, 1.0]), 0.95)).all()


def test_scales_are_shared_by_the_query_heads_of_a_key_value_head() -> None:
    sizes = torch.arange(12.0)  # 2 key-value heads, 3 query heads each, of size 2
    expected = [2, 3, 2, 3, 2, 3, 8, 9, 8, 9, 8, 9]
    assert share_over_heads(sizes, kv_heads=2, head_size=2).tolist() == expected
    assert torch.equal(share_over_heads(sizes, kv_heads=6, head_size=2), sizes)


def with_biases(model: nn.Module, seed: int) -> None:
    """Give every linear of the decoder a bias, as Llama has them with attention_bias and mlp_bias."""
    generator = torch.Generator().manual_seed(seed)
    for layer in decoder_layers(model):
        for linear in linears(layer).values():
            linear.bias = nn.Parameter(torch.randn(linear.out_features, generator=generator) * 0.1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_folding_changes_no_output(arch: str, kv_heads: int, biased: bool) -> None:
    model = tiny_model(arch, kv_heads=kv_heads, head_dim=12)
    if biased:
        with_biases(model, 1)
    ids = torch.randint(5, 320, (2, 30), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for layer in decoder_layers(model):
        for names in STEPS:
            sizes = torch.rand(linears(layer)[names[0]].in_features, generator=generator) * 5 + 0.01
            if names == ("o_proj",):
                sizes = share_over_heads(sizes, kv_heads=kv_heads, head_size=12)
            fold_scales(layer, names, channel_scales(sizes, 0.9))
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, weights[name])]
    assert len([name for name in changed if "proj.weight" in name]) == 14
    assert float((model(ids).logits - before).norm() / before.norm()) < 2e-6
    # the negative control: one scale per query head cannot be taken back where heads share their values
    if kv_heads < 4:
        layer = decoder_layers(model)[0]
        fold_scales(layer, ("o_proj",), channel_scales(torch.rand(48, generator=generator) + 0.1, 0.9))
        assert float((model(ids).logits - before).norm() / before.norm()) > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_a_scaled_layer_computes_the_same_and_rounds_better(arch: str) -> None:
    model = tiny_model(arch)
    layer = decoder_layers(model)[0]
    for norm, size in (("input_layernorm", 15.0), ("post_attention_layernorm", 25.0)):  # planted outliers
        layer.get_submodule(norm).weight[[3, 9]] *= size
    ids = torch.randint(5, 320, (4, 40), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1)))
        for name, linear in linears(layer).items()
    ]
    before = model(ids).logits
    for hook in hooks:
        hook.remove()
    measured = [(n, (x := seen[n[0]].double()).abs().mean(0), x.T @ x / len(x)) for n in STEPS]
    found = scale_layer(layer, measured, rounding(3))
    assert list(found) == STEPS
    assert all(choice.error <= choice.error_plain for choice in found.values())
    for names in (STEPS[0], STEPS[2]):
        assert found[names].alpha > 0
        assert found[names].error < 0.8 * found[names].error_plain
    assert float((model(ids).logits - before).norm() / before.norm()) < 2e-6


def slow_clip(weight: Any, rows: Any, scales: list[list[float]], *, size: int, middle: int, bits: int) -> Any:
    """Return the scale of least output error (out, groups) among ``scales`` per (row, group), on stored rows."""
    best = np.zeros((weight.shape[0], weight.shape[1] // size))
    for row in range(weight.shape[0]):
        for group in range(best.shape[1]):
            part = slice(group * size, (group + 1) * size)
            errors = []
            for scale in scales[row * best.shape[1] + group]:
                codes = [reference.code(v, scale, middle, bits) for v in weight[row, part]]
                change = (np.array(codes) - middle) * scale - weight[row, part]
                errors.append(float(np.square(rows[:, part] @ change).sum()))
            best[row, group] = scales[row * best.shape[1] + group][int(np.argmin(errors))]
    return best


def test_the_clip_is_the_one_of_least_output_error() -> None:
    weights, rows = problem(5, inputs=48, outputs=(6,))
    weight = weights[0]
    moment = rows.T @ rows / len(rows)
    found = round_to_nearest(weight, bits=3, group_size=16, clip_steps=6, moment=moment)
    shares = [1.0, *np.linspace(7 / 6, 0.35, 7)]
    tops = weight.view(6, 3, 16).abs().amax(2).view(-1).tolist()
    tried = [[reference.half_up(2 * top * share / 7) for share in shares] for top in tops]
    expected = slow_clip(weight.numpy(), rows.numpy(), tried, size=16, middle=4, bits=3)
    assert np.array_equal(found.scales.double().numpy(), expected)
    assert not torch.equal(found.scales, round_to_nearest(weight, bits=3, group_size=16, clip_steps=6).scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_clipping_is_never_worse_and_helps_at_low_bits(bits: int, seed: int) -> None:
    weights, rows = problem(seed)
    weight, moment = weights[0], rows.T @ rows / len(rows)
    options: dict[str, Any] = {"bits": bits, "group_size": 32}
    plain = output_error(weight, round_to_nearest(weight, **options), moment)
    clipped = round_clipped(weight, moment, **options)
    assert output_error(weight, clipped, moment) < {2: 0.6, 3: 0.8, 4: 0.97}[bits] * plain
    for row in range(0, len(weight), 5):
        each = [
            output_error(weight[row : row + 1], type(clipped)(*(part[row : row + 1] for part in layer[:3]), layer[3]),
                         moment)
            for layer in (clipped, round_to_nearest(weight, **options))
        ]  # fmt: skip
        assert each[0] <= each[1]
    none = round_clipped(weight, moment, clip_steps=0, **options)
    assert all(torch.equal(a, b) for a, b in zip(none, round_to_nearest(weight, **options), strict=True))


def test_a_diagonal_moment_is_an_importance_per_input() -> None:
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(9, 16, generator=generator), torch.rand(16, generator=generator)
    both = [fit(values, bits=2, sym=False, clip_steps=15, importance=given) for given in (weight, torch.diag(weight))]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
