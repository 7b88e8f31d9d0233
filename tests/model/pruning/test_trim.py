"""Trimming: dead parts go first and change nothing, a sliced model equals the masked one, the rest stays true."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import ModelError
from compress.model.calibration import Batch, batches
from compress.model.checkpoint import TorchRuntime, count_parameters, parameter_count, save_model
from compress.model.layers import decoder_layers, is_tied, linears
from compress.model.pruning.depth import choose_layers, cut_layers
from compress.model.pruning.importance import measure, strongest
from compress.model.pruning.structured import build_student, slice_model
from compress.model.pruning.width import choose_heads, cut_ffn, cut_heads, cut_hidden
from compress.model.shapes import StudentShape
from tests.tiny import ARCHITECTURES, tiny_model, tiny_token_rows, tiny_tokenizer

IDS = torch.randint(5, 320, (3, 14), generator=torch.Generator().manual_seed(0))
EVERY = pytest.mark.parametrize("arch", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False])


def given() -> list[Batch]:
    return batches(tiny_token_rows(8), tokens=10**6, batch_size=4, seed=0, pad_id=0)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def shape(**change: Any) -> StudentShape:
    return StudentShape(**({"layers": 3, "heads": 8, "kv_heads": 4, "ffn": 48, "hidden": 32} | change))


def planted(arch: str, tied: bool, part: str) -> Any:
    """Return a model of 3 layers, 8/4 heads, ffn 48, hidden 32, one part of which does nothing.

    heads: group 1 of layer 0, 2 of layer 1, 0 of layer 2, and within live groups the first head of each.
    """
    model = tiny_model(arch, tied=tied, layers=3, heads=8, kv_heads=4, head_dim=4, ffn=48, scale=0.3)
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            parts = linears(layer)
            if part == "ffn":
                parts["up_proj"].weight[index::3] = 0
            if part == "groups":
                group = (1, 2, 0)[index]
                parts["v_proj"].weight[4 * group : 4 * group + 4] = 0
                if parts["v_proj"].bias is not None:
                    parts["v_proj"].bias[4 * group : 4 * group + 4] = 0
            if part == "layers" and index == 1:
                parts["o_proj"].weight.zero_()
                parts["down_proj"].weight.zero_()
            if part == "hidden":
                for name in ("o_proj", "down_proj"):
                    parts[name].weight[3::4] = 0
        if part == "hidden":
            model.model.embed_tokens.weight[:, 3::4] = 0
    return model


@EVERY
@TIED
@pytest.mark.parametrize(
    ("part", "target"),
    [
        ("ffn", shape(ffn=32)),
        ("groups", shape(heads=6, kv_heads=3, hidden=24)),
        ("layers", shape(layers=2)),
        ("hidden", shape(hidden=24)),
    ],
)
def test_planted_dead_parts_go_first_and_logits_stay(arch: str, tied: bool, part: str, target: StudentShape) -> None:
    model = planted(arch, tied, part)
    if part == "groups":  # 6 heads do not divide a Llama's 32 channels: cut dead hidden channels with them
        hidden = planted(arch, tied, "hidden")
        with torch.no_grad():
            for layer, other in zip(decoder_layers(hidden), decoder_layers(model), strict=True):
                linears(layer)["v_proj"].load_state_dict(linears(other)["v_proj"].state_dict())
        model = hidden
    model.config.rms_norm_eps = 0.0
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and module.weight.numel() == 32:
            module.variance_epsilon = 0.0  # epsilon alone does not scale with the number of channels
    student = build_student(model, given(), target)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=5e-5)
    assert count_parameters(student) == parameter_count(student.config.to_dict()) < count_parameters(model)
    assert is_tied(student) is tied


@EVERY
def test_a_sliced_ffn_equals_the_masked_one(arch: str) -> None:
    model = tiny_model(arch, scale=0.3)
    keep = [strongest(scores, 40) for scores in measure(model, given()).ffn]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, kept in zip(decoder_layers(masked), keep, strict=True):
            gone = sorted(set(range(64)) - set(kept))
            linears(layer)["down_proj"].weight[:, gone] = 0
    cut_ffn(model, keep)
    assert not torch.allclose(logits(masked), logits(tiny_model(arch, scale=0.3)), atol=1e-3)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=5e-5)
    assert model.config.intermediate_size == 40


@EVERY
@pytest.mark.parametrize(("keep_heads", "keep_kv"), [(4, 2), (4, 4), (2, 1), (2, 2)])
def test_sliced_heads_equal_the_masked_ones(arch: str, keep_heads: int, keep_kv: int) -> None:
    model = tiny_model(arch, heads=8, kv_heads=4, head_dim=4, scale=0.3)
    found = measure(model, given()).heads
    keep = [choose_heads(scores, kv_heads=4, keep_heads=keep_heads, keep_kv=keep_kv) for scores in found]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, (heads, groups) in zip(decoder_layers(masked), keep, strict=True):
            assert {head // 2 for head in heads} == set(groups)
            gone = [4 * head + i for head in sorted(set(range(8)) - set(heads)) for i in range(4)]
            linears(layer)["o_proj"].weight[:, gone] = 0
    cut_heads(model, keep)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=5e-5)
    assert model.config.num_key_value_heads == keep_kv


def test_choose_heads_takes_groups_by_their_norm_and_heads_within() -> None:
    scores = torch.tensor([9.0, 0.0, 7.0, 7.0, 1.0, 2.0, 8.0, 3.0])  # group norms 9, 9.9, 2.2, 8.5
    assert choose_heads(scores, kv_heads=4, keep_heads=4, keep_kv=2) == ([0, 1, 2, 3], [0, 1])
    assert choose_heads(scores, kv_heads=4, keep_heads=3, keep_kv=3) == ([0, 2, 6], [0, 1, 3])


def test_cut_layers_keeps_the_cache_and_the_config_whole() -> None:
    model = tiny_model("qwen2", layers=4, scale=0.3)
    bare = copy.deepcopy(model)
    cut_layers(model, [0, 3])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert len(model.config.layer_types) == model.config.num_hidden_layers == 2
    with torch.no_grad():
        for index in (1, 2):
            for name in ("o_proj", "down_proj"):
                linears(bare.model.layers[index])[name].weight.zero_()
    torch.testing.assert_close(logits(model), logits(bare))
    assert TorchRuntime(model).generate([[1, 9, 8]], 6, ()) == TorchRuntime(bare).generate([[1, 9, 8]], 6, ())


def test_choose_layers_keeps_the_order() -> None:
    assert choose_layers([0.5, 0.0, 0.1, 0.4], 3) == [0, 2, 3]


def test_gains_are_rescaled_only_when_asked() -> None:
    model = planted("llama", True, "hidden")
    found = measure(model, given())
    plain, scaled = copy.deepcopy(model), copy.deepcopy(model)
    keep = strongest(found.hidden, 24)
    cut_hidden(plain, keep, moments=None)
    cut_hidden(scaled, keep, moments=found.moments)
    ratio = scaled.model.norm.weight / plain.model.norm.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, (32 / 24) ** 0.5))
    assert (logits(plain) - logits(model)).abs().max() > 10 * (logits(scaled) - logits(model)).abs().max()


@EVERY
@TIED
def test_a_student_saves_opens_plainly_trains_and_generates(arch: str, tied: bool, tmp_path: Path) -> None:
    teacher = tiny_model(arch, tied=tied, layers=3, heads=8, kv_heads=4, head_dim=4, ffn=48, scale=0.3)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    student = build_student(teacher, given(), StudentShape(layers=2, heads=4, kv_heads=2, ffn=32, hidden=16))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    tiny_tokenizer(tmp_path / "tokenizer")
    save_model(student, tmp_path / "out", tokenizer_from=tmp_path / "tokenizer", metadata={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(again) - logits(student)).abs().max() <= 1e-6
    assert is_tied(again) is tied
    assert again.config.head_dim == 4
    assert TorchRuntime(again).generate([[1, 7]], 5, ()) == TorchRuntime(student).generate([[1, 7]], 5, ())
    again.train()
    again(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


@EVERY
def test_the_own_shape_changes_no_weight(arch: str) -> None:
    model = tiny_model(arch)
    student = build_student(model, given(), StudentShape(layers=2, heads=4, kv_heads=2, ffn=64))
    for name, value in model.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 6, "kv_heads": 3}, r"heads/kv_heads 6/3; expected one of 8/4, 4/4, 4/2"),
        ({"ffn": 64}, "ffn 64; expected 1 to 48"),
        ({"layers": 0}, "layers 0"),
    ],
)
def test_impossible_shapes_are_refused_before_anything_is_cut(change: dict[str, int], message: str) -> None:
    model = planted("llama", True, "ffn")
    found = measure(model, given())
    with pytest.raises(ModelError, match=message):
        slice_model(model, found, shape(**change))
    assert count_parameters(model) == parameter_count(model.config.to_dict())
