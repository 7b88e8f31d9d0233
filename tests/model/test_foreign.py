"""Folders of other formats are refused by their names, with what to do, before tensors are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.model.checkpoint import check_folder, load_model, read_config, write_json
from compress.model.foreign import format_of
from tests.deploy.tools import rounded
from tests.tiny import tiny_checkpoint

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
     r"compressed-tensors \(pack-quantized\)"),
    ({"compression_config": {"config_groups": {"group_0": {}}}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}}, "awq"),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, r"fp8 \(e4m3\)"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "exl3", "bits": 3.0}}, "exl3"),
    ({"quantization_config": {"bits": 4}}, "unnamed"),
    ({"quantization_config": "int4"}, "quantization_config 'int4'"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "told"), CONFIGS)
def test_a_format_in_the_config_is_named(entries: dict[str, Any], told: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    path = source / "model.safetensors"
    packed = {f"{name}_packed" if "proj" in name else name: tensor for name, tensor in load_file(path).items()}
    save_file(packed, path, metadata={"format": "pt"})
    write_json(source / "config.json", read_config(source) | entries)
    for reader in (check_folder, load_model):
        with pytest.raises(ModelError, match=f"quantized in another format: {told};.*Start from the model before"):
            reader(source)


@pytest.mark.parametrize(
    ("suffix", "told"), [("weight_packed", "compressed-tensors"), ("qweight", "gptq or awq"), ("weight.absmax", "bits")]
)
def test_a_format_that_the_config_does_not_tell_of_is_named_by_its_tensors(
    suffix: str, told: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    path = source / "model.safetensors"
    tensors = {name.replace("weight", suffix) if "proj" in name else name: t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"another format: {told}.*, which config.json does not tell of"):
        check_folder(source)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model-Q4_K_M.gguf", r"only GGUF \(model-Q4_K_M.gguf\).*safetensors of the original model"),
        ("adapter_model.safetensors", "only a PEFT adapter.*merge_and_unload"),
        ("consolidated.00.safetensors", "only Mistral's own layout"),
        ("model.onnx", "only ONNX"),
    ],
)
def test_weights_of_another_kind_are_named(name: str, told: str, config: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    (source / "model.safetensors").rename(source / name)
    if not config:
        (source / "config.json").unlink()
    with pytest.raises(ModelError, match=told):
        check_folder(source)


def test_a_gguf_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model.gguf: a file; expected a folder"):
        load_model(tmp_path / "model.gguf")


def test_what_is_ours_or_plain_has_no_other_name(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    codes = rounded(source, tmp_path / "codes")
    (source / "quantize_config.json").write_text("{}")  # left over: the weights are plain and whole
    for folder in (source, codes):
        check_folder(folder)
    assert format_of(read_config(source)) is None
    assert format_of(read_config(codes)) == "gptq"
