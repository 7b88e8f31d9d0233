"""Several teachers of one vocabulary as one: their probabilities mixed, with weights that may differ from row to row.

`MixedTargets` runs the teachers on a batch and gives `Mixture`, a target like any other; a cache is filled from it, so
that what is stored is the mixture, exactly, whatever the codec. `routed` says how much each teacher counts on each row:
fixed weights, or by its loss on the labels, its entropy, or the rows' own word. Knows nothing of profiles and files.

Shapes: N positions, R rows, M teachers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.model.distillation.losses import Dense, States
from compress.model.distillation.packing import Batch, RowTable, cut
from compress.model.distillation.targets import TEACHER_TOKENS, OnlineTargets

if TYPE_CHECKING:
    from compress.progress import Progress

CHUNK_ELEMENTS = 1 << 22  # log-probabilities held at once while rows are scored
ROW_SUM = 1e-6


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixture of what M teachers say: ``weights`` (N, M), each row adding up to 1."""

    parts: tuple[States, ...]
    weights: Tensor

    def narrow(self, start: int, stop: int) -> Dense:
        """Positions ``start`` to ``stop``: log sum w p over the teachers; a weight of 1 leaves a teacher's own bits."""
        dense = [part.narrow(start, stop).logprobs for part in self.parts]
        logs = self.weights[start:stop].log().to(dense[0])
        mixed = dense[0] + logs[:, :1]
        for at, logprobs in enumerate(dense[1:], start=1):
            mixed = torch.logaddexp(mixed, logprobs + logs[:, at : at + 1])
        return Dense(mixed)


class MixedTargets:
    """Runs several teachers on every batch; those without weight on all of its rows are left out."""

    def __init__(self, teachers: Sequence[OnlineTargets], weights: Tensor) -> None:
        """``weights`` (R, M) are those of the table's rows, each row adding up to 1."""
        assert weights.shape[1] == len(teachers), "a weight for every teacher"
        assert bool(((weights.sum(dim=1) - 1).abs() < ROW_SUM).all()), "weights add up to 1"
        self.teachers, self.weights = list(teachers), weights

    @property
    def device(self) -> torch.device:
        """Where the teachers are."""
        return self.teachers[0].device

    @property
    def models(self) -> Sequence[nn.Module]:
        """All that are run."""
        return [teacher.teacher for teacher in self.teachers]

    def __call__(self, batch: Batch) -> States | Mixture:
        weights = self.weights[batch.rows]  # (B, M)
        heard = torch.nonzero((weights > 0).any(dim=0))[:, 0].tolist()
        parts: tuple[States, ...] = tuple(self.teachers[at](batch) for at in heard)
        if len(parts) == 1:
            return parts[0]
        spread = torch.repeat_interleave(weights[:, heard], batch.counts, dim=0)
        behind = len(batch.keep) - len(spread)  # positions that only fill a batch up
        if behind:
            spread = torch.cat([spread, spread[-1:].expand(behind, -1)])
        return Mixture(parts, spread.to(batch.labels.device))


def shared_out(weights: Sequence[float], rows: int) -> Tensor:
    """The same ``weights`` for every row, scaled to add up to 1: (R, M) float64."""
    base = torch.tensor(weights, dtype=torch.float64)
    return (base / base.sum()).expand(rows, -1).contiguous()


def routed(weights: Sequence[float], scores: Tensor, temperature: float) -> Tensor:
    """Weights (R, M) proportional to ``weights`` times exp(-score / ``temperature``); ``scores`` (R, M), in nats."""
    base = torch.tensor(weights, dtype=torch.float64).log()
    return torch.softmax(base - scores.double() / temperature, dim=1)


def told(names: Mapping[str, float], said: Sequence[Any], rows: Sequence[str], *, where: str) -> Tensor:
    """Weights (R, M) from what each row says: a teacher's name, or names with weights. ``names`` are the teachers'.

    Raises:
        DataError: a row names a teacher that is not in the mixture, or none.
    """
    found = torch.zeros((len(said), len(names)), dtype=torch.float64)
    order = {name: at for at, name in enumerate(names)}
    allowed = f"one of {', '.join(names)}, or a mapping of them to weights of 0 or more, not all 0"
    for row, (value, name_of_row) in enumerate(zip(said, rows, strict=True)):
        if not isinstance(value, str | dict):
            raise DataError(f"row {name_of_row}: {where}", f"got {value!r}", allowed)
        wanted = value if isinstance(value, dict) else {value: 1.0}
        for name, weight in wanted.items():
            usable = isinstance(weight, int | float) and 0 <= weight < float("inf")
            if name not in order or not usable:
                raise DataError(f"row {name_of_row}: {where}", f"got {value!r}", allowed)
            found[row, order[name]] = float(weight) * names[name]
        if not found[row].any():
            raise DataError(f"row {name_of_row}: {where}", f"got {value!r}", allowed)
    return found / found.sum(dim=1, keepdim=True)


def row_scores(teacher: OnlineTargets, table: RowTable, kind: Literal["loss", "entropy"], progress: Progress) -> Tensor:
    """Mean over the targets of each row (R,), float64: the loss on the labels or the entropy, nats per token."""
    found = torch.zeros(len(table), dtype=torch.float64)
    rows = np.argsort(table.lengths, kind="stable").astype(np.int64)
    step = max(1, CHUNK_ELEMENTS // table.vocab)
    with progress.bar("routing", int(table.lengths.sum())) as bar:
        for piece in cut(rows, table.lengths, TEACHER_TOKENS):
            batch = table.batch(piece).to(teacher.device)
            said = teacher(batch)
            values = [
                _values(said.narrow(at, at + step), batch.labels[at : at + step], kind)
                for at in range(0, len(batch.labels), step)
            ]
            owner = torch.repeat_interleave(batch.rows, batch.counts)
            found.index_add_(0, owner, torch.cat(values).cpu())
            bar.advance(int(table.lengths[piece].sum()))
    return found / torch.from_numpy(table.counts)


def _values(dense: Dense, labels: Tensor, kind: Literal["loss", "entropy"]) -> Tensor:
    """One figure per position (N,), float64."""
    if kind == "loss":
        return -dense.logprobs.gather(1, labels[:, None])[:, 0].double()
    chances = dense.logprobs.exp()
    terms = torch.where(chances == 0, 0.0, chances * dense.logprobs)  # zero times minus infinity is no number
    return -terms.sum(dim=1).double()
