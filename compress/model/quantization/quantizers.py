"""Weights rounded in the forward pass and trained through it: one rule per number of bits.

Every rule writes a weight as level * step, the level an integer that `levels` finds, the step one per group and always
an fp16 number; so what a forward pass computes with is what `FakeQuantLinear.coded` stores, bit for bit. Rounding
passes gradients straight through (Bengio et al. 2013). Rules:

- ``affine``: levels -zero ... top - zero (EfficientQAT, Chen et al. 2024, arXiv:2407.11062); trains the step, and the
  zero point too where that is asked for.
- ``lsq``: the symmetric grid of Esser et al. 2020 (arXiv:1902.08153), which ParetoQ takes for 3 and 4 bits.
- ``elastic``: ParetoQ's stretched grid for 2 bits, levels -3, -1, 1, 3 of a quarter of alpha (Liu et al. 2025,
  arXiv:2502.02631). Its middle lies between two codes: stored in 4 bits.
- ``ternary``: ParetoQ's grid of three, -1, 0, 1 of two thirds of alpha; stored in 2 bits.

Knows nothing of models, data or files. Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.model.quantization.packing import QuantizedLinear, group_index, quantize
from compress.model.quantization.params import Rule
from compress.model.quantization.rtn import SMALLEST_CLIP

CLIP = 0.99  # of alpha, in the stretched rules: what is beyond it passes no gradient (ParetoQ)
STRETCHED = {"elastic": 4.0, "ternary": 1.5}  # alpha in steps
MIDDLE = {"elastic": 8, "ternary": 2}  # the code of level 0
INSIDE = 1 / 8  # of a step from a code: how far a latent weight may lie that must round to that code
ZERO_SPEED = 32.0  # steps of a zero point per unit of its parameter: an optimizer moves a parameter by its rate
_TINY, _HUGE = 2.0**-24, 65504.0  # of fp16


def levels(weight: Tensor, step: Tensor, zero: Tensor, *, bits: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the integer level of each weight, and whether a gradient passes there; all tensors (O, I).

    ``affine`` lets it pass where the rounded weight is on the grid, ``lsq`` where the weight lies between its ends,
    the stretched rules within `CLIP` of alpha.
    """
    ratio = weight / step
    if rule in STRETCHED:
        reach = CLIP * STRETCHED[rule]
        if rule == "elastic":
            found = torch.round(ratio.clamp(-reach, reach) / 2 - 0.5) * 2 + 1
        else:
            found = torch.round(ratio.clamp(-reach, reach))
        return found, ratio.abs() <= reach
    low, high = -zero, ((1 << bits) - 1) - zero
    nearest = torch.round(ratio)
    found = torch.minimum(torch.maximum(nearest, low), high)
    return found, (ratio >= low) & (ratio <= high) if rule == "lsq" else nearest == found


class RoundThrough(torch.autograd.Function):
    """level * step (O, I), with the gradients of what stands beside it when the rounding errors are held fixed.

    To the weight 1 inside and 0 outside; to the step level - weight / step inside and the level outside, times
    ``factor``; to the zero point 0 inside and -step outside, where a moved zero point moves the end of the grid.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        zero: Tensor,  # noqa: ARG004 - the level holds it already; it stands here for its gradient
        level: Tensor,
        inside: Tensor,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, level, inside)
        ctx.factor = factor
        return level * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, level, inside = ctx.saved_tensors
        given = outer[0]
        d_weight = given * inside
        d_step = given * torch.where(inside, level - weight / step, level) if ctx.needs_input_grad[1] else None
        d_zero = (d_weight - given) * step if ctx.needs_input_grad[2] else None
        if d_step is not None and ctx.factor != 1.0:
            d_step = d_step * ctx.factor
        return d_weight, d_step, d_zero, None, None, None


def _through(rounded: Tensor, values: Tensor) -> Tensor:
    """``rounded``, exactly, with the gradient of ``values``."""
    return rounded.detach() + (values - values.detach())


class FakeQuantLinear(nn.Linear):
    """A linear whose ``weight`` (O, I) is rounded anew at every use, from latent weights and steps that can be trained.

    Trained are ``latent`` (O, I), ``log_step`` (O * G,), the logarithm of what a step has grown by, and with
    ``train_zero`` ``zero_shift`` (O * G,). A logarithm lets one learning rate serve steps of all sizes, keeps them
    positive, and starts at zero: untrained, the module is exactly the grid it was given.
    """

    start_step: Tensor  # (O, G), the steps where log_step is 0
    start_zero: Tensor  # (O, G)
    g_idx: Tensor  # (I,)
    fixed_level: Tensor | None  # (O, I), once the codes are fixed
    zero_shift: nn.Parameter | None

    def __init__(
        self,
        latent: Tensor,
        grid: QuantizedLinear,
        *,
        bits: int,
        rule: Rule,
        bias: Tensor | None = None,
        train_zero: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = latent.shape
        self.bits, self.rule = bits, rule
        self.latent = nn.Parameter(latent.detach().clone().float())
        self.log_step = nn.Parameter(torch.zeros(grid.scales.numel()))
        self.zero_shift = nn.Parameter(torch.zeros(grid.scales.numel())) if train_zero else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone().float()))
        self.register_buffer("start_step", grid.scales.float())
        self.register_buffer("start_zero", grid.zero_points.float())
        self.register_buffer("g_idx", grid.g_idx)
        self.register_buffer("fixed_level", None)
        groups = grid.scales.shape[1]
        size = self.in_features // groups
        even = self.in_features % groups == 0 and torch.equal(grid.g_idx, group_index(self.in_features, size))
        self._even = size if even else 0
        top = 1 if rule == "ternary" else (1 << bits) - 1 - (1 << (bits - 1))
        shared = self.in_features / groups
        # LSQ, section 2.2: keeps the step's share of the gradient's norm near that of the weights it serves
        self._factor = 1.0 if rule == "affine" else 1.0 / math.sqrt(shared * top)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weights (O, I) fp32."""
        step = self._spread(self.step())
        if self.fixed_level is not None:
            return self.fixed_level * step
        zero = self._spread(self.zero())
        level, inside = levels(self.latent.detach(), step.detach(), zero.detach(), bits=self.bits, rule=self.rule)
        return cast(Tensor, cast(Any, RoundThrough.apply)(self.latent, step, zero, level, inside, self._factor))

    def step(self) -> Tensor:
        """The steps (O, G), fp16 numbers in fp32."""
        grown = self.start_step * self.log_step.view_as(self.start_step).exp()
        return _through(grown.clamp(_TINY, _HUGE).to(torch.float16).to(grown.dtype), grown)

    def zero(self) -> Tensor:
        """The codes of level 0 (O, G), whole numbers from 1 (0 wraps around in the GPTQ layout) in fp32."""
        start = self.start_zero
        if self.zero_shift is None:
            return start
        moved = start + ZERO_SPEED * self.zero_shift.view_as(start)
        return _through(torch.round(moved).clamp(1.0, float((1 << self.bits) - 1)), moved)

    def _spread(self, values: Tensor) -> Tensor:
        """Values (O, G) of the groups, for each weight (O, I)."""
        if self._even:
            return values.unsqueeze(2).expand(-1, -1, self._even).reshape(len(values), -1)
        return values.index_select(1, self.g_idx.long())

    @torch.no_grad()
    def coded(self) -> QuantizedLinear:
        """The codes of `weight`: their values are its values, bit for bit."""
        step, zero = self.step(), self.zero()
        level = self.fixed_level
        if level is None:
            level, _ = levels(self.latent, self._spread(step), self._spread(zero), bits=self.bits, rule=self.rule)
        codes = (level + self._spread(zero)).to(torch.uint8)
        halves = step.to(torch.float16)
        return QuantizedLinear(codes.cpu(), halves.cpu(), zero.to(torch.uint8).cpu(), self.g_idx.cpu())

    @torch.no_grad()
    def freeze_codes(self) -> None:
        """Fix the codes as they are now; only the steps stay trainable (EfficientQAT's second phase)."""
        step, zero = self.step(), self.zero()
        self.fixed_level, _ = levels(
            self.latent, self._spread(step), self._spread(zero), bits=self.bits, rule=self.rule
        )
        self.start_step, self.start_zero = step, zero
        self.log_step.zero_()
        self.latent.requires_grad_(False)
        self.zero_shift = None


def cell_weights(weight: Tensor, grid: QuantizedLinear, *, bits: int) -> Tensor:
    """Return latent weights (O, I) fp32 that round to the codes of ``grid``: ``weight`` where it does so itself.

    What GPTQ chose is often not what the weight would round to. Such a weight is put on its own side of the code,
    `INSIDE` of a step from it: at the edge of the cell the first steps would undo what GPTQ found. Beyond the ends of
    the grid it stays where it is.
    """
    index = grid.g_idx.long()
    step, zero = grid.scales.float()[:, index], grid.zero_points.float()[:, index]
    level = grid.codes.float() - zero
    ratio = weight.float() / step
    low = torch.where(grid.codes == 0, -math.inf, level - INSIDE)
    high = torch.where(grid.codes == (1 << bits) - 1, math.inf, level + INSIDE)
    kept = torch.minimum(torch.maximum(ratio, low), high) * step
    same = quantize(weight.float(), grid.scales, grid.zero_points, grid.g_idx, bits=bits) == grid.codes
    return torch.where(same, weight.float(), kept)


def stretched_grid(weight: Tensor, *, rule: Rule, group_size: int, clip_steps: int = 0) -> QuantizedLinear:
    """Return the codes of a stretched rule with alpha the largest weight of each group, as ParetoQ starts.

    With ``clip_steps`` alphas down to `SMALLEST_CLIP` of that are tried, and the one of least squared error is taken.
    A group of zeros gets the smallest step there is, since ``elastic`` has no zero.
    """
    rows, inputs = weight.shape
    g_idx = group_index(inputs, group_size)
    index, work = g_idx.long(), weight.float()
    parts = torch.split(work.abs(), inputs if group_size == -1 else group_size, dim=1)
    largest = torch.stack([part.amax(dim=1) for part in parts], dim=1)  # (O, G)
    best = torch.full_like(largest, math.inf)
    scales = torch.ones_like(largest, dtype=torch.float16)
    zero = torch.full((rows, inputs), float(MIDDLE[rule]))
    for share in torch.linspace(1.0, SMALLEST_CLIP, clip_steps + 1).tolist():
        halves = (largest * share / STRETCHED[rule]).clamp(_TINY, _HUGE).to(torch.float16)
        step = halves.float()[:, index]
        level, _ = levels(work, step, zero, bits=2, rule=rule)
        error = torch.zeros_like(best).index_add_(1, index, (level * step - work).square())
        scales = torch.where(error < best, halves, scales)
        best = torch.minimum(error, best)
    level, _ = levels(work, scales.float()[:, index], zero, bits=2, rule=rule)
    zero_points = torch.full(largest.shape, MIDDLE[rule], dtype=torch.uint8)
    return QuantizedLinear((level + zero).to(torch.uint8), scales, zero_points, g_idx)
