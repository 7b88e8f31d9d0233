"""The quantized checkpoint on disk: one common GPTQ folder, and beside it the codes of embedding and head.

`quantize_outer` quantizes embedding or head, `save_tensors` writes a file that is whole or absent, `write_folder`
writes everything. ``model.safetensors`` holds embedding and head as the exact values of their codes, because the
format has no place for a quantized embedding; `OUTER_FILE` holds the codes, which the ONNX export uses.
Knows nothing of calibration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.model.checkpoint import METADATA_FILE, copy_tokenizer, write_json
from compress.model.quantization.blocks import EMBEDDING, HEAD
from compress.model.quantization.layout import Layout, quantization_config
from compress.model.quantization.packing import QuantizedLinear, dequantize
from compress.model.quantization.params import RtnParams

OUTER_FILE = "edgestill_embedding.safetensors"
OUTER_NAMES = {EMBEDDING: "embedding", HEAD: "lm_head"}  # checkpoint name -> prefix in OUTER_FILE
_GENERATION = "generation_config.json"


def outer_tensors(name: str, layer: QuantizedLinear | None, plain: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Return what goes into the two files for the embedding or head ``name``: file name -> tensors.

    Quantized: its exact values (V, hidden) fp32, and codes (V, hidden) uint8, scales (V, groups) fp16 and
    zero_points (V, groups) uint8 beside them. Not quantized (``layer`` None): fp16.
    """
    if layer is None:
        return {"model.safetensors": {name: plain.to(torch.float16)}, OUTER_FILE: {}}
    prefix = OUTER_NAMES[name]
    codes = {"codes": layer.codes, "scales": layer.scales, "zero_points": layer.zero_points, "g_idx": layer.g_idx}
    return {
        "model.safetensors": {name: dequantize(*layer)},
        OUTER_FILE: {f"{prefix}.{key}": tensor.contiguous() for key, tensor in codes.items()},
    }


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, *, note: str | None = None) -> None:
    """Write a safetensors file under another name first, so that a file that is there is whole.

    ``note`` goes into the header under "edgestill". Only one entry may stand there: the library writes several in
    no fixed order.
    """
    partial = path.with_name(path.name + ".partial")
    save_file(dict(tensors), partial, metadata={"format": "pt"} if note is None else {"edgestill": note})
    os.replace(partial, path)


def write_folder(
    out: Path,
    *,
    source: Path,
    config: Mapping[str, Any],
    layout: Layout,
    params: RtnParams,
    tensors: Mapping[str, torch.Tensor],
    outer: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write config, weights, outer codes, tokenizer and ``edgestill.json`` into ``out``."""
    new = dict(config) | {
        "intermediate_size": layout.ffn,
        "quantization_config": quantization_config(layout, params),
        "dtype": "float16",  # what readers of this format compute in; our own reads all as fp32
    }
    new.pop("torch_dtype", None)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", new)
    save_tensors(tensors, out / "model.safetensors")
    if outer:
        save_tensors(outer, out / OUTER_FILE)
    copy_tokenizer(source, out)
    if (source / _GENERATION).is_file():
        (out / _GENERATION).write_bytes((source / _GENERATION).read_bytes())
    write_json(out / METADATA_FILE, dict(metadata))
