"""Intervals by the bootstrap: of a mean, of a paired difference of means, of a ratio of sums; see also `intervals`.

Percentile intervals from resampled rows (Efron & Tibshirani 1993, chapter 13); pairs are resampled together
(chapter 8). Seeded, vectorised in slices so that memory stays flat. Knows nothing of what the rows mean.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SLICE = 4_000_000  # resampled values held at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its interval; ``rows`` is how many rows stand behind it.

    An end that nothing is known of is infinite. ``method`` is how the interval was made, ``note`` what a reader must
    know of it.
    """

    mean: float
    low: float
    high: float
    rows: int
    method: str = "bootstrap"
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("mean", "low", "high"):  # 0 has no sign here: a drop of -0 reads like a gain
            object.__setattr__(self, name, getattr(self, name) + 0.0)

    def signed(self, sign: float) -> Interval:
        """Of the quantity times ``sign``, which is 1 or -1."""
        low, high = sorted((sign * self.low, sign * self.high))
        return replace(self, mean=sign * self.mean, low=low, high=high)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def column(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """``values`` as a finite float array (rows,); ValueError otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}; expected one value per row, at least one row")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array


def resampled_sums(table: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Column sums of ``samples`` resamples of the rows of ``table`` (rows, k) -> (samples, k)."""
    rng, rows = np.random.default_rng(seed), len(table)
    sums = np.empty((samples, table.shape[1]))
    step = max(1, SLICE // rows)
    for at in range(0, samples, step):
        picks = rng.integers(0, rows, size=(min(step, samples - at), rows))
        for k in range(table.shape[1]):
            sums[at : at + len(picks), k] = table[:, k][picks].sum(axis=1)
    return sums


def percentiles(draws: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The central ``level`` share of ``draws``."""
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}; expected a share between 0 and 1, such as 0.95")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: ArrayLike, *, seed: int = 0, samples: int = 10_000, level: float = 0.95) -> Interval:
    """Interval of the mean of ``values`` (rows,)."""
    array = column(values, "values")
    means = resampled_sums(array[:, None], samples, seed)[:, 0] / len(array)
    return Interval(float(array.mean()), *percentiles(means, level), len(array))


def paired_difference(
    left: ArrayLike, right: ArrayLike, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Interval of ``mean(left - right)``, row i of both being the same test row."""
    a, b = column(left, "left"), column(right, "right")
    if len(a) != len(b):
        raise ValueError(f"paired rows: got {len(a)} and {len(b)}; the two must be scored on the same rows")
    return interval(a - b, seed=seed, samples=samples, level=level)


def ratio(
    numerator: ArrayLike, denominator: ArrayLike, *, seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Interval:
    """Interval of ``sum(numerator) / sum(denominator)``, rows resampled whole: a loss per token over rows."""
    a, b = column(numerator, "numerator"), column(denominator, "denominator")
    if len(a) != len(b):
        raise ValueError(f"paired rows: got {len(a)} and {len(b)}")
    if (b < 0).any() or b.sum() <= 0:
        raise ValueError("denominator: expected counts of at least 0, not all 0")
    sums = resampled_sums(np.stack([a, b], axis=1), samples, seed)
    sums = sums[sums[:, 1] > 0]
    return Interval(float(a.sum() / b.sum()), *percentiles(sums[:, 0] / sums[:, 1], level), len(a))
