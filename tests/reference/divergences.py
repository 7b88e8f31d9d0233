"""The divergences of distillation as plain loops in float64, straight from their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.reference.distillation import Row, kl, softmax


def mix(weight: float, one: Row, other: Row) -> list[float]:
    """weight * one + (1 - weight) * other."""
    return [weight * a + (1.0 - weight) * b for a, b in zip(one, other, strict=True)]


def jsd(p: Row, q: Row, beta: float) -> float:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""
    middle = mix(beta, p, q)
    return beta * kl(p, middle) + (1.0 - beta) * kl(q, middle)


OF: dict[str, Callable[[Row, Row, float], float]] = {  # teacher p, student q, the divergence's number
    "forward_kl": lambda p, q, _: kl(p, q),
    "reverse_kl": lambda p, q, _: kl(q, p),
    "cakld": lambda p, q, c: (1.0 - c) * kl(p, q) + c * kl(q, p),
    "jsd": jsd,
    "skew_kl": lambda p, q, a: kl(p, mix(a, p, q)),
    "skew_reverse_kl": lambda p, q, a: kl(q, mix(a, q, p)),
    "skew_pair": lambda p, q, a: kl(p, mix(a, p, q)),  # in text of the teacher, at equal weights
}


def divergence(
    name: str, teacher: Row, student: Row, number: float, *, temperature: float = 1.0, k: int | None = None
) -> float:
    """The divergence of two rows of logits; with ``k``, all but the teacher's top k are one bucket."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if k is not None and k < len(p):
        order = sorted(range(len(p)), key=lambda token: -p[token])
        p, q = ([row[t] for t in order[:k]] + [sum(row[t] for t in order[k:])] for row in (p, q))
    return OF[name](p, q, number)


def adaptive_skew(pairs: list[list[tuple[float, float]]], own: list[bool], skew: float, floor: float) -> list[float]:
    """1 - (1 - skew) m / g per row of (log p, log q) at its labels, clipped; g and m as DistiLLM-2 has them."""
    gaps = []
    for row, flag in zip(pairs, own, strict=True):
        p, q = (math.exp(sum(pair[side] for pair in row) / len(row)) for side in (0, 1))
        gaps.append(q - p if flag else p - q)
    found = []
    for gap, flag in zip(gaps, own, strict=True):
        alike = [g for g, other in zip(gaps, own, strict=True) if other == flag]
        found.append(min(skew, max(floor, 1.0 - (1.0 - skew) * sum(alike) / len(alike) / gap)))
    return found
