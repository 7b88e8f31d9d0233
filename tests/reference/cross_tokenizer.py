"""Alignment and losses across tokenizers as plain loops, straight from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]
Symbols = Sequence[int]


def chunks(teacher: Sequence[Symbols], student: Sequence[Symbols]) -> list[tuple[int, int, int, int]]:
    """Chunks of two spellings of the very same text: walk both until both stand at the same place."""
    found, begun, a, b = [], (0, 0), 0, 0
    while a < len(teacher) or b < len(student):
        here, there = sum(map(len, teacher[:a])), sum(map(len, student[:b]))
        if a > begun[0] and b > begun[1] and here == there:
            found.append((begun[0], a, begun[1], b))
            begun = (a, b)
        if here <= there:
            a += 1
        else:
            b += 1
    return [*found, (begun[0], a, begun[1], b)]


def sorted_distance(q: Row, p: Row) -> float:
    """Sum of |q_(i) - p_(i)| of both in falling order, the shorter filled up with zeros."""
    width = max(len(q), len(p))
    ordered = [sorted([*row, *[0.0] * (width - len(row))], reverse=True) for row in (q, p)]
    return sum(abs(a - b) for a, b in zip(*ordered, strict=True))


def alm(student: float, teacher: float, temperature: float) -> float:
    """Binary KL of two chunk likelihoods to the power of 1 / temperature, times the temperature."""
    p, q = math.exp(teacher) ** (1 / temperature), math.exp(student) ** (1 / temperature)
    return temperature * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def gold(
    q: Row, p: Row, student: tuple[int, float], teacher: tuple[int, float], common: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """(KL over shared outcomes, sorted distance of all others) of a chunk.

    ``student`` and ``teacher`` are the first token and the probability of the others given it; ``common`` pairs ids of
    the teacher with ids of the student.
    """
    pairs = [(p[teacher[0]] * teacher[1], q[student[0]] * student[1])]
    ours, theirs = set(), set()
    for here, there in common:
        if here != teacher[0] and there != student[0]:
            pairs.append((p[here], q[there]))
            ours.add(here)
            theirs.add(there)
    matched = sum(a * math.log(a / b) - a + b for a, b in pairs)
    rest_p = [value for token, value in enumerate(p) if token not in ours and token != teacher[0]]
    rest_q = [value for token, value in enumerate(q) if token not in theirs and token != student[0]]
    rest_p.append(p[teacher[0]] * (1 - teacher[1]))
    rest_q.append(q[student[0]] * (1 - student[1]))
    return matched, sorted_distance(rest_q, rest_p)


def groups(edges: Row, joins: Sequence[bool], threshold: float) -> list[list[int]]:
    """Runs of chunks that end where a word is expected; what meets a gap before that is dropped."""
    found: list[list[int]] = []
    begun: list[int] = []
    for number, (edge, join) in enumerate(zip(edges, joins, strict=True)):
        begun.append(number)
        if math.exp(edge) >= threshold:
            found.append(begun)
            begun = []
        elif not join:
            begun = []
    return found
