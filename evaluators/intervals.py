"""Intervals of shares near 0 and 1, where resampling sees no spread: 30 of 30 right is not 100 % to 100 %.

`proportion` is the exact interval of a share (Clopper & Pearson 1934), `wilson` the score interval of a mean of values
between 0 and 1. `paired_difference` and `paired_ratio` compare two models on the same rows: the score intervals of
Tango 1998 (Statistics in Medicine 17) and of Tang, Tang & Chan 2003 (Statistics in Medicine 22), with the exact bound
where all changes go one way or there is none, so that nothing passes because few rows were looked at. Pure functions of
counts; know nothing of what the rows mean. Shares throughout, not per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

HALVINGS = 60  # of a bisection: beyond double precision on intervals of length 1
LARGEST_RATIO = 1e12


def proportion(successes: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which ``successes`` of ``rows`` were seen: it covers the truth at ``level`` or more.

    Raises:
        ValueError: counts or level out of range.
    """
    if not 0 <= successes <= rows or rows < 1:
        raise ValueError(f"counts: got {successes} of {rows}; expected 0 <= successes <= rows, at least one row")
    half = (1 - _checked(level)) / 2
    low = 0.0 if successes == 0 else _root(lambda p: _at_least(successes, rows, p) - half, 0.0, successes / rows)
    high = 1.0 if successes == rows else _root(lambda p: half - _at_most(successes, rows, p), successes / rows, 1.0)
    return low, high


def wilson(mean: float, rows: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of the mean of ``rows`` values between 0 and 1 (Wilson 1927).

    No values between 0 and 1 vary more than zeros and ones of the same mean do, so it is wide enough for any of them.
    """
    square = _z(level) ** 2
    middle = (mean + square / (2 * rows)) / (1 + square / rows)
    half = math.sqrt(max(0.0, mean * (1 - mean) * square / rows + square * square / (4 * rows * rows)))
    half /= 1 + square / rows
    return max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))


def paired_difference(up: float, down: float, rows: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of (share right after) - (share right before) over the same ``rows``.

    ``up`` rows are right after alone, ``down`` before alone; the others did not change. Tango's score interval. Where
    no row went the other way, it reaches at least to the exact bound of the share that changed.
    """
    _check_pairs(up, down, rows)
    z, seen = _z(level), (up - down) / rows
    low = _root(lambda d: z - _difference_score(d, up, down, rows), -1.0, seen)
    high = _root(lambda d: -z - _difference_score(d, up, down, rows), seen, 1.0)
    if not up:
        low = min(low, -_most(down, rows, level))
    if not down:
        high = max(high, _most(up, rows, level))
    return low, high


def paired_ratio(up: float, down: float, both: float, rows: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of (share right after) / (share right before); ``both`` rows are right both times, else as above.

    The score interval of Tang, Tang & Chan, with the exact bound where all changes go one way or there is none.

    Raises:
        ValueError: no row was right before: there is nothing to divide by.
    """
    _check_pairs(up, down, rows)
    after, before = both + up, both + down
    if before <= 0:
        raise ValueError("ratio: no row was right before")
    z, seen = _z(level), after / before
    low, high = 0.0, math.inf
    if after:
        low = _root(lambda r: z - _ratio_score(r, up, down, both, rows), 0.0, seen)
    if _ratio_score(LARGEST_RATIO, up, down, both, rows) < -z:
        top = _root(
            lambda log: -z - _ratio_score(math.exp(log), up, down, both, rows),
            math.log(max(seen, 1 / LARGEST_RATIO)),
            math.log(LARGEST_RATIO),
        )
        high = math.exp(top)
    if not up:
        low = min(low, 1 - _most(down, before, level))
    if not down and after:
        spared = 1 - _most(up, after, level)
        high = max(high, 1 / spared if spared > 0 else math.inf)
    return low, high


def effective_rows(weights: NDArray[np.float64]) -> float:
    """How many rows of equal weight say as much as rows of ``weights`` (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _difference_score(difference: float, up: float, down: float, rows: float) -> float:
    """Tango's statistic; the likeliest share of ``down`` under ``difference`` solves a quadratic."""
    linear = -up - down + (2 * rows - up + down) * difference
    constant = -down * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear * linear - 8 * rows * constant)) - linear) / (4 * rows)
    spread = rows * (2 * share + difference * (1 - difference))
    return _standardised(up - down - rows * difference, spread)


def _ratio_score(ratio: float, up: float, down: float, both: float, rows: float) -> float:
    """The statistic of Tang, Tang & Chan."""
    after, before, right = both + up, both + down, both + up + down
    square = rows * (1 + ratio)
    linear = before * ratio * ratio - (after + 2 * down)
    constant = down * (1 - ratio) * right / rows
    share = (math.sqrt(max(0.0, linear * linear - 4 * square * constant)) - linear) / (2 * square)
    return _standardised(after - ratio * before, rows * (1 + ratio) * share + right * (ratio - 1))


def _standardised(distance: float, spread: float) -> float:
    if spread <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(spread)


def _most(count: float, rows: float, level: float) -> float:
    """Exact upper bound of a share; counts of weighted rows are taken as whole ones, to the safe side."""
    whole = max(1, math.floor(rows))
    return proportion(min(math.ceil(count), whole), whole, level)[1]


def _at_least(count: int, rows: int, p: float) -> float:
    """P(X >= count) of a binomial."""
    return _mass(count, rows, rows, p)


def _at_most(count: int, rows: int, p: float) -> float:
    """P(X <= count) of a binomial."""
    return _mass(0, count, rows, p)


def _mass(first: int, last: int, rows: int, p: float) -> float:
    if p <= 0 or p >= 1:
        sure = 0 if p <= 0 else rows
        return float(first <= sure <= last)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, rows + 1)))])  # of factorials
    k = np.arange(first, last + 1)
    terms = logs[rows] - logs[k] - logs[rows - k] + k * math.log(p) + (rows - k) * math.log1p(-p)
    return float(np.exp(terms).sum())


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function passes 0 between ``low`` and ``high``; the nearer end where it does not."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2 + 0.0  # no -0


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + _checked(level)) / 2)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}; expected a share between 0 and 1, such as 0.95")
    return level


def _check_pairs(up: float, down: float, rows: float) -> None:
    if min(up, down) < 0 or rows <= 0 or up + down > rows * (1 + 1e-9):
        raise ValueError(f"pairs: got {up:g} and {down:g} changed of {rows:g} rows; expected counts within the rows")
