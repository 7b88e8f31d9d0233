"""Files that a kill cannot spoil: tensors and JSON values written whole or not at all, read back with checks.

`save_tensors` writes safetensors under a temporary name, flushes it to disk and renames it; `open_tensors` gives back
what was saved, tensor by tensor, or ``None`` when the file is absent, cut short or of something else; `read_tensors`
all of it at once. Neither holds more than one tensor beside those given. No pickle. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import StoreError
from compress.files import json_text, whole_file, write_whole
from compress.json_reader import parse_json

logger = logging.getLogger(__name__)
_VALUES = "values"  # the one metadata entry: JSON text
# names of number formats in a header, in the order in which the library writes them
_KINDS = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FREE = "Free disk space, or correct the rights of the folder"


@dataclass(frozen=True)
class SavedTensors:
    """An open file of `save_tensors`; the tensors are read when they are asked for."""

    values: dict[str, Any]
    outlines: dict[str, Tensor]  # by name, in the order of the file: shapes and number formats, on no device
    file: Any

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: by number format, wide ones first, so that each tensor is aligned; by name."""
    ranks = {kind: rank for rank, kind in enumerate(_KINDS)}
    return sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    whole: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> None:
    """Write ``tensors`` and the JSON ``values`` as one file, atomically; an older file is replaced.

    ``whole`` is asked for each tensor when its turn comes (`in_file_order`): a tensor of which this process holds a
    part can be gathered then.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    try:
        with whole_file(path) as file:
            _write(file, tensors, values, whole)
    except OSError as error:
        raise StoreError(str(path), f"cannot be written ({error})", do=FREE) from error


def _write(
    file: IO[bytes], tensors: Mapping[str, Tensor], values: Mapping[str, Any], whole: Callable[[Tensor], Tensor]
) -> None:
    """The format of safetensors, which the library itself writes from copies of all tensors alone."""
    header: dict[str, Any] = {"__metadata__": {_VALUES: json.dumps(values, sort_keys=True)}}
    place = 0
    order = in_file_order(tensors)
    for name in order:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        flat = whole(tensors[name]).detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def open_tensors(path: Path) -> SavedTensors | None:
    """What was saved in ``path``; ``None`` when there is no such file or it is damaged (logged)."""
    if not path.is_file():
        return None
    try:
        file: Any = safe_open(path, framework="pt")
        values = parse_json((file.metadata() or {})[_VALUES], constants=True)
        outlines = {name: _outline(file.get_slice(name)) for name in file.offset_keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and left aside (%s)", path, error)
        return None
    return SavedTensors(values, outlines, file)


def _outline(piece: Any) -> Tensor:
    kinds = {name: kind for kind, name in _KINDS.items()}  # another format is a KeyError, as in any foreign file
    return torch.empty(piece.get_shape(), dtype=kinds[piece.get_dtype()], device="meta")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, values) as saved; ``None`` when there is no such file or it is damaged (logged)."""
    found = open_tensors(path)
    return None if found is None else ({name: found[name] for name in found.outlines}, found.values)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON with sorted keys, atomically; raises StoreError as `save_tensors`."""
    try:
        write_whole(path, json_text(value, indent=2) + "\n")
    except OSError as error:
        raise StoreError(str(path), f"cannot be written ({error})", do=FREE) from error


def value_digest(value: object) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def kept_choice(path: Path, choice: bool) -> bool:
    """The choice that stands in ``path``, else ``choice``, which is written there: a resumed run keeps to it.

    Raises:
        StoreError: it cannot be written.
    """
    if path.is_file():
        return bool(json.loads(path.read_text(encoding="utf-8"))["bf16"])
    write_json(path, {"bf16": choice})
    return choice
