"""The GGUF export: read back with the package gguf, every weight is the checkpoint's, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import MissingExtraError, ModelError, ParityError
from compress.model.checkpoint import load_model, read_config
from deploy.archive import pack, unpack
from deploy.bundle import GGUF_FOLDER, GPTQ_FOLDER, open_bundle
from deploy.export import gguf_blocks, gguf_tokenizer
from deploy.export.codes import Coded
from deploy.export.gguf import export_gguf, verify
from deploy.export.stage import export
from deploy.export.tensors import Matrix
from deploy.params import ExportParams
from tests.deploy.tools import changed_config, context, rounded, shuffled
from tests.tiny import CHAT_TEMPLATE, SPECIAL, tiny_checkpoint, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'edgestill[gguf]'")

REACH = "codes lie further from their zero point than int8 reaches (sym: true keeps within it)"
SHAPE: dict[str, Any] = {"hidden": 128, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 256, "layers": 1}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def their_name(name: str) -> str:
    """The name in a GGUF file of a parameter of transformers."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def unturned(value: Any, size: int) -> Any:
    """Rows of q or k of a Llama as transformers has them: halves of a head, not neighbours, turn together."""
    return value.reshape(-1, size // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Values and types of all tensors, and the key-value pairs."""
    reader = gguf.GGUFReader(path)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return values, types, {name: field.contents() for name, field in reader.fields.items()}


def check_values(source: Path, path: Path) -> dict[str, str]:
    """Compare every parameter of ``source`` with the file, bit for bit; return the types of the tensors."""
    values, types, _ = read_back(path)
    config = read_config(source)
    model = load_model(source)
    for name, parameter in model.named_parameters():
        found = values.pop(their_name(name))
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            found = unturned(found, config["head_dim"])
        assert found.dtype == np.float32, name
        assert np.array_equal(found, parameter.detach().numpy()), name
    assert not values, "tensors of no parameter"
    return types


@pytest.mark.parametrize(
    ("arch", "tied", "params", "kind"),
    [
        ("llama", True, {"bits": 4, "group_size": 32}, "Q4_0"),
        ("qwen2", False, {"bits": 4, "group_size": 128}, "Q4_0"),
        ("qwen3", True, {"bits": 3, "group_size": 64}, "Q4_0"),
        ("llama", False, {"bits": 3, "group_size": 32, "sym": False}, "Q4_0"),
        ("qwen3", False, {"bits": 2, "group_size": 32, "sym": False}, "Q4_0"),
        ("llama", False, {"bits": 2, "group_size": -1}, "Q4_0"),
        ("qwen2", True, {"bits": 4, "group_size": 32, "sym": False}, "Q5_0"),
        ("llama", True, {"bits": 8, "group_size": 32}, "Q8_0"),
        ("qwen2", True, {"bits": 4, "group_size": 16}, "F32"),
    ],
)
def test_the_codes_are_kept_exactly(arch: str, tied: bool, params: dict[str, Any], kind: str, tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", arch, tied=tied, **SHAPE)
    source = rounded(plain, tmp_path / "q", clip_steps=0, **params)
    told = export_gguf(source, tmp_path / "out")
    types = check_values(source, tmp_path / "out" / "model.gguf")
    linears = {types[f"blk.0.{name}.weight"] for name in NAMES.values() if "norm" not in name}
    assert linears == {kind}
    fits = params.get("sym", True) and params["group_size"] != 16  # 8 bits with a free zero point have no type
    assert types["token_embd.weight"] == ("Q8_0" if fits else "F16")
    assert ("output.weight" in types) != tied
    assert told["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    assert sum(told["weights"].values()) == sum(p.numel() for p in load_model(source).parameters() if p.ndim == 2)
    assert sum("holds as floats" in note for note in told["notes"]) == (not fits)
    again = export_gguf(source, tmp_path / "again")
    assert again == told
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()


def test_inputs_in_another_order_become_floats_and_it_is_said(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", **SHAPE)
    source = shuffled(rounded(plain, tmp_path / "q", group_size=32, clip_steps=0), tmp_path / "s")
    told = export_gguf(source, tmp_path / "out")
    types = check_values(source, tmp_path / "out" / "model.gguf")
    assert types["blk.0.ffn_down.weight"] == "F32"
    assert types["token_embd.weight"] == "Q8_0"
    assert told["notes"] == [
        "quantized matrices that the GGUF file holds as floats of the same values: 7 (blk.0.attn_q.weight ...): "
        "32 weights side by side lie in several groups (a smaller group_size, or act_order)"
    ]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_plain_weights_keep_their_precision(dtype: str, kind: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "plain", "qwen2", **SHAPE)
    model = load_model(source, dtype=getattr(torch, dtype))
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e-3 if dtype == "float16" else 1e-9  # too small for fp16
    model.save_pretrained(source)
    export_gguf(source, tmp_path / "out")
    types = check_values(source, tmp_path / "out" / "model.gguf")
    assert types["token_embd.weight"] == kind
    assert types["output_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"


def coded(codes: Any, zeros: Any, scales: Any, bits: int = 4) -> Coded:
    grid = np.asarray(codes, np.uint8)
    groups = np.arange(grid.shape[1]) // 32
    return Coded(grid, np.asarray(scales, np.float32), np.asarray(zeros, np.uint8), groups, bits)


def test_blocks_have_the_published_bytes() -> None:
    codes = [[*range(16), *range(15, -1, -1)]]
    half = np.float16(0.5).tobytes()
    low_high = bytes(low | (15 - low) << 4 for low in range(16))
    stored = gguf_blocks.encode(Matrix(coded=coded(codes, [[8]], [[0.5]])))
    assert (stored.kind, stored.data.tobytes()) == ("Q4_0", half + low_high)
    stored = gguf_blocks.encode(Matrix(coded=coded(codes, [[4]], [[0.5]])))
    assert (stored.kind, stored.data.tobytes()) == ("Q4_1", half + np.float16(-2).tobytes() + low_high)
    rough = float(np.float16(0.1))  # times 13 no fp16 number
    stored = gguf_blocks.encode(Matrix(coded=coded(codes, [[13]], [[rough]])))
    steps = [code - 13 + 16 for code in codes[0]]
    fifth = sum((step >> 4) << place for place, step in enumerate(steps)).to_bytes(4, "little")
    nibbles = bytes(steps[place] & 15 | (steps[place + 16] & 15) << 4 for place in range(16))
    assert (stored.kind, stored.data.tobytes()) == ("Q5_0", np.float16(rough).tobytes() + fifth + nibbles)
    stored = gguf_blocks.encode(Matrix(coded=coded([range(0, 256, 8)], [[128]], [[0.5]], 8)))
    assert (stored.kind, stored.data.tobytes()) == ("Q8_0", half + np.arange(-128, 128, 8, dtype=np.int8).tobytes())
    stored = gguf_blocks.encode(Matrix(coded=coded([range(0, 256, 8)], [[1]], [[0.5]], 8)))
    assert (stored.kind, stored.reason) == ("F16", REACH)
    stored = gguf_blocks.encode(Matrix(coded=coded(codes, [[8]], [[1 / 3]])))
    assert (stored.kind, stored.reason) == ("F32", "its scales are no fp16 numbers")
    stored = gguf_blocks.encode(Matrix(coded=coded([[1] * 33], [[8, 8]], [[1, 1]])))
    assert (stored.kind, stored.reason) == ("F16", "rows of 33 weights are no multiple of 32")


@given(seed=st.integers(0, 10_000), top=st.sampled_from([3, 7, 15, 255]), middle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_is_stored_reads_back_as_it_was(seed: int, top: int, middle: bool) -> None:
    draw = np.random.default_rng(seed)
    zeros = np.full((5, 3), (top + 1) // 2) if middle else draw.integers(0, top + 1, (5, 3))
    scales = draw.normal(size=(5, 3)).astype(np.float16)
    matrix = Matrix(coded=coded(draw.integers(0, top + 1, (5, 96)), zeros, scales, 8 if top > 15 else 4))
    stored = gguf_blocks.encode(matrix)
    found = gguf.quants.dequantize(stored.data, gguf.GGMLQuantizationType[stored.kind])
    assert np.array_equal(found, matrix.plain())
    assert bool(stored.reason) == stored.kind.endswith(("F16", "F32"))


def test_the_file_says_what_the_model_and_its_tokenizer_are(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "plain", "llama", vocab=340, **SHAPE)
    tiny_tokenizer(source, vocab=320)
    changed_config(source, rope_parameters={"rope_type": "default", "rope_theta": 25_000.0}, rms_norm_eps=3e-5)
    path = source / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"].append(dict(data["added_tokens"][-1], id=339, content="<|tool|>", special=False))
    path.write_text(json.dumps(data), encoding="utf-8")
    export_gguf(source, tmp_path / "out", licence="Apache-2.0")
    told = read_back(tmp_path / "out" / "model.gguf")[2]
    wanted = {
        "general.architecture": "llama", "general.license": "Apache-2.0", "general.file_type": 0,
        "llama.vocab_size": 340, "llama.context_length": 256, "llama.embedding_length": 128, "llama.block_count": 1,
        "llama.feed_forward_length": 256, "llama.attention.head_count": 8, "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 25_000.0, "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-5),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    assert {name: told.get(name) for name in wanted} == wanted
    tokens, types = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    vocab = data["model"]["vocab"]
    assert tokens[: len(vocab)] == sorted(vocab, key=vocab.get)
    assert types[: len(SPECIAL)] == [gguf.TokenType.CONTROL] * len(SPECIAL)
    assert (tokens[339], types[339]) == ("<|tool|>", gguf.TokenType.USER_DEFINED)
    assert len(tokens) == len(types) == len(set(tokens)) == 340
    assert set(types[len(vocab) : 339]) <= {gguf.TokenType.UNUSED}
    assert [tuple(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]] == [
        tuple(pair) for pair in data["model"]["merges"]
    ]


def test_rotary_scaling_is_said_or_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "plain", "llama", **SHAPE)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 10_000.0}
    changed_config(source, rope_parameters=rope)
    export_gguf(source, tmp_path / "llama3")
    factors = read_back(tmp_path / "llama3" / "model.gguf")[0]["rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)  # the slowest turns are stretched by the whole factor
    assert 1 < factors[3] < 8
    changed_config(source, rope_parameters=rope | {"rope_type": "linear"})
    export_gguf(source, tmp_path / "linear")
    told = read_back(tmp_path / "linear" / "model.gguf")[2]
    assert (told["llama.rope.scaling.type"], told["llama.rope.scaling.factor"]) == ("linear", 8)
    changed_config(source, rope_parameters=rope | {"rope_type": "yarn", "beta_fast": 16})
    with pytest.raises(ModelError, match="yarn with beta_fast"):
        export_gguf(source, tmp_path / "yarn")


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json as llama2's: byte fallback, blanks as U+2581."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    merges = [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "merges": merges}
    model["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    special = [
        {"id": index, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for index, text in enumerate(pieces[:3])
    ]  # fmt: skip
    whole = {"added_tokens": special, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return whole | {"version": "1.0", "model": model | changes}


def with_tokenizer(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")
    return folder


def test_merges_become_scores_and_bytes_are_marked(tmp_path: Path) -> None:
    found = gguf_tokenizer.read(with_tokenizer(tmp_path / "t", sentencepiece()), size=270)
    assert (found.model, found.add_space_prefix, found.add_bos) == ("llama", True, False)
    assert found.types[:5] == [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 2]
    assert found.scores is not None
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["ab"] > score["▁a"] > score["▁ab"] > score["a"]
    assert found.types[265:] == [gguf.TokenType.UNUSED] * 5


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path: Path, plain: Path) -> None:
    byte_level = json.loads((plain / "tokenizer.json").read_text(encoding="utf-8"))
    whitespace = byte_level | {"pre_tokenizer": {"type": "Whitespace"}}
    lowercase = byte_level | {"normalizer": {"type": "Lowercase"}}
    ignoring = byte_level | {"model": byte_level["model"] | {"ignore_merges": True}}
    cases = {
        "type Unigram": {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        "pre-tokenizer Whitespace": whitespace,
        "normalizer Lowercase": lowercase,
        "ignore_merges": ignoring,
        "no merge of '▁a' and 'b'": sentencepiece(merges=[["a", "b"], ["▁", "a"], ["▁", "ab"]]),
        "merges of '▁ab' that do not stand together": sentencepiece(
            merges=[["▁", "ab"], ["a", "b"], ["▁", "a"], ["▁a", "b"]]
        ),
        "without the byte <0x00>": sentencepiece(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[]),
    }
    for number, (message, data) in enumerate(cases.items()):
        folder = with_tokenizer(tmp_path / str(number), data)
        with pytest.raises(ModelError, match=message) as caught:
            gguf_tokenizer.read(folder, size=300)
        assert "Leave gguf out of the formats" in str(caught.value)


def test_a_changed_value_is_found(plain: Path, quantized: Path, tmp_path: Path) -> None:
    export_gguf(quantized, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    place = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight").data_offset
    data = bytearray(path.read_bytes())
    data[place + 9] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ParityError, match=r"blk.1.ffn_up.weight does not hold the values of its source"):
        verify(quantized, path)
    with pytest.raises(ParityError):
        verify(plain, path)


def test_what_llama_cpp_would_leave_out_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "plain", "qwen3", **SHAPE)
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(256)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    changed_config(source, attention_bias=False)
    with pytest.raises(ModelError, match=r"a bias of attn_q; expected none"):
        export_gguf(source, tmp_path / "out")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no place for model.layers.0.self_attn.sinks"):
        export_gguf(source, tmp_path / "out")


def test_the_missing_package_is_named(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"format gguf: the package 'gguf' .*pip install 'edgestill\[gguf\]'"):
        export_gguf(quantized, tmp_path / "out")


def test_a_bundle_ships_the_file_where_there_is_no_onnx_model(quantized: Path, tmp_path: Path) -> None:
    ctx = context("deploy.export.bundle", tmp_path / "out", inputs={"model": quantized}, target=None)
    result = export(ExportParams(formats=["gguf", "gptq"]), ctx)
    bundle = open_bundle(ctx.out)
    assert set(bundle.shipped) == {"model.gguf"}
    assert result.metrics["gguf_bytes"] < result.metrics["bundle_bytes"] == bundle.bytes
    assert any("bundle_bytes counts the GGUF file in gguf/" in note for note in result.notes)
    assert bundle.info["gguf"]["weights"]["Q4_0"] > 0
    pack(ctx.out, tmp_path / "bundle.tar.zst")
    unpacked = unpack(tmp_path / "bundle.tar.zst", tmp_path / "device")
    assert sorted(path.name for path in unpacked.rglob("*") if path.is_file()) == ["bundle.json", "model.gguf"]
    (ctx.out / GPTQ_FOLDER / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"gptq/config.json"):
        open_bundle(ctx.out)
    (ctx.out / GGUF_FOLDER / "model.gguf").unlink()
    with pytest.raises(ModelError, match=r"gguf/model.gguf: missing from the bundle"):
        open_bundle(ctx.out)
