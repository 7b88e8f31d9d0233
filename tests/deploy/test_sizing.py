"""Estimates against what was really written, and what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.errors import TargetError
from compress.model.checkpoint import read_config
from compress.model.quantization.params import RtnParams
from deploy import sizing
from deploy.bundle import RUNNER, Bundle, bundle_bytes, open_bundle
from deploy.export.onnx import OnnxOptions, write_onnx
from deploy.export.tokenizer import write_tokenizer
from deploy.sizing import Precision
from deploy.targets import load_target
from tests.deploy.tools import rounded
from tests.tiny import tiny_checkpoint

PI = load_target("raspberry-pi-5")
SMOLLM2 = {  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip


def test_the_estimate_is_within_five_percent_of_the_bundle(quantized: Path, bundle: Path) -> None:
    config = read_config(quantized)
    precision = Precision.of_checkpoint(quantized, config)
    assert precision == Precision(
        bits=4, group_size=32, embedding_bits=8, lm_head_bits=8, others=dict.fromkeys(precision.others, (4, 32))
    )
    assert sizing.bundle_bytes(config, precision) == pytest.approx(bundle_bytes(bundle), rel=0.05)
    found = sizing.estimate(config, precision, PI)
    assert found.read_per_token_bytes == pytest.approx(
        open_bundle(bundle).info["onnx"]["read_per_token_bytes"], rel=0.05
    )


def test_other_bits_for_some_linears_are_counted(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "layers": 4}
    plain = tiny_checkpoint(tmp_path / "plain", **shape)
    mixed = RtnParams.model_validate(
        {
            "ignore": ["model.layers.0.*"],
            "overrides": [{"pattern": "*.down_proj", "bits": 8}, {"pattern": "model.layers.3.*", "bits": 2}],
        }
    )
    source = rounded(plain, tmp_path / "codes", **mixed.model_dump())
    (tmp_path / "out").mkdir()
    report = write_onnx(source, tmp_path / "out", options=OnnxOptions())
    write_tokenizer(source, tmp_path / "out")
    shutil.copy(RUNNER, tmp_path / "out")
    precision = Precision.of_checkpoint(source, read_config(source))
    assert {bits for bits, _ in precision.others.values()} == {2, 4, 8, 16}
    stored, read = sizing.weight_bytes(read_config(source), precision)
    assert stored == pytest.approx((tmp_path / "out" / "model.onnx").stat().st_size, rel=0.05)
    assert read == pytest.approx(report.read_per_token_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        (
            {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 128, "layers": 3, "vocab": 768},
            {"bits": 4},
        ),
        ({"hidden": 64, "head_dim": 8, "heads": 8, "ffn": 172, "layers": 4, "tied": False}, {"bits": 4, "sym": False}),
        ({"hidden": 128, "head_dim": 16, "heads": 8, "ffn": 256, "layers": 2}, {"bits": 8, "group_size": 128}),
        ({"hidden": 128, "head_dim": 16, "heads": 8, "ffn": 256, "layers": 2}, {}),
    ],
)
def test_estimates_from_parameters_hold_for_other_shapes(
    tmp_path: Path, shape: dict[str, Any], params: dict[str, Any]
) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", **shape)
    source = rounded(plain, tmp_path / "codes", **params) if params else plain
    (tmp_path / "out").mkdir()
    write_onnx(source, tmp_path / "out", options=OnnxOptions())
    write_tokenizer(source, tmp_path / "out")
    shutil.copy(RUNNER, tmp_path / "out")
    precision = Precision.of_params(params | {"embedding_bits": 8} if params else {})
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert sizing.bundle_bytes(read_config(plain), precision) == pytest.approx(written, rel=0.06)


def test_a_million_parameters_take_less_than_a_megabyte() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 128, "head_dim": 32,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 768,
        "tie_word_embeddings": True,
    }  # fmt: skip
    assert sizing.bundle_bytes(config, Precision.of_params({"bits": 4, "embedding_bits": 8})) < 1.0e6


def test_a_real_model_on_a_real_board_is_foretold_sensibly() -> None:
    found = sizing.estimate(SMOLLM2, Precision.of_params({"bits": 4, "group_size": 64, "embedding_bits": 4}), PI)
    assert 70e6 < found.bundle_bytes < 95e6  # 76 MB at block 64 with the runtime's own int4, tokenizer left out
    assert found.kv_cache_bytes == 2 * 30 * 3 * 64 * 4 * 2048
    assert 20 < found.decode_tokens_per_s < PI.memory_bandwidth_bytes_per_s / found.read_per_token_bytes
    assert found.decode_tokens_per_s < found.prefill_tokens_per_s
    sizing.check_fit(found, PI)


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    huge = SMOLLM2 | {"hidden_size": 4032, "intermediate_size": 14336, "head_dim": 128, "num_hidden_layers": 80}
    found = sizing.estimate(huge, Precision(), PI)
    with pytest.raises(TargetError, match=r"the bundle needs about \d+\.?\d* GB of storage; expected at most 16 GB"):
        sizing.check_fit(found, PI)
    with pytest.raises(TargetError, match=r"GB of memory, .* of it for 2048 tokens of context; expected at most 6 GB"):
        sizing.check_fit(sizing.estimate(huge, Precision.of_params({"bits": 4}), PI), PI)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fewer_bits_and_shorter_contexts_never_need_more(bits: int) -> None:
    narrow = sizing.estimate(SMOLLM2, Precision.of_params({"bits": bits}), PI, 256)
    wide = sizing.estimate(SMOLLM2, Precision(), PI, 2048)
    assert narrow.bundle_bytes < wide.bundle_bytes
    assert narrow.peak_memory_bytes < wide.peak_memory_bytes
    assert narrow.decode_tokens_per_s > wide.decode_tokens_per_s


def test_only_products_count_and_the_last_position_once(quantized: Path) -> None:
    config = read_config(quantized)
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    every, once = sizing.products(config, last_logits=True)
    assert once == vocabulary * hidden + 3 * hidden * ffn
    assert sizing.products(config, last_logits=False) == (every + once, 0)
    assert sizing.products(config | {"tie_word_embeddings": False}, last_logits=True) == (every, once)


def test_logits_of_every_position_take_memory(bundle: Path) -> None:
    opened, target = open_bundle(bundle), load_target("raspberry-pi-5")
    assert opened.info["onnx"]["last_logits"] is True
    last = sizing.estimate_of_bundle(opened, target, 200, 150)
    facts = dict(opened.info["onnx"]) | {"last_logits": False}
    every = sizing.estimate_of_bundle(Bundle(bundle, dict(opened.info) | {"onnx": facts}), target, 200, 150)
    vocabulary = int(opened.model["vocabulary"])
    assert every.peak_memory_bytes - last.peak_memory_bytes == pytest.approx(4 * vocabulary * 149, abs=1)
    older = {key: value for key, value in facts.items() if key not in ("last_logits", "products_per_token")}
    found = sizing.estimate_of_bundle(Bundle(bundle, dict(opened.info) | {"onnx": older}), target, 200, 150)
    assert found.peak_memory_bytes == last.peak_memory_bytes
