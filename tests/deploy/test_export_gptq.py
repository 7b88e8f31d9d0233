"""The GPTQ export: the same codes, proven again after writing, and read by the onnxruntime-genai builder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.context import StageContext
from compress.errors import ModelError, ParityError
from compress.model.checkpoint import load_model, read_config, write_json
from compress.model.quantization import packing
from compress.model.quantization.gptq_stage import round_to_nearest
from compress.model.quantization.params import RtnParams
from compress.progress import Progress
from deploy.export.gptq import export_gptq, read_codes, verify
from deploy.export.tensors import rotary
from tests.tiny import tiny_checkpoint

WIDE: dict[str, Any] = {"hidden": 64, "heads": 4, "head_dim": 16, "ffn": 96}  # the runtime takes heads of 16 and more


def quantized(
    root: Path, arch: str = "llama", *, tied: bool = True, shape: dict[str, Any] | None = None, **params: Any
) -> Path:
    source = tiny_checkpoint(root / "model", arch, tied=tied, **(shape or {}))
    for name in ("quantized", "work"):
        (root / name).mkdir()
    ctx = StageContext(
        name="model.quantization.rtn",
        inputs={"model": source},
        out=root / "quantized",
        work=root / "work",
        seed=0,
        progress=Progress(quiet=True),
        threads=1,
    )
    round_to_nearest(RtnParams(**({"clip_steps": 3} | params)), ctx)
    return ctx.out


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False), (8, False)])
def test_the_export_holds_the_codes_and_only_common_files(bits: int, sym: bool, tmp_path: Path) -> None:
    source = quantized(tmp_path, bits=bits, sym=sym)
    figures = export_gptq(source, tmp_path / "out", facts={"licence": "MIT", "exact match": "97|1 %"})
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert not any(name.startswith("edgestill") for name in names)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert figures["matrices"] == 14
    assert figures["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    for (name, ours), (other, theirs) in zip(read_codes(source), read_codes(out), strict=True):
        assert name == other
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    card = (out / "README.md").read_text()
    assert "- transformers 5.23 with GPTQModel" in card
    assert ("refuses asymmetric codes" in card) != sym, "a card says no more than tests/interop shows"
    assert ("in fp32 on a CPU, leaves their zero points out" in card) != sym
    assert "AutoGPTQ" not in card, "which leaves a tied embedding out"
    assert "| exact match | 97\\|1 % |" in card
    assert f"{4 if bits == 3 else bits} bits, groups of 32 inputs, {'symmetric' if sym else 'asymmetric'}" in card
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert json.loads((out / "quantize_config.json").read_text()) == settings
    assert "damp_percent" not in settings, "rounding has none, and 0 is refused by GPTQModel and transformers"
    again = export_gptq(source, tmp_path / "again", facts={"exact match": "97|1 %", "licence": "MIT"})
    assert again == figures
    assert all((tmp_path / "again" / name).read_bytes() == (out / name).read_bytes() for name in names)


@pytest.mark.parametrize("scaled", [False, True])
def test_older_readers_find_the_rotary_base(scaled: bool, tmp_path: Path) -> None:
    source = quantized(tmp_path)
    config = read_config(source)
    rope = {"rope_type": "linear", "factor": 2.0} if scaled else {"rope_type": "default"}
    write_json(source / "config.json", config | {"rope_parameters": rope | {"rope_theta": 50_000.0}})
    export_gptq(source, tmp_path / "out")
    written = read_config(tmp_path / "out")
    assert written["rope_theta"] == 50_000, "where transformers 4 looks"
    assert written.get("rope_scaling") == (rope if scaled else None)
    for ours, theirs in zip(rotary(read_config(source)), rotary(written), strict=True):
        assert np.array_equal(ours, theirs)
    assert rotary(written)[0][1] < rotary(config)[0][1], "the base does count"


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_changed_code_is_found(suffix: str, tmp_path: Path) -> None:
    source = quantized(tmp_path)
    export_gptq(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    tensors[name][0, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ParityError, match=r"layers\.1\.mlp\.up_proj does not hold the codes of its source"):
        verify(source, tmp_path / "out")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    with pytest.raises(ModelError, match=r"plain weights.*Quantize it first"):
        export_gptq(tmp_path / "model", tmp_path / "out")
    config = read_config(source)
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    write_json(source / "config.json", config)
    with pytest.raises(ModelError, match="gptq_v2"):
        export_gptq(source, tmp_path / "out")
    with pytest.raises(ModelError, match="gptq_v2"):  # nor opened as if it were ours
        load_model(source)


def build(folder: Path, out: Path, cache: Path) -> Any:
    """Run the runtime's own model builder in a process of its own and open what it wrote."""
    command = [sys.executable, "-W", "ignore", "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(folder), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(cache), "--extra_options"]
    options = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul", "shared_embeddings=false"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(out / "model.onnx", settings, providers=["CPUExecutionProvider"])


def logits(session: Any, ids: list[int]) -> Any:
    feeds = {}
    for slot in session.get_inputs():
        if slot.name == "input_ids":
            feeds[slot.name] = np.array([ids], dtype=np.int64)
        elif slot.name == "attention_mask":
            feeds[slot.name] = np.ones((1, len(ids)), dtype=np.int64)
        elif slot.name == "position_ids":
            feeds[slot.name] = np.arange(len(ids), dtype=np.int64)[None]
        else:  # past keys and values, empty
            feeds[slot.name] = np.zeros((1, 2, 0, WIDE["head_dim"]), dtype=np.float32)
    return session.run(["logits"], feeds)[0][0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arch", "tied", "params"),
    [
        ("llama", True, {"bits": 4, "group_size": 32}),
        pytest.param("qwen2", False, {"bits": 8, "group_size": 16, "sym": False}, marks=pytest.mark.slow),
        pytest.param("qwen3", True, {"bits": 2, "group_size": 32, "sym": False}, marks=pytest.mark.slow),
        pytest.param("llama", False, {"bits": 3, "group_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_the_runtimes_own_builder_reads_the_same_weights(
    arch: str, tied: bool, params: dict[str, Any], tmp_path: Path
) -> None:
    source = quantized(tmp_path, arch, tied=tied, shape=WIDE, **params)
    export_gptq(source, tmp_path / "out")
    session = build(tmp_path / "out", tmp_path / "onnx", tmp_path / "cache")
    ids = [1, 2, 77, 200, 31, 8, 150, 3]
    with torch.no_grad():
        expected = load_model(source)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits(session, ids) - expected).max() < 4e-4
    # the negative control: zero points read one off, as a "gptq_v2" reader would, are far away
    tensors = load_file(source / "model.safetensors")
    model = load_model(source)
    for name, weight in model.named_parameters():
        prefix = name.removesuffix(".weight")
        if f"{prefix}.qweight" in tensors:
            layer = packing.read_layer(tensors, prefix)
            weight.data = packing.dequantize(*layer._replace(zero_points=layer.zero_points - 1))
    with torch.no_grad():
        wrong = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(wrong - expected).max() > 0.1
