"""Asymmetric clip: each group's grid ends where the outputs change least, its upper and lower end chosen apart.

`clip_quantize` tries shares of a group's largest and smallest weight against each other (BitDistiller, Du et al. 2024,
arXiv:2402.10631, section 3.1). The paper looks at each group alone; here the groups of a row are taken in turn and what
the errors of the other groups do to the same outputs counts, so that the error of the whole row never rises.
Pure functions; know nothing of models, data or files.
"""

from __future__ import annotations

import itertools

import torch

from compress.model.quantization.halves import FP16_SCALE_BITS
from compress.model.quantization.packing import QuantizedLinear, dequantize, nearest_offsets, quantize
from compress.model.quantization.rtn import round_to_nearest, span_grid

STEPS, SMALLEST = 20, 0.5  # the paper's: shares from 1 to a half in twenty steps


def clip_quantize(
    weight: torch.Tensor,
    moment: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = False,
    steps: int = STEPS,
    smallest: float = SMALLEST,
    scale_bits: int = FP16_SCALE_BITS,
) -> QuantizedLinear:
    """Round ``weight`` (O, I) to nearest on the clipped grids of least output error.

    ``moment`` (I, I) is the mean of x x' of the inputs. The error of a row is e' H e with e its rounding error; it is
    never above that of `rtn.round_to_nearest` without a clip, with which this starts. A symmetric grid has one end to
    choose. No steps: rounding to nearest.
    """
    work = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    layer = round_to_nearest(work, bits=bits, group_size=group_size, sym=sym, scale_bits=scale_bits)
    if steps < 1:
        return layer
    scales, zero_points = layer.scales.clone(), layer.zero_points.clone()
    errors = dequantize(*layer).to(work.dtype) - work  # (O, I)
    hessian = moment.to(work.dtype)
    shares = torch.linspace(1.0, smallest, steps + 1).tolist()
    pairs = [(share, share) for share in shares] if sym else list(itertools.product(shares, shares))
    for group in range(scales.shape[1]):
        members = torch.nonzero(layer.g_idx == group)[:, 0]
        values = work[:, members]  # (O, n)
        own = hessian[members][:, members]  # (n, n)
        beside = errors @ hessian[:, members] - errors[:, members] @ own  # (O, n): pull of the other groups' errors
        low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
        best = _cost(errors[:, members], own, beside)
        for below, above in pairs[1:]:
            scale, zero_point = span_grid(low * below, high * above, bits=bits, sym=sym, scale_bits=scale_bits)
            step, zero = scale.to(work.dtype)[:, None], zero_point.to(work.dtype)[:, None]
            tried = nearest_offsets(values / step, zero, bits=bits).mul_(step).sub_(values)
            cost = _cost(tried, own, beside)
            better = cost < best
            best = torch.where(better, cost, best)
            scales[:, group] = torch.where(better, scale, scales[:, group])
            zero_points[:, group] = torch.where(better, zero_point, zero_points[:, group])
            errors[:, members] = torch.where(better[:, None], tried, errors[:, members])
    codes = quantize(work, scales, zero_points, layer.g_idx, bits=bits)
    return QuantizedLinear(codes, scales, zero_points, layer.g_idx)


def _cost(errors: torch.Tensor, own: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Return e' H e + 2 e' b of each row (O,): what a group's errors add to those of the other groups."""
    return (errors * (errors @ own + 2 * beside)).sum(dim=1)
