"""Scores per test row, kept so that two models can be compared row by row, and figures drawn from them.

A `Scores` file holds, for every metric, one numerator and one weight per row: an exact match is (0 or 1, 1), a loss
is (nats, tokens). The metric's value is the ratio of the sums, for perplexity the exponential of it. `measure` gives
value and interval, `difference` and `ratio` compare two files over the same rows (Efron & Tibshirani 1993, chapter 8:
pairs are resampled together). Knows nothing of how a row was scored, of models, or of limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # that of typing is not read by pydantic before Python 3.12

from compress.errors import StoreError
from compress.files import json_text, write_whole
from compress.json_reader import checked, read_table
from compress.run_record import Measure
from evaluators.bootstrap import Interval, percentiles, resampled_sums

Array = NDArray[np.float64]

FILE = "scores.json"
LOWER_IS_BETTER = frozenset({"perplexity", "nll", "kl"})
EXPONENTIAL = frozenset({"perplexity"})  # exp of the mean loss
_MOST_NATS = 100.0  # a broken model's loss: its exponential would be infinite, which no JSON and no chart can hold


def higher_is_better(metric: str) -> bool:
    """Whether more of ``metric`` is better."""
    return metric not in LOWER_IS_BETTER


class _Rows(TypedDict):
    """Values of one metric, row by row."""

    ids: list[str]
    sums: list[float]
    weights: list[float]


class _Document(TypedDict):
    """The whole of ``scores.json``."""

    subject: str
    parameters: int | None
    bytes: int | None
    order: list[str]
    rows: dict[str, _Rows]


@dataclass(frozen=True)
class Scores:
    """Row scores of one subject.

    Attributes:
        subject: ``teacher``, ``model`` or ``bundle``.
        parameters: of the model; None where nobody tells.
        bytes: teacher: as fp32; checkpoint: its weights; bundle: what is copied to the device.
        ids: metric -> ids of the rows that were scored, in order.
        sums: metric -> numerators (rows,).
        weights: metric -> weights (rows,).
    """

    subject: str
    parameters: int | None
    bytes: int | None
    ids: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order they were added."""
        return list(self.sums)

    def add(self, metric: str, ids: Sequence[str], sums: Array, weights: Array | None = None) -> None:
        """Add a metric; weights of 1 when left out."""
        assert len(ids) == len(sums) > 0, f"{metric}: one value per row is needed"
        self.ids[metric], self.sums[metric] = list(ids), np.asarray(sums, dtype=np.float64)
        self.weights[metric] = np.ones(len(sums)) if weights is None else np.asarray(weights, dtype=np.float64)

    def value(self, metric: str) -> float:
        """The metric's value over all rows."""
        return float(_value(metric, self.sums[metric].sum(), self.weights[metric].sum()))

    def write(self, folder: Path) -> None:
        """Write ``scores.json``: sorted keys, so that equal scores give equal bytes."""
        rows = {
            name: {"ids": self.ids[name], "sums": self.sums[name].tolist(), "weights": self.weights[name].tolist()}
            for name in self.metrics
        }
        document = {
            "subject": self.subject,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "order": self.metrics,
            "rows": rows,
        }
        write_whole(folder / FILE, json_text(document) + "\n")


def read_scores(folder: Path) -> Scores:
    """Read ``scores.json`` of an evaluation artifact.

    Raises:
        StoreError: it is missing or damaged.
    """
    path, do = folder / FILE, "Remove the artifact's folder and run again."
    document = read_table(path, StoreError, do=do)
    checked(_Document, document, str(path), StoreError, do=do)
    scores = Scores(document["subject"], document["parameters"], document["bytes"])
    for name in document["order"]:
        row = document["rows"].get(name, {"ids": [], "sums": [], "weights": []})
        if not len(row["ids"]) == len(row["sums"]) == len(row["weights"]) > 0:
            raise StoreError(str(path), f"{name} has not one value for each row", do=do)
        scores.add(name, row["ids"], np.asarray(row["sums"]), np.asarray(row["weights"]))
    return scores


def _value(metric: str, sums: float | Array, weights: float | Array) -> float | Array:
    ratio = sums / weights
    return np.exp(np.minimum(ratio, _MOST_NATS)) if metric in EXPONENTIAL else ratio


def measure(scores: Scores, metric: str, *, seed: int, samples: int = 2000, level: float = 0.95) -> Interval:
    """Value of ``metric`` with its bootstrap interval over rows."""
    table = np.stack([scores.sums[metric], scores.weights[metric]], axis=1)
    draws = resampled_sums(table, samples, seed)
    draws = draws[draws[:, 1] > 0]
    ends = percentiles(np.asarray(_value(metric, draws[:, 0], draws[:, 1])), level)
    return Interval(scores.value(metric), *ends, len(table))


def as_measure(interval: Interval) -> Measure:
    """An interval in the run record's form."""
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.rows}


def difference(
    after: Scores, before: Scores, metric: str, *, seed: int, samples: int = 10_000, level: float = 0.95
) -> Interval | None:
    """Interval of ``value(after) - value(before)`` over the same rows; None when the rows are not the same."""
    draws = _paired_draws(after, before, metric, seed=seed, samples=samples)
    if draws is None:
        return None
    ends = percentiles(draws[0] - draws[1], level)
    return Interval(after.value(metric) - before.value(metric), *ends, len(after.ids[metric]))


def ratio(
    after: Scores, before: Scores, metric: str, *, seed: int, samples: int = 10_000, level: float = 0.95
) -> Interval | None:
    """Interval of ``value(after) / value(before)`` over the same rows.

    For perplexity this is exp of the difference of the token-weighted mean losses. None when the rows are not the
    same, or when ``before`` is 0 in some resample: leaving those out would make the interval look better than it is.
    """
    draws = _paired_draws(after, before, metric, seed=seed, samples=samples)
    if draws is None or before.value(metric) <= 0 or (draws[1] <= 0).any():
        return None
    ends = percentiles(draws[0] / draws[1], level)
    return Interval(after.value(metric) / before.value(metric), *ends, len(after.ids[metric]))


def _paired_draws(after: Scores, before: Scores, metric: str, *, seed: int, samples: int) -> tuple[Array, Array] | None:
    """Values of ``metric`` of both, (samples,) each, over the same resampled rows; None when the rows differ."""
    if metric not in after.sums or metric not in before.sums or after.ids[metric] != before.ids[metric]:
        return None
    columns = [after.sums[metric], after.weights[metric], before.sums[metric], before.weights[metric]]
    draws = resampled_sums(np.stack(columns, axis=1), samples, seed)
    draws = draws[(draws[:, 1] > 0) & (draws[:, 3] > 0)]
    left, right = _value(metric, draws[:, 0], draws[:, 1]), _value(metric, draws[:, 2], draws[:, 3])
    return np.asarray(left), np.asarray(right)
