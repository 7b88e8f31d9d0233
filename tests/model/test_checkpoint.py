"""Folders are checked before they are trusted, and what is saved opens anywhere with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.errors import ModelError
from compress.model import checkpoint
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model

IDS = torch.tensor([[1, 2, 40, 41, 42, 4, 3, 50]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_opens_plainly_with_the_same_logits(arch: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", arch, tied=tied)
    checkpoint.check_folder(source)
    model = checkpoint.load_model(source)
    checkpoint.save_model(model, tmp_path / "a", tokenizer_from=source, metadata={"b": 1, "a": [2]})
    checkpoint.save_model(model, tmp_path / "b", tokenizer_from=source, metadata={"a": [2], "b": 1})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["head_dim"] == 8
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "edgestill.json"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    ours, theirs = (PreTrainedTokenizerFast.from_pretrained(tmp_path / part) for part in ("a", "source"))
    assert ours("dim the hall").input_ids == theirs("dim the hall").input_ids
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_dtype_is_what_was_asked_not_what_was_stored(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    model = checkpoint.load_model(source, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    checkpoint.save_model(model, tmp_path / "half", tokenizer_from=source)
    assert checkpoint.load_model(tmp_path / "half").dtype == torch.float32
    eager = checkpoint.load_model(source, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_generation_config_with_idle_sampling_figures_is_saved(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    model = checkpoint.load_model(source)
    model.generation_config.temperature = 0.5
    checkpoint.save_model(model, tmp_path / "out", tokenizer_from=source)
    assert model.generation_config.temperature == 0.5
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 4
    assert saved.get("temperature") is None


def test_count_parameters_counts_a_tied_head_once() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    assert checkpoint.count_parameters(untied) - checkpoint.count_parameters(tied) == 320 * 32
    assert checkpoint.count_parameters(tied) == checkpoint.parameter_count(tied.config.to_dict())


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_beside_a_tied_config(same: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (0 if same else 1)

    edit_weights(source, add_head)
    model = checkpoint.load_model(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is same
    checkpoint.save_model(model, tmp_path / "out", tokenizer_from=source)
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "out")), logits(model))


def test_pickle_only_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    for call in (checkpoint.check_folder, checkpoint.load_model):
        with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\); expected model.safetensors"):
            call(source)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_cut_off_safetensors_is_refused(left: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    for call in (checkpoint.check_folder, checkpoint.load_model):
        with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut off"):
            call(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    edit_weights(source, spoil)
    for call in (checkpoint.check_folder, checkpoint.load_model):
        with pytest.raises(ModelError, match=r"1 NaN or infinite values in model.layers.1.mlp.up_proj.weight"):
            call(source)


def test_missing_and_misshaped_tensors_are_refused(tmp_path: Path) -> None:
    missing = tiny_checkpoint(tmp_path / "missing")
    edit_weights(missing, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"missing tensors model\.norm\.weight"):
        checkpoint.load_model(missing)
    shaped = tiny_checkpoint(tmp_path / "shaped")
    config = json.loads((shaped / "config.json").read_text())
    (shaped / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"of shape \(.*as config.json says"):
        checkpoint.check_folder(shaped)


def test_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel; expected one of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3"):
        checkpoint.check_folder(tmp_path)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    big = tiny_checkpoint(tmp_path / "big", vocab=330)
    (source / "tokenizer.json").write_bytes((big / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match=r"token id 329; expected ids below the model's vocab_size 320"):
        checkpoint.check_folder(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", "{", "config.json: cannot be read as JSON"),
        ("config.json", "[]", "config.json: a JSON list; expected a JSON object"),
        ("config.json", b"\xff\xfe", "config.json: cannot be read as JSON"),
        ("model.safetensors", None, "no weights; expected model.safetensors"),
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{}", r"tokenizer.json: no model\.vocab"),
    ],
)
def test_broken_folders_are_named(name: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message):
        checkpoint.check_folder(source)


def test_shards_are_followed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    model = checkpoint.load_model(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="40KB")
    assert (source / "model.safetensors.index.json").is_file()
    checkpoint.check_folder(source)
    assert torch.equal(logits(checkpoint.load_model(source)), logits(model))
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"missing shards {shard.name}"):
        checkpoint.check_folder(source)


def test_a_config_that_transformers_refuses_is_a_model_error(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "small"}))
    with pytest.raises(ModelError, match="transformers cannot open it"):
        checkpoint.load_model(source)


def write_quantized(folder: Path, change: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Quantize a tiny checkpoint in place to 4 bits, groups of 8; return the weights that its codes stand for."""
    from compress.model.quantization import packing

    values: dict[str, torch.Tensor] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors.pop(name)
            g_idx = packing.group_index(weight.shape[1], 8)
            scales = torch.rand(weight.shape[0], int(g_idx.max()) + 1).half() / 20 + 0.01
            zeros = torch.randint(1, 15, scales.shape).to(torch.uint8)
            layer = packing.QuantizedLinear(
                packing.quantize(weight, scales, zeros, g_idx, bits=4), scales, zeros, g_idx
            )
            prefix = name.removesuffix(".weight")
            tensors.update({f"{prefix}.{key}": value for key, value in packing.pack_layer(layer, bits=4).items()})
            values[name] = (layer.codes.float() - zeros.float()[:, g_idx.long()]) * scales.float()[:, g_idx.long()]

    torch.manual_seed(0)
    edit_weights(folder, pack)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 8, **(change or {})}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_checkpoint_opens_as_its_exact_values(arch: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m", arch, tied=tied)
    plain = checkpoint.load_model(source)
    values = write_quantized(source)
    checkpoint.check_folder(source)
    model = checkpoint.load_model(source)
    state = model.state_dict()
    assert len(values) == 14
    for name, value in (plain.state_dict() | values).items():
        assert torch.equal(state[name], value), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    checkpoint.save_model(model, tmp_path / "out", tokenizer_from=source)
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "out")), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_foreign_and_incomplete_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "m")
    write_quantized(source, {"checkpoint_format": "gptq_v2"})
    with pytest.raises(ModelError, match="checkpoint_format 'gptq_v2'"):
        checkpoint.load_model(source)
    other = tiny_checkpoint(tmp_path / "other")
    write_quantized(other)
    edit_weights(other, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(ModelError, match=r"missing tensors model\.layers\.1\.mlp\.up_proj\.scales"):
        checkpoint.load_model(other)
