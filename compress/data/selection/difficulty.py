"""Instruction-following difficulty: how much a prompt helps its answer, as a ratio of losses or of perplexities.

`mean_losses` and `bare` prepare what a scorer gave, `ratio` is the measure, `select` the decision, `auroc` the
proof that a score tells two kinds of rows apart. Two definitions exist and their limits do not transfer: Cherry LLM
(Li et al. 2024, section 2.2) divides mean token losses, Superfiltering (Li et al. 2024, section 3.1) divides
perplexities. Pure functions; knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.encoding import TokenRow
from compress.errors import DataError

# Added to both losses: an answer that is certain either way gets the ratio 1, not 0/0.
FLOOR = 1e-6


class HasLogprobs(Protocol):
    """What a scorer gives per row: natural log probabilities of the target tokens."""

    @property
    def logprob(self) -> NDArray[Any]: ...


class Scored(NamedTuple):
    """A row to decide on: its number, its ratio, and the group within which the share is taken."""

    row: int
    ratio: float
    group: str | None = None


def mean_losses(scores: Sequence[HasLogprobs]) -> NDArray[np.float64]:
    """Mean negative log-likelihood per target token (nats), (rows,) float64; NaN where a row has no target."""
    return np.array([-np.mean(s.logprob, dtype=np.float64) if len(s.logprob) else np.nan for s in scores])


def bare(row: TokenRow) -> TokenRow:
    """The answer tokens after the row's first token alone (which is the BOS mark where there is one)."""
    start = len(row.prompt)
    if start <= 1:
        return row
    return TokenRow(row.id, (row.ids[0], *row.ids[start:]), (0, *row.answer[start:]))


def first_targets(row: TokenRow, count: int) -> TokenRow:
    """``row`` cut behind its first ``count`` targets, so that both losses are over the same answer tokens."""
    if row.targets <= count:
        return row
    end = len(row.prompt) + count
    return TokenRow(row.id, row.ids[:end], row.answer[:end])


def ratio(with_prompt: NDArray[np.float64], alone: NDArray[np.float64], *, definition: str) -> NDArray[np.float64]:
    """IFD from mean losses in nats: ``loss`` gives L(A|Q) / L(A), ``perplexity`` gives exp(L(A|Q)) / exp(L(A)).

    1 when the prompt changes nothing, above 1 when it makes the answer less likely.
    """
    if definition == "loss":
        return np.asarray((with_prompt + FLOOR) / (alone + FLOOR))
    if definition == "perplexity":
        return np.asarray(np.exp(with_prompt - alone))
    raise DataError("definition", repr(definition), "loss or perplexity")


def select(items: Sequence[Scored], *, max_ratio: float, keep: float) -> dict[int, tuple[str, str]]:
    """Rows to drop: index -> (reason, detail).

    First goes what lies above ``max_ratio``; of the rest the highest ratios stay, at most ``keep`` of *all* items of
    the group (the official Superfiltering code takes a share of 52,002 rows whatever it is given). Equal ratios
    stay in the order of the file.
    """
    reasons: dict[int, tuple[str, str]] = {}
    groups: dict[str | None, list[Scored]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    for members in groups.values():
        budget = max(round(keep * len(members)), 1)
        usable = []
        for item in members:
            if item.ratio > max_ratio:
                reasons[item.row] = ("prompt does not help", f"ratio {item.ratio:.3f}, at most {max_ratio:g}")
            else:
                usable.append(item)
        ranked = sorted(usable, key=lambda item: -item.ratio)
        for rank, item in enumerate(ranked[budget:], start=budget + 1):
            reasons[item.row] = ("too easy", f"ratio {item.ratio:.3f}, place {rank} of {budget} kept")
    return reasons


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive row scores above a negative one, ties counting half (Mann-Whitney).

    ``scores`` (n,) float, ``positive`` (n,) bool. Raises `DataError` unless both kinds are present.
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        raise DataError("auroc", f"{count} positives of {len(positive)}", "some of either kind")
    order = np.sort(scores)
    ranks = (np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right") + 1) / 2
    total = float(ranks[positive].sum()) - count * (count + 1) / 2
    return total / (count * (len(positive) - count))
