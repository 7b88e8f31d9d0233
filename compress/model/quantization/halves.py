"""Sixteen bits for what a quantized checkpoint stores as plain values: which format holds them, and which grids fit.

`half` rounds a tensor to fp16, or to bf16 where fp16 would overflow or lose small rows; `exact_half` finds the format
that holds values as they are; `scale_bits` says how many significant bits a scale may have for code times scale to
fit. Pure functions, tensors in, tensors out; know nothing of models and files.
"""

from __future__ import annotations

import torch

from compress.errors import ModelError

FP16_MOST = 65504.0  # the largest number of fp16
FP16_SCALE_BITS = 11  # significant bits of fp16, with the one that is not stored
_BF16_BITS = 8
_ROOM = 0.9  # a grid may end beyond what it was fitted to
_BF16_ERROR = 2.0**-9  # of a value: half a unit in bf16's last place


def half(values: torch.Tensor, name: str = "weights") -> torch.Tensor:
    """Return ``values`` in 16 bits: fp16, or bf16 where fp16 overflows or is less exact for a whole row.

    A row is everything but the last axis; small values beside large ones do not count. ModelError for NaN and for
    what not even bf16 holds.
    """
    small = values.to(torch.float16)
    if bool(torch.isfinite(small).all()):
        lost = (small.to(values.dtype) - values).abs().amax(dim=-1)
        if bool((lost <= _BF16_ERROR * values.abs().amax(dim=-1)).all()):
            return small
    wide = values.to(torch.bfloat16)
    if not bool(torch.isfinite(wide).all()):
        raise ModelError(name, "values that 16 bits cannot hold", "finite ones below 3.3e38")
    return wide


def halved(values: torch.Tensor, name: str = "weights") -> torch.Tensor:
    """Return what `half` stores, in fp32."""
    return half(values, name).float()


def exact_half(values: torch.Tensor) -> torch.Tensor | None:
    """Return ``values`` as fp16, else as bf16, where that holds every one of them exactly; else None."""
    for kind in (torch.float16, torch.bfloat16):
        small = values.to(kind)
        if torch.equal(small.to(values.dtype), values):
            return small
    return None


def scale_bits(weight: torch.Tensor, *, bits: int, sym: bool) -> int:
    """Return the significant bits of scales with which codes of ``bits`` bits give values that 16 bits hold exactly.

    The distance of a code from its zero point has ``bits`` bits, one less on a symmetric grid; the product has the sum
    of both. The format is fp16, or bf16 where ``weight`` exceeds fp16; there a scale may be a power of two.
    """
    fits = float(weight.abs().max()) <= _ROOM * FP16_MOST
    return max(1, (FP16_SCALE_BITS if fits else _BF16_BITS) - (bits - 1 if sym else bits))
