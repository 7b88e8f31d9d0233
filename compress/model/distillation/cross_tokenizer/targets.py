"""The teacher's side across tokenizers: a batch of the student's rows in, what the teacher says of them out.

`OnlineTeacher` runs the teacher on the same rows in its own tokens; `CachedTeacher` reads the likelihoods of chunks
that `fill_cache` stored. Both give `CrossTargets`. Knows nothing of the student and of losses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError, ModelError
from compress.model.distillation.cross_tokenizer.cache import ChunkCache
from compress.model.distillation.cross_tokenizer.losses import Scores, Spans, chunk_sums, label_scores
from compress.model.distillation.cross_tokenizer.pairs import Chunks, Pairs
from compress.model.distillation.filling import Asked, EvenBatch, Said, fill
from compress.model.distillation.losses import States
from compress.model.distillation.packing import Batch, Indices, RowTable, entries, moved
from compress.model.distillation.targets import OnlineTargets, cache_tokens

if TYPE_CHECKING:
    from compress.progress import Progress

SHARD_CHUNKS = 65_536  # a kill loses at most the teacher's work on these


@dataclass(frozen=True, slots=True)
class CrossTargets:
    """What the teacher says of a batch.

    Attributes:
        chunks: which targets of the batch belong together.
        scores: (C, 1 or 2), log-likelihood of each chunk, and that a word begins behind it (0 where the answer ends).
        states: the teacher's states (C, width) before each chunk and its head; ``None`` where only ``scores`` count.
        spans: the teacher's first token of each chunk and the log-likelihood of the others; likewise.
    """

    chunks: Chunks
    scores: Tensor
    states: States | None = None
    spans: Spans | None = None


class OnlineTeacher:
    """Runs the teacher on every batch."""

    def __init__(
        self, online: OnlineTargets, table: RowTable, pairs: Pairs, *, edges: Tensor | None, whole: bool
    ) -> None:
        """``table`` holds the rows in the teacher's tokens, in the order of ``pairs``.

        ``edges`` (V,) bool are the teacher's tokens that begin a word, where their probability is asked for; ``whole``
        asks for the distributions before chunks.
        """
        self.online, self.table, self.pairs, self.edges, self.whole = online, table, pairs, edges, whole

    def __call__(self, batch: Batch) -> CrossTargets:
        return self.of_rows(batch.rows.numpy(), batch.labels.device)

    def of_rows(self, rows: Indices, device: torch.device) -> CrossTargets:
        """The targets of rows of the table, on ``device``."""
        batch = self.table.batch(rows).to(device)
        states = self.online(batch)
        with torch.no_grad():
            edges = None if self.edges is None else self.edges.to(device)
            scores = label_scores(states.hidden, states.head, batch.labels, edges)
        chunks = moved(self.pairs.batch(rows), device)
        found = CrossTargets(chunks, chunk_scores(scores, chunks.teacher, chunks.last))
        if not self.whole:
            return found
        first = chunks.teacher[:, 0]
        before = States(states.hidden[first], states.head, states.temperature)
        return replace(found, states=before, spans=spans_of(scores.labels, batch.labels, chunks.teacher))


class CachedTeacher:
    """Reads the likelihoods of chunks from a cache."""

    def __init__(self, cache: ChunkCache, table: RowTable, pairs: Pairs, wanted: Indices | None = None) -> None:
        """Look every row up at once, or those ``wanted`` alone.

        Raises:
            DataError: a row is not in the cache.
        """
        self.pairs = pairs
        rows = np.arange(len(table)) if wanted is None else wanted
        self.known = np.isin(np.arange(len(table)), rows)
        taken = cache.take([pairs.key(row, table) for row in rows.tolist()])
        self.values = taken.new_full((int(pairs.starts[-1]), taken.shape[1]), torch.nan)
        self.values[torch.from_numpy(entries(pairs.starts, rows)[1])] = taken

    def __call__(self, batch: Batch) -> CrossTargets:
        rows = batch.rows.numpy()
        if not self.known[rows].all():
            got = f"row number {int(rows[~self.known[rows]][0])} was not asked about"
            raise DataError("the teacher's cache", got, do="Fill the cache with these rows first")
        _, places = entries(self.pairs.starts, rows)
        device = batch.labels.device
        return CrossTargets(moved(self.pairs.batch(rows), device), self.values[torch.from_numpy(places)].to(device))


def chunk_scores(scores: Scores, ranges: Tensor, last: Tensor) -> Tensor:
    """Columns of `CrossTargets.scores` from scores at positions: ``ranges`` (C, 2), ``last`` (C,) bool.

    Nothing is predicted behind the last target of a row: where that ends the answer, a new beginning is certain.
    """
    sums = chunk_sums(scores.labels, ranges[:, 0], ranges[:, 1])
    if scores.edges is None:
        return sums[:, None]
    behind = ranges[:, 1].clamp(max=len(scores.edges) - 1)
    return torch.stack([sums, torch.where(last, 0.0, scores.edges[behind])], dim=1)


def spans_of(logprobs: Tensor, labels: Tensor, ranges: Tensor) -> Spans:
    """First token of each range (C, 2) of targets, and the log-probability of the others given what is before them."""
    return Spans(labels[ranges[:, 0]], chunk_sums(logprobs, ranges[:, 0] + 1, ranges[:, 1]))


def fill_cache(cache: ChunkCache, teacher: OnlineTeacher, progress: Progress, wanted: Indices | None = None) -> None:
    """Compute what ``cache`` lacks of the teacher's table, or of its rows ``wanted``; killed and run again, it goes on.

    A resumed cache holds the very files of an unbroken one.
    """
    table, pairs, online = teacher.table, teacher.pairs, teacher.online

    def code(batch: EvenBatch) -> Said:
        values = teacher.of_rows(batch.rows, online.head.device).scores.cpu().float()
        if not bool(torch.isfinite(values).all()):
            raise ModelError("teacher", "its log-probabilities are not finite", "a teacher that gives no NaN")
        return {"values": values}

    keys = [pairs.key(row, table) for row in range(len(table))]
    asked = Asked(keys, table.lengths, pairs.starts[1:] - pairs.starts[:-1], wanted)
    fill(cache, asked, code, progress, size=SHARD_CHUNKS, tokens=cache_tokens(online))
