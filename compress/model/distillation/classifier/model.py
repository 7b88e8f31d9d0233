"""A student with its loss on classes, in place of the trainer's own pair of student and loss.

`ClassifierModel` turns a batch into the sums that the trainer takes, one target per row; `measure` says how the student
classifies. Knows nothing of teachers, tokenizers and files.

Shapes: B rows, K classes, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.model.distillation.classifier.attributions import attribution_distance
from compress.model.distillation.classifier.rows import ClassTable, Tree
from compress.model.distillation.classifier.scoring import Heard, attention_scores, class_scores
from compress.model.distillation.losses import LossParts
from compress.model.distillation.packing import Batch, Indices, cut

MEASURE_TOKENS = 4_096
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class ClassLesson:
    """What the student learns from.

    Attributes:
        table: the questions.
        labels: (R,) int64, -1 where a row has none.
        scores: (R, K), the teacher's, or ``None``.
        attributions: the teacher's, flat as ``table``, or ``None``.
        vocab: token ids in use.
        kd_weight, temperature, attribution_weight: as `ClassifierParams` says.
    """

    table: ClassTable
    labels: Tensor
    scores: Tensor | None
    attributions: Tensor | None
    vocab: int
    kd_weight: float
    temperature: float
    attribution_weight: float

    def explained(self, rows: Indices) -> Tensor:
        """The teacher's attributions (B, T) of ``rows``."""
        assert self.attributions is not None, "asked for with an attribution_weight"
        _, source = self.table.places(rows)
        return self.attributions[torch.from_numpy(source)]


class ClassifierModel(nn.Module):
    """A student with its loss on classes."""

    def __init__(self, lesson: ClassLesson, student: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.lesson, self.student = lesson, student
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def forward(self, batch: Batch, _targets: None = None) -> LossParts:
        """Sums over the rows; ``kl`` is that of classes at the temperature, without its factor."""
        lesson, device = self.lesson, batch.input_ids.device
        rows = batch.rows.numpy()
        tree = lesson.table.batch(rows).to(device)
        wants = bool(lesson.attribution_weight)
        heard = class_scores(self.student, tree, vocab=lesson.vocab, inner=wants, dtype=self.dtype)
        labels = lesson.labels[batch.rows].to(device)
        ce = label_loss(heard.scores, labels).sum()
        loss, kl = (1.0 - lesson.kd_weight) * ce, heard.scores.new_zeros(())
        if lesson.scores is not None and lesson.kd_weight:
            theirs = lesson.scores[batch.rows].to(device)
            apart, missing = class_divergence(heard.scores, theirs, lesson.temperature)
            kl = apart.sum()
            loss = loss + lesson.kd_weight * (lesson.temperature**2 * kl + missing.sum())
        if wants:
            loss = loss + lesson.attribution_weight * self._unlike(heard, tree, rows).sum()
        return LossParts(loss, ce.detach(), kl.detach())

    def _unlike(self, heard: Heard, tree: Tree, rows: Indices) -> Tensor:
        """How far the student looks elsewhere than where the teacher's score comes from (B,)."""
        assert heard.inner is not None, "the states were asked for"
        own = attention_scores(self.student, heard.inner, tree)
        return attribution_distance(own, self.lesson.explained(rows).to(own.device), tree.content)


def label_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """(B,): minus the log-likelihood of the label's answer, over all that could be answered; 0 without a label."""
    return torch.where(labels >= 0, -scores.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)


def class_divergence(scores: Tensor, theirs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(KL(teacher, student) of the classes at ``temperature``, minus the log of the student's mass on all classes).

    At temperature 1 their sum is the forward KL of whole answers, for a teacher that answers nothing but classes; the
    mass is what keeps the student answering in the words of the classes. Both (B,).
    """
    goal = torch.log_softmax(theirs.to(scores.dtype) / temperature, dim=1)
    ours = torch.log_softmax(scores / temperature, dim=1)
    return (goal.exp() * (goal - ours)).sum(1), -torch.logsumexp(scores, dim=1)


def measure(student: nn.Module, lesson: ClassLesson, rows: Indices) -> dict[str, float]:
    """How ``student`` classifies ``rows``: figures that rows and teacher allow, empty without rows.

    accuracy on labels, agreement with the teacher's class, calibration error of the student's probabilities (over 10
    bins), mass on all classes, and cosine of attributions.
    """
    found: list[tuple[Tensor, Tensor]] = []
    order = rows[lesson.table.lengths[rows].argsort(kind="stable")]
    for piece in cut(order, lesson.table.lengths, MEASURE_TOKENS):
        tree = lesson.table.batch(piece).to(next(student.parameters()).device)
        with torch.no_grad():
            heard = class_scores(student, tree, vocab=lesson.vocab, inner=lesson.attributions is not None)
            apart = torch.zeros(len(piece))
            if heard.inner is not None:
                own = attention_scores(student, heard.inner, tree)
                apart = attribution_distance(own, lesson.explained(piece).to(own.device), tree.content).cpu()
        found.append((heard.scores.cpu(), apart))
    if not found:
        return {}
    scores, apart = (torch.cat(parts) for parts in zip(*found, strict=True))
    order_t = torch.from_numpy(order)
    figures = _figures(scores, lesson.labels[order_t], None if lesson.scores is None else lesson.scores[order_t])
    return figures | ({"attribution_cosine": float(1 - 2 * apart.mean())} if lesson.attributions is not None else {})


def _figures(scores: Tensor, labels: Tensor, theirs: Tensor | None) -> dict[str, float]:
    figures = {"class_mass": float(torch.logsumexp(scores, 1).exp().mean())}
    chosen = scores.argmax(1)
    known = labels >= 0
    if known.any():
        right = (chosen == labels)[known].float()
        sure = torch.softmax(scores, 1).amax(1)[known]
        figures |= {"accuracy": float(right.mean()), "calibration_error": calibration_error(sure, right)}
    if theirs is not None:
        figures["agreement"] = float((chosen == theirs.argmax(1)).float().mean())
    return figures


def calibration_error(sure: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, section 2): |accuracy - confidence| by bin, weighted by rows."""
    bins = (sure * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS).index_add(0, bins, right - sure)
    return float(gaps.abs().sum() / len(sure))
