"""The graph of a model as onnxruntime-genai's model builder draws it, with all widths cut to almost nothing.

The builder knows each architecture's graph and its runtime config, but rounds weights by its own rules, and reads and
writes them all in fp32. So it is given a model of the same layers, heads and vocabulary with a hidden size of a few
channels and meaningless weights: it draws in a second, whatever the real size, and `deploy.export.onnx` puts the real
tensors in. The options are explicit, because the builder ignores the ones it does not know.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from compress.errors import EdgestillError, ModelError
from compress.model.checkpoint import copy_tokenizer, quiet_transformers
from compress.model.shapes import architecture
from compress.scratch import scratch

_BUILDER_ERRORS = (NotImplementedError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError)
_SHORTEST = 16  # of the feed-forward width


@dataclass(frozen=True)
class Skeleton:
    """The builder's graph and runtime config; the initializers' values mean nothing."""

    model: onnx.ModelProto
    genai_config: dict[str, Any]


def build(
    checkpoint: Path, config: Mapping[str, Any], *, head_size: int, context_tokens: int, fuse_qkv: bool
) -> Skeleton:
    """Draw the graph for ``config`` with heads of ``head_size`` and rotary tables of ``context_tokens`` positions.

    The tokenizer and generation config of ``checkpoint`` are shown to the builder for its runtime config.

    Raises:
        ModelError: the architecture or an attention variant is not supported.
        EdgestillError: the builder failed for another reason.
    """
    check_attention(config, where=str(checkpoint / "config.json"))
    with scratch() as temporary:
        source, drawn = temporary / "model", temporary / "onnx"
        _write_model(checkpoint, config, source, head_size=head_size, context_tokens=context_tokens)
        _run_builder(source, drawn, temporary / "cache", fuse_qkv=fuse_qkv)
        model = onnx.load(str(drawn / "model.onnx"), load_external_data=False)
        genai_config = json.loads((drawn / "genai_config.json").read_text(encoding="utf-8"))
    return Skeleton(model, genai_config)


def check_attention(config: Mapping[str, Any], *, where: str) -> None:
    """Raise ModelError for variants that the graph would silently leave out: sliding windows, moving rotary bases."""
    architecture(config, where=where)
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"} or config.get("use_sliding_window"):
        raise ModelError(where, f"attention over {', '.join(sorted(layer_types))}", "full attention in every layer")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(where, f"rotary embedding of type {kind!r}", "one that does not change with the length")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(where, f"hidden_act {config['hidden_act']!r}", "silu")


def _write_model(
    checkpoint: Path, config: Mapping[str, Any], folder: Path, *, head_size: int, context_tokens: int
) -> None:
    """Write the shrunk model: hidden size one channel per head, which Llama's check of divisibility takes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dropped = ("quantization_config", "rope_scaling", "rope_parameters", "rope_theta")
    shrunk = {key: value for key, value in config.items() if key not in dropped}
    shrunk |= {
        "hidden_size": int(config["num_attention_heads"]),
        "intermediate_size": _SHORTEST,
        "head_dim": head_size,
        "max_position_embeddings": context_tokens,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "dtype": "float32",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shrunk), encoding="utf-8")
    copy_tokenizer(checkpoint, folder)
    with quiet_transformers():
        plain = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(plain)
        for parameter in model.parameters():
            parameter.data.fill_(0.5)  # the builder leaves out a bias of zeros
        model.save_pretrained(folder)
    if (checkpoint / "generation_config.json").is_file():
        shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")


def _run_builder(source: Path, out: Path, cache: Path, *, fuse_qkv: bool) -> None:
    """Call the builder's Python interface; what it prints is kept for the message of a failure."""
    importlib.import_module("onnxruntime_genai.models")  # puts the builder's own modules on the import path
    builder = importlib.import_module("onnxruntime_genai.models.builder")
    options = ["hf_token=false", "shared_embeddings=false", f"fuse_qkv={str(fuse_qkv).lower()}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the builder's own use of its libraries
            with quiet_transformers():
                prepared = builder.parse_extra_options(None, str(source), str(out), "fp32", "cpu", str(cache), options)
                builder.create_model(None, str(source), str(out), "fp32", "cpu", str(cache), **prepared)
    except _BUILDER_ERRORS as error:
        last = said.getvalue().strip().splitlines()[-1:] or [""]
        raise EdgestillError("export", f"onnxruntime-genai's builder failed: {error} ({last[0][:200]})") from error
