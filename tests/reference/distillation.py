"""Losses of distillation as plain loops in float64, straight from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    """Probabilities of one position."""
    highest = max(logits)
    weights = [math.exp((value - highest) / temperature) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def cross_entropy(logits: Row, label: int, label_smoothing: float = 0.0) -> float:
    """-sum t log q with t = (1 - e) one-hot + e / V."""
    q = softmax(logits)
    loss = 0.0
    for token, probability in enumerate(q):
        wanted = label_smoothing / len(q) + (1.0 - label_smoothing if token == label else 0.0)
        loss -= wanted * math.log(probability)
    return loss


def kl(p: Row, q: Row) -> float:
    """sum p log(p / q) over the entries with p > 0."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def forward_kl(teacher_logits: Row, student_logits: Row, temperature: float = 1.0) -> float:
    """KL(teacher || student), both at ``temperature``."""
    return kl(softmax(teacher_logits, temperature), softmax(student_logits, temperature))


def forward_kl_top_k(teacher_logits: Row, student_logits: Row, k: int, temperature: float = 1.0) -> float:
    """KL between the two distributions with everything outside the teacher's top k put into one bucket."""
    p, q = softmax(teacher_logits, temperature), softmax(student_logits, temperature)
    top = sorted(range(len(p)), key=lambda token: -p[token])[:k]
    rest = [token for token in range(len(p)) if token not in top]
    coarse_p = [p[token] for token in top] + ([sum(p[token] for token in rest)] if rest else [])
    coarse_q = [q[token] for token in top] + ([sum(q[token] for token in rest)] if rest else [])
    return kl(coarse_p, coarse_q)


def mixed(
    teacher_logits: Sequence[Row],
    student_logits: Sequence[Row],
    labels: Sequence[int],
    *,
    kd_weight: float,
    temperature: float,
    label_smoothing: float,
) -> float:
    """Sum over positions of (1 - w) CE + w T^2 KL."""
    total = 0.0
    for teacher, student, label in zip(teacher_logits, student_logits, labels, strict=True):
        total += (1.0 - kd_weight) * cross_entropy(student, label, label_smoothing)
        total += kd_weight * temperature**2 * forward_kl(teacher, student, temperature)
    return total


def cakld(teacher_logits: Row, student_logits: Row, confidence: float, temperature: float = 1.0) -> float:
    """g KL(student || teacher) + (1 - g) KL(teacher || student), both at ``temperature``."""
    p, q = softmax(teacher_logits, temperature), softmax(student_logits, temperature)
    return confidence * kl(q, p) + (1.0 - confidence) * kl(p, q)
