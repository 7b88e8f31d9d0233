"""The mix of groups in a data set: shares, distance to a wanted mix, and how many rows of each group to take.

`group_of` says where a row belongs, `wanted_shares` what is wanted, `kl_divergence` how far off a mix is, `allocate`
how many rows of each group bring it nearest within limits, `kmeans` makes groups where there are none. Pure
functions; knows nothing of stages, files or teachers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.data.rows import Row

NO_FUNCTION = "(no function)"  # the answer is no JSON object with a name
NO_LABEL = "(no label)"


def function_name(answer: str) -> str:
    """The string under ``name`` of an answer that is one JSON object; `NO_FUNCTION` otherwise."""
    try:
        call = json.loads(answer)
    except (ValueError, RecursionError):
        return NO_FUNCTION
    name = call.get("name") if isinstance(call, dict) else None
    return name if isinstance(name, str) and name else NO_FUNCTION


def group_of(row: Row, by: str) -> str:
    """The group of a row by ``function`` or by ``label``."""
    if by == "function":
        return function_name(row.answer)
    return NO_LABEL if row.label is None else row.label


def label_of(row: Row) -> str | None:
    """The row's label, or the function it calls, or None when it has neither: what a share is taken within."""
    if row.label is not None:
        return row.label
    name = function_name(row.answer)
    return None if name == NO_FUNCTION else name


def wanted_shares(weights: Mapping[str, float], *, tempering: float = 1.0) -> dict[str, float]:
    """Shares proportional to weight^tempering, summing to 1, in name order; groups of weight 0 stay at 0.

    Tempering as in multilingual sampling (Conneau and Lample 2019, section 3.1).
    """
    powers = {name: weights[name] ** tempering if weights[name] > 0 else 0.0 for name in sorted(weights)}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def kl_divergence(counts: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """KL(mix of ``counts`` || ``wanted``) in nats; infinite when there are rows of a group that is not wanted."""
    total = math.fsum(counts.values())
    if total <= 0:
        return math.inf
    parts = []
    for name, count in counts.items():
        if count > 0:
            goal = wanted.get(name, 0.0)
            if goal <= 0:
                return math.inf
            parts.append(count / total * math.log(count / total / goal))
    return max(math.fsum(parts), 0.0)


def allocate(counts: Mapping[str, int], wanted: Mapping[str, float], *, total: int, max_repeat: int) -> dict[str, int]:
    """How many rows of each group to take: ``total`` in all, as near to ``wanted`` as the limits allow.

    A group gives at most ``max_repeat`` times its rows. What it cannot give goes to the others in the proportions of
    ``wanted``, which is the nearest mix in KL(taken || wanted) for this total. Fewer than ``total`` only when all
    groups are at their limit. Rounded by largest remainder, ties in name order.
    """
    limits = {name: count * max_repeat for name, count in counts.items() if count > 0 and wanted.get(name, 0.0) > 0}
    taken: dict[str, float] = dict.fromkeys(sorted(counts), 0.0)
    total = min(total, sum(limits.values()))
    free = sorted(limits)
    left = float(total)
    while free:
        mass = math.fsum(wanted[name] for name in free)
        full = [name for name in free if left * wanted[name] / mass >= limits[name]]
        if not full:
            taken.update({name: left * wanted[name] / mass for name in free})
            break
        for name in full:
            taken[name] = float(limits[name])
        left = total - math.fsum(limits[name] for name in limits if name not in free or name in full)
        free = [name for name in free if name not in full]
    return _rounded(taken, total)


def _rounded(taken: Mapping[str, float], total: int) -> dict[str, int]:
    exact = {name: round(value, 9) for name, value in taken.items()}  # 17.999999999 is 18
    result = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_remainder[: total - sum(result.values())]:
        result[name] += 1
    return result


def kmeans(
    points: NDArray[np.float32], clusters: int, *, seed: int, rounds: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lloyd's k-means from a k-means++ start: nearest center of every point (n,), and the centers (k, d).

    Fewer centers than asked for when there are fewer different points. Arthur and Vassilvitskii 2007.
    """
    points = np.asarray(points, dtype=np.float32)
    rng = np.random.default_rng(seed)
    centers = points[[int(rng.integers(len(points)))]]
    squared = _squared_distances(points, centers)[:, 0]
    while len(centers) < clusters and squared.max() > 1e-6:
        chosen = int(rng.choice(len(points), p=squared / squared.sum()))
        centers = np.concatenate([centers, points[[chosen]]])
        squared = np.minimum(squared, _squared_distances(points, points[[chosen]])[:, 0])
    nearest = _squared_distances(points, centers).argmin(axis=1)
    for _ in range(rounds):
        for k in range(len(centers)):
            members = points[nearest == k]
            if len(members):  # an empty cluster keeps its center
                centers[k] = members.mean(axis=0, dtype=np.float64)
        again = _squared_distances(points, centers).argmin(axis=1)
        if np.array_equal(again, nearest):
            break
        nearest = again
    return nearest, centers


def nearest_centers(points: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the nearest of ``centers`` for each of ``points``, (n,)."""
    return np.asarray(_squared_distances(np.asarray(points, dtype=np.float32), centers).argmin(axis=1))


def _squared_distances(points: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, k), by |a|² + |b|² - 2ab."""
    cross = points @ centers.T
    own = np.einsum("nd,nd->n", points, points)[:, None] + np.einsum("kd,kd->k", centers, centers)[None]
    return np.asarray(np.maximum(own - 2.0 * cross, 0.0), dtype=np.float64)


def count_groups(groups: Sequence[str]) -> dict[str, int]:
    """Rows per group, in name order."""
    counts: dict[str, int] = {}
    for name in groups:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
