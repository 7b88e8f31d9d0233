"""Class scores, integrated gradients and their distance as plain loops, straight from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scores(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]], embeds: Tensor | None = None) -> Tensor:
    """Log-likelihood of each answer behind ``prompt``, one sequence each; ``embeds`` (P, H) stand in for the prompt."""
    found = []
    for answer in answers:
        table = model.get_input_embeddings().weight
        before = table[list(prompt)] if embeds is None else embeds
        logits = model(inputs_embeds=torch.cat([before, table[list(answer)]])[None]).logits[0]
        spread = torch.log_softmax(logits, dim=-1)
        found.append(sum(spread[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))
    return torch.stack(found)


def odds(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]], embeds: Tensor, chosen: int) -> Tensor:
    """Log of the odds of one class against the others."""
    chances = torch.softmax(scores(model, prompt, answers, embeds), 0)
    return torch.log(chances[chosen] / (1 - chances[chosen]))


def attributions(
    model: Any,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    content: range,
    start: Tensor,
    *,
    chosen: int,
    steps: int,
) -> Tensor:
    """Integrated gradients by the midpoint rule: the tokens in ``content`` go from ``start`` (H,) to themselves."""
    inputs = model.get_input_embeddings().weight[list(prompt)].detach()
    baseline = inputs.clone()
    baseline[list(content)] = start
    total = torch.zeros_like(inputs)
    for step in range(steps):
        at = (baseline + (step + 0.5) / steps * (inputs - baseline)).requires_grad_()
        total += torch.autograd.grad(odds(model, prompt, answers, at, chosen), at)[0] / steps
    return (total * (inputs - baseline)).sum(-1)


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """(1 - cosine) / 2."""
    product = sum(a * b for a, b in zip(ours, theirs, strict=True))
    return (1 - product / math.sqrt(sum(a * a for a in ours)) / math.sqrt(sum(b * b for b in theirs))) / 2
