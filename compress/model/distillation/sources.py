"""Where the batches of a training step come from: `BatchSource`, and `RowSource`, the plain one over the rows given.

A step is `Work`: `Piece` after piece, each with its rows, what the teacher says of them and, where it is not the run's
own, its loss. A source that makes rows itself keeps a state; the trainer puts it into its checkpoint. Knows nothing of
models, of optimizers or of how rows are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.model.distillation.logit_map import LogitMap
from compress.model.distillation.losses import LossParts, Targets
from compress.model.distillation.packing import Batch, BatchOrder, Indices, RowTable
from compress.model.distillation.targets import TargetFn

# (hidden (N, H), head (V, H), batch, targets, number format of the products, the student's map of logits) -> sums over
# the N positions
LossFn = Callable[[Tensor, Tensor, Batch, Targets | None, torch.dtype, LogitMap], LossParts]
State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of ``table`` that go through the student together; ``loss`` ``None`` is the run's own."""

    table: RowTable
    rows: Indices
    target_fn: TargetFn | None
    loss: LossFn | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step; ``kind`` tells apart steps whose losses cannot be compared."""

    kind: str
    pieces: Sequence[Piece]

    @property
    def positions(self) -> int:
        """Targets in all pieces."""
        return sum(int(piece.table.counts[piece.rows].sum()) for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """Real tokens in all pieces."""
        return sum(int(piece.table.lengths[piece.rows].sum()) for piece in self.pieces)


class BatchSource(Protocol):
    """Which batches make step s. What it returns may follow from its state, the weights and s, from nothing else."""

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must agree on, beside settings, rows and student."""
        ...

    def work(self, step: int, order: BatchOrder) -> Work:
        """The batches of step ``step``, counted from 0; ``order`` says which rows are its turn."""
        ...

    def validated(self, loss: float) -> None:
        """Hear the loss on the held-out rows, each time that it is taken."""
        ...

    def figures(self) -> dict[str, float]:
        """Figures for the log."""
        ...

    def state(self) -> State:
        """Tensors and JSON values that a resumed run needs."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        ...


def row_work(table: RowTable, rows: Indices, *, target_fn: TargetFn | None, parts: int) -> Work:
    """The step that trains on ``rows``, cut into at most ``parts`` pieces."""
    return Work(
        "rows", [Piece(table, part, target_fn) for part in np.array_split(rows, min(parts, len(rows))) if len(part)]
    )


class RowSource:
    """The rows given, in the order given: nothing to remember."""

    fingerprint = ""

    def __init__(self, table: RowTable, target_fn: TargetFn | None, *, parts: int) -> None:
        self.table, self.target_fn, self.parts = table, target_fn, parts

    def work(self, step: int, order: BatchOrder) -> Work:
        """The rows whose turn it is."""
        return row_work(self.table, order[step], target_fn=self.target_fn, parts=self.parts)

    def validated(self, loss: float) -> None:
        """Nothing follows from it."""

    def figures(self) -> dict[str, float]:
        """None."""
        return {}

    def state(self) -> State:
        """None."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Nothing to restore."""
