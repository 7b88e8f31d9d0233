"""An ONNX model for onnxruntime-genai from a checkpoint: the builder's graph, holding the checkpoint's very codes.

`write_onnx` takes a plain folder or one in the "gptq" format and writes ``model.onnx`` and ``genai_config.json``.
Nothing is rounded here: codes go into MatMulNBits and GatherBlockQuantized as they are, all else is stored as the fp16,
bf16 or fp32 that holds it exactly. Heads of a size that the runtime refuses are zero-padded (`heads`), a tied
embedding is stored once, columns sorted by group (act_order) cost a Gather or nothing. Knows nothing of stages.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.encoding import load_tokenizer, stop_ids
from compress.errors import ModelError, ParityError
from compress.model.quantization.layout import has_kernel
from compress.model.shapes import head_size, kv_head_count
from deploy import variants
from deploy.export import codes, heads, skeleton
from deploy.export.codes import Array, Index
from deploy.export.graph import CONTRIB, GraphWriter, count_nodes, write
from deploy.export.tensors import EMBEDDING, HEAD, Matrix, Tensors, rotary, stacked

logger = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
GENAI_CONFIG = "genai_config.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "attn.q_norm.layernorm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.layernorm.weight": "self_attn.k_norm.weight",
}
COUNTED = ("MatMulNBits", "GatherBlockQuantized", "MatMul", "FusedMatMul", "Gather", "GroupQueryAttention")


@dataclass(frozen=True)
class OnnxOptions:
    """How the graph computes.

    ``accuracy_level`` of MatMulNBits: 4 rounds activations to 8 bits per block, 0 and 1 compute in fp32.
    ``context_tokens`` is the longest prompt and answer together; None takes the model's own.
    ``last_logits``: the last layer's feed-forward part and the head compute the last position of a prompt alone.
    """

    accuracy_level: int = 4
    context_tokens: int | None = None
    last_logits: bool = True


@dataclass
class OnnxReport:
    """What was written: node counts by operator, and what gave way."""

    nodes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    head_size: int = 0
    context_tokens: int = 0
    bits: int | None = None
    read_per_token_bytes: int = 0  # weights that one decoded token reads, as the runtime holds them in memory


def write_onnx(checkpoint: Path, out: Path, *, options: OnnxOptions) -> OnnxReport:
    """Write the ONNX model of ``checkpoint`` into ``out`` (which exists) and say what is in it.

    Raises:
        ModelError: the checkpoint is damaged, not supported, or in a format that would be misread.
        ParityError: the graph does not hold every quantized matrix as such.
        EdgestillError: the builder failed.
    """
    source = Tensors(checkpoint)
    longest = int(source.config.get("max_position_embeddings") or 2048)
    context = longest if options.context_tokens is None else min(longest, options.context_tokens)
    size = head_size(source.config)
    if size % 2:
        raise ModelError(str(checkpoint), f"head size {size}", "an even one")
    padded = heads.padded_size(size)
    report = OnnxReport(head_size=padded, context_tokens=context, bits=source.bits)
    if padded != size:
        report.notes.append(f"heads of {size} are zero-padded to {padded}: the runtime takes multiples of 16 only")
    drawn = skeleton.build(
        checkpoint, source.config, head_size=padded, context_tokens=context, fuse_qkv=_fusable(source)
    )
    assembly = _Assembly(source, drawn.model, options, report)
    model = assembly.run()
    report.nodes = count_nodes(model, COUNTED)
    _check_counts(report.nodes, assembly, where=str(checkpoint))
    write(model, out / MODEL_FILE)
    _write_config(drawn.genai_config, source, context, out / GENAI_CONFIG)
    return report


def _fusable(source: Tensors) -> bool:
    """Whether q, k and v of every layer can be one matrix: all plain, or codes of the same bits and groups."""
    for layer in range(int(source.config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}.self_attn"
        if stacked([source.linear(f"{prefix}.{name}_proj") for name in "qkv"]) is None:
            return False
    return True


def _check_counts(nodes: dict[str, int], assembly: _Assembly, *, where: str) -> None:
    """Raise ParityError when a quantized matrix went into the graph as floats, or a tensor was lost."""
    left = assembly.source.left()
    if left:
        raise ParityError(where, f"the graph has no place for {', '.join(left[:3])} ({len(left)} tensors)", "none left")
    if nodes["MatMulNBits"] != assembly.coded_linears or nodes["GatherBlockQuantized"] != assembly.coded_embeddings:
        raise ParityError(
            where,
            f"{nodes['MatMulNBits']} MatMulNBits and {nodes['GatherBlockQuantized']} GatherBlockQuantized nodes",
            f"{assembly.coded_linears} and {assembly.coded_embeddings}, one for each quantized matrix",
        )


def _write_config(genai_config: dict[str, Any], source: Tensors, context: int, path: Path) -> None:
    """Write the runtime's config: greedy search said outright, real sizes, every token that ends an answer."""
    config = json.loads(json.dumps(genai_config))
    model = config["model"]
    model["context_length"], model["decoder"]["hidden_size"] = context, int(source.config["hidden_size"])
    ends, pad = end_tokens(source.folder, source.config)
    model |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
    keep = ("past_present_share_buffer",)
    search = {name: value for name, value in config["search"].items() if name in keep}
    config["search"] = search | {"do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1}
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[list[int], int]:
    """Return the ids that end an answer, and the one that pads, of the model in ``folder``, whose config is given.

    Padding is the tokenizer's, else the config's, else an end. ModelError when no token ends an answer.
    """
    tokenizer, vocabulary = load_tokenizer(folder), int(config["vocab_size"])
    ends = [token for token in stop_ids(tokenizer) if token < vocabulary]
    if not ends:
        raise ModelError(str(folder), "no token that ends an answer", "eos_token_id in config.json")
    pads = (tokenizer.pad_token_id, config.get("pad_token_id"))
    return ends, next((int(pad) for pad in pads if pad is not None and 0 <= pad < vocabulary), ends[0])


class _Assembly:
    """Goes once through the builder's nodes and puts the checkpoint's tensors in."""

    def __init__(self, source: Tensors, drawn: onnx.ModelProto, options: OnnxOptions, report: OnnxReport) -> None:
        self.source, self.drawn, self.options, self.report = source, drawn, options, report
        self.graph = GraphWriter(drawn)
        config = source.config
        self.size, self.padded = head_size(config), report.head_size
        self.heads, self.kv_heads = int(config["num_attention_heads"]), kv_head_count(config)
        self.meaningless = {tensor.name for tensor in drawn.graph.initializer}
        self.coded_linears = self.coded_embeddings = 0
        self.orders: dict[tuple[str, bytes], str] = {}
        self.slow: list[tuple[int, int]] = []  # bits and blocks of products that the runtime has no kernel for
        self.embedding = source.embedding()
        self.head = source.head()
        self.last_layer = int(config["num_hidden_layers"]) - 1

    def run(self) -> onnx.ModelProto:
        """Return the finished model."""
        self.rotary_tables()
        for node in self.drawn.graph.node:
            weights = [name for name in node.input if name in self.meaningless]
            if node.op_type == "MatMul":
                self.linear(node)
            elif node.name == "/model/embed_tokens/Gather":
                self.embed(node)
            elif node.op_type == "Add" and weights:
                self.bias(node, weights[0])
            elif node.op_type in ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
                self.norm(node, weights[0])
            else:
                self.other(node, weights)
        if self.options.last_logits:
            variants.declare_positions(self.drawn, 1)
        for (bits, block), count in sorted(Counter(self.slow).items()):
            self.report.notes.append(self.slow_note(bits, block, count))
        return self.graph.finish()

    def slow_note(self, bits: int, block: int, count: int) -> str:
        """Return what the user must know of ``count`` products without a kernel."""
        level = self.options.accuracy_level
        told = "8-bit activations" if level == 4 else f"fp32 arithmetic (accuracy_level {level})"
        way = f"quantize to groups of 32 or to 4 bits in groups of {block}" if level == 4 else "set accuracy_level: 4"
        return (
            f"{count} matrices of {bits} bits in blocks of {block}: onnxruntime has no kernel for them with {told} and "
            f"decodes them about 50 times slower than it could: {way}"
        )

    def other(self, node: onnx.NodeProto, weights: list[str]) -> None:
        """Take a node as it is; attention gets the softmax scale of the unpadded head."""
        assert set(weights) <= {"cos_cache", "sin_cache"}, f"{node.name} reads {weights}, which has no source"
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f = 1 / math.sqrt(self.size)
        shown = node.name
        node.name = _node_name(node.name)
        self.graph.nodes.append(node)
        if node.op_type == "GroupQueryAttention" and self.is_last(shown):
            wanted, node.output[0] = node.output[0], f"{node.output[0]}/all"
            self.last_position(node.output[0], wanted)

    def is_last(self, name: str) -> bool:
        """Whether the builder's node is of the last layer, where only the last position is wanted behind attention."""
        return self.options.last_logits and name.startswith(f"/model/layers.{self.last_layer}/")

    def last_position(self, value: str, output: str) -> str:
        """Append ``output``: the last position of ``value`` (batch, positions, channels), for all that comes after."""
        index = self.graph.raw("last.index", np.array([-1], np.int64))
        return self.graph.add("Gather", [value, index], output, name=f"{variants.LAST}.{output}", axis=1)

    def rotary_tables(self) -> None:
        """Compute both tables (context, padded head / 2) in the graph: the runtime folds them when it loads."""
        inverse, factor = rotary(self.source.config)
        graph = self.graph
        limits = [("start", 0), ("stop", self.report.context_tokens), ("step", 1)]
        names = [graph.raw(f"rotary.{name}", np.array(value, np.int64)) for name, value in limits]
        positions = graph.add("Range", names, "rotary.positions")
        column = graph.add("Unsqueeze", [positions, graph.raw("rotary.axis", np.array([1], np.int64))], "rotary.column")
        real = graph.add("Cast", [column], "rotary.real", to=onnx.TensorProto.FLOAT)
        wide = graph.raw("rotary.frequencies", heads.frequencies(inverse, self.padded)[None])
        angles = graph.add("Mul", [real, wide], "rotary.angles")
        for op, name in (("Cos", "cos_cache"), ("Sin", "sin_cache")):
            if factor == 1.0:
                graph.add(op, [angles], name)
            else:
                plain = graph.add(op, [angles], f"rotary.{op}")
                graph.add("Mul", [plain, graph.raw("rotary.factor", np.array(factor, np.float32))], name)

    def norm(self, node: onnx.NodeProto, weight: str) -> None:
        """Give a norm its gain; a norm over padded heads also the epsilon that keeps it exact."""
        found = _LAYER.fullmatch(weight)
        assert found is not None, f"norm {weight} is of no layer"
        part = _NORMS.get(found[2])
        gain = self.source.vector("model.norm.weight" if part is None else f"model.layers.{found[1]}.{part}")
        if part is not None and "self_attn" in part and self.padded != self.size:
            gain = heads.norm_gain(gain, self.padded)
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = heads.norm_epsilon(attribute.f, self.size, self.padded)
        place = list(node.input).index(weight)
        node.input[place] = self.graph.constant(weight, gain)
        if part == "post_attention_layernorm.weight" and self.is_last(node.name):  # what attention is added to
            node.input[0] = self.last_position(node.input[0], f"{node.input[0]}/last")
        node.name = _node_name(node.name)
        self.graph.nodes.append(node)

    def bias(self, node: onnx.NodeProto, weight: str) -> None:
        """Give an Add its bias."""
        matrix = self.matrix(weight.removesuffix(".Add.bias"))
        assert matrix.bias is not None, f"{weight} has no source"
        place = list(node.input).index(weight)
        node.input[place] = self.graph.constant(weight, matrix.bias)
        node.name = _node_name(node.name)
        self.graph.nodes.append(node)

    def matrix(self, name: str) -> Matrix:
        """Return the matrix of the builder's linear ``name``, heads padded, feed-forward channels in down's order."""
        found = _LAYER.fullmatch(name)
        assert found is not None, f"{name} is of no layer"
        prefix, part = f"model.layers.{found[1]}", found[2].split(".")[-1]
        attention = {
            "q_proj": ("q", self.heads),
            "k_proj": ("k", self.kv_heads),
            "v_proj": ("v", self.kv_heads),
        }
        if part == "qkv_proj":
            parts = [self.matrix(f"{prefix}.attn.{which}_proj") for which in "qkv"]
            whole = stacked(parts)
            assert whole is not None, "_fusable looked at this"
            return whole
        if part in attention:
            letter, count = attention[part]
            matrix = self.source.linear(f"{prefix}.self_attn.{letter}_proj")
            return matrix.rows(heads.row_order(count, self.size, self.padded))
        if part == "o_proj":
            return self.source.linear(f"{prefix}.self_attn.o_proj")
        matrix = self.source.linear(f"{prefix}.mlp.{part}")
        if part in ("gate_proj", "up_proj"):
            down = self.source.linear(f"{prefix}.mlp.down_proj").coded
            if down is not None:  # its columns' order costs nothing when the channels come in it
                matrix = matrix.rows(codes.column_layout(down.groups, down.bits)[1])
        return matrix

    def linear(self, node: onnx.NodeProto) -> None:
        """Replace a MatMul by MatMulNBits over the very codes, or keep it over the real weights."""
        name = node.name.removesuffix("/MatMul").removeprefix("/").replace("/", ".")
        if name == HEAD:
            self.output_head(node)
            return
        matrix, part = self.matrix(name), name.split(".")[-1]
        order: Index = np.arange(matrix.shape[1], dtype=np.int64)
        block = 0
        if matrix.coded is not None:
            block, order = codes.column_layout(matrix.coded.groups, matrix.coded.bits)
        picked: Index | None = None if codes.is_identity(order, matrix.shape[1]) else order
        if part == "o_proj" and self.padded != self.size:
            picked = heads.column_places(self.heads, self.size, self.padded)[order]
        if part == "down_proj":
            picked = None  # gate and up already come in this order
        read = node.input[0] if picked is None else self.gather(node.input[0], picked)
        self.multiply(node, read, name, matrix, (block, order))

    def gather(self, value: str, order: Index) -> str:
        """Return ``value`` with its last axis in ``order``; what a pad reads meets a zero weight."""
        index = np.where(order == codes.PAD, 0, order)
        key = (value, index.tobytes())
        if key not in self.orders:
            name = f"{value}/order{len(self.orders)}"
            stored = self.graph.raw(f"{name}.index", index.astype(np.int32))
            self.orders[key] = self.graph.add("Gather", [value, stored], name, axis=-1)
        return self.orders[key]

    def multiply(self, node: onnx.NodeProto, read: str, name: str, matrix: Matrix, layout: tuple[int, Index]) -> None:
        """Append the product of ``read`` with a matrix of the graph."""
        if matrix.coded is None:
            assert matrix.weight is not None, "a matrix has weights or codes"
            self.report.read_per_token_bytes += matrix.weight.size * 4
            weight = self.graph.constant(f"{name}.weight", np.ascontiguousarray(matrix.weight.T))
            self.graph.add("MatMul", [read, weight], node.output[0], name=_node_name(node.name))
            return
        block, order = layout
        ready = codes.take_columns(matrix.coded, order, block)
        packed, scales, zero_points = codes.pack(ready, block)
        inputs = [read, self.graph.raw(f"{name}.codes", packed), self.scales(name, scales)]
        if zero_points is not None:
            inputs.append(self.graph.raw(f"{name}.zero_points", zero_points))
        self.nbits(node, inputs, ready, block)

    def scales(self, name: str, scales: Array) -> str:
        """Store the scales of a matrix, (rows, blocks)."""
        return self.graph.constant(f"{name}.scales", scales)

    def nbits(self, node: onnx.NodeProto, inputs: list[str], matrix: codes.Coded, block: int) -> None:
        """Append MatMulNBits."""
        self.coded_linears += 1
        rows, columns = matrix.codes.shape
        blocks = -(-columns // block)
        self.report.read_per_token_bytes += rows * blocks * (block * matrix.bits // 8 + 4)  # codes and fp32 scales
        if not has_kernel(matrix.bits, block, accuracy_level=self.options.accuracy_level):
            self.slow.append((matrix.bits, block))
        self.graph.add(
            "MatMulNBits",
            inputs,
            node.output[0],
            name=_node_name(node.name),
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=matrix.bits,
            block_size=block,
            accuracy_level=self.options.accuracy_level,
        )

    def outer_layout(self, matrix: Matrix) -> int:
        """Return the block size when an embedding's codes can be looked up in place, else 0."""
        if matrix.coded is None:
            return 0
        block, order = codes.column_layout(matrix.coded.groups, matrix.coded.bits)
        whole = codes.is_identity(order, matrix.shape[1]) and matrix.shape[1] % block == 0
        return block if whole and matrix.coded.bits in (4, 8) else 0

    def embed(self, node: onnx.NodeProto) -> None:
        """Look tokens up in the codes (GatherBlockQuantized), or in the weights."""
        block, ids = self.outer_layout(self.embedding), node.input[1]
        if not block or self.embedding.coded is None:
            if self.embedding.coded is not None:
                self.report.notes.append("the embedding's groups do not suit the runtime: it is stored as plain values")
            table = self.graph.constant(f"{EMBEDDING}.weight", self.embedding.plain())
            self.graph.add("Gather", [table, ids], node.output[0], name="embed")
            return
        self.coded_embeddings += 1
        coded = self.embedding.coded
        packed, scales, zero_points = codes.pack(
            codes.take_columns(coded, np.arange(coded.codes.shape[1]), block), block
        )
        flat = self.graph.raw(f"{EMBEDDING}.codes", packed.reshape(len(packed), -1))
        inputs = [flat, ids, self.scales(EMBEDDING, scales)]
        if zero_points is not None:
            inputs.append(self.graph.raw(f"{EMBEDDING}.zero_points", zero_points))
        self.graph.add(
            "GatherBlockQuantized",
            inputs,
            node.output[0],
            name="embed",
            domain=CONTRIB,
            bits=coded.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )

    def output_head(self, node: onnx.NodeProto) -> None:
        """Append the head; a tied one reads the embedding's own initializers."""
        if self.head is not None:
            block = 0
            order: Index = np.arange(self.head.shape[1], dtype=np.int64)
            if self.head.coded is not None:
                block, order = codes.column_layout(self.head.coded.groups, self.head.coded.bits)
            read = node.input[0]
            if not codes.is_identity(order, self.head.shape[1]):
                read = self.gather(read, order)
            self.multiply(node, read, HEAD, self.head, (block, order))
            return
        block = self.outer_layout(self.embedding)
        if not block or self.embedding.coded is None:
            table = self.graph.constant(f"{EMBEDDING}.weight", self.embedding.plain())
            inputs = [node.input[0], table]
            self.report.read_per_token_bytes += self.embedding.plain().size * 4
            self.graph.add("FusedMatMul", inputs, node.output[0], name="lm_head", domain=CONTRIB, transB=1)
            return
        coded = self.embedding.coded
        rows, blocks = coded.codes.shape[0], coded.codes.shape[1] // block
        shape = self.graph.raw("lm_head.shape", np.array([rows, blocks, block * coded.bits // 8], np.int64))
        cube = self.graph.add("Reshape", [f"{EMBEDDING}.codes", shape], "lm_head.codes")
        inputs = [node.input[0], cube, self.scales(EMBEDDING, np.empty(0, np.float32))]
        if f"{EMBEDDING}.zero_points" in self.graph.initializers:
            inputs.append(f"{EMBEDDING}.zero_points")
        self.nbits(node, inputs, coded, block)


def _node_name(name: str) -> str:
    """Return a short name for the builder's node: ``/model/layers.3/mlp/up_proj/MatMul`` is ``3.up_proj``."""
    found = re.fullmatch(r"/model/layers\.(\d+)/(?:attn/|mlp/)?([^/]+)(?:/(.+))?", name)
    if found is None:
        return ""  # names must differ, or be left out
    tail = found[3] if found[3] in ("Add", "Split", "Reshape_1", "Reshape_2", "Mul", "Sigmoid") else ""
    return f"{found[1]}.{found[2]}" + (f".{tail}" if tail else "")
