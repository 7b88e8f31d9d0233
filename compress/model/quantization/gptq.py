"""GPTQ: round one column after the other and push each rounding error into the columns still to come.

`gptq_quantize` does one matrix from its weight and the second moment of its inputs, `output_error` says what a
quantized matrix does to the outputs. Source: Frantar et al., GPTQ (arXiv:2210.17323), algorithm 1. Unlike the
published code the grid of every group is fitted to weights that carry all errors so far, also inside a block.
Pure functions; know nothing of models, data or files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.model.quantization.halves import FP16_SCALE_BITS
from compress.model.quantization.packing import QuantizedLinear, dequantize, group_index, nearest_offsets
from compress.model.quantization.rtn import fit, round_to_nearest

PIECE = 32  # columns done one by one between two matrix products
RETRIES = 5  # each with ten times the damping: from 0.01 of the mean diagonal this ends far above it


@dataclass(frozen=True)
class GptqResult:
    """What became of one matrix.

    Attributes:
        layer: codes, scales, zero points and the group of each input.
        damp_frac: damping used, as a fraction of the Hessian's mean diagonal.
        retries: how often the damping had to be raised tenfold before the Hessian could be inverted.
        fell_back: True when no damping helped and the matrix was rounded to nearest.
        dead: inputs that were always zero; their weights are rounded to nearest, not set to zero, because what
            calibration never showed may still come.
    """

    layer: QuantizedLinear
    damp_frac: float
    retries: int = 0
    fell_back: bool = False
    dead: int = 0


def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    act_order: bool = False,
    keep_groups: bool = True,
    damp_frac: float = 0.01,
    block_size: int = 128,
    clip_steps: int = 0,
    levels: Sequence[int] | None = None,
    scale_bits: int = FP16_SCALE_BITS,
) -> GptqResult:
    """Quantize ``weight`` (out, in) so that outputs on inputs of second moment ``hessian`` (in, in) change least.

    ``hessian`` is a (weighted) mean of x x'; its overall factor has no effect. ``act_order`` takes the inputs of
    largest second moment first: with ``keep_groups`` within each group and groups by their mean, so that groups
    stay contiguous and need no index at run time; without it over all inputs, which mixes the groups (``g_idx``).
    ``clip_steps`` searches the clip of each group, ``levels`` and ``scale_bits`` restrict its grid, see `rtn.fit`.
    Works in fp64 for fp64 weights, else in fp32; the Hessian is always factored in fp64. Where it cannot be, even
    damped, the weights are rounded to nearest and ``fell_back`` is set.
    """
    work = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    diagonal = hessian.diagonal().double()
    dead = int((diagonal == 0).sum())
    order, groups = processing_order(diagonal, group_size=group_size, act_order=act_order, keep_groups=keep_groups)
    factor, used, retries = inverse_factor(hessian[order][:, order], damp_frac)
    grid: dict[str, Any] = {"bits": bits, "sym": sym, "clip_steps": clip_steps, "levels": levels}
    grid["scale_bits"] = scale_bits
    if factor is None:
        layer = round_to_nearest(work, group_size=group_size, **grid)
        return GptqResult(layer, damp_frac=used, retries=retries, fell_back=True, dead=dead)
    sweep = _Sweep(factor.to(work.dtype), groups, grid)
    sweep.run(work[:, order].T.contiguous(), block_size=block_size)
    codes = torch.empty_like(sweep.codes)
    codes[order] = sweep.codes
    g_idx = torch.empty_like(groups)
    g_idx[order] = groups
    layer = QuantizedLinear(codes.T.contiguous(), sweep.scales, sweep.zero_points, g_idx)
    return GptqResult(layer, damp_frac=used, retries=retries, dead=dead)


def output_error(weight: torch.Tensor, layer: QuantizedLinear, hessian: torch.Tensor) -> float:
    """Return tr(D H D'), the mean squared change of the outputs, for D = quantized - ``weight`` (out, in)."""
    change = dequantize(*layer).to(weight.dtype) - weight
    return float(((change @ hessian.to(weight.dtype)) * change).sum(dtype=torch.float64))


def processing_order(
    diagonal: torch.Tensor, *, group_size: int, act_order: bool, keep_groups: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of the inputs (in,) and the group of each in that order (in,) int32; groups come in runs."""
    groups = group_index(len(diagonal), group_size)
    if not act_order:
        return torch.arange(len(diagonal)), groups
    by_size = torch.argsort(diagonal, descending=True, stable=True)
    if not keep_groups:
        return by_size, groups
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=diagonal.dtype).index_add_(0, groups.long(), diagonal)
    means = sums / torch.bincount(groups.long(), minlength=count)
    rank = torch.argsort(torch.argsort(means, descending=True, stable=True), stable=True)  # (groups,)
    order = by_size[torch.argsort(rank[groups.long()[by_size]], stable=True)]
    return order, groups[order]


def inverse_factor(hessian: torch.Tensor, damp_frac: float) -> tuple[torch.Tensor | None, float, int]:
    """Return the upper Cholesky factor U, U' U = inverse of the damped Hessian, the damping used and the retries.

    The factor is fp64, or None when the Hessian is not finite, is zero, or resists all damping. An input that is
    always zero gets the mean of the diagonal: it is tied to no other and takes no part.
    """
    work = hessian.double().clone()
    diagonal = work.diagonal()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(work).all()) or mean <= 0:
        return None, damp_frac, 0
    dead = diagonal == 0
    diagonal[dead] = mean
    plain = diagonal.clone()
    damping = damp_frac
    for retry in range(RETRIES + 1):
        diagonal.copy_(plain + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(work)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping, retry
        damping = max(10 * damping, 1e-4)
    return None, damping, RETRIES


def pieces(groups: torch.Tensor, block_size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield blocks of about ``block_size`` columns as lists of pieces (start, end) of one group each.

    A group that fits into a block is never cut by its end, so that its grid sees every error before it. A longer
    one starts a block of its own.
    """
    changes = (groups[1:] != groups[:-1]).nonzero().squeeze(1) + 1
    bounds = [0, *changes.tolist(), len(groups)]
    block: list[tuple[int, int]] = []
    for start, end in itertools.pairwise(bounds):
        if block and end - block[0][0] > block_size:
            yield block
            block = []
        for at in range(start, end, PIECE):
            piece = (at, min(at + PIECE, end))
            if block and piece[1] - block[0][0] > block_size:
                yield block
                block = []
            block.append(piece)
    if block:
        yield block


class _Sweep:
    """One pass over the columns; columns lie as rows here, so that each is contiguous."""

    def __init__(self, factor: torch.Tensor, groups: torch.Tensor, grid: dict[str, Any]) -> None:
        self.factor, self.groups = factor, groups.tolist()  # (in, in) upper, group of each column
        self.ends = {group: len(self.groups) - self.groups[::-1].index(group) for group in set(self.groups)}
        self.grid = grid  # what `fit` is told
        # an error e in column i costs (e / U_ii)² once the later columns have made the best of it
        self.importance = factor.diagonal().square().reciprocal() if grid["clip_steps"] else None

    def run(self, columns: torch.Tensor, *, block_size: int) -> None:
        """Round ``columns`` (in, out), which are changed in place; leaves codes, scales and zero_points."""
        count, width = columns.shape
        self.codes = torch.empty(count, width, dtype=torch.uint8)
        self.scales = torch.empty(width, len(self.ends), dtype=torch.float16)
        self.zero_points = torch.empty(width, len(self.ends), dtype=torch.uint8)
        fitted: set[int] = set()
        for block in pieces(torch.tensor(self.groups), block_size):
            first, last = block[0][0], block[-1][1]
            errors = torch.zeros(last - first, width, dtype=columns.dtype)
            for start, end in block:
                group = self.groups[start]
                reach = end if group in fitted else min(self.ends[group], columns.shape[0])
                current = columns[start:reach]
                if start > first:  # the errors of this block reach the later columns only at its end
                    current = current - self.factor[first:start, start:reach].T @ errors[: start - first]
                if group not in fitted:
                    self._fit(current, group, start)
                    fitted.add(group)
                self._round(current[: end - start], errors[start - first : end - first], group, start)
            columns[last:] -= self.factor[first:last, last:].T @ errors

    def _fit(self, current: torch.Tensor, group: int, start: int) -> None:
        part = None if self.importance is None else self.importance[start : start + len(current)]
        scale, zero_point = fit(current.T.contiguous(), importance=part, **self.grid)
        self.scales[:, group], self.zero_points[:, group] = scale, zero_point

    def _round(self, current: torch.Tensor, errors: torch.Tensor, group: int, start: int) -> None:
        """Round the columns ``current`` (n, out) of one group one by one; fill in ``errors`` (n, out)."""
        scale = self.scales[:, group].to(current.dtype)
        zero = self.zero_points[:, group].to(current.dtype)
        bits, levels = self.grid["bits"], self.grid["levels"]
        factor = self.factor[start : start + len(current), start : start + len(current)]
        for i in range(len(current)):
            column = current[i] - factor[:i, i] @ errors[:i] if i else current[0]
            offset = nearest_offsets(column / scale, zero, bits=bits, levels=levels)
            self.codes[start + i] = (offset + zero).to(torch.uint8)
            errors[i] = (column - offset * scale) / factor[i, i]
