"""Quantized matrices in numpy, and their layout in the runtime's MatMulNBits operator.

A `Coded` matrix holds one code per weight, and a scale and zero point per row and group; w = (code - zero_point) *
scale. `column_layout` finds the block size and the order of columns under which every block lies within one group,
`take_columns` and `take_rows` reorder and pad with weights that are exactly zero, `pack` gives the operator's bytes.
No code is ever rounded again here. Knows nothing of checkpoints and graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.errors import ModelError

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]

BLOCK_SIZES = (128, 64, 32, 16)  # what MatMulNBits takes: powers of two from 16 (contrib operator's definition)
PAD = -1  # in an order: a place that holds zero weights


@dataclass(frozen=True)
class Coded:
    """A quantized matrix (rows, columns)."""

    codes: Bytes  # (rows, columns)
    scales: Array  # (rows, groups)
    zero_points: Bytes  # (rows, groups)
    groups: Index  # (columns,) the group of each column
    bits: int  # 2, 4 or 8

    def weight(self) -> Array:
        """The weights that the codes stand for, (rows, columns)."""
        steps = self.codes.astype(np.float32) - self.zero_points.astype(np.float32)[:, self.groups]
        return np.asarray(steps * self.scales[:, self.groups], dtype=np.float32)


def column_layout(groups: Index, bits: int) -> tuple[int, Index]:
    """Return (block size, order): blocks of columns ``order`` each lie within one group; `PAD` fills short groups.

    Groups that lie side by side in whole blocks keep their order. Among the block sizes the one of fewest bytes wins,
    the larger at a draw. The last group is not filled up: the operator does that itself.
    """
    sorted_columns = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[sorted_columns])) + 1
    runs = np.split(sorted_columns, bounds)
    best: tuple[float, int, Index] | None = None
    for block in BLOCK_SIZES:
        parts: list[npt.NDArray[np.int64]] = []
        for run in runs[:-1]:
            parts += [run, np.full(-len(run) % block, PAD)]
        order = np.concatenate([*parts, runs[-1]]).astype(np.int64)
        blocks = -(-len(order) // block)
        weight = blocks * (block * bits / 8 + 2 + bits / 8)  # codes, an fp16 scale, a zero point
        if best is None or weight < best[0]:
            best = (weight, block, order)
    assert best is not None, "BLOCK_SIZES is not empty"
    return best[1], best[2]


def is_identity(order: Index, columns: int) -> bool:
    """Whether ``order`` takes all of so many columns as they stand."""
    return len(order) == columns and bool(np.array_equal(order, np.arange(columns)))


def take_columns(matrix: Coded, order: Index, block: int) -> Coded:
    """Return the matrix with columns in ``order``, one group per block of ``block`` columns.

    Raises AssertionError when a block mixes groups; `column_layout` gives none that does.
    """
    rows = len(matrix.codes)
    blocks = -(-len(order) // block)
    filled = np.full(blocks * block, PAD)
    filled[: len(order)] = order
    real = filled != PAD
    groups = np.where(real, matrix.groups[filled], -1).reshape(blocks, block)
    top = groups.max(axis=1)  # (blocks,)
    assert bool(((groups == top[:, None]) | (groups == -1)).all()), "a block of columns mixes groups"
    zero_points = matrix.zero_points[:, top]  # (rows, blocks)
    kept = filled[: len(order)]
    codes = np.where(kept != PAD, matrix.codes[:, kept], np.repeat(zero_points, block, axis=1)[:, : len(order)])
    index = np.repeat(np.arange(blocks), block)[: len(order)]
    assert codes.shape == (rows, len(order)), "columns were lost"
    return Coded(codes, matrix.scales[:, top], zero_points, index, matrix.bits)


def take_rows(matrix: Coded, order: Index) -> Coded:
    """Return the matrix with rows in ``order``; a `PAD` row is zero: every code is the zero point, the scale is 1."""
    if not (order == PAD).any():
        return Coded(matrix.codes[order], matrix.scales[order], matrix.zero_points[order], matrix.groups, matrix.bits)
    middle, real = np.uint8(1 << (matrix.bits - 1)), (order != PAD)[:, None]
    return Coded(
        codes=np.where(real, matrix.codes[order], middle),
        scales=np.where(real, matrix.scales[order], np.float32(1)),
        zero_points=np.where(real, matrix.zero_points[order], middle),
        groups=matrix.groups,
        bits=matrix.bits,
    )


def stack(matrices: list[Coded]) -> Coded:
    """Return the rows of all ``matrices``, one below the other; bits and groups must be the same."""
    first = matrices[0]
    assert all(same_columns(first, other) for other in matrices), "matrices of different groups cannot be stacked"
    return Coded(
        codes=np.concatenate([m.codes for m in matrices]),
        scales=np.concatenate([m.scales for m in matrices]),
        zero_points=np.concatenate([m.zero_points for m in matrices]),
        groups=first.groups,
        bits=first.bits,
    )


def same_columns(a: Coded, b: Coded) -> bool:
    """Whether two matrices have the same bits and groups."""
    return a.bits == b.bits and bool(np.array_equal(a.groups, b.groups))


def pack(matrix: Coded, block: int) -> tuple[Bytes, Array, Bytes | None]:
    """Return what MatMulNBits reads: codes (rows, blocks, block * bits / 8), scales (rows, blocks), zero points.

    ``matrix`` has one group per block, as `take_columns` gives it. The lowest bits of a byte come first. Zero points
    (rows, ceil(blocks * bits / 8)) are None where all are in the middle of the grid, which is the operator's default.
    """
    rows, columns = matrix.codes.shape
    blocks = matrix.scales.shape[1]
    if matrix.bits not in (2, 4, 8):
        raise ModelError("export", f"{matrix.bits}-bit codes", "2, 4 or 8 bits, which the operator has")
    assert blocks == -(-columns // block), "one group per block is needed"
    padded = np.repeat(matrix.zero_points, block, axis=1)  # (rows, blocks * block): past the end stand zero weights
    padded[:, :columns] = matrix.codes
    codes = _pack_bits(padded, matrix.bits).reshape(rows, blocks, block * matrix.bits // 8)
    if bool((matrix.zero_points == 1 << (matrix.bits - 1)).all()):
        return codes, matrix.scales, None
    return codes, matrix.scales, _pack_bits(matrix.zero_points, matrix.bits)


def _pack_bits(values: Bytes, bits: int) -> Bytes:
    """Pack (rows, n) values of ``bits`` into (rows, ceil(n * bits / 8)) bytes, the first one lowest."""
    per_byte = 8 // bits
    rows, n = values.shape
    filled = np.zeros((rows, -(-n // per_byte) * per_byte), np.uint8)
    filled[:, :n] = values
    grid = filled.reshape(rows, -1, per_byte)
    packed = np.zeros(grid.shape[:2], np.uint8)
    for place in range(per_byte):
        packed |= grid[:, :, place] << np.uint8(place * bits)
    return packed
