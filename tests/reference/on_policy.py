"""Answers and their loss as plain loops: every token by a whole forward pass, every sum by its definition."""

from __future__ import annotations

import math
from typing import Any

import torch

from compress.model.distillation.rollouts import uniforms

STEADY = 1.0 - 1e-12


def distribution(model: Any, ids: list[int], vocab: int, temperature: float = 1.0) -> torch.Tensor:
    """The next token's probabilities after ``ids``, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1, :vocab].double()
    return torch.softmax(logits / temperature, dim=-1)


def drawn(probabilities: torch.Tensor, draw: float) -> int:
    """The first token at which the running sum passes ``draw`` of the whole."""
    total, goal = 0.0, draw * STEADY * float(probabilities.sum())
    for token, probability in enumerate(probabilities.tolist()):
        total += probability
        if total > goal:
            return token
    return len(probabilities) - 1


def speculated(student: Any, teacher: Any, ask: Any, drawing: Any, top_k: int) -> list[int]:
    """Speculative KD token by token (Xu et al. 2024, algorithm 1), the replaced tokens from the teacher's top k."""
    ids, draws = list(ask.prompt), uniforms(drawing.seed, ask.step, ask.row, ask.limit)
    for place in range(ask.limit):
        token = drawn(distribution(student, ids, drawing.vocab, drawing.temperature), draws[0, place])
        judged = distribution(teacher, ids, drawing.vocab, drawing.temperature)
        best = sorted(range(drawing.vocab), key=lambda t: -float(judged[t]))[:top_k]
        if token not in best:
            kept = torch.zeros_like(judged)
            kept[best] = judged[best]
            token = drawn(kept, draws[1, place])
        ids.append(token)
        if token in drawing.stops:
            break
    return ids


def returns(rewards: list[float], discount: float, normalize: bool) -> list[float]:
    """For each token the discounted sum, or mean, of the rewards of those after it."""
    found = []
    for t in range(len(rewards)):
        later = range(t + 1, len(rewards))
        total = sum(discount ** (s - t - 1) * rewards[s] for s in later)
        weight = sum(discount ** (s - t - 1) for s in later)
        found.append(total / weight if normalize and weight else total)
    return found


def policy_surrogate(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: list[int],
    counts: list[int],
    chances: list[float],
    *,
    discount: float,
    normalize: bool,
    largest_weight: float,
) -> tuple[float, torch.Tensor]:
    """The value of MiniLLM's loss, and a sum whose autograd gradient is its gradient."""
    log_q, log_p = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    value, surrogate, at = 0.0, torch.zeros((), dtype=student_logits.dtype), 0
    for count in counts:
        span = range(at, at + count)
        rewards = [float(log_p[t, labels[t]] - log_q[t, labels[t]].detach()) for t in span]
        after = returns(rewards, discount, normalize)
        for t in span:
            own = log_q[t, labels[t]]
            weight = min(largest_weight, math.exp(float(own.detach()) - chances[t]))
            single = (log_q[t].exp() * (log_q[t] - log_p[t])).sum()
            value += weight * float(single.detach())
            surrogate = surrogate + weight * (single - after[t - at] * own)
        at += count
    return value, surrogate
