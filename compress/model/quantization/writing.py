"""The quantized checkpoint on disk: one common GPTQ folder, and beside it the codes of embedding and head.

A finished layer is a file of its own (`Parts`), which a later run takes over; `join` puts the files into one
``model.safetensors`` without holding them, and `write_folder` writes everything. ``model.safetensors`` holds embedding
and head as the exact values of their codes in 16 bits, because the format has no place for a quantized embedding;
`OUTER_FILE` holds the codes, which the ONNX export uses. Knows nothing of calibration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from compress.errors import ModelError
from compress.files import plain_numbers, whole_file, write_whole
from compress.model.checkpoint import GENERATION_FILE, METADATA_FILE, copy_tokenizer, declare_ends, write_json
from compress.model.layers import LINEARS, linear_path, linears
from compress.model.quantization.blocks import EMBEDDING, HEAD
from compress.model.quantization.halves import FP16_MOST, exact_half, half
from compress.model.quantization.layout import Layout, quantization_config
from compress.model.quantization.packing import QuantizedLinear, dequantize, dequantize_rows, pack_layer, read_layer
from compress.model.quantization.params import RtnParams

OUTER_FILE = "edgestill_embedding.safetensors"
OUTER_NAMES = {EMBEDDING: "embedding", HEAD: "lm_head"}  # checkpoint name -> prefix in OUTER_FILE
PARTS = ("codes", "scales", "zero_points", "g_idx")
Report = dict[str, Any]
_COPY_BYTES = 1 << 24


class Parts:
    """The finished layers of one pass, one file each in ``folder``; a file that is there is whole.

    What becomes of a linear: its codes, or 16 bits where the layout leaves it alone. All else has 16 bits too.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout

    def path(self, index: int) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether the layer is done."""
        return self.path(index).is_file()

    def save(
        self, index: int, layer: nn.Module, done: Mapping[str, QuantizedLinear], reports: Sequence[Report]
    ) -> None:
        """Write a layer: codes of the linears ``done`` (name -> codes), all else of ``layer`` in 16 bits.

        ``layer`` then has the weights that the file stands for.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, linear in linears(layer).items():
            path = linear_path(index, name)
            if name in done:
                packed = pack_layer(done[name], bits=self.layout.linears[path].stored_bits)
                tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in packed.items()}
                linear.weight.data = dequantize(*done[name])
            else:
                tensors[f"{path}.weight"] = half(linear.weight.data, path)
                linear.weight.data = tensors[f"{path}.weight"].float()
        tensors |= halve_rest(index, layer)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, self.path(index), note=json.dumps(list(reports)))

    def load(self, index: int, layer: nn.Module) -> None:
        """Put what an earlier run left into ``layer``."""
        prefix = f"model.layers.{index}."
        with safe_open(str(self.path(index)), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        codes = {f"{linear_path(index, n)}.": linear for n, linear in linears(layer).items()}
        for path, linear in codes.items():
            if f"{path}qweight" in tensors:
                bits = self.layout.linears[path.removesuffix(".")].stored_bits
                linear.weight.data = dequantize(*read_layer(tensors, path.removesuffix("."), bits=bits))
        packed = (".qweight", ".qzeros", ".scales", ".g_idx")
        plain = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if not n.endswith(packed)}
        layer.load_state_dict(plain, strict=False)

    def codes(self, index: int) -> dict[str, QuantizedLinear]:
        """Return the codes of the linears of a finished layer, by name; those left alone are not among them."""
        with safe_open(str(self.path(index)), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        paths = {name: linear_path(index, name) for name in LINEARS}
        return {
            name: read_layer(tensors, path, bits=self.layout.linears[path].stored_bits)
            for name, path in paths.items()
            if f"{path}.qweight" in tensors
        }

    def reports(self, index: int) -> list[Report]:
        """Return what the solver said of the linears of a finished layer."""
        with safe_open(str(self.path(index)), framework="pt") as file:
            found: list[Report] = json.loads(file.metadata()["edgestill"])
        return found

    def save_outer(self, outer: Mapping[str, QuantizedLinear | None], reports: Sequence[Report]) -> None:
        """Write the codes of embedding and head (checkpoint name -> codes; None: fp16), with the head's reports."""
        tensors = {
            f"{name}.{part}": tensor.contiguous()
            for name, layer in outer.items()
            if layer is not None
            for part, tensor in zip(PARTS, layer, strict=True)
        }
        note = json.dumps({"names": list(outer), "reports": list(reports)})
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, self.folder / "outer.safetensors", note=note)

    def load_outer(self) -> tuple[dict[str, QuantizedLinear | None], list[Report]]:
        """Return what `save_outer` wrote."""
        with safe_open(str(self.folder / "outer.safetensors"), framework="pt") as file:
            note = json.loads(file.metadata()["edgestill"])
            there = set(file.keys())
            outer = {
                name: QuantizedLinear(*(file.get_tensor(f"{name}.{part}") for part in PARTS))
                if f"{name}.codes" in there
                else None
                for name in note["names"]
            }
        return outer, list(note["reports"])


def halve_rest(index: int, layer: nn.Module) -> dict[str, torch.Tensor]:
    """Round all but the weights of the linears in ``layer`` to 16 bits in place; return what is to be stored, by name.

    Doing it twice changes nothing.
    """
    weights = {f"{linear_path(index, name)}.weight" for name in LINEARS}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in layer.state_dict().items():
        path = f"model.layers.{index}.{name}"
        if path not in weights:
            stored[path] = half(tensor, path).contiguous()
            tensor.copy_(stored[path])
    return stored


def outer_tensors(name: str, layer: QuantizedLinear | None, plain: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Return what goes into the two files for the embedding or head ``name``: file name -> tensors.

    Quantized: its exact values (V, hidden) in 16 bits, and codes (V, hidden) uint8, scales (V, groups) fp16 and
    zero_points (V, groups) uint8 beside them. Not quantized (``layer`` None): rounded to 16 bits. Raises ModelError
    where 16 bits cannot hold them.
    """
    if layer is None:
        return {"model.safetensors": {name: half(plain, name)}, OUTER_FILE: {}}
    prefix, values = OUTER_NAMES[name], exact_half(dequantize_rows(layer))
    if values is None:
        raise ModelError(name, "values of codes that 16 bits do not hold", "smaller ones", f"Set {prefix}_bits: 16")
    return {
        "model.safetensors": {name: values},
        OUTER_FILE: {f"{prefix}.{key}": tensor.contiguous() for key, tensor in zip(PARTS, layer, strict=True)},
    }


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, *, note: str | None = None) -> None:
    """Write a safetensors file under another name first, so that a file that is there is whole.

    ``note`` goes into the header under "edgestill". Only one entry may stand there: the library writes several in
    no fixed order.
    """
    with whole_file(path) as stream:
        save_file(dict(tensors), stream.name, metadata={"format": "pt"} if note is None else {"edgestill": note})


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write ``value`` whole; the folder is made."""
    write_whole(path, json.dumps(plain_numbers(value), allow_nan=False))  # in its order, which is read back


def join(parts: Sequence[Path], path: Path) -> None:
    """Write one safetensors file with all tensors of ``parts``, byte by byte, so that none is ever held in memory.

    The format is a length (8 bytes, little endian), a JSON header of types, shapes and places, and the data; wide
    types come first, which keeps every tensor aligned (github.com/huggingface/safetensors, README).
    """
    entries: list[tuple[str, dict[str, Any], Path, int]] = []
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries += [(name, facts, part, 8 + length) for name, facts in header.items()]
    entries.sort(key=lambda entry: (-_width(entry[1]["dtype"]), entry[0]))
    placed, at = {}, 0
    for name, facts, _, _ in entries:
        first, last = facts["data_offsets"]
        placed[name] = facts | {"data_offsets": [at, at + last - first]}
        at += last - first
    text = json.dumps({"__metadata__": {"format": "pt"}} | placed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, facts, part, base in entries:
            first, last = facts["data_offsets"]
            with part.open("rb") as file:
                file.seek(base + first)
                for start in range(0, last - first, _COPY_BYTES):
                    out.write(file.read(min(_COPY_BYTES, last - first - start)))


def _width(kind: str) -> int:
    """Return the bytes of a value of the format's type ``kind``, such as F16 or I32."""
    digits = "".join(sign for sign in kind if sign.isdigit())
    return int(digits or 8) // 8


def _dtype(parts: Sequence[Path]) -> str:
    """Return float16, the number format of the GPTQ world; bfloat16 where a value of ``parts`` would overflow in it."""
    for part in parts:
        with safe_open(str(part), framework="pt") as file:
            wide = [name for name in file.keys() if file.get_slice(name).get_dtype() == "BF16"]  # noqa: SIM118
            if any(float(file.get_tensor(name).abs().max()) > FP16_MOST for name in wide):
                return "bfloat16"
    return "float16"


def write_folder(
    out: Path,
    *,
    source: Path,
    config: Mapping[str, Any],
    layout: Layout,
    params: RtnParams,
    parts: Sequence[Path],
    outer: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write config, weights (the tensors of the files ``parts``), outer codes, tokenizer and ``edgestill.json``."""
    new = dict(config) | {
        "intermediate_size": layout.ffn,
        "quantization_config": quantization_config(layout, params),
        "dtype": _dtype(parts),  # what readers of this format compute in; our own reads all as fp32
    }
    new.pop("torch_dtype", None)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", new)
    join(parts, out / "model.safetensors")
    if outer:
        save_tensors(outer, out / OUTER_FILE)
    copy_tokenizer(source, out)
    if (source / GENERATION_FILE).is_file():
        shutil.copyfile(source / GENERATION_FILE, out / GENERATION_FILE)
    declare_ends(out, tokenizer_from=source)
    write_json(out / METADATA_FILE, dict(metadata))
