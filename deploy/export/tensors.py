"""The tensors of a checkpoint as the export takes them: quantized matrices as their very codes, the rest as fp32.

`Tensors` opens a folder (plain, or in the "gptq" format) and reads one tensor at a time. A `Matrix` is either codes
or plain weights, with its bias. Knows the names of a Hugging Face decoder's tensors; knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from compress.errors import ModelError
from compress.model.checkpoint import check_folder, read_config, weight_files
from compress.model.quantization import packing
from compress.model.quantization.layout import stored_as
from deploy.export import codes
from deploy.export.codes import PAD, Array, Coded, Index

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
EMBEDDING_CODES = "edgestill_embedding.safetensors"
_STORED = {EMBEDDING: "embedding", HEAD: "lm_head"}  # prefixes in that file


@dataclass(frozen=True)
class Matrix:
    """One linear or embedding (rows, columns): ``weight`` or ``coded``, whichever it is; ``bias`` (rows,) or None."""

    weight: Array | None = None
    coded: Coded | None = None
    bias: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        found = self.weight if self.coded is None else self.coded.codes
        assert found is not None, "a matrix has weights or codes"
        return int(found.shape[0]), int(found.shape[1])

    def rows(self, order: Index) -> Matrix:
        """Return the matrix with rows, and bias, in ``order``; `PAD` gives zeros."""
        real = order != PAD
        bias = None if self.bias is None else np.where(real, self.bias[order], np.float32(0))
        if self.coded is not None:
            return Matrix(coded=codes.take_rows(self.coded, order), bias=bias)
        assert self.weight is not None, "a matrix has weights or codes"
        return Matrix(weight=np.where(real[:, None], self.weight[order], np.float32(0)), bias=bias)

    def plain(self) -> Array:
        """The weights in fp32, those that the codes stand for where there are codes."""
        if self.coded is not None:
            return self.coded.weight()
        assert self.weight is not None, "a matrix has weights or codes"
        return self.weight


def stacked(matrices: list[Matrix]) -> Matrix | None:
    """Return the matrices one below the other, or None where that would mix codes of different groups or bits."""
    biases = [m.bias for m in matrices]
    bias = None if biases[0] is None else np.concatenate([b for b in biases if b is not None])
    coded = [m.coded for m in matrices if m.coded is not None]
    if len(coded) == len(matrices):
        if not all(codes.same_columns(coded[0], other) for other in coded):
            return None
        return Matrix(coded=codes.stack(coded), bias=bias)
    weights = [m.weight for m in matrices if m.weight is not None]
    return Matrix(weight=np.concatenate(weights), bias=bias) if len(weights) == len(matrices) else None


class Tensors:
    """The tensors of the checkpoint in ``folder``, each read when asked for.

    Raises ModelError for a folder that is damaged, not supported, or quantized in a way that would be misread.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder, self.config = folder, read_config(folder)
        quantization = self.config.get("quantization_config")
        if quantization:
            packing.check_quantization_config(quantization, where=str(folder / "config.json"))
        self.quantization = quantization
        self.bits = int(quantization["bits"]) if quantization else None  # of most linears
        self.files: dict[str, Path] = {}
        self.taken: set[str] = set()
        for path in weight_files(folder):
            self.files |= dict.fromkeys(_names(path), path)
        extra = folder / EMBEDDING_CODES
        self.embedding_files = dict.fromkeys(_names(extra), extra) if extra.is_file() else {}

    def left(self) -> list[str]:
        """Return the tensors that nobody asked for."""
        return sorted(name for name in self.files.keys() - self.taken if not name.endswith(".inv_freq"))

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ModelError(str(self.folder), f"no tensor {name}", "all that config.json implies")
        self.taken.add(name)
        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def vector(self, name: str) -> Array:
        """Return one tensor as fp32."""
        return np.asarray(self._read(name).float().numpy(), dtype=np.float32)

    def optional(self, name: str) -> Array | None:
        """Return one tensor as fp32, None when the checkpoint has none of that name."""
        return self.vector(name) if name in self.files else None

    def linear(self, prefix: str) -> Matrix:
        """Return the linear ``prefix``, such as ``model.layers.0.mlp.up_proj``."""
        bias = self.optional(f"{prefix}.bias")
        if f"{prefix}.qweight" not in self.files:
            return Matrix(weight=self.vector(f"{prefix}.weight"), bias=bias)
        parts = {f"{prefix}.{suffix}": self._read(f"{prefix}.{suffix}") for suffix in packing.SUFFIXES}
        if not self.quantization:
            raise ModelError(str(self.folder), f"codes of {prefix}", "no codes, as config.json has no word on them")
        bits, _ = stored_as(self.quantization, prefix)
        return Matrix(coded=_coded(packing.read_layer(parts, prefix, bits=bits), bits), bias=bias)

    def embedding(self) -> Matrix:
        """Return the embedding (vocabulary, hidden)."""
        return self._outer(EMBEDDING)

    def head(self) -> Matrix | None:
        """Return the output head (vocabulary, hidden); None when the embedding serves as head."""
        tied = bool(self.config.get("tie_word_embeddings", False)) and f"{HEAD}.weight" not in self.files
        return None if tied else self._outer(HEAD)

    def _outer(self, prefix: str) -> Matrix:
        """Return embedding or head: the codes that the quantization step put beside the weights, else the weights."""
        parts, stored = {}, _STORED[prefix]
        for name, path in self.embedding_files.items():
            if name.startswith(f"{stored}."):
                with safe_open(str(path), framework="pt") as file:
                    parts[name] = file.get_tensor(name)
        weight = self.vector(f"{prefix}.weight")
        if not parts:
            return Matrix(weight=weight)
        coded = read_outer(parts, stored)
        if not np.array_equal(coded.weight(), weight):
            raise ModelError(str(self.folder / EMBEDDING_CODES), f"the codes of {prefix} are not those of its weights")
        return Matrix(coded=coded)


def read_outer(parts: dict[str, torch.Tensor], prefix: str) -> Coded:
    """Return the codes of an embedding or head from the tensors codes, scales, zero_points, g_idx of ``prefix``.

    Codes that all fit 4 bits are taken as such: their values are the same.
    """
    wanted = [f"{prefix}.{suffix}" for suffix in ("codes", "scales", "zero_points", "g_idx")]
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise ModelError(EMBEDDING_CODES, f"missing tensors {', '.join(missing)}", ", ".join(wanted))
    layer = packing.QuantizedLinear(*(parts[name] for name in wanted))
    return _coded(layer, 8 if int(max(layer.codes.max(), layer.zero_points.max())) > 15 else 4)


def _coded(layer: packing.QuantizedLinear, bits: int) -> Coded:
    return Coded(
        codes=np.ascontiguousarray(layer.codes.numpy()),
        scales=np.ascontiguousarray(layer.scales.float().numpy()),
        zero_points=np.ascontiguousarray(layer.zero_points.numpy()),
        groups=layer.g_idx.numpy().astype(np.int64),
        bits=4 if bits == 3 else bits,  # the operator has no 3 bits; the codes stay what they are
    )


def _names(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def rotary(config: dict[str, Any]) -> tuple[Array, float]:
    """Return the rotary frequencies (head size / 2,) and the factor on cosine and sine, as transformers has them."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    embedding = LlamaRotaryEmbedding(AutoConfig.for_model(**plain))
    return np.asarray(embedding.inv_freq.float().numpy(), dtype=np.float32), float(embedding.attention_scaling)
