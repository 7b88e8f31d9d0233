"""Sizes from a config alone: equal to the built model's, and only shapes that transformers opens."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from compress.errors import ModelError
from compress.model import shapes
from compress.model.shapes import StudentShape
from tests.tiny import ARCHITECTURES, tiny_config, tiny_model

SMOLLM: dict[str, Any] = {  # the sizes of a 135M Llama, as its config.json has them
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (4, 4, 16), (2, 1, None)])
def test_counts_and_shapes_equal_the_model(
    arch: str, tied: bool, heads: int, kv_heads: int, head_dim: int | None
) -> None:
    model = tiny_model(arch, tied=tied, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=3)
    config = model.config.to_dict()
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes.tensor_shapes(config) == real
    assert shapes.parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.weight_bytes(config, bits=4) == -(-shapes.parameter_count(config) // 2)


def test_biases_of_llama_and_qwen3_follow_the_config() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for arch, extra in [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})]:
        config = tiny_config(arch)
        for key, value in extra.items():
            setattr(config, key, value)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert shapes.tensor_shapes(config.to_dict()).keys() == dict(model.named_parameters()).keys()


def test_published_count() -> None:
    assert shapes.parameter_count(SMOLLM) == 134_515_008  # the model card says 135M; this is the exact sum


@pytest.mark.parametrize("drop", ["head_dim", "num_key_value_heads"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_missing_keys_mean_what_transformers_means(arch: str, drop: str) -> None:
    from transformers import LlamaConfig, Qwen3Config

    config = tiny_config(arch, kv_heads=4).to_dict()
    del config[drop]
    if arch == "qwen3" and drop == "num_key_value_heads":
        config[drop] = None
    real = {"llama": LlamaConfig, "qwen3": Qwen3Config}[arch](**config)
    assert shapes.head_size(config) == real.head_dim
    assert shapes.kv_head_count(config) == real.num_key_value_heads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; expected one of LlamaForCausalLM, Qwen2"),
        ({"architectures": None, "model_type": "mamba"}, "architecture mamba"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key-value heads"),
        ({"hidden_size": 30}, "hidden_size 30 with 4 heads"),
        ({"layer_types": ["full_attention"]}, "1 layer_types; expected 2"),
    ],
)
def test_unfit_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        shapes.check_config(tiny_config("llama").to_dict() | change)


def test_head_options_of_llama_divide_the_hidden_size() -> None:
    llama = tiny_config("llama", hidden=64, heads=8, kv_heads=4).to_dict()
    assert shapes.head_options(llama) == [(8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1)]
    qwen = tiny_config("qwen3", hidden=64, heads=8, kv_heads=4).to_dict()
    assert (6, 3) in shapes.head_options(qwen)
    assert (6, 3) in shapes.head_options(llama, hidden=48)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_option_opens_in_transformers(arch: str) -> None:
    config = tiny_config(arch, hidden=48, heads=6, kv_heads=3, layers=3).to_dict()
    for hidden in (48, 40):
        for heads, kv in shapes.head_options(config, hidden=hidden):
            new = shapes.with_shape(config, StudentShape(layers=2, heads=heads, kv_heads=kv, ffn=24, hidden=hidden))
            new.pop("dtype", None)
            built = type(tiny_config(arch))(**new)
            assert (built.num_attention_heads, built.head_dim, built.num_hidden_layers) == (heads, 8, 2)


def test_nearest_shape_rounds_down_and_says_so() -> None:
    config = tiny_config("llama", hidden=64, heads=8, kv_heads=4, ffn=172, layers=5).to_dict()
    shape, notes = shapes.nearest_shape(config, heads=6, ffn=100)
    assert shape == StudentShape(layers=5, heads=4, kv_heads=2, ffn=96, hidden=64)
    assert notes == ["heads 6 rounded to 4", "ffn 100 rounded to 96"]
    assert shapes.nearest_shape(config) == (shapes.shape_of(config), [])
    assert shapes.nearest_shape(config, heads=4, kv_heads=4)[0].kv_heads == 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ffn": 20}, "ffn 20; expected at least 32"),
        ({"ffn": 400}, "ffn 400; expected at most 172"),
        ({"layers": 6}, "layers 6; expected 1 to 5"),
        ({"layers": 0}, "layers 0; expected 1 to 5"),
        ({"heads": 0}, "heads 0"),
    ],
)
def test_shapes_that_cannot_be_cut_are_refused(wanted: dict[str, int], message: str) -> None:
    config = tiny_config("llama", hidden=64, heads=8, kv_heads=4, ffn=172, layers=5).to_dict()
    with pytest.raises(ModelError, match=message):
        shapes.nearest_shape(config, **wanted)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("axes", [("heads", "ffn"), ("heads", "ffn", "hidden"), ("layers", "ffn")])
def test_ratio_meets_its_count_on_the_grid(ratio: float, axes: tuple[str, ...]) -> None:
    shape = shapes.shape_for_ratio(SMOLLM, ratio, axes=axes)
    left = shapes.parameter_count(shapes.with_shape(SMOLLM, shape)) / shapes.parameter_count(SMOLLM)
    assert left == pytest.approx(1 - ratio, abs=0.03)
    assert shape.ffn % 32 == 0
    shapes.check_shape(SMOLLM, shape, where="test")
    if ratio == 0:
        assert shape == shapes.shape_of(SMOLLM)
    if "layers" not in axes:
        assert shape.layers == 30


def test_ratio_out_of_reach_names_the_limit() -> None:
    with pytest.raises(ModelError, match=r"0\.9 of the parameters by ffn; expected at most about 0\.\d+ here\. Add"):
        shapes.shape_for_ratio(SMOLLM, 0.9, axes=("ffn",))


def test_sizes_need_no_torch() -> None:
    code = (
        "import sys, json; from compress.model.shapes import parameter_count; "
        f"assert parameter_count(json.loads({json.dumps(json.dumps(SMOLLM))!s})); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
