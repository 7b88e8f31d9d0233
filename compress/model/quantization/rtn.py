"""Grids and rounding to nearest: the scale and zero point of a group, and the codes that follow from them alone.

`fit` chooses scale and zero point of one group per row, by its range or by the clip of least error;
`round_to_nearest` quantizes a whole matrix. Pure functions, tensors in, tensors out. GPTQ and AWQ build on them.
Knows nothing of models, data or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.errors import ModelError
from compress.model.quantization.halves import FP16_SCALE_BITS
from compress.model.quantization.packing import QuantizedLinear, group_index, nearest_offsets, quantize

SMALLEST_CLIP = 0.35  # of the range; a 2-bit grid gains down to about here, a 4-bit grid stops near 0.7
# Eight levels spaced as the quantiles of a normal distribution (NF3 of BitDistiller, arXiv:2402.10631), each moved to
# an integer that a 4-bit code can say. Of the 32 ways to round 7 * NF3 up or down this has the least squared error on
# normal weights in groups of 32 with the clip searched; tests/model/quantization/test_nf3.py derives it.
NF3 = (-7, -4, -2, 0, 1, 3, 5, 7)


def fit(
    values: torch.Tensor,
    *,
    bits: int,
    sym: bool,
    clip_steps: int = 0,
    importance: torch.Tensor | None = None,
    levels: Sequence[int] | None = None,
    scale_bits: int = FP16_SCALE_BITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale (out,) fp16 and zero point (out,) uint8 of one group, ``values`` (out, inputs of the group).

    Without ``clip_steps`` the grid spans the values and zero, so that no value is further than scale / 2 from it;
    scales are rounded up to fp16 to keep that true. With ``clip_steps`` n, n + 1 shares of that span down to
    `SMALLEST_CLIP` are tried too and each row takes the one of least squared error, weighted per input by
    ``importance`` (inputs,), or of least d M d' for the row's error d where ``importance`` is a second moment
    M (inputs, inputs). A symmetric grid has one step less above zero than below, so that its shares begin
    where the upper half alone spans the values. Zero is always on the grid, so that padding and pruned weights
    stay zero. With ``levels``, such as `NF3`, the grid is those multiples of the scale alone, as offsets from zero
    point 8. A scale has at most ``scale_bits`` significant bits.

    An asymmetric zero point is at least 1: stored as zero - 1 in the GPTQ layout it would wrap around at 0, and
    readers disagree about that. A group of zeros gets scale 1. Raises ModelError when a scale exceeds fp16.
    """
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    if clip_steps < 1:
        return span_grid(low, high, bits=bits, sym=sym, levels=levels, scale_bits=scale_bits)
    top = (1 << bits) - 1
    largest = top / (top - 1) if sym and levels is None else 1.0
    shares = torch.cat([torch.ones(1), torch.linspace(largest, SMALLEST_CLIP, clip_steps + 1)]).to(values.dtype)
    spans = shares.unsqueeze(1)  # (shares, 1); the first is the whole range
    grid: dict[str, Any] = {"bits": bits, "sym": sym, "levels": levels, "scale_bits": scale_bits}
    scales, zero_points = span_grid(low * spans, high * spans, **grid)  # (shares, out)
    scale, zero_point = scales[0], zero_points[0]
    best = _error(values, (scale, zero_point), bits, importance, levels)
    for tried in zip(scales[1:], zero_points[1:], strict=True):
        error = _error(values, tried, bits, importance, levels)
        better = error < best
        scale, zero_point = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero_point)
        best = torch.where(better, error, best)
    return scale, zero_point


def span_grid(
    low: torch.Tensor,
    high: torch.Tensor,
    *,
    bits: int,
    sym: bool,
    levels: Sequence[int] | None = None,
    scale_bits: int = FP16_SCALE_BITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points of the grids that span ``low`` <= 0 <= ``high``, all of one shape."""
    if levels is not None:
        scale = _scale(torch.maximum(low / levels[0], high / levels[-1]), scale_bits)
        return scale, torch.full(low.shape, 8, dtype=torch.uint8)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        scale = _scale(2 * torch.maximum(-low, high) / top, scale_bits)
        return scale, torch.full(low.shape, middle, dtype=torch.uint8)
    scale = _scale((high - low) / top, scale_bits)
    zero_point = torch.round(-low / scale.to(low.dtype)).clamp(0, top)
    # nothing below -scale / 2: the zero point moves up by one and the rest has one step less
    scale = torch.where(zero_point < 1, _scale(high / (top - 1), scale_bits), scale)
    zero_point = torch.where((low == 0) & (high == 0), middle, zero_point.clamp(min=1))
    return scale, zero_point.to(torch.uint8)


def _scale(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round positive scales up to fp16 numbers of at most ``bits`` significant bits; zero becomes one."""
    rounded = scale.to(torch.float16)
    below = rounded.to(scale.dtype) < scale
    rounded = (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.float16)  # the next larger number
    if bits < FP16_SCALE_BITS:
        part, exponent = torch.frexp(rounded.float())
        rounded = torch.ldexp((part * (1 << bits)).ceil(), exponent - bits).to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise ModelError("weights", f"a scale of {float(scale.max()):.3g}", "at most 65504, what 16 bits hold")
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))


def _error(
    values: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor],
    bits: int,
    importance: torch.Tensor | None,
    levels: Sequence[int] | None,
) -> torch.Tensor:
    step, zero = (part.to(values.dtype).unsqueeze(1) for part in grid)
    change = nearest_offsets(values / step, zero, bits=bits, levels=levels).mul_(step).sub_(values)
    if importance is not None and importance.dim() == 2:
        return (change @ importance.to(values.dtype)).mul_(change).sum(dim=1)
    squares = change.square_()
    return squares.sum(dim=1) if importance is None else squares @ importance.to(values.dtype)


def round_to_nearest(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    clip_steps: int = 0,
    levels: Sequence[int] | None = None,
    scale_bits: int = FP16_SCALE_BITS,
    moment: torch.Tensor | None = None,
) -> QuantizedLinear:
    """Quantize ``weight`` (out, in) by rounding each value to the nearest point of its group's grid.

    ``group_size`` -1 is one group per row; where it does not divide the inputs, the last group is shorter. The
    grids are those of `fit`. With ``moment`` (in, in), the second moment of the inputs, the clip of each group is the
    one that changes the outputs least, as far as this group alone changes them.
    """
    rows, inputs = weight.shape
    size = inputs if group_size == -1 else min(group_size, inputs)
    whole = inputs // size
    options: dict[str, Any] = {"bits": bits, "sym": sym, "clip_steps": clip_steps, "levels": levels}
    options["scale_bits"] = scale_bits
    if moment is None:
        parts = [weight[:, : whole * size].reshape(rows * whole, size)]  # every group of every row at once
        if inputs % size:
            parts.append(weight[:, whole * size :])
        found = [fit(part, **options) for part in parts]
    else:
        slices = [slice(at, min(at + size, inputs)) for at in range(0, inputs, size)]
        found = [fit(weight[:, part], importance=moment[part, part], **options) for part in slices]
    scales, zero_points = (
        torch.cat([pair[kind].view(rows, -1) for pair in found], dim=1).contiguous() for kind in (0, 1)
    )
    g_idx = group_index(inputs, group_size)
    codes = quantize(weight, scales, zero_points, g_idx, bits=bits, levels=levels)
    return QuantizedLinear(codes, scales, zero_points, g_idx)
