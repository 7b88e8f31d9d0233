"""A GGUF file for llama.cpp from a checkpoint, plain or in the "gptq" format: its very codes where a type holds them.

`export_gguf` writes ``model.gguf`` and reads it back: every tensor must hold the source's values, bit for bit. Which
type holds which codes is known to `gguf_blocks`, which tokenizers llama.cpp has to `gguf_tokenizer`. For a Llama the
rows of q and k are reordered, because llama.cpp turns neighbouring channels where transformers turns halves. Nothing is
rounded; what no type holds is stored as floats, and a note says so. Needs the package ``gguf``; knows no targets.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import MissingExtraError, ModelError, ParityError
from compress.model.shapes import architecture, head_size, kv_head_count
from deploy.export import gguf_blocks, gguf_tokenizer
from deploy.export.codes import Array, Index
from deploy.export.skeleton import check_attention
from deploy.export.tensors import Matrix, Tensors, rotary

GGUF_FILE = "model.gguf"
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_FILE_TYPES = {  # the name that llama.cpp shows for the file, by the type of most of its weights
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q8_0": "MOSTLY_Q8_0",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "F32": "ALL_F32",
}


def export_gguf(source: Path, folder: Path, *, licence: str | None = None) -> dict[str, Any]:
    """Write ``folder/model.gguf`` (the folder is made) and return figures and notes for the run record.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ModelError: a model, tokenizer or rotary embedding that llama.cpp has not, or a damaged checkpoint.
        ParityError: what was written does not hold the source's values.
    """
    gguf = _import_gguf()
    tensors = Tensors(source)
    where = str(source / "config.json")
    check_attention(tensors.config, where=where)
    vocabulary = gguf_tokenizer.read(source, size=int(tensors.config["vocab_size"]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / GGUF_FILE
    # the data waits in a temporary file, so that only one tensor at a time is in memory
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[architecture(tensors.config)], use_temp_file=True)
    try:
        kinds, reasons = _add_tensors(gguf, writer, tensors)
        _add_sizes(writer, tensors.config)
        _add_rotary(gguf, writer, tensors.config, where)
        _add_vocabulary(writer, vocabulary)
        most = max(_FILE_TYPES, key=lambda kind: kinds[kind])
        writer.add_file_type(int(getattr(gguf.LlamaFileType, _FILE_TYPES[most])))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_quantized_by("edgestill")
        if licence:
            writer.add_license(licence)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()  # which the writer does only when it came to its end
    count = verify(source, path)
    return {
        "bytes": path.stat().st_size,
        "tensors": count,
        "weights": {kind: kinds[kind] for kind in _FILE_TYPES if kinds[kind]},
        "notes": vocabulary.notes + _fallen(reasons),
    }


def verify(source: Path, path: Path) -> int:
    """Read ``path`` back and compare it with the checkpoint ``source``; return the number of tensors compared.

    Raises ParityError that names the first tensor whose values differ by a single bit, is missing, or is too many.
    """
    gguf = _import_gguf()
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = Tensors(source)
    count = 0
    for name, matrix in _matrices(expected):
        if name not in written:
            raise ParityError(str(path), f"no tensor {name}", "every tensor of the checkpoint")
        tensor = written.pop(name)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if not np.array_equal(found, matrix if isinstance(matrix, np.ndarray) else matrix.plain()):
            raise ParityError(str(path), f"{name} does not hold the values of its source", tensor.tensor_type.name)
        count += 1
    if written:
        raise ParityError(str(path), f"tensors {', '.join(sorted(written)[:3])} of no source", "none left")
    return count


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "format gguf") from error


def _fallen(reasons: dict[str, list[str]]) -> list[str]:
    """One note for each reason why codes became floats."""
    return [
        f"quantized matrices that the GGUF file holds as floats of the same values: {len(names)} "
        f"({names[0]}{' ...' if len(names) > 1 else ''}): {reason}"
        for reason, names in sorted(reasons.items())
    ]


def _add_tensors(gguf: Any, writer: Any, tensors: Tensors) -> tuple[Counter[str], dict[str, list[str]]]:
    """Add all tensors; return how many weights each type holds, and the matrices that fell to floats by reason."""
    kinds: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {}
    for name, matrix in _matrices(tensors):
        if isinstance(matrix, np.ndarray):
            writer.add_tensor(name, matrix)
            continue
        stored = gguf_blocks.encode(matrix)
        writer.add_tensor(name, stored.data, raw_dtype=getattr(gguf.GGMLQuantizationType, stored.kind))
        rows, columns = matrix.shape
        kinds[stored.kind] += rows * columns
        if stored.reason:
            reasons.setdefault(stored.reason, []).append(name)
    left = tensors.left()
    if left:
        raise ModelError(str(tensors.folder), f"llama.cpp has no place for {', '.join(left[:3])}", "none left")
    return kinds, reasons


def _matrices(tensors: Tensors) -> Iterator[tuple[str, Matrix | Array]]:
    """Yield every tensor under its name in the file: matrices, and vectors (norms, biases) as fp32."""
    config = tensors.config
    name = architecture(config)
    yield "token_embd.weight", tensors.embedding()
    yield "output_norm.weight", tensors.vector("model.norm.weight")
    head = tensors.head()
    if head is not None:
        yield "output.weight", head
    factors = _rope_factors(config)
    if factors is not None and name == "LlamaForCausalLM":
        yield "rope_freqs.weight", factors
    for layer in range(int(config["num_hidden_layers"])):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for part, other in _NORMS.items():
            vector = tensors.optional(f"{ours}.{part}.weight")
            if vector is not None:
                yield f"{theirs}.{other}.weight", vector
        for part, other in _LINEARS.items():
            matrix = tensors.linear(f"{ours}.{part}")
            if name == "LlamaForCausalLM" and other in ("attn_q", "attn_k"):
                matrix = matrix.rows(_interleaved(matrix.shape[0], head_size(config)))
            yield f"{theirs}.{other}.weight", matrix
            if matrix.bias is not None:
                _check_bias(name, other, str(tensors.folder))
                yield f"{theirs}.{other}.bias", matrix.bias


def _check_bias(name: str, part: str, where: str) -> None:
    """Refuse a bias that llama.cpp's graph of the architecture leaves out without a word."""
    if name == "Qwen3ForCausalLM" or (name == "Qwen2ForCausalLM" and part not in ("attn_q", "attn_k", "attn_v")):
        raise ModelError(where, f"a bias of {part}", f"none, which is what llama.cpp's {_ARCHITECTURES[name]} has")


def _interleaved(rows: int, size: int) -> Index:
    """Return the order of q's or k's rows in which the two channels of each rotation stand side by side."""
    return np.arange(rows).reshape(-1, 2, size // 2).swapaxes(1, 2).ravel()


def _rope(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the kind of rotary scaling and its settings, wherever config.json has them."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return str(settings.get("rope_type", settings.get("type", "default"))), settings


def _theta(config: dict[str, Any]) -> float:
    _, settings = _rope(config)
    return float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _rope_factors(config: dict[str, Any]) -> Array | None:
    """Return what llama.cpp divides each plain rotary frequency by (head size / 2,), for Llama 3's scaling."""
    if _rope(config)[0] != "llama3":
        return None
    size = head_size(config)
    plain = _theta(config) ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    return np.asarray(plain / rotary(config)[0], dtype=np.float32)


def _add_rotary(gguf: Any, writer: Any, config: dict[str, Any], where: str) -> None:
    """Say how positions turn the heads; ModelError for a scaling that llama.cpp has not for the architecture."""
    kind, settings = _rope(config)
    writer.add_rope_freq_base(_theta(config))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
    elif kind == "yarn":
        plain = {"rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta"}
        odd = sorted(key for key, value in settings.items() if key not in plain and value is not None)
        if odd:
            raise ModelError(where, f"yarn with {', '.join(odd)}", "factor and original_max_position_embeddings alone")
        original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(settings["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind == "llama3" and architecture(config) != "LlamaForCausalLM":
        raise ModelError(where, f"rotary scaling llama3 in a {architecture(config)}", "a Llama, in llama.cpp")


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    size = head_size(config)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(kv_head_count(config))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))  # the default of all three configs
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def _add_vocabulary(writer: Any, vocabulary: gguf_tokenizer.Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
