"""Matrices as llama.cpp's GGUF types store them: the smallest type that holds every weight exactly.

llama.cpp knows no zero points. Its types hold ``step * d`` with one fp16 ``d`` for 32 weights of a row, and differ in
the steps that they can hold; `encode` looks at the steps ``code - zero point`` that a matrix really has. So 2, 3, 4 and
8 bits, symmetric or not, find their place by one rule, and a matrix that fits none is stored as floats, with a reason.
Nothing is ever rounded here. Layouts of the blocks: ggml-common.h of llama.cpp. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.export.codes import Array, Bytes, Coded
from deploy.export.tensors import Matrix

BLOCK = 32  # weights that share a scale, in all of the types used here


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file: ``kind`` is the type's name, ``data`` its rows as bytes (F32: as numbers).

    ``reason`` says why codes had to become floats; empty where they did not.
    """

    kind: str
    data: npt.NDArray[Any]
    reason: str = ""


def encode(matrix: Matrix) -> Stored:
    """Return ``matrix`` in the smallest type that holds it exactly: Q4_0, Q4_1, Q5_0, Q8_0, F16, BF16 or F32."""
    if matrix.coded is None:
        return floats(matrix.plain())
    found = _quantized(matrix.coded)
    if isinstance(found, Stored):
        return found
    stored = floats(matrix.plain())
    return Stored(stored.kind, stored.data, found)


def floats(weight: Array) -> Stored:
    """Return fp32 ``weight`` as F16 or BF16 where that loses nothing, else as F32."""
    half = _fp16(weight)
    if half is not None:
        return Stored("F16", half)
    words = np.ascontiguousarray(weight).view(np.uint32)
    if not (words & 0xFFFF).any():
        return Stored("BF16", (words >> 16).astype("<u2").view(np.uint8).reshape(len(weight), -1))
    return Stored("F32", weight)


def _quantized(coded: Coded) -> Stored | str:
    """Return the matrix as blocks, or the reason why no type holds it."""
    rows, columns = coded.codes.shape
    if columns % BLOCK:
        return f"rows of {columns} weights are no multiple of {BLOCK}"
    groups = coded.groups.reshape(-1, BLOCK)
    if (groups != groups[:, :1]).any():
        return f"{BLOCK} weights side by side lie in several groups (a smaller group_size, or act_order)"
    scales = coded.scales[:, groups[:, 0]]  # (rows, blocks)
    d = _fp16(scales)
    if d is None:
        return "its scales are no fp16 numbers"
    zeros = coded.zero_points[:, groups[:, 0]]
    found = _blocks(coded.codes.reshape(rows, -1, BLOCK), zeros, scales, d)
    return found or "codes lie further from their zero point than int8 reaches (sym: true keeps within it)"


def _blocks(codes: Bytes, zeros: Bytes, scales: Array, d: npt.NDArray[np.float16]) -> Stored | None:
    """Return codes (rows, blocks, 32) in the smallest type that holds their steps; None where none does."""
    steps = codes.astype(np.int16) - zeros[:, :, None].astype(np.int16)
    low, high = int(steps.min()), int(steps.max())
    if low >= -8 and high <= 7:
        return Stored("Q4_0", _rows(d, _nibbles(steps + 8)))
    least = _fp16(-(zeros.astype(np.float32) * scales)) if int(codes.max()) <= 15 else None
    if least is not None:  # the weight of code 0
        return Stored("Q4_1", _rows(d, least, _nibbles(codes)))
    if low >= -16 and high <= 15:
        return Stored("Q5_0", _rows(d, _fifth_bits(steps + 16), _nibbles(steps + 16)))
    if low >= -128 and high <= 127:
        return Stored("Q8_0", _rows(d, steps.astype(np.int8)))
    return None


def _fp16(values: Array) -> npt.NDArray[np.float16] | None:
    """Return fp32 ``values`` as little-endian fp16, None where that would round."""
    with np.errstate(over="ignore"):
        stored = values.astype("<f2")
    return stored if np.array_equal(stored.astype(np.float32), values) else None


def _nibbles(values: npt.NDArray[Any]) -> Bytes:
    """Pack the low four bits of (rows, blocks, 32): the first half of a block lies in the low nibbles."""
    low = (values & 15).astype(np.uint8)
    return low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << np.uint8(4))


def _fifth_bits(values: npt.NDArray[Any]) -> Bytes:
    """Pack bit 4 of (rows, blocks, 32) into four bytes, the first weight lowest."""
    return np.packbits(((values >> 4) & 1).astype(np.uint8), axis=-1, bitorder="little")


def _rows(*parts: npt.NDArray[Any]) -> Bytes:
    """Lay the parts of every block side by side; a part is (rows, blocks) or (rows, blocks, n)."""
    rows, blocks = parts[0].shape[:2]
    seen = [np.ascontiguousarray(part).reshape(rows, blocks, -1).view(np.uint8) for part in parts]
    return np.concatenate(seen, axis=2).reshape(rows, -1)
