"""Second moments of what the linears of a decoder layer are given, measured on calibration batches.

`position_weights` says how much each position counts, `second_moment` adds up x x' over batches, `size_and_moment`
the sizes of the inputs too.
Knows nothing of layers, quantization, files or stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from compress.model.calibration import Batch


def position_weights(batch: Batch, *, prompt_weight: float) -> torch.Tensor:
    """Return the weight of each position (B, T): 1 where the next token is a target, ``prompt_weight`` elsewhere.

    Padding weighs nothing.
    """
    predicts = torch.zeros_like(batch.answer)
    predicts[:, :-1] = batch.answer[:, 1:]
    weights = torch.where(predicts.bool(), 1.0, prompt_weight)
    return weights * batch.attention_mask


def second_moment(inputs: Iterable[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weighted mean of x x' (in, in) fp64 over all positions.

    ``inputs`` gives one (B, T, in) per batch and is read once, so that it may be a generator; ``weights`` holds the
    (B, T) weights of the batches. A product is fp32, their sum fp64. No weight at all gives zeros.
    """
    total = torch.zeros(1, 1, dtype=torch.float64)
    for values, weight in zip(inputs, weights, strict=True):
        total = total + _gram(_weighted(values, weight)).double()
    return total / max(float(sum(weight.double().sum() for weight in weights)), 1e-12)


def _weighted(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the positions (n, in) fp32 of ``values`` (B, T, in) that weigh anything, times the root of ``weight``."""
    flat = weight.flatten()
    used = flat.nonzero().squeeze(1)
    return values.flatten(0, 1).index_select(0, used).float() * flat[used].sqrt().unsqueeze(1)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Return rows' rows (in, in), exactly symmetric: what lies left of the diagonal's blocks is mirrored."""
    width = rows.shape[1]
    size = max(64, -(-width // 4))  # four blocks do 5/8 of the whole product's work
    found = rows.new_empty(width, width)
    for at in range(0, width, size):
        block = slice(at, at + size)
        found[block, at:] = rows[:, block].T @ rows[:, at:]
        found[at + size :, block] = found[block, at + size :].T
    return found


def size_and_moment(
    inputs: Iterable[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean of abs(x) (in,) fp64 beside the `second_moment`, reading ``inputs`` once."""
    sizes = torch.zeros(1, dtype=torch.float64)

    def summed() -> Iterator[torch.Tensor]:
        nonlocal sizes
        for values, weight in zip(inputs, weights, strict=True):
            sizes = sizes + (values.float().abs() * weight.unsqueeze(-1)).sum(dim=(0, 1)).double()
            yield values

    moment = second_moment(summed(), weights)
    return sizes / max(float(sum(weight.double().sum() for weight in weights)), 1e-12), moment


def paired_moments(
    inputs: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted means of x x' and of z x', both (in, in) fp64: ``inputs`` give x, ``wanted`` z.

    Arguments as those of `second_moment`; both streams are read in step.
    """
    moment = cross = torch.zeros(1, 1, dtype=torch.float64)
    for values, others, weight in zip(inputs, wanted, weights, strict=True):
        rows = _weighted(values, weight)
        moment = moment + _gram(rows).double()
        cross = cross + (_weighted(others, weight).T @ rows).double()
    whole = max(float(sum(weight.double().sum() for weight in weights)), 1e-12)
    return moment / whole, cross / whole


def corrected(weight: torch.Tensor, moment: torch.Tensor, cross: torch.Tensor, *, damp_frac: float) -> torch.Tensor:
    """Return the weight (out, in) that gives on the changed inputs x what ``weight`` gave on the plain inputs z.

    Least squares over ``moment`` E[x x'] and ``cross`` E[z x'], drawn towards ``weight`` by ``damp_frac`` of the mean
    diagonal: (W C + d W) (H + d I)^-1. With no change (C = H) or endless damping it is ``weight``. Quantizing this
    weight instead of the plain one makes up for the errors of the layers before it: the aim of GPTAQ (Li et al. 2025,
    arXiv:2504.02692, section 3), reached by one solve before the columns are rounded. Where the moments are not
    finite or zero, or the fit cannot be solved, ``weight`` itself comes back.
    """
    mean = float(moment.diagonal().mean())
    if not (bool(torch.isfinite(moment).all()) and bool(torch.isfinite(cross).all())) or mean <= 0:
        return weight
    damping = damp_frac * mean
    factor, failed = torch.linalg.cholesky_ex(moment + damping * torch.eye(len(moment), dtype=moment.dtype))
    if int(failed):
        return weight
    plain = weight.double()
    solved = torch.cholesky_solve((plain @ cross + damping * plain).T, factor).T
    return solved.to(weight.dtype).contiguous()
