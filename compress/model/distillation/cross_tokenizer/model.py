"""A student with a loss across tokenizers, in place of the trainer's own pair of student and loss.

`CrossTokenizerModel` turns a batch and the teacher's `CrossTargets` into the sums that the trainer takes. The loss is
(1 - kd_weight) * cross-entropy + kd_weight * scale * the cross loss summed over chunks; ``scale`` is targets per chunk
over all rows, so that the mean over chunks stands beside the mean over tokens and does not depend on how a step is cut.
Knows nothing of rows, tokenizers and teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compress.model.distillation.cross_tokenizer.losses import (
    Common,
    Scores,
    Spans,
    alm,
    distances,
    gold,
    label_scores,
    merged,
    uld,
)
from compress.model.distillation.cross_tokenizer.targets import CrossTargets, chunk_scores, spans_of
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import LossParts, LossWeights, fused_loss
from compress.model.distillation.packing import Batch
from compress.model.layers import output_head


@dataclass(frozen=True, slots=True)
class CrossLoss:
    """Which loss, and its numbers.

    Attributes:
        kind: ``alm``, ``gold`` or ``uld``.
        kd_weight: share of the cross loss.
        scale: the student's targets per chunk, over all rows.
        temperature: of ``alm``.
        debias: of ``alm``: the threshold of `losses.merged`; ``None`` takes every chunk as it is.
        edges: of ``alm`` with ``debias``: the student's tokens that begin a word, (V,) bool.
        common: of ``gold``.
        unmatched: of ``gold``.
    """

    kind: Literal["alm", "gold", "uld"]
    kd_weight: float
    scale: float
    temperature: float = 100.0
    debias: float | None = None
    edges: Tensor | None = None
    common: Common | None = None
    unmatched: float = 1.0


class CrossTokenizerModel(nn.Module):
    """A student with its loss across tokenizers."""

    def __init__(self, student: nn.Module, loss: CrossLoss, vocab: int, *, bf16: bool = False) -> None:
        super().__init__()
        self.student, self.loss, self.vocab = student, loss, vocab
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def forward(self, batch: Batch, targets: CrossTargets | None) -> LossParts:
        """Sums of the losses over the targets of ``batch``; ``kl`` is the cross loss, scaled."""
        hidden = kept_states(self.student, batch.input_ids, batch.keep, dtype=self.dtype)
        head = output_head(self.student).weight[: self.vocab]
        if targets is None:  # labels alone: the trainer's own loss, bit for bit
            return fused_loss(hidden, head, batch.labels, None, LossWeights(0.0), dtype=self.dtype)
        edges = None if self.loss.edges is None else self.loss.edges.to(hidden.device)
        scores = label_scores(hidden, head, batch.labels, edges)
        ce = -scores.labels.sum()
        cross = cross_loss(hidden, head, batch.labels, scores, targets, loss=self.loss).sum() * self.loss.scale
        loss = (1.0 - self.loss.kd_weight) * ce + self.loss.kd_weight * cross
        return LossParts(loss, ce.detach(), cross.detach())


def cross_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, scores: Scores, targets: CrossTargets, *, loss: CrossLoss
) -> Tensor:
    """The cross loss of each chunk, or of each group of chunks (C,), without any factor."""
    chunks = targets.chunks
    if not len(chunks.student):  # no row of this batch could be aligned
        return hidden.sum(dim=1)[:0]
    if loss.kind == "alm":
        return _alm(scores, targets, loss)
    assert targets.states is not None, "these losses run the teacher"
    if loss.kind == "uld":
        return distances(hidden, head, chunks.student[:, 0], targets.states, lambda ours, theirs, *_: uld(ours, theirs))
    theirs, ours = targets.spans, spans_of(scores.labels, labels, chunks.student)
    assert theirs is not None, "an online teacher gives its spans"
    assert loss.common is not None, "gold needs the common tokens"
    common = Common(loss.common.teacher.to(hidden.device), loss.common.student.to(hidden.device))

    def measure(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
        own, other = (Spans(side.first[start:stop], side.rest[start:stop].to(student.dtype)) for side in (ours, theirs))
        return gold(student, teacher, own, other, common, unmatched=loss.unmatched)

    return distances(hidden, head, chunks.student[:, 0], targets.states, measure)


def _alm(scores: Scores, targets: CrossTargets, loss: CrossLoss) -> Tensor:
    chunks = targets.chunks
    ours, theirs = chunk_scores(scores, chunks.student, chunks.last), targets.scores.to(scores.labels.dtype)
    if loss.debias is None:
        return alm(ours[:, 0], theirs[:, 0], temperature=loss.temperature)
    cut_off = chunks.last & ~chunks.ended  # nothing tells whether a word begins behind it
    group, ends = merged(theirs[:, 1].masked_fill(cut_off, -torch.inf), chunks.joins, loss.debias)
    kept = torch.nonzero(group >= 0)[:, 0]
    sums = [
        side.new_zeros(len(ends)).index_add(0, group[kept], side[kept, 0]) + side[ends, 1] for side in (ours, theirs)
    ]
    return alm(sums[0], sums[1], temperature=loss.temperature)
