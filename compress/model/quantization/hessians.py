"""Second moments of what the linears of a decoder layer are given, measured on calibration batches.

`position_weights` says how much each position counts, `input_moments` runs a layer and adds up x x' per linear,
`second_moment` does it for plain activations. Knows nothing of quantization, files or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.model.calibration import Batch
from compress.model.layers import linears

# linears that are given the same input; GPTQ rounds them with one Hessian, in this order (true sequential)
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def position_weights(batch: Batch, *, prompt_weight: float) -> torch.Tensor:
    """Return the weight of each position (B, T): 1 where the next token is a target, ``prompt_weight`` elsewhere.

    Padding weighs nothing.
    """
    predicts = torch.zeros_like(batch.answer)
    predicts[:, :-1] = batch.answer[:, 1:]
    weights = torch.where(predicts.bool(), 1.0, prompt_weight)
    return weights * batch.attention_mask


def second_moment(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weighted mean of x x' (in, in) fp64 over all positions of ``inputs``, each (B, T, in)."""
    total = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64)
    for values, weight in zip(inputs, weights, strict=True):
        total += _moment(values, weight)
    return total / max(float(sum(weight.double().sum() for weight in weights)), 1e-12)


def input_moments(
    layer: nn.Module,
    names: Sequence[str],
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    hidden: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the weighted mean of x x' (in, in) fp64 of the inputs of the linears ``names`` of ``layer``.

    ``hidden`` are the layer's inputs, one (B, T, hidden) per batch, and ``run`` is called as ``run(layer, hidden)``.
    """
    modules = linears(layer)
    totals = {name: torch.zeros((modules[name].in_features,) * 2, dtype=torch.float64) for name in names}
    current: dict[str, torch.Tensor] = {}

    def add(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        totals[name] += _moment(args[0], current["weight"])

    hooks = [modules[name].register_forward_pre_hook(partial(add, name)) for name in names]
    try:
        for values, weight in zip(hidden, weights, strict=True):
            current["weight"] = weight
            run(layer, values)
    finally:
        for hook in hooks:
            hook.remove()
    count = max(float(sum(weight.double().sum() for weight in weights)), 1e-12)
    return {name: total / count for name, total in totals.items()}


def _moment(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of x x' (in, in) fp64 of one batch; the product itself is fp32."""
    used = weight > 0
    rows = values[used] * weight[used].sqrt().unsqueeze(1)  # (n, in)
    return (rows.T @ rows).double()
