"""Scores per test row, kept so that two models can be compared row by row, and figures drawn from them.

A `Scores` file holds, for every metric, one numerator and one weight per row: an exact match is (0 or 1, 1), a loss
is (nats, tokens). The metric's value is the ratio of the sums, for perplexity the exponential of it. `measure` gives
value and interval, `difference` and `ratio` compare two files over the same rows. Rows that are right or wrong get the
exact and score intervals of ``evaluators.intervals``; else rows are resampled (Efron & Tibshirani 1993, chapter 8:
pairs together). Knows nothing of how a row was scored, of models, or of limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # that of typing is not read by pydantic before Python 3.12

from compress.errors import StoreError
from compress.files import json_text, write_whole
from compress.json_reader import checked, read_table
from compress.run_record import Measure
from evaluators import intervals
from evaluators.bootstrap import Interval, percentiles, resampled_sums

Array = NDArray[np.float64]

FILE = "scores.json"
LOWER_IS_BETTER = frozenset({"perplexity", "nll", "kl", "unknown_function_rate"})
SHARES = frozenset(
    {"exact_match", "function_accuracy", "argument_f1", "valid_json", "unknown_function_rate", "top1_agreement"}
)  # every row's value lies between 0 and 1
MISSED = 0.001  # chance that as many rows again show no right one, above which nothing is divided by their share
FEW = 10  # rows that differ from the rest, below which resampling them is no guide to rows that were not seen
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


def on_shared_rows(scores: Sequence[Scores]) -> tuple[list[Scores], int]:
    """The scores on rows that every subject with the metric was measured on, and how many rows that leaves out.

    What one model could not be asked says nothing of another: it is left out on all sides.
    """
    kept = [Scores(each.subject, each.parameters, each.bytes) for each in scores]
    lost: set[str] = set()
    for name in dict.fromkeys(name for each in scores for name in each.metrics):
        told = [(old, new) for old, new in zip(scores, kept, strict=True) if name in old.sums]
        shared = set.intersection(*(set(old.ids[name]) for old, _ in told))
        for old, new in told:
            at = [place for place, row in enumerate(old.ids[name]) if row in shared]
            lost |= set(old.ids[name]) - shared
            if at:
                new.add(name, [old.ids[name][place] for place in at], old.sums[name][at], old.weights[name][at])
    return kept, len(lost)


def _value(metric: str, sums: float | Array, weights: float | Array) -> float | Array:
    ratio = sums / weights
    return np.exp(np.minimum(ratio, _MOST_NATS)) if metric in EXPONENTIAL else ratio


def measure(scores: Scores, metric: str, *, seed: int, samples: int = 2000, level: float = 0.95) -> Interval:
    """Value of ``metric`` with its interval over rows: exact where rows are right or wrong, else by the bootstrap."""
    sums, weights = scores.sums[metric], scores.weights[metric]
    if _right_or_wrong(metric, sums, weights):
        ends = intervals.proportion(round(sums.sum()), len(sums), level)
        return Interval(scores.value(metric), *ends, len(sums), "exact")
    draws = resampled_sums(np.stack([sums, weights], axis=1), samples, seed)
    draws = draws[draws[:, 1] > 0]
    found = _drawn(scores.value(metric), np.asarray(_value(metric, draws[:, 0], draws[:, 1])), level, len(sums))
    if metric not in SHARES:
        return _doubted(found, sums / weights)
    _, counts = np.unique(sums / weights, return_counts=True)
    if len(sums) - counts.max() >= FEW:
        return found
    return _widened(found, intervals.wilson(found.mean, intervals.effective_rows(weights), level))


def as_measure(interval: Interval) -> Measure:
    """An interval in the run record's form: an end that nothing is known of is None."""
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return {"mean": interval.mean, "low": low, "high": high, "n": interval.rows}


def difference(
    after: Scores, before: Scores, metric: str, *, seed: int, samples: int = 10_000, level: float = 0.95
) -> Interval | None:
    """Interval of ``value(after) - value(before)`` over the same rows; None when the rows are not the same."""
    if not _same_rows(after, before, metric):
        return None
    value, rows = after.value(metric) - before.value(metric), len(after.ids[metric])
    pairs = _Pairs.of(after, before, metric)
    if pairs.right_or_wrong:
        ends = intervals.paired_difference(pairs.up, pairs.down, rows, level)
        return Interval(value, *ends, rows, "paired score")
    draws = _paired_draws(after, before, metric, seed=seed, samples=samples)
    found = _drawn(value, draws[0] - draws[1], level, rows)
    if metric not in SHARES:
        return _doubted(found, pairs.changes)
    if pairs.changed >= FEW:
        return found
    return _widened(found, intervals.paired_difference(*pairs.weighed, level))


def ratio(
    after: Scores, before: Scores, metric: str, *, seed: int, samples: int = 10_000, level: float = 0.95
) -> Interval | None:
    """Interval of ``value(after) / value(before)`` over the same rows.

    For perplexity this is exp of the difference of the token-weighted mean losses. None when the rows are not the
    same, or when ``before`` is 0, or may be on other rows: leaving those out would make the interval look better than
    it is.
    """
    if not _same_rows(after, before, metric) or before.value(metric) <= 0:
        return None
    value, rows = after.value(metric) / before.value(metric), len(after.ids[metric])
    pairs = _Pairs.of(after, before, metric)
    draws = None if pairs.right_or_wrong else _paired_draws(after, before, metric, seed=seed, samples=samples)
    if (1 - before.value(metric)) ** rows > MISSED if draws is None else (draws[1] <= 0).any():
        return None
    if draws is None:
        ends = intervals.paired_ratio(pairs.up, pairs.down, pairs.both, rows, level)
        return Interval(value, *ends, rows, "paired score")
    found = _drawn(value, draws[0] / draws[1], level, rows)
    if metric not in SHARES:
        return _doubted(found, pairs.changes, lowest=0.0)
    if pairs.changed >= FEW:
        return found
    low, high = intervals.paired_difference(*pairs.weighed, level)
    teacher = before.value(metric)
    return _widened(found, (max(0.0, 1 + low / teacher), 1 + high / teacher))


@dataclass(frozen=True)
class _Pairs:
    """How rows changed from one subject to another: ``changes`` (rows,) of the value, ``weights`` (rows,)."""

    changes: Array
    weights: Array
    both: int  # rows right both times, where rows are right or wrong
    right_or_wrong: bool

    @staticmethod
    def of(after: Scores, before: Scores, metric: str) -> _Pairs:
        left, right = (each.sums[metric] / each.weights[metric] for each in (after, before))
        plain = all(_right_or_wrong(metric, each.sums[metric], each.weights[metric]) for each in (after, before))
        return _Pairs(left - right, after.weights[metric], int(((left > 0) & (right > 0)).sum()), plain)

    @property
    def up(self) -> int:
        return int((self.changes > 0).sum())

    @property
    def down(self) -> int:
        return int((self.changes < 0).sum())

    @property
    def changed(self) -> int:
        return self.up + self.down

    @property
    def weighed(self) -> tuple[float, float, float]:
        """Rows up, rows down and all, as so many of equal weight as say no more; a changed row counts as a whole."""
        rows = intervals.effective_rows(self.weights)
        share = rows / len(self.changes)
        return self.up * share, self.down * share, rows


def _right_or_wrong(metric: str, sums: Array, weights: Array) -> bool:
    """Whether every row is one answer, right or wrong."""
    return metric in SHARES and bool((weights == 1).all() and np.isin(sums, (0.0, 1.0)).all())


def _drawn(value: float, draws: Array, level: float, rows: int) -> Interval:
    return Interval(value, *percentiles(draws, level), rows)


def _widened(found: Interval, ends: tuple[float, float]) -> Interval:
    """``found``, at least as wide as ``ends``: few rows differ, and resampling cannot show what none of them did."""
    return replace(found, low=min(found.low, ends[0]), high=max(found.high, ends[1]), method="bootstrap or score")


def _doubted(found: Interval, values: Array, *, lowest: float = -math.inf) -> Interval:
    """``found`` of a quantity without an upper bound, with its note where resampling says nothing."""
    if len(values) == 1:
        note = "one row, of which no interval can be made"
        return replace(found, low=lowest, high=math.inf, method="none", note=note)
    if (values == values[0]).all():
        return replace(found, note=f"all {len(values)} rows are equal, so that the interval has no width")
    return found


def _same_rows(after: Scores, before: Scores, metric: str) -> bool:
    return metric in after.sums and metric in before.sums and after.ids[metric] == before.ids[metric]


def _paired_draws(after: Scores, before: Scores, metric: str, *, seed: int, samples: int) -> tuple[Array, Array]:
    """Values of ``metric`` of both, (samples,) each, over the same resampled rows."""
    columns = [after.sums[metric], after.weights[metric], before.sums[metric], before.weights[metric]]
    draws = resampled_sums(np.stack(columns, axis=1), samples, seed)
    draws = draws[(draws[:, 1] > 0) & (draws[:, 3] > 0)]
    left, right = _value(metric, draws[:, 0], draws[:, 1]), _value(metric, draws[:, 2], draws[:, 3])
    return np.asarray(left), np.asarray(right)
