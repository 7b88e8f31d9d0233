"""Filling a teacher's cache: which rows are asked for, in which batches, and how often what was said is stored.

`reached` says which rows a training will look at, `even_batches` cuts rows into batches whose shapes depend on nothing
but the lengths of their rows, so that what is said of a row does not depend on which others are asked about; `fill`
computes what a cache lacks. What was said lies on the disk after `STORE_EVERY_S` in parts, which become one shard when
it is whole: a filling that was killed and goes on leaves the very files of an unbroken one, whenever that was. Knows
nothing of teachers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress.model.distillation.packing import BatchOrder, Indices, RowTable, split_rows
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.shard_folder import ShardFolder, ordered

if TYPE_CHECKING:
    from compress.progress import Bar, Progress

STORE_EVERY_S = 10.0  # with the time of one batch it stays below 20 s
Said = Mapping[str, Tensor]  # what a cache stores of some rows, each tensor with the rows one behind the other


@dataclass(frozen=True, slots=True)
class Layout:
    """How a training uses its rows: ``training`` are learned from in ``order`` for ``steps``, ``held`` are judged."""

    training: Indices
    held: Indices
    order: BatchOrder
    steps: int


def layout(table: RowTable, settings: TrainSettings) -> Layout:
    """Which rows are learned from, in which order and in how many steps, and which are held out."""
    training, held = split_rows(
        table,
        validation_share=settings.validation_share,
        validation_rows=settings.validation_rows,
        seed=settings.seed,
    )
    order = BatchOrder(table.lengths, training, batch_tokens=settings.batch_tokens, seed=settings.seed)
    steps = order.steps(settings.epochs) if settings.steps is None else settings.steps
    return Layout(training, held, order, steps)


def reached(table: RowTable, *trainings: TrainSettings) -> Indices:
    """The rows that these trainings look at: those that their steps draw, and those held out; in rising order."""
    seen = np.zeros(len(table), dtype=bool)
    for settings in trainings:
        found = layout(table, settings)
        seen[found.held] = True
        for step in range(found.steps):
            if seen.all():
                break
            seen[found.order[step]] = True
    return np.flatnonzero(seen)


@dataclass(frozen=True, slots=True)
class EvenBatch:
    """``rows`` of one batch, the ``filled`` ones that make it as large as others of its ``width`` in tokens."""

    rows: Indices
    filled: Indices
    width: int


def even_batches(rows: Indices, lengths: Indices, tokens: int) -> Iterator[EvenBatch]:
    """``rows``, sorted by rising length, in batches of about ``tokens`` padded tokens, one shape for each width.

    The last bit of a product depends on its shape. Widths go up in steps of at most an eighth, no further than the
    longest of all ``lengths``; a batch that is not full is filled up with its last row.
    """
    longest = int(lengths.max())
    widths = np.array([_width(int(lengths[row]), longest) for row in rows], dtype=np.int64)
    edges = [0, *(np.flatnonzero(np.diff(widths)) + 1).tolist(), len(rows)]
    for start, end in pairwise(edges):
        width = int(widths[start])
        size = max(1, tokens // width)
        for at in range(start, end, size):
            piece = rows[at : min(at + size, end)]
            yield EvenBatch(piece, np.concatenate([piece, np.repeat(piece[-1:], size - len(piece))]), width)


def _width(length: int, longest: int) -> int:
    step = max(4, 1 << max(0, length.bit_length() - 4))
    return min(-(-length // step) * step, longest)


def shards(counts: Sequence[int], size: int) -> Iterator[slice]:
    """Cut rows with ``counts`` targets into runs of at least ``size`` targets (the last may have fewer)."""
    start = total = 0
    for end, count in enumerate(counts, start=1):
        total += count
        if total >= size or end == len(counts):
            yield slice(start, end)
            start, total = end, 0


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows of a cache: their ``keys``, ``lengths`` in tokens, ``counts`` of what is stored, and those ``wanted``."""

    keys: Sequence[bytes]
    lengths: Indices
    counts: Indices
    wanted: Indices | None = None

    @staticmethod
    def of(table: RowTable, wanted: Indices | None = None) -> Asked:
        """The rows of ``table``, all of them where ``wanted`` is left out."""
        return Asked([table.key(row) for row in range(len(table))], table.lengths, table.counts, wanted)


def fill(
    folder: ShardFolder,
    asked: Asked,
    code: Callable[[EvenBatch], Said],
    progress: Progress,
    *,
    size: int,
    tokens: int | None,
) -> None:
    """Compute what ``folder`` lacks of ``asked`` in shards of ``size``, batches of ``tokens`` (None: a shard at once).

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    rows = ordered(asked.keys, asked.lengths, asked.wanted)
    with progress.bar("teacher", int(asked.counts[rows].sum()), unit=folder.unit) as bar:
        for piece in shards(asked.counts[rows].tolist(), size):
            run = rows[piece]
            missing = np.array([row for row in run if asked.keys[row] not in folder], dtype=np.int64)
            bar.resume(int(asked.counts[run].sum() - asked.counts[missing].sum()))
            if not len(missing):
                continue
            whole = EvenBatch(missing, missing, int(asked.lengths[missing].max()))
            batches = [whole] if tokens is None else list(even_batches(missing, asked.lengths, tokens))
            _Shard(folder, asked, batches).make(code, bar)
    folder.drop_parts()


class _Shard:
    """One shard on its way: batches that are computed, of which the first may lie in parts already."""

    def __init__(self, folder: ShardFolder, asked: Asked, batches: Sequence[EvenBatch]) -> None:
        self.folder, self.asked, self.batches = folder, asked, batches
        self.made: list[Said] = []

    def make(self, code: Callable[[EvenBatch], Said], bar: Bar) -> None:
        """Compute what is missing and write the shard; parts of it are written on the way."""
        done = self._taken_up()
        bar.resume(sum(self._count(batch) for batch in self.batches[:done]))
        stored, unstored, clock = done, 0, time.monotonic()
        for at in range(done, len(self.batches)):
            self.made.append(code(self.batches[at]))
            unstored += 1
            bar.advance(self._count(self.batches[at]))
            if time.monotonic() - clock >= STORE_EVERY_S and at + 1 < len(self.batches):
                keys, counts = self._rows(self.batches[stored : at + 1])
                self.folder.write_part(keys, counts, joined(self.made[-unstored:]))
                stored, unstored, clock = at + 1, 0, time.monotonic()
        keys, counts = self._rows(self.batches)
        self.folder.write(keys, counts, joined(self.made), **{self.folder.unit: sum(counts)})
        self.folder.drop_parts()

    def _count(self, batch: EvenBatch) -> int:
        return int(self.asked.counts[batch.rows].sum())

    def _rows(self, batches: Sequence[EvenBatch]) -> tuple[list[bytes], list[int]]:
        rows = np.concatenate([batch.rows for batch in batches])
        return [self.asked.keys[row] for row in rows], self.asked.counts[rows].tolist()

    def _taken_up(self) -> int:
        """Take what lies in parts, where it is the beginning of this shard; returns of how many batches it is."""
        found = self.folder.parts()
        held = [key for keys, _ in found for key in keys]
        ends: list[int] = np.cumsum([len(batch.rows) for batch in self.batches]).tolist()
        if not found or len(held) not in ends or self._rows(self.batches)[0][: len(held)] != held:
            self.folder.drop_parts()  # of rows that are no longer asked for, or of a shard that is whole
            return 0
        self.made = [tensors for _, tensors in found]
        return ends.index(len(held)) + 1


def joined(parts: Sequence[Said]) -> dict[str, Tensor]:
    """What is said of rows behind rows."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
