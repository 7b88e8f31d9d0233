"""What a bundle will weigh, need and do on a target, from a config alone; no weights, no torch.

`estimate` gives bytes, memory and speed, `estimate_of_bundle` the same of a finished bundle, `check_fit` refuses what a
target cannot hold. Bytes follow from shapes and come within a few percent of the written file; memory within a third;
speed is a roofline (Williams, Waterman and Patterson 2009): the slower of memory and arithmetic, plus a time per
operator, and is rough. Knows targets' facts and models' shapes; of a bundle it reads sizes and configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import ModelError, TargetError
from compress.json_reader import read_table, required
from compress.model.quantization.layout import stored_as
from compress.model.shapes import head_size, kv_head_count, layer_shapes, linear_shapes
from deploy.bundle import RUNNER, Bundle
from deploy.targets import Target

HEAD_MULTIPLE = 16  # heads are padded to it (deploy.export.heads)
BLOCKS = (128, 64, 32, 16)
SCALE_BYTES = 2  # fp16 in the file
HELD_SCALE_BYTES = 4  # fp32 in memory
LAYER_GRAPH_BYTES = 1500  # nodes of one layer, measured
GRAPH_BYTES = 4000  # nodes around the layers
CONFIG_BYTES = 3000  # genai_config.json, bundle.json, tokenizer_config.json, chat template
TOKENIZER_BYTES_PER_ENTRY = 18  # tokenizer.json without blanks: 15 to 20 measured on vocabularies below 1000
BASE_BYTES = 69_000_000  # a Python process with onnxruntime-genai and an empty model, measured
HELD_COPIES = 2.0  # weights in memory over weights as read: the file's own bytes while it is parsed and repacked
LAYER_NODES = 11  # operators that take time, in one layer; each costs the target's ``node_seconds``


@dataclass(frozen=True)
class Precision:
    """Bits of linears, embedding and head; 32 or 16 is plain floating point, less is codes with scales."""

    bits: int = 32
    group_size: int = 32  # -1: one group per row
    zero_points: bool = False
    embedding_bits: int = 32
    lm_head_bits: int = 32
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # linear's path -> its bits and group size

    def of_linear(self, path: str) -> tuple[int, int]:
        """Return bits and group size of one linear, such as ``model.layers.0.mlp.up_proj``."""
        return self.others.get(path, (self.bits, self.group_size))

    @classmethod
    def of_params(cls, values: Mapping[str, Any], others: Mapping[str, tuple[int, int]] | None = None) -> Precision:
        """Return the precision that a quantization step of these parameters will give; empty ones: plain fp32.

        ``others`` has the linears that get other bits or groups than ``values`` say.
        """
        if not values:
            return cls()
        embedding = int(values.get("embedding_bits") or 16)
        bits = int(values.get("bits") or 4)
        return cls(
            bits=4 if bits == 3 else bits,  # stored in 4
            group_size=int(values.get("group_size") or 32),
            zero_points=not values.get("sym", True),
            embedding_bits=embedding,
            lm_head_bits=int(values.get("lm_head_bits") or embedding),
            others=others or {},
        )

    @classmethod
    def of_checkpoint(cls, folder: Path, config: Mapping[str, Any]) -> Precision:
        """Return the precision of a checkpoint folder, as its config and ``edgestill.json`` say."""
        quantization = config.get("quantization_config")
        if not quantization:
            kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
            plain = 16 if kind in ("float16", "bfloat16") else 32
            return cls(bits=plain, embedding_bits=plain, lm_head_bits=plain)
        made = folder / "edgestill.json"
        figures = read_table(made, ModelError).get("figures") if made.is_file() else None
        told = figures if isinstance(figures, dict) else {}
        values = dict(quantization) | {
            key: required({key: told.get(key, 16)}, key, int, str(made), ModelError, least=1, most=32)
            for key in ("embedding_bits", "lm_head_bits")
        }
        return cls.of_params(values, {path: stored_as(quantization, path) for path in _paths(config)})


@dataclass(frozen=True)
class SizeEstimate:
    """What is foretold of a bundle on a target."""

    bundle_bytes: int
    weight_bytes: int  # in the file
    read_per_token_bytes: int  # weights that one decoded token reads
    kv_cache_bytes: int  # at ``context_tokens``
    peak_memory_bytes: int
    context_tokens: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float

    def facts(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return asdict(self)


def estimate(
    config: Mapping[str, Any],
    precision: Precision,
    target: Target,
    context_tokens: int | None = None,
    *,
    last_logits: bool = True,
) -> SizeEstimate:
    """Return the estimate for a model of ``config`` on ``target``; the context is the target's where left out.

    ``last_logits`` is what the export is told: a prompt's logits at its last position alone.
    """
    own = int(config.get("max_position_embeddings") or target.context_tokens)
    context = min(own, target.context_tokens if context_tokens is None else context_tokens)
    stored, read = weight_bytes(config, precision)
    return _on_target(
        target,
        weights=(stored, read),
        cache=kv_cache_bytes(config, context),
        context=context,
        layers=int(config["num_hidden_layers"]),
        multiplied=products(config, last_logits=last_logits),
        logits=logits_bytes(int(config["vocab_size"]), 1 if last_logits else context),
        size=bundle_bytes(config, precision),
        prompt=context,
        coded=precision.bits < 16,
    )


def estimate_of_bundle(
    bundle: Bundle, target: Target, context_tokens: int, prompt_tokens: int | None = None
) -> SizeEstimate:
    """Return the estimate for a finished bundle on ``target`` when ``context_tokens`` are read and written.

    ``prompt_tokens`` of them are the prompt, which is read at once; left out: all.

    Raises:
        ModelError: the bundle has no ONNX format, or its configuration cannot be read.
    """
    bundle.need("onnx")
    prompt = context_tokens if prompt_tokens is None else prompt_tokens
    path = bundle.folder / "genai_config.json"
    config = read_table(path, ModelError, do="Export again")
    model = required(config, "model", dict, str(path), ModelError)
    decoder = required(model, "decoder", dict, str(path), ModelError)
    sizes = ("num_hidden_layers", "num_key_value_heads", "head_size")
    layers, kv_heads, size = (
        required(decoder, key, int, str(path), ModelError, least=1, most=1 << 20) for key in sizes
    )
    values = layers * kv_heads * size
    return _on_target(
        target,
        weights=(
            sum(file.stat().st_size for file in bundle.folder.glob("model.onnx*")),
            int(bundle.info["onnx"]["read_per_token_bytes"]),
        ),
        cache=2 * 4 * values * context_tokens,
        context=context_tokens,
        layers=layers,
        multiplied=_products_of_bundle(bundle),
        logits=logits_bytes(int(bundle.model["vocabulary"]), 1 if _keeps_last(bundle) else prompt),
        size=bundle.bytes,
        prompt=prompt,
        coded=bundle.model.get("bits") is not None,
    )


def products(config: Mapping[str, Any], *, last_logits: bool) -> tuple[int, int]:
    """Return the weights that multiply every token, and those that multiply the last token of a prompt alone.

    The latter are the head and the last layer's feed-forward part where ``last_logits``, else none. An embedding is
    looked up, not multiplied.
    """
    shapes = {name: math.prod(shape) for name, shape in linear_shapes(config).items()}
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    once = head + sum(size for name, size in shapes.items() if name.startswith("mlp.")) if last_logits else 0
    return int(config["num_hidden_layers"]) * sum(shapes.values()) + head - once, once


def _keeps_last(bundle: Bundle) -> bool:
    facts = bundle.info["onnx"]
    return bool(facts.get("last_logits", facts.get("backend") != "optimum"))


def _products_of_bundle(bundle: Bundle) -> tuple[int, int]:
    """As `products`; a bundle of an older export tells neither, and counts as one with a tied head."""
    facts, head = bundle.info["onnx"], int(bundle.model["vocabulary"]) * int(bundle.model["hidden"])
    if "products_per_token" in facts:
        return int(facts["products_per_token"]), int(facts["products_per_prompt"])
    once = head if _keeps_last(bundle) else 0
    return bundle.parameters - once, once


def _on_target(
    target: Target,
    *,
    weights: tuple[int, int],  # bytes in the file, bytes that one decoded token reads
    cache: int,
    context: int,
    layers: int,
    multiplied: tuple[int, int],  # weights that multiply every token, and the last of a prompt alone
    logits: int,  # bytes
    size: int,
    prompt: int,  # tokens that are read at once
    coded: bool,  # the linears are codes
) -> SizeEstimate:
    stored, read = weights
    overhead = (layers * LAYER_NODES + 8) * target.node_seconds
    every, once = multiplied
    row = 2 * (every + once) / target.product_ops_per_s(coded=coded, rows=1)
    rows = 2 * (every * prompt + once) / target.product_ops_per_s(coded=coded, rows=prompt)
    # half the context is full on average over an answer
    decode = max((read + cache / 2) / target.read_bytes_per_s, row) + overhead
    prefill = max(read / target.read_bytes_per_s, rows) + overhead
    return SizeEstimate(
        bundle_bytes=size,
        weight_bytes=stored,
        read_per_token_bytes=read,
        kv_cache_bytes=cache,
        peak_memory_bytes=round(BASE_BYTES + HELD_COPIES * max(read, stored) + cache + logits),
        context_tokens=context,
        decode_tokens_per_s=1 / decode,
        prefill_tokens_per_s=prompt / prefill,
    )


def bundle_bytes(config: Mapping[str, Any], precision: Precision) -> int:
    """Return the bytes of all files of the bundle."""
    stored, _ = weight_bytes(config, precision)
    graph = GRAPH_BYTES + int(config["num_hidden_layers"]) * LAYER_GRAPH_BYTES
    fixed = CONFIG_BYTES + RUNNER.stat().st_size
    return stored + graph + fixed + TOKENIZER_BYTES_PER_ENTRY * int(config["vocab_size"])


def weight_bytes(config: Mapping[str, Any], precision: Precision) -> tuple[int, int]:
    """Return the bytes of all weights in the file, and those that one decoded token reads from memory."""
    layers, hidden, vocab = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    vectors = [
        math.prod(shape) for name, shape in layer_shapes(config).items() if name[:-7] not in linear_shapes(config)
    ]
    stored = read = 4 * layers * sum(vectors)
    for path, columns in _paths(config).items():
        bits, group_size = precision.of_linear(path)
        matrix = _matrix(_padded(config, path.split(".")[-1]), columns, bits, group_size, precision.zero_points)
        stored, read = stored + matrix[0], read + matrix[1]
    outer = (precision.group_size, precision.zero_points)
    embedding = _matrix(vocab, hidden, precision.embedding_bits, *outer)
    tied = bool(config.get("tie_word_embeddings", False))
    head = embedding if tied else _matrix(vocab, hidden, precision.lm_head_bits, *outer)
    return stored + embedding[0] + (0 if tied else head[0]) + 4 * hidden, read + head[1] + 4 * hidden


def _paths(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the inputs of every linear by its path."""
    layers, shapes = range(int(config["num_hidden_layers"])), linear_shapes(config)
    return {f"model.layers.{index}.{name}": columns for index in layers for name, (_, columns) in shapes.items()}


def _padded(config: Mapping[str, Any], part: str) -> int:
    """Return the rows of a linear with its heads padded."""
    size = -(-head_size(config) // HEAD_MULTIPLE) * HEAD_MULTIPLE
    return {
        "q_proj": int(config["num_attention_heads"]) * size,
        "k_proj": kv_head_count(config) * size,
        "v_proj": kv_head_count(config) * size,
        "o_proj": int(config["hidden_size"]),
        "gate_proj": int(config["intermediate_size"]),
        "up_proj": int(config["intermediate_size"]),
        "down_proj": int(config["hidden_size"]),
    }[part]


def _matrix(rows: int, columns: int, bits: int, group_size: int, zero_points: bool) -> tuple[int, int]:
    """Return the bytes of a matrix in the file, and in memory."""
    if bits >= 16:
        return rows * columns * bits // 8, rows * columns * 4  # computed in fp32
    wanted = columns if group_size == -1 else group_size
    block = next((size for size in BLOCKS if size <= wanted and columns % size == 0), min(wanted, BLOCKS[0]))
    blocks = -(-columns // block)
    codes = rows * blocks * block * bits // 8
    zeros = rows * -(-blocks * bits // 8) if zero_points else 0
    return codes + rows * blocks * SCALE_BYTES + zeros, codes + rows * blocks * HELD_SCALE_BYTES + zeros


def kv_cache_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Return the bytes of keys and values of ``tokens`` positions, in fp32, heads padded."""
    size = -(-head_size(config) // HEAD_MULTIPLE) * HEAD_MULTIPLE
    return 2 * 4 * int(config["num_hidden_layers"]) * kv_head_count(config) * size * tokens


def lowered_context(own: int, wanted: int | None, target: Target | None) -> str:
    """A note where the target, and not the user (``wanted``), makes the context shorter than the model's ``own``."""
    if wanted is not None or target is None or target.context_tokens >= own:
        return ""
    return (
        f"the context is {target.context_tokens} tokens, as the target {target.name} says, and {own} by the model; "
        "export.context_tokens sets another"
    )


def logits_bytes(vocabulary: int, positions: int) -> int:
    """Return the bytes of the logits, in fp32, at so many positions of a prompt."""
    return 4 * vocabulary * positions


def check_fit(found: SizeEstimate, target: Target) -> None:
    """Raise TargetError when the bundle does not fit the storage, or running it does not fit the memory."""
    if found.bundle_bytes > target.storage_bytes:
        raise TargetError(
            f"target {target.name}",
            f"the bundle needs about {_readable(found.bundle_bytes)} of storage",
            f"at most {_readable(target.storage_bytes)}",
            "Prune more, or quantize to fewer bits",
        )
    if found.peak_memory_bytes > target.usable_memory_bytes:
        raise TargetError(
            f"target {target.name}",
            f"running the bundle needs about {_readable(found.peak_memory_bytes)} of memory, "
            f"{_readable(found.kv_cache_bytes)} of it for {found.context_tokens} tokens of context",
            f"at most {_readable(target.usable_memory_bytes)}",
            "Prune more, quantize to fewer bits, or set export.context_tokens lower",
        )


def _readable(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")
