"""AWQ: inputs that are large get finer weights, by a scale per input that the operation before takes back.

`search_scales` chooses the scales of one input from what it is multiplied with, `fold_scales` puts them into a
decoder layer without a change to what it computes, `scale_layer` does both for a whole layer, and `round_clipped`
rounds to nearest with the clip that changes the outputs least. Source: Lin et al., AWQ (arXiv:2306.00978).
Unlike the published code the error is exact, tr(D H D') from the second moment H, instead of measured on stored
activations, and grouped-query attention is scaled too. Knows nothing of files, stages or where moments come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from compress.model.layers import attention, linears
from compress.model.quantization.halves import FP16_SCALE_BITS
from compress.model.quantization.packing import QuantizedLinear, dequantize
from compress.model.quantization.rtn import round_to_nearest

SMALLEST_SIZE = 1e-4  # of a power of the mean size: an input that is nearly silent asks for no scale of its own
NORMS = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}  # first of a step -> what feeds it
Rounding = Callable[[str, torch.Tensor], torch.Tensor]  # name, weight (out, in) -> the values of its codes


@dataclass(frozen=True)
class ScaleChoice:
    """The scales of one input and what they gain.

    Attributes:
        scales: (in,) fp32; weights are multiplied and the input divided by them.
        alpha: exponent of the mean size; 0 when no scale is better.
        error: tr(D H D') summed over the linears that share the input, with ``scales``.
        error_plain: the same without.
    """

    scales: torch.Tensor
    alpha: float
    error: float
    error_plain: float


def channel_scales(mean_abs: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``mean_abs`` (in,) ** ``alpha`` over the geometric middle of its extremes, fp32; 1 for dead inputs."""
    live = mean_abs > 0
    scales = torch.ones(len(mean_abs), dtype=torch.float64)
    if alpha and bool(live.any()):
        powers = mean_abs[live].double().pow(alpha).clamp(min=SMALLEST_SIZE)
        scales[live] = powers / (powers.max() * powers.min()).sqrt()
    return scales.float()


def search_scales(
    weights: Mapping[str, torch.Tensor],
    mean_abs: torch.Tensor,
    moment: torch.Tensor,
    rounding: Rounding,
    *,
    grid_points: int = 20,
) -> ScaleChoice:
    """Return the best of ``grid_points`` exponents 0, 1/n, ... for the linears ``weights`` (out, in) of one input.

    ``mean_abs`` (in,) is the mean size of each input and ``moment`` (in, in) its second moment. ``rounding`` gives
    the values that a weight has after quantization.
    """
    best: ScaleChoice | None = None
    for point in range(grid_points):
        scales = channel_scales(mean_abs, point / grid_points)
        error = 0.0
        for name, weight in weights.items():
            change = (rounding(name, weight * scales) / scales).double() - weight.double()
            error += float(((change @ moment) * change).sum())
        if best is None or error < best.error:
            best = ScaleChoice(scales, point / grid_points, error, error if best is None else best.error_plain)
    if best is None:
        raise ValueError("grid_points must be at least 1")
    return best


def share_over_heads(mean_abs: torch.Tensor, *, kv_heads: int, head_size: int) -> torch.Tensor:
    """Return the mean sizes (heads * head size,) averaged over the query heads that read one key-value head.

    What o_proj is given by these heads comes from the same rows of v_proj, which can take back one scale only.
    """
    grouped = mean_abs.view(kv_heads, -1, head_size)  # query heads of one key-value head lie side by side
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold_scales(layer: nn.Module, names: Sequence[str], scales: torch.Tensor) -> None:
    """Multiply the linears ``names`` by ``scales`` (in,) per input, and divide what gives them this input.

    That is a norm's gain for q, k, v and for gate, up; rows of v_proj for o_proj, where the scales must be the same
    for all query heads of a key-value head; rows of up_proj for down_proj. Biases of v_proj and up_proj go along.
    """
    parts = linears(layer)
    for name in names:
        parts[name].weight.mul_(scales)
    if names[0] in NORMS:
        cast(Any, layer).get_submodule(NORMS[names[0]]).weight.div_(scales)
        return
    before = parts["v_proj" if names[0] == "o_proj" else "up_proj"]
    if names[0] == "o_proj":
        size = int(cast(Any, attention(layer)).head_dim)
        scales = scales.view(before.out_features // size, -1, size)[:, 0].reshape(-1)
    before.weight.div_(scales.unsqueeze(1))
    if before.bias is not None:
        before.bias.div_(scales)


def scale_layer(
    layer: nn.Module,
    measured: Iterable[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]],
    rounding: Rounding,
    *,
    grid_points: int = 20,
) -> dict[tuple[str, ...], ScaleChoice]:
    """Choose and fold the scales of one decoder layer; return the choice for each set of linears.

    ``measured`` gives, for each set of linears that share their input, their names, the mean size of the input and
    its second moment. It is read as it comes, and the layer changes only after its end, so that it may still run.
    """
    found: dict[tuple[str, ...], ScaleChoice] = {}
    parts = linears(layer)
    size = int(cast(Any, attention(layer)).head_dim)
    kv_heads = parts["v_proj"].out_features // size
    for names, mean_abs, moment in measured:
        wanted = share_over_heads(mean_abs, kv_heads=kv_heads, head_size=size) if names == ("o_proj",) else mean_abs
        weights = {name: parts[name].weight.data for name in names}
        found[names] = search_scales(weights, wanted, moment, rounding, grid_points=grid_points)
    for names, choice in found.items():
        if choice.alpha:
            fold_scales(layer, names, choice.scales)
    return found


def round_clipped(
    weight: torch.Tensor,
    moment: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    clip_steps: int = 20,
    levels: Sequence[int] | None = None,
    scale_bits: int = FP16_SCALE_BITS,
) -> QuantizedLinear:
    """Round ``weight`` (out, in) to nearest with groups clipped where that changes the outputs less.

    The clip of a group is searched as if the others were exact. Whether a row is clipped at all is decided by its
    whole error d H d', so that no row is worse than without.
    """
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "levels": levels}
    options["scale_bits"] = scale_bits
    plain = round_to_nearest(weight, **options)
    clipped = round_to_nearest(weight, clip_steps=clip_steps, moment=moment, **options)
    errors = []
    for layer in (plain, clipped):
        change = dequantize(*layer).double() - weight.double()
        errors.append(((change @ moment.double()) * change).sum(dim=1))
    better = (errors[1] < errors[0]).unsqueeze(1)
    return QuantizedLinear(
        torch.where(better, clipped.codes, plain.codes),
        torch.where(better, clipped.scales, plain.scales),
        torch.where(better, clipped.zero_points, plain.zero_points),
        plain.g_idx,
    )
