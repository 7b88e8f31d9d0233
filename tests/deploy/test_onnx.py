"""The exported graph against torch: three architectures, tied and not, plain and codes, heads that need padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import EdgestillError, ModelError, ParityError
from compress.model.checkpoint import TorchRuntime, load_model
from deploy.export import parity
from deploy.export.onnx import OnnxOptions, OnnxReport, write_onnx
from deploy.export.tokenizer import write_tokenizer
from deploy.runners import GenaiRunner
from tests.deploy.tools import changed_config, rounded, shuffled
from tests.tiny import tiny_checkpoint, tiny_token_rows

PROMPTS = [list(row.ids) for row in tiny_token_rows(4, tokens=(1, 2, 9, 25))]
EXACT = 2e-6  # of the largest logit: fp32 sums in another order, a few units in the last place


def exported(source: Path, out: Path, **options: Any) -> OnnxReport:
    """Write model, config and tokenizer into ``out``."""
    out.mkdir()
    report = write_onnx(source, out, options=OnnxOptions(**{"accuracy_level": 1, **options}))
    write_tokenizer(source, out)
    return report


def assert_same(source: Path, out: Path) -> None:
    """Logits of prompt and decode, and greedy answers, are torch's."""
    found = parity.difference(out, PROMPTS, parity.torch_logits(source, PROMPTS), threads=1)
    assert found.relative < EXACT
    assert found.top1 == 1.0
    torch_answers = TorchRuntime(load_model(source)).generate(PROMPTS, 12, {4})
    assert GenaiRunner(out, threads=1, verify=False).generate(PROMPTS, 12, {4}) == torch_answers


SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"tied": True}, {}),
    ("llama", {"tied": False}, {"bits": 4, "sym": False, "embedding_bits": 4, "lm_head_bits": 8}),
    ("qwen2", {"tied": True}, {"bits": 4, "embedding_bits": 4}),
    ("qwen2", {"tied": False}, {}),
    ("qwen3", {"tied": True}, {"bits": 4, "group_size": 16}),
    ("qwen3", {"tied": False}, {"bits": 8, "sym": False, "embedding_bits": 16}),
    ("llama", {"hidden": 32, "head_dim": 8, "ffn": 44}, {"bits": 4}),  # the shape of stories260k: both are padded
    ("qwen2", {"hidden": 48, "head_dim": 24, "ffn": 48, "heads": 2, "kv_heads": 1}, {"bits": 4, "group_size": 16}),
    ("qwen3", {"head_dim": 8, "heads": 8, "kv_heads": 2, "hidden": 64}, {}),
]


@pytest.mark.parametrize(("arch", "shape", "rounding"), SHAPES)
def test_the_graph_computes_what_torch_computes(
    tmp_path: Path, arch: str, shape: dict[str, Any], rounding: dict[str, Any]
) -> None:
    source = tiny_checkpoint(tmp_path / "plain", arch, **({"hidden": 64, "head_dim": 16} | shape))
    if rounding:
        source = rounded(source, tmp_path / "codes", **rounding)
    report = exported(source, tmp_path / "onnx")
    assert_same(source, tmp_path / "onnx")
    tied = shape.get("tied", True)
    plain_embedding = not rounding or rounding.get("embedding_bits", 8) == 16
    linears = report.nodes["MatMulNBits"] + report.nodes["MatMul"] + report.nodes["FusedMatMul"]
    assert linears == 2 * 5 + 1  # qkv, o, gate, up, down of two layers, and the head
    assert report.nodes["MatMulNBits"] == (0 if not rounding else 10 if plain_embedding else 11)
    assert report.nodes["GatherBlockQuantized"] == (0 if plain_embedding else 1)
    assert report.nodes["FusedMatMul"] == (1 if tied and plain_embedding else 0)
    padded = [note for note in report.notes if "zero-padded" in note]
    assert bool(padded) == (shape.get("head_dim", 16) % 16 != 0)
    assert all("no kernel" in note for note in report.notes if note not in padded)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("head_dim", [16, 8])
def test_codes_in_activation_order_are_exact(tmp_path: Path, apart: bool, head_dim: int) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", hidden=64, heads=4, kv_heads=2, head_dim=head_dim)
    source = shuffled(rounded(plain, tmp_path / "codes", bits=4), tmp_path / "shuffled", apart=apart)
    report = exported(source, tmp_path / "onnx")
    assert_same(source, tmp_path / "onnx")
    assert report.nodes["MatMulNBits"] == 2 * (7 if apart else 5) + 1


@pytest.mark.parametrize("rounding", [{"bits": 2}, {"bits": 3}, {"bits": 4, "group_size": -1}])
def test_other_widths_and_whole_row_groups_are_exact(plain: Path, tmp_path: Path, rounding: dict[str, Any]) -> None:
    source = rounded(plain, tmp_path / "codes", **rounding)
    exported(source, tmp_path / "onnx")
    assert_same(source, tmp_path / "onnx")


MIXED = [
    {"overrides": [{"pattern": "*.down_proj", "bits": 8}, {"pattern": "model.layers.1.*", "bits": 2}]},
    {"overrides": [{"pattern": "*.v_proj", "bits": 8, "group_size": 16}], "ignore": ["model.layers.1.mlp.*"]},
]


@pytest.mark.parametrize("mixed", MIXED)
def test_linears_of_different_bits_are_exact(plain: Path, tmp_path: Path, mixed: dict[str, Any]) -> None:
    source = rounded(plain, tmp_path / "codes", **mixed)
    exported(source, tmp_path / "onnx")
    assert_same(source, tmp_path / "onnx")


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_scaled_rotary_embeddings_are_torchs(plain: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in plain.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    scaled = {"rope_theta": 50_000.0, "original_max_position_embeddings": 64, **rope}
    changed_config(source, rope_parameters=scaled)
    exported(source, tmp_path / "onnx")
    assert_same(source, tmp_path / "onnx")


def test_the_runtime_reads_the_tokenizer_as_we_do(bundle: Path) -> None:
    import onnxruntime_genai as og

    from compress.encoding import load_tokenizer

    theirs, ours = og.Tokenizer(og.Model(str(bundle))), load_tokenizer(bundle)
    for text in ("dim the kitchen lights to 30", "  set   a timer\nfor 5 minutes!", "Grüße, 東京"):
        assert list(theirs.encode(text)) == ours(text, add_special_tokens=False)["input_ids"]


def test_int8_activations_cost_little_and_say_so(quantized: Path, tmp_path: Path) -> None:
    exported(quantized, tmp_path / "onnx", accuracy_level=4)
    found = parity.check(tmp_path / "onnx", quantized, PROMPTS, tolerance=EXACT, max_kl=0.05, threads=1, work=tmp_path)
    assert found.exact.relative < EXACT < found.shipped.relative < 0.1
    assert found.exact.kl < found.shipped.kl


def test_the_context_is_cut_where_asked(quantized: Path, tmp_path: Path) -> None:
    report = exported(quantized, tmp_path / "onnx", context_tokens=32)
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text(encoding="utf-8"))
    assert report.context_tokens == config["model"]["context_length"] == config["search"]["max_length"] == 32
    assert config["search"]["do_sample"] is False
    assert config["model"]["eos_token_id"] == 4
    answers = GenaiRunner(tmp_path / "onnx", threads=1, verify=False).generate(PROMPTS, 100, set())
    assert [len(prompt) + len(answer) for prompt, answer in zip(PROMPTS, answers, strict=True)] == [32] * 4


def test_a_wrong_weight_is_noticed(quantized: Path, plain: Path, tmp_path: Path) -> None:
    exported(plain, tmp_path / "onnx")  # the unrounded model is not the rounded one
    with pytest.raises(ParityError, match=r"model.onnx: its logits differ from torch's by .* \(parity_tolerance\)"):
        parity.check(tmp_path / "onnx", quantized, PROMPTS, tolerance=1e-3, max_kl=9.0, threads=1, work=tmp_path)


def test_gptq_v2_is_refused(quantized: Path, tmp_path: Path) -> None:
    source = _copy(quantized, tmp_path / "model")
    changed_config(source, quantization_config={"checkpoint_format": "gptq_v2"})
    with pytest.raises(ModelError, match=r"checkpoint_format 'gptq_v2'.*gives garbage"):
        exported(source, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["LamaForCausalLM"]}, "architecture LamaForCausalLM; expected one of LlamaForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel; expected one of LlamaForCausalLM, Qw"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; expected silu"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention; expected full attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embedding of type 'dynamic'"),
    ],
)
def test_what_the_graph_would_leave_out_is_refused(
    plain: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    source = changed_config(_copy(plain, tmp_path / "model"), **values)
    with pytest.raises(ModelError, match=message) as caught:
        exported(source, tmp_path / "onnx")
    assert caught.value.exit_code == 2


def test_a_missing_folder_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing/config.json: no such file"):
        exported(tmp_path / "nobody" / "nothing", tmp_path / "onnx")


def test_a_tensor_without_a_place_is_an_error(plain: Path, tmp_path: Path) -> None:
    source = _copy(plain, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.gate.weight"] = torch.zeros(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgestillError, match=r"no place for model.layers.0.self_attn.gate.weight"):
        exported(source, tmp_path / "onnx")


def test_codes_that_are_not_the_embeddings_are_refused(quantized: Path, tmp_path: Path) -> None:
    source = _copy(quantized, tmp_path / "model")
    path = source / "edgestill_embedding.safetensors"
    tensors = load_file(path)
    tensors["embedding.codes"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the codes of model.embed_tokens are not those of its weights"):
        exported(source, tmp_path / "onnx")


def _copy(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


WIDTHS: list[tuple[int, dict[str, Any]]] = [
    (320, {"hidden": 320, "heads": 5, "kv_heads": 1, "head_dim": 64}),  # also the queries' width
    (288, {"hidden": 288, "heads": 6, "kv_heads": 2, "head_dim": 48, "ffn": 64}),
    (320, {"hidden": 64, "head_dim": 16, "ffn": 320}),
    (320, {"hidden": 80, "heads": 20, "kv_heads": 20, "head_dim": 16}),  # keys and values
    (512, {"hidden": 64, "heads": 64, "kv_heads": 32, "head_dim": 8}),  # keys and values once they are padded
    (289, {"hidden": 288, "heads": 6, "kv_heads": 3, "head_dim": 48}),
]


@pytest.mark.parametrize("last_logits", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("vocab", "shape"), WIDTHS)
def test_a_vocabulary_as_large_as_a_width_is_no_matter(
    tmp_path: Path, vocab: int, shape: dict[str, Any], tied: bool, last_logits: bool
) -> None:
    source = tiny_checkpoint(tmp_path / "plain", vocab=vocab, tied=tied, layers=1, **shape)
    exported(source, tmp_path / "onnx", last_logits=last_logits)
    prompts = [[token % vocab for token in ids] for ids in PROMPTS]
    found = parity.difference(tmp_path / "onnx", prompts, parity.torch_logits(source, prompts), threads=1)
    assert found.relative < EXACT
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["model"]["vocab_size"] == vocab
