"""Grids and rounding to nearest: the scale and zero point of a group, and the codes that follow from them alone.

`fit` chooses scale and zero point of one group per row, by its range or by the clip of least squared error;
`round_to_nearest` quantizes a whole matrix. Pure functions, tensors in, tensors out. GPTQ builds on `fit`.
Knows nothing of models, data or files.
"""

from __future__ import annotations

import torch

from compress.errors import ModelError
from compress.model.quantization.packing import QuantizedLinear, group_index, quantize

SMALLEST_CLIP = 0.35  # of the range; a 2-bit grid gains down to about here, a 4-bit grid stops near 0.7


def fit(
    values: torch.Tensor, *, bits: int, sym: bool, clip_steps: int = 0, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale (out,) fp16 and zero point (out,) uint8 of one group, ``values`` (out, inputs of the group).

    Without ``clip_steps`` the grid spans the values and zero, so that no value is further than scale / 2 from it;
    scales are rounded up to fp16 to keep that true. With ``clip_steps`` n, spans of n shares from 1 down to
    `SMALLEST_CLIP` are tried and each row takes the one of least squared error, weighted per input by
    ``importance`` (inputs,). Zero is always on the grid, so that padding and pruned weights stay zero.

    An asymmetric zero point is at least 1: stored as zero - 1 in the GPTQ layout it would wrap around at 0, and
    readers disagree about that. A group of zeros gets scale 1. Raises ModelError when a scale exceeds fp16.
    """
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    scale, zero_point = _grid(low, high, bits=bits, sym=sym)
    if clip_steps < 1:
        return scale, zero_point
    best = _error(values, scale, zero_point, bits, importance)
    for share in torch.linspace(1.0, SMALLEST_CLIP, clip_steps + 1)[1:].tolist():
        tried = _grid(low * share, high * share, bits=bits, sym=sym)
        error = _error(values, *tried, bits, importance)
        better = error < best
        scale, zero_point = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero_point)
        best = torch.where(better, error, best)
    return scale, zero_point


def _grid(low: torch.Tensor, high: torch.Tensor, *, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grid that spans ``low`` <= 0 <= ``high`` (out,)."""
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if sym:
        scale = _half(2 * torch.maximum(-low, high) / top)
        return scale, torch.full(low.shape, middle, dtype=torch.uint8)
    scale = _half((high - low) / top)
    zero_point = torch.round(-low / scale.to(low.dtype)).clamp(0, top)
    # nothing below -scale / 2: the zero point moves up by one and the rest has one step less
    scale = torch.where(zero_point < 1, _half(high / (top - 1)), scale)
    zero_point = torch.where((low == 0) & (high == 0), middle, zero_point.clamp(min=1))
    return scale, zero_point.to(torch.uint8)


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales up to fp16; zero becomes one."""
    rounded = scale.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise ModelError("weights", f"a scale of {float(scale.max()):.3g}", "at most 65504, what 16 bits hold")
    below = rounded.to(scale.dtype) < scale
    rounded = (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.float16)  # the next larger number
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))


def _error(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, importance: torch.Tensor | None
) -> torch.Tensor:
    step, zero = scale.to(values.dtype).unsqueeze(1), zero_point.to(values.dtype).unsqueeze(1)
    codes = (torch.round(values / step) + zero).clamp_(0, (1 << bits) - 1)
    squares = ((codes - zero) * step - values).square_()
    return squares.sum(dim=1) if importance is None else squares @ importance.to(values.dtype)


def fit_groups(
    weight: torch.Tensor,
    g_idx: torch.Tensor,
    *,
    bits: int,
    sym: bool,
    clip_steps: int = 0,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (out, groups) fp16 and zero points (out, groups) uint8 of ``weight`` (out, in) as `fit`."""
    found = []
    for group in range(int(g_idx.max()) + 1):
        members = (g_idx == group).nonzero().squeeze(1)
        part = None if importance is None else importance[members]
        found.append(fit(weight[:, members], bits=bits, sym=sym, clip_steps=clip_steps, importance=part))
    return torch.stack([scale for scale, _ in found], dim=1), torch.stack([zero for _, zero in found], dim=1)


def round_to_nearest(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    clip_steps: int = 0,
    importance: torch.Tensor | None = None,
) -> QuantizedLinear:
    """Quantize ``weight`` (out, in) by rounding each value to the nearest point of its group's grid.

    ``group_size`` -1 is one group per row; where it does not divide the inputs, the last group is shorter.
    """
    g_idx = group_index(weight.shape[1], group_size)
    scales, zero_points = fit_groups(weight, g_idx, bits=bits, sym=sym, clip_steps=clip_steps, importance=importance)
    codes = quantize(weight, scales, zero_points, g_idx, bits=bits)
    return QuantizedLinear(codes, scales, zero_points, g_idx)
