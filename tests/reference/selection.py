"""Slow, plain versions of selection and condensation: loops and float64, nothing clever."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np


def jaccard(a: set[str], b: set[str]) -> float:
    """Counted element by element."""
    every = set(a)
    every.update(b)
    both = [x for x in every if x in a and x in b]
    return len(both) / len(every) if every else 1.0


def char_shingles(text: str, size: int) -> set[str]:
    """Runs of characters of a text of plain words, with one space on either side."""
    padded = " " + text + " "
    found = set()
    for start in range(len(padded)):
        piece = padded[start : start + size]
        if len(piece) == size:
            found.add(piece)
    return found or {padded}


def keep_first(sets: Sequence[set[str]], answers: Sequence[str], threshold: float) -> list[int | None]:
    """For every set the most similar earlier kept one with an equal answer, None when it is kept."""
    result: list[int | None] = []
    for i, own in enumerate(sets):
        best, best_value = None, 0.0
        for j in range(i):
            if result[j] is None and answers[j] == answers[i]:
                value = jaccard(own, sets[j])
                if value >= threshold and value > best_value:
                    best, best_value = j, value
        result.append(best)
    return result


def radius(points: np.ndarray, centers: Sequence[int]) -> float:
    """Largest distance of any point to its nearest center."""
    worst = 0.0
    for point in points:
        worst = max(worst, min(math.dist(point, points[c]) for c in centers))
    return worst


def best_radius(points: np.ndarray, count: int) -> float:
    """Smallest radius over all choices of ``count`` centers."""
    return min(radius(points, centers) for centers in itertools.combinations(range(len(points)), count))


def farthest_points(points: np.ndarray, count: int) -> list[int]:
    """The greedy choice, from the definition."""
    mean = [float(np.mean(points[:, d], dtype=np.float64)) for d in range(points.shape[1])]
    chosen = [min(range(len(points)), key=lambda i: (math.dist(points[i], mean), i))]
    while len(chosen) < count:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(math.dist(points[i], points[c]) for c in chosen), -i)))
    return chosen


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """All pairs counted."""
    won = []
    for s, p in zip(scores, positive, strict=True):
        for t, q in zip(scores, positive, strict=True):
            if p and not q:
                won.append(1.0 if s > t else 0.5 if s == t else 0.0)
    return sum(won) / len(won)
