"""What the teacher says of the rows: a score for every class, and which tokens the score of its class comes from.

`teach` asks once and keeps what it heard in a file, so that a killed run goes on. Knows nothing of students.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compress.model.distillation.classifier.attributions import integrated_gradients, log_odds
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.classifier.rows import ClassTable, Questions, Tree, ask
from compress.model.distillation.classifier.scoring import answer_lengths, class_scores
from compress.model.distillation.packing import Indices, cut
from compress.model.distillation.resume import read_tensors, save_tensors
from compress.model.layers import embedding

if TYPE_CHECKING:
    from compress.progress import Progress

TEACHER_TOKENS = 4_096  # padded tokens of one teacher batch
ZERO_BEND = 3  # on a trained teacher, 32 points: 4.7 % of the sum is missed, against 33 % without
SAVE_SECONDS = 30.0  # what a kill can cost


@dataclass(frozen=True)
class Taught:
    """What the teacher said.

    Attributes:
        scores: (R, K), log-likelihoods of the classes' answers.
        attributions: one number per token of the table's flat arrays; ``None`` where none were asked for.
        asked_again: rows asked with each deeper prompt.
        gap: |sum of attributions - difference of scores|, summed over rows, as a share of the summed |difference|.
    """

    scores: Tensor
    attributions: Tensor | None = None
    asked_again: tuple[int, ...] = ()
    gap: float | None = None

    @property
    def confidence(self) -> Tensor:
        """(R,): the probability of the likeliest class."""
        return torch.softmax(self.scores, dim=1).amax(1)


@dataclass(frozen=True)
class Teacher:
    """The teacher's model with what it needs to be asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocab: int
    params: ClassifierParams

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return embedding(self.model).weight.device

    def scores(self, tree: Tree, embeds: Tensor | None = None) -> Tensor:
        """(B, K) as the parameters want them."""
        found = class_scores(self.model, tree, vocab=self.vocab, embeds=embeds).scores
        return found / answer_lengths(tree) if self.params.score == "mean" else found

    def all_scores(self, table: ClassTable) -> Tensor:
        """(R, K) of every row."""
        found = torch.zeros(len(table), table.classes)
        for rows in _pieces(table):
            with torch.no_grad():
                found[torch.from_numpy(rows)] = self.scores(table.batch(rows).to(self.device)).float().cpu()
        return found


def teach(teacher: Teacher, questions: Questions, table: ClassTable, work: Path, progress: Progress) -> Taught:
    """Ask ``teacher`` about every row of ``table``, deeper where it is unsure, and why, where that is wanted."""
    params = teacher.params
    taught = Taught(teacher.all_scores(table))
    again = []
    answers = [params.answers.get(name, name) for name in questions.classes]
    for prompt in params.deeper:
        unsure = torch.nonzero(taught.confidence < params.confidence)[:, 0]
        again.append(len(unsure))
        if len(unsure):
            rows = [questions.rows[i] for i in unsure.tolist()]
            asked = ask(rows, answers, prompt, teacher.tokenizer, params.max_tokens)
            taught.scores[unsure] = teacher.all_scores(ClassTable(asked, table.classes))
    taught = replace(taught, asked_again=tuple(again))
    if not params.attribution_weight:
        return taught
    chosen = taught.scores.argmax(1)
    attributions, gap = _attributions(teacher, table, chosen, work / "attributions.safetensors", progress)
    return replace(taught, attributions=attributions, gap=gap)


def explain(teacher: Teacher, tree: Tree, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Attributions (B, T) of the log-odds of ``chosen`` (B,), and the difference (B,) that they should add up to.

    Only the row's own text moves from the baseline; the template and the answers stay as they are.
    """
    table = embedding(teacher.model).weight.detach()
    inputs = embedding(teacher.model)(tree.ids).detach()
    start = (
        table[: teacher.vocab].mean(0) if teacher.params.attribution_baseline == "mean" else torch.zeros_like(table[0])
    )
    baseline = torch.where(tree.content[..., None], start, inputs)

    def score(embeds: Tensor) -> Tensor:
        return log_odds(teacher.scores(tree, embeds), chosen)

    # behind a norm a path that starts at zero turns almost at once and then hardly at all: the points belong there
    bend = ZERO_BEND if teacher.params.attribution_baseline == "zero" else 1
    found = integrated_gradients(score, inputs, baseline, points=teacher.params.attribution_points, bend=bend)
    with torch.no_grad():
        difference = score(inputs) - score(baseline)
    return found, difference


def _attributions(
    teacher: Teacher, table: ClassTable, chosen: Tensor, path: Path, progress: Progress
) -> tuple[Tensor, float]:
    """Attributions in the table's flat order, and the gap; gone on with from ``path``."""
    pieces = _pieces(table)
    flat, gaps, done = torch.zeros(table.flat.shape[1]), torch.zeros(len(table), 2), 0
    saved = read_tensors(path)
    if saved is not None and saved[0]["flat"].shape == flat.shape and torch.equal(saved[0]["chosen"], chosen):
        flat, gaps, done = saved[0]["flat"], saved[0]["gaps"], int(saved[1]["done"])
    clock = time.monotonic()
    with progress.bar("attributions", len(pieces)) as bar:
        bar.advance(done)
        for index in range(done, len(pieces)):
            rows = pieces[index]
            tree = table.batch(rows).to(teacher.device)
            found, difference = explain(teacher, tree, chosen[torch.from_numpy(rows)].to(teacher.device))
            found, difference = found.cpu(), difference.cpu()
            real, source = table.places(rows)
            flat[torch.from_numpy(source[real])] = found[torch.from_numpy(real)].float()
            off = torch.stack([(found.sum(1) - difference).abs(), difference.abs()], dim=1)
            gaps[torch.from_numpy(rows)] = off.float()
            bar.advance()
            if time.monotonic() - clock > SAVE_SECONDS or index + 1 == len(pieces):
                save_tensors(path, {"flat": flat, "gaps": gaps, "chosen": chosen}, {"done": index + 1})
                clock = time.monotonic()
    return flat, float(gaps[:, 0].sum() / gaps[:, 1].sum().clamp_min(1e-9))


def _pieces(table: ClassTable) -> list[Indices]:
    order = np.argsort(table.lengths, kind="stable").astype(np.int64)
    return list(cut(order, table.lengths, TEACHER_TOKENS))
