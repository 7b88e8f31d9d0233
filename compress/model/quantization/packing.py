"""Codes of quantized weights, their arithmetic and their place in a GPTQ checkpoint; pure torch.

A quantized matrix is four tensors: ``codes`` (out, in) uint8, ``scales`` (out, groups) fp16, ``zero_points``
(out, groups) uint8 and ``g_idx`` (in,) int32, the group of each input; w = (code - zero_point) * scale.
`quantize` and `dequantize` go between them and weights, `pack_layer` and `read_layer` between them and the tensors
of the AutoGPTQ layout (version 1: the stored zero is ``zero_point - 1``), `dequantize_checkpoint` opens a whole one.
Knows nothing of models, files or of how scales are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from compress.errors import ModelError
from compress.model.quantization.layout import stored_as

WIDTHS = (2, 3, 4, 8)
_PERIOD = 32  # so many codes fill a whole number of 32-bit words, whatever their width
_WORD = 1 << 32
ROWS_ENTRIES = 1 << 21  # weights of an embedding that are looked at at once
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class QuantizedLinear(NamedTuple):
    """One quantized matrix; unpacks into the arguments of `dequantize`."""

    codes: torch.Tensor  # (out, in) uint8
    scales: torch.Tensor  # (out, groups) fp16
    zero_points: torch.Tensor  # (out, groups) uint8
    g_idx: torch.Tensor  # (in,) int32


def group_index(in_features: int, group_size: int) -> torch.Tensor:
    """Return the group of each input, (in,) int32, groups lying side by side; the last one may be shorter.

    ``group_size`` -1 is one group over all inputs.
    """
    size = in_features if group_size == -1 else group_size
    return (torch.arange(in_features) // size).to(torch.int32)


def quantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    g_idx: torch.Tensor,
    *,
    bits: int,
    levels: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the nearest codes (out, in) uint8 of ``weight`` (out, in) on the grids of its groups.

    ``levels`` restricts the codes, see `nearest_offsets`.
    """
    index = g_idx.long()
    zeros = zero_points.to(weight.dtype)[:, index]
    units = weight / scales.to(weight.dtype)[:, index]
    return nearest_offsets(units, zeros, bits=bits, levels=levels).add_(zeros).to(torch.uint8)


def nearest_offsets(
    units: torch.Tensor, zeros: torch.Tensor, *, bits: int, levels: Sequence[int] | None = None
) -> torch.Tensor:
    """Return code - zero point nearest to ``units``, weights as multiples of their scale; ``units`` is overwritten.

    Every code of ``bits`` bits is allowed, or those alone whose distance from the zero point is among ``levels``
    (ascending).
    """
    if levels is None:
        return units.round_().clamp_(min=-zeros, max=((1 << bits) - 1) - zeros)
    points = torch.tensor(levels, dtype=units.dtype)
    return points[torch.bucketize(units, (points[1:] + points[:-1]) / 2)]


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, g_idx: torch.Tensor
) -> torch.Tensor:
    """Return the weights (out, in) fp32 that the codes stand for, exactly: (code - zero_point) * scale.

    A code difference has at most 9 bits and an fp16 scale 11, so the product is exact in fp32.
    """
    index = g_idx.long()
    return (codes.float() - zero_points.float()[:, index]) * scales.float()[:, index]


def dequantize_rows(layer: QuantizedLinear) -> torch.Tensor:
    """`dequantize`, some rows at a time: of an embedding the values between exist for a few rows alone."""
    values = torch.empty(layer.codes.shape)
    step = max(1, ROWS_ENTRIES // max(layer.codes.shape[1], 1))
    for at in range(0, len(values), step):
        part = slice(at, at + step)
        values[part] = dequantize(layer.codes[part], layer.scales[part], layer.zero_points[part], layer.g_idx)
    return values


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers (n, m) below ``2**bits`` along the first axis into int32 words (ceil(n * bits / 32), m).

    The values of a column form one bit stream, lowest bit first; for 3 bits a value may straddle two words
    (AutoGPTQ's layout, qlinear_cuda_old.pack). Missing values at the end are zeros.
    """
    _check_width(bits)
    n, m = values.shape
    periods = math.ceil(n / _PERIOD)
    padded = torch.zeros(periods * _PERIOD, m, dtype=torch.int64)
    padded[:n] = values
    grid = padded.view(periods, _PERIOD, m)
    words = torch.zeros(periods, bits, m, dtype=torch.int64)
    for j in range(_PERIOD):
        word, shift = divmod(j * bits, 32)
        words[:, word] |= (grid[:, j] << shift) & (_WORD - 1)
        if shift + bits > 32:
            words[:, word + 1] |= grid[:, j] >> (32 - shift)
    flat = words.view(periods * bits, m)[: math.ceil(n * bits / 32)]
    return torch.where(flat >= _WORD // 2, flat - _WORD, flat).to(torch.int32).contiguous()


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` values per column (count, m) uint8 of `pack_rows`' words.

    Raises ModelError when the words are too few for ``count`` values.
    """
    _check_width(bits)
    if words.shape[0] * 32 < count * bits:
        raise ModelError("packed weights", f"{words.shape[0]} words", f"room for {count} codes of {bits} bits")
    stream = words.to(torch.int64) & (_WORD - 1)
    values = torch.empty(count, words.shape[1], dtype=torch.uint8)
    for j in range(min(_PERIOD, count)):
        word, shift = divmod(j * bits, 32)
        picked = len(range(j, count, _PERIOD))
        found = stream[word::bits][:picked] >> shift
        if shift + bits > 32:
            found = found | (stream[word + 1 :: bits][:picked] << (32 - shift))
        values[j::_PERIOD] = (found & ((1 << bits) - 1)).to(torch.uint8)
    return values


def pack_layer(layer: QuantizedLinear, *, bits: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the layout: ``qweight`` (in * bits / 32, out), ``qzeros`` (groups, out * bits / 32),
    ``scales`` (groups, out) and ``g_idx`` (in,).

    ``qzeros`` holds ``zero_point - 1`` modulo ``2**bits`` (checkpoint format "gptq"; "gptq_v2" would hold the zero
    point itself, and common readers do not look at the name).
    """
    stored = (layer.zero_points.to(torch.int64) - 1) & ((1 << bits) - 1)
    return {
        "qweight": pack_rows(layer.codes.T, bits),
        "qzeros": pack_rows(stored, bits).T.contiguous(),
        "scales": layer.scales.T.to(torch.float16).contiguous(),
        "g_idx": layer.g_idx.to(torch.int32).contiguous(),
    }


def read_layer(tensors: Mapping[str, torch.Tensor], prefix: str, *, bits: int | None = None) -> QuantizedLinear:
    """Return the codes of the linear ``prefix`` (such as ``model.layers.0.mlp.up_proj``) of a "gptq" checkpoint.

    ``bits`` follows from the shapes when it is left out. Raises ModelError when a tensor is missing or the shapes
    do not belong together.
    """
    missing = [f"{prefix}.{suffix}" for suffix in SUFFIXES if f"{prefix}.{suffix}" not in tensors]
    if missing:
        raise ModelError("GPTQ checkpoint", f"missing tensors {', '.join(missing)}", "qweight, qzeros, scales, g_idx")
    qweight, qzeros, scales, g_idx = (tensors[f"{prefix}.{suffix}"] for suffix in SUFFIXES)
    dimensions = [(tensor.dim(), tensor.is_floating_point()) for tensor in (qweight, qzeros, scales, g_idx)]
    if dimensions != [(2, False), (2, False), (2, True), (1, False)]:
        found = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (qweight, qzeros, scales, g_idx))
        raise ModelError(f"GPTQ checkpoint: {prefix}", found, "int32 qweight, qzeros and g_idx, floating scales")
    in_features, out_features = len(g_idx), qweight.shape[1]
    width = _width(qweight.shape[0], in_features) if bits is None else bits
    groups = scales.shape[0]
    fits = (
        width in WIDTHS
        and qweight.shape[0] == math.ceil(in_features * width / 32)
        and tuple(scales.shape) == (groups, out_features)
        and tuple(qzeros.shape) == (groups, math.ceil(out_features * width / 32))
        and (in_features == 0 or 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups)
    )
    if not fits:
        shapes = ", ".join(f"{s} {tuple(tensors[f'{prefix}.{s}'].shape)}" for s in SUFFIXES)
        raise ModelError(f"GPTQ checkpoint: {prefix}", shapes, "shapes that belong together, 2, 3, 4 or 8 bits")
    stored = unpack_rows(qzeros.T.contiguous(), width, out_features)  # (out, groups)
    zero_points = ((stored.to(torch.int64) + 1) & ((1 << width) - 1)).to(torch.uint8)
    codes = unpack_rows(qweight, width, in_features).T.contiguous()
    return QuantizedLinear(codes, scales.T.contiguous(), zero_points, g_idx.to(torch.int32))


def check_quantization_config(config: Mapping[str, Any], *, where: str = "config.json") -> None:
    """Raise ModelError unless ``quantization_config`` is of the kind that `read_layer` reads rightly."""
    method = config.get("quant_method")
    if method != "gptq":
        raise ModelError(where, f"quant_method {method!r}", "'gptq'", "Start from the model before quantization")
    form = config.get("checkpoint_format", "gptq")
    if form != "gptq":
        raise ModelError(
            where,
            f"checkpoint_format {form!r}",
            "'gptq' (stored zero = zero point - 1)",
            "Save it again in the format 'gptq'; read as such, this one gives garbage",
        )
    changed = (config.get("dynamic") or {}).values()
    for bits in (config.get("bits"), *(entry["bits"] for entry in changed if "bits" in entry)):
        if bits not in WIDTHS:
            raise ModelError(where, f"bits {bits!r}", f"one of {WIDTHS}")


def dequantize_checkpoint(
    tensors: Mapping[str, torch.Tensor], quantization_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the checkpoint with every packed linear as ``PREFIX.weight`` (out, in) fp32; other tensors as they are.

    Raises ModelError for another format than "gptq" or tensors that do not belong together.
    """
    check_quantization_config(quantization_config)
    prefixes = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    packed = {f"{prefix}.{suffix}" for prefix in prefixes for suffix in SUFFIXES}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    bits = {prefix: stored_as(quantization_config, prefix)[0] for prefix in prefixes}
    return plain | {f"{prefix}.weight": dequantize(*read_layer(tensors, prefix, bits=bits[prefix])) for prefix in bits}


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ModelError("bits", str(bits), f"one of {WIDTHS}")


def _width(words: int, in_features: int) -> int:
    """Return the width of ``in_features`` codes in ``words`` words; the last word may be part empty."""
    fitting = [bits for bits in WIDTHS if math.ceil(in_features * bits / 32) == words]
    return fitting[-1] if fitting else 0
