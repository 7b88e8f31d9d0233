"""AWQ, rotation and NF3 as stages: the folders they write, what they equal, what they gain, kills, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.context import StageResult
from compress.errors import ModelError
from compress.model.checkpoint import check_folder, load_model, read_config
from compress.model.layers import decoder_layers, linears
from compress.model.quantization import awq_stage, gptq_stage
from compress.model.quantization.hessians import second_moment, size_and_moment
from compress.model.quantization.packing import read_layer
from compress.model.quantization.params import AwqParams, GptqParams, RtnParams
from compress.model.quantization.rtn import NF3
from tests.model.quantization.test_stage import QUICK, context
from tests.tiny import ARCHITECTURES, tiny_checkpoint

FAST: dict[str, Any] = {"grid_points": 8, "calibration_tokens": 1500, "calibration_draws": 1, "clip_steps": 6}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from compress.model.quantization import awq_stage, rotation, writing
from tests.model.quantization.test_awq_stage import AwqParams, FAST, context
save, seen, last = writing.save_tensors, [], int(sys.argv[3])
def save_then_die(tensors, path, **rest):
    if len(seen) == last:
        path.with_name(f".{path.name}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(path)
    save(tensors, path, **rest)
writing.save_tensors = rotation.save_tensors = save_then_die
awq_stage.quantize(AwqParams(**FAST, rotate="full"), context(Path(sys.argv[1]), Path(sys.argv[2]), out="killed"))
"""


def awq(root: Path, model: Path, out: str = "out", **params: Any) -> StageResult:
    return awq_stage.quantize(AwqParams(**(FAST | params)), context(root, model, out=out))


def rtn(root: Path, model: Path, out: str = "rtn", **params: Any) -> StageResult:
    return gptq_stage.round_to_nearest(RtnParams(**params), context(root, model, out=out))


def outliers(folder: Path, arch: str = "llama", *, seed: int = 0, **shape: Any) -> Path:
    """A checkpoint in which the norms let a few inputs through far larger than the rest."""
    source = tiny_checkpoint(folder, arch, seed=seed, **shape)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[[3, 9]] *= 12
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(5, 320, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = load_model(folder)(ids).logits
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_scales_and_clip_it_is_rounding_bit_for_bit(arch: str, bits: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, tied=False, ffn=44)
    awq(tmp_path, source, grid_points=1, clip_steps=0, bits=bits, correction_damp=None)
    rtn(tmp_path, source, clip_steps=0, bits=bits)
    for name in ("model.safetensors", "edgestill_embedding.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "rtn" / name).read_bytes()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_folder_opens_and_large_inputs_gain(arch: str, rounding: str, tmp_path: Path) -> None:
    source = outliers(tmp_path / "model", arch, ffn=44)
    result = awq(tmp_path, source, rounding=rounding, keep_groups=False)
    check_folder(tmp_path / "out")
    settings = read_config(tmp_path / "out")["quantization_config"]
    assert settings["desc_act"] == (rounding == "gptq")  # nearest leaves the inputs in their order
    reports = {report["linear"]: report for report in result.metrics["layers"]}
    assert all(report["scaled_error"] <= 1 for report in reports.values())
    assert reports["model.layers.0.self_attn.q_proj"]["alpha"] > 0
    assert reports["model.layers.1.mlp.up_proj"]["scaled_error"] < 0.9
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    gain = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before[gain], after[gain])
    name = "model.layers.0.self_attn.v_proj.bias"
    if arch == "qwen2" and reports["model.layers.0.self_attn.o_proj"]["alpha"]:
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_less_divergence_than_rounding_where_inputs_are_large(bits: int, seed: int, tmp_path: Path) -> None:
    source = outliers(tmp_path / "model", seed=seed)
    same = {"embedding_bits": 16, "bits": bits}
    results = {
        "awq": awq(tmp_path, source, **same),
        "none": awq(tmp_path, source, out="none", grid_points=1, clip_steps=0, **same),
    }
    kl = {name: result.metrics["kl"] for name, result in results.items()}
    assert kl["awq"] < 0.92 * kl["none"]  # measured: 0.57 to 0.87


def test_q_and_k_may_keep_their_full_range(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    folders = [tmp_path / name for name in ("clipped", "spared", "none")]
    options: list[dict[str, Any]] = [{}, {"clip_attention": False}, {"clip_steps": 0}]
    for folder, values in zip(folders, options, strict=True):
        awq(tmp_path, source, out=folder.name, grid_points=1, bits=2, **values)
    clipped, spared, none = (load_file(folder / "model.safetensors") for folder in folders)
    for name in ("q_proj", "k_proj"):
        path = f"model.layers.0.self_attn.{name}.scales"
        assert torch.equal(spared[path], none[path])
        assert not torch.equal(clipped[path], none[path])
    path = "model.layers.0.self_attn.v_proj.scales"
    assert torch.equal(spared[path], clipped[path])


def test_other_bits_and_linears_left_alone(tmp_path: Path) -> None:
    source = outliers(tmp_path / "model")
    overrides = [{"pattern": "*.down_proj", "bits": 8}, {"pattern": "model.layers.1.*", "bits": 3}]
    result = awq(tmp_path, source, overrides=overrides, ignore=["*.0.self_attn.*_proj", "*.1.*.v_proj"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    named = {report["linear"] for report in result.metrics["layers"]}
    assert "model.layers.1.self_attn.v_proj" not in named
    assert "model.layers.1.self_attn.k_proj" in named
    change = (logits(tmp_path / "out") - logits(source)).norm() / logits(source).norm()
    assert float(change) < 0.5


@pytest.mark.parametrize("last", [2, 6])  # in the middle of the rotation, of the layers
def test_a_kill_in_the_middle_changes_nothing(last: int, tmp_path: Path) -> None:
    source = outliers(tmp_path / "model", layers=3)
    whole = awq(tmp_path, source, out="whole", rotate="full")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(source), str(last)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    assert not any((tmp_path / "killed").iterdir())
    done = sorted((tmp_path / "killed-work").rglob("*-000*.safetensors"))
    assert len(done) == last
    stamps = [path.stat().st_mtime_ns for path in done]
    resumed = awq(tmp_path, source, out="killed", rotate="full")
    assert [path.stat().st_mtime_ns for path in done] == stamps
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert (resumed.metrics, resumed.notes) == (whole.metrics, whole.notes)


def gptq(root: Path, model: Path, **params: Any) -> StageResult:
    return gptq_stage.quantize(GptqParams(**(QUICK | {"calibration_draws": 1} | params)), context(root, model))


def plain(root: Path, model: Path, **params: Any) -> StageResult:
    return rtn(root, model, out="out", **params)


@pytest.mark.parametrize("stage", [plain, gptq, awq])
@pytest.mark.parametrize("rotate", ["none", "heads", "full"])
def test_every_quantizer_takes_a_rotated_model(stage: Callable[..., StageResult], rotate: str, tmp_path: Path) -> None:
    source = outliers(tmp_path / "model", "qwen2")
    result = stage(tmp_path, source, bits=8, rotate=rotate, embedding_bits=16)
    assert (tmp_path / "out-work" / "rotated").is_dir() == (rotate != "none")
    out = tmp_path / "out"
    check_folder(out)
    assert float((logits(out) - logits(source)).norm() / logits(source).norm()) < 0.03
    assert read_config(out)["tie_word_embeddings"] == (rotate != "full")
    said = [note for note in result.notes if note.startswith("rotated")]
    assert len(said) == (rotate != "none")
    if rotate == "full":
        assert f"{320 * 32:,} weights more, {320 * 32 * 2:,} bytes at 16 bits" in said[0]
        for layer in decoder_layers(load_model(out)):
            norm = layer.get_submodule("input_layernorm").weight
            assert torch.allclose(norm, torch.ones(32)) or stage is awq


def test_an_untied_head_may_have_bits_of_its_own(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    result = rtn(tmp_path, source, rotate="full", embedding_bits=8, lm_head_bits=4)
    assert (result.metrics["embedding_bits"], result.metrics["lm_head_bits"]) == (8, 4)
    with pytest.raises(ModelError, match=r"lm_head_bits.*tie_word_embeddings"):
        rtn(tmp_path, source, out="heads", rotate="heads", embedding_bits=8, lm_head_bits=4)


@pytest.mark.parametrize("stage", [plain, gptq, awq])
def test_nf3_of_every_quantizer_uses_its_eight_levels(stage: Callable[..., StageResult], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    overrides = [{"pattern": "*.down_proj", "bits": 4}]
    result = stage(tmp_path, source, bits=3, grid="nf3", overrides=overrides)
    assert any("8 of the 16 levels" in note for note in result.notes)
    assert result.metrics["bits_per_weight"] == pytest.approx(4.5)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for index, layer in enumerate(decoder_layers(load_model(tmp_path / "out"))):
        for name in linears(layer):
            prefix = f"model.layers.{index}.{'mlp' if name in {'gate_proj', 'up_proj', 'down_proj'} else 'self_attn'}"
            found = read_layer(tensors, f"{prefix}.{name}", bits=4)
            offsets = set((found.codes.int() - 8).unique().tolist())
            assert offsets <= set(NF3) if name != "down_proj" else len(offsets) > 8
            assert set(found.zero_points.unique().tolist()) == {8}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"bits": 4, "grid": "nf3"}, "NF3 is a 3-bit grid"),
        ({"bits": 3, "grid": "nf3", "sym": False}, "nf3 beside sym false"),
    ],
)
def test_where_nf3_makes_no_sense_it_is_refused(params: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        rtn(tmp_path, tiny_checkpoint(tmp_path / "model"), **params)


def test_size_and_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 3, generator=generator) for _ in range(2)]
    weights = [torch.rand(2, 5, generator=generator) for _ in range(2)]
    weights[0][1, 3:] = 0
    size, moment = size_and_moment(iter(batches), weights)
    flat, counts = (torch.cat([part.reshape(10, -1) for part in parts]).double() for parts in (batches, weights))
    assert torch.allclose(size, (flat.abs() * counts).sum(0) / counts.sum(), atol=1e-6)
    assert torch.equal(moment, second_moment(batches, weights))
