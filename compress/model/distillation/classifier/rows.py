"""Rows as questions of class: a prompt, every class's answer behind it, and where the row's own text stands.

`read_questions` reads rows, finds the classes and encodes; `ClassTable` lays the questions out as flat arrays and
gives `Tree` batches, in which all answers to a prompt share it: K classes cost one prompt, not K. The answers are
segments 1..K of one sequence; an answer sees the prompt and itself. Knows nothing of models, teachers and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.encoding import SLOT as FILLER
from compress.encoding import AskedRow, TokenRow, asked_rows, encode_answers, encode_prompt
from compress.errors import DataError
from compress.model.distillation.classifier.params import SLOT, ClassifierParams
from compress.model.distillation.packing import Indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Question:
    """One row: ``prompt`` and ``answers`` (one per class) in tokens; ``prompt[first:last]`` is the row's own text."""

    id: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    first: int
    last: int

    @property
    def longest(self) -> TokenRow:
        """The prompt with its longest answer."""
        answer = max(self.answers, key=len)
        return TokenRow(self.id, (*self.prompt, *answer), (0,) * len(self.prompt) + (1,) * len(answer))

    @property
    def row(self) -> TokenRow:
        """All of it in one sequence, as the trainer counts rows: one target each."""
        ids = (*self.prompt, *(token for answer in self.answers for token in answer))
        return TokenRow(self.id, ids, (0,) * (len(ids) - 1) + (1,))


@dataclass(frozen=True)
class Questions:
    """The rows, the names of the classes, and each row's class, -1 where it has none."""

    asked: list[Question]
    classes: list[str]
    labels: npt.NDArray[np.int64]
    rows: list[AskedRow]

    def pick(self, rows: Sequence[int]) -> Questions:
        """Only ``rows``."""
        found = np.asarray(rows, dtype=np.int64)
        return Questions(
            [self.asked[i] for i in found], self.classes, self.labels[found], [self.rows[i] for i in found]
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """B questions padded on the right to T tokens.

    Attributes:
        ids: (B, T) int64.
        segments: (B, T) int64: 0 in the prompt, k + 1 in the answer of class k, -1 in the padding.
        positions: (B, T) int64, places as the model counts them: every answer goes on behind the prompt.
        before: (B, T) int64, the place whose state predicts the token.
        content: (B, T) bool, tokens of the row's own text.
        end: (B,) int64, the prompt's last place, where the answer is decided.
        classes: K.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    before: Tensor
    content: Tensor
    end: Tensor
    classes: int

    def to(self, device: torch.device) -> Tree:
        """The same on ``device``."""
        moved = {one.name: getattr(self, one.name).to(device) for one in fields(self) if one.name != "classes"}
        return replace(self, **moved)


class ClassTable:
    """All questions as flat arrays, in the order given."""

    def __init__(self, asked: Sequence[Question], classes: int) -> None:
        self.classes = classes
        laid = [_laid_out(question) for question in asked]
        self.lengths: Indices = np.array([one.shape[1] for one in laid], dtype=np.int64)
        self.starts: Indices = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.flat = np.concatenate(laid, axis=1)  # (5, all tokens)
        self.end = np.array([len(question.prompt) - 1 for question in asked], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def places(self, rows: Indices) -> tuple[npt.NDArray[np.bool_], Indices]:
        """(B, T): whether a place is real, and where in the flat arrays it is (0 in the padding)."""
        lengths = self.lengths[rows]
        places = np.arange(int(lengths.max()))
        real = places[None] < lengths[:, None]
        return real, np.where(real, self.starts[rows][:, None] + places[None], 0)

    def batch(self, rows: Indices) -> Tree:
        """The tree of ``rows``."""
        real, source = self.places(rows)
        ids, segments, positions, before, content = (np.where(real, line[source], 0) for line in self.flat)
        segments = np.where(real, segments, -1)
        return Tree(
            ids=torch.from_numpy(ids),
            segments=torch.from_numpy(segments),
            positions=torch.from_numpy(positions),
            before=torch.from_numpy(before),
            content=torch.from_numpy(content.astype(np.bool_)),
            end=torch.from_numpy(self.end[rows]),
            classes=self.classes,
        )


def _laid_out(question: Question) -> npt.NDArray[np.int64]:
    """Ids, segments, positions, predicting places and content of one question (5, T)."""
    size = len(question.prompt)
    columns = [
        (token, 0, place, max(0, place - 1), int(question.first <= place < question.last))
        for place, token in enumerate(question.prompt)
    ]
    for index, answer in enumerate(question.answers):
        for offset, token in enumerate(answer):
            columns.append((token, index + 1, size + offset, len(columns) - 1 if offset else size - 1, 0))
    return np.array(columns, dtype=np.int64).T


def read_questions(folder: Path, tokenizer: PreTrainedTokenizerFast, params: ClassifierParams) -> Questions:
    """Read a data artifact as questions.

    A row's class is its ``label``, or, without one, that whose answer the assistant gives. A text is a user's
    message.

    Raises:
        DataError: fewer than two classes, a label that is none of them, two classes with one answer, a row without a
            user's message, or one longer than ``max_tokens``.
        ModelError: the tokenizer has no chat template.
    """
    rows = asked_rows(folder)
    classes = params.classes or sorted({row.label for row in rows if row.label is not None})
    if len(classes) < 2:
        raise DataError(
            str(folder), f"labels {classes or 'none'}", "rows of two labels or more", "Give labels, or classes: [...]"
        )
    answers = [params.answers.get(name, name) for name in classes]
    strange = sorted(params.answers.keys() - set(classes))
    if strange or len(set(answers)) < len(answers) or not all(answer.strip() for answer in answers):
        raise DataError(
            f"{folder}: answers",
            f"answers {answers}" + (f", and for no class: {', '.join(strange)}" if strange else ""),
            f"an answer of its own, not empty, for each of the classes {', '.join(classes)}",
        )
    labels = np.array([_label(row, classes, answers) for row in rows], dtype=np.int64)
    asked = ask(rows, answers, params.prompt, tokenizer, params.max_tokens)
    return Questions(asked, classes, labels, rows)


def _label(row: AskedRow, classes: Sequence[str], answers: Sequence[str]) -> int:
    if row.label is None:
        return answers.index(row.answer) if row.answer in answers else -1
    if row.label not in classes:
        raise DataError(f"row {row.id}", f"label {row.label!r}", "one of " + ", ".join(classes))
    return classes.index(row.label)


def ask(
    rows: Sequence[AskedRow], answers: Sequence[str], prompt: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[Question]:
    """The questions of ``rows`` under ``prompt``; raises as `read_questions`."""
    bare: dict[str, list[int]] = {}  # what a prompt is without the row's text
    asked = []
    for row in rows:
        user, filler = ({"role": "user", "content": prompt.replace(SLOT, text)} for text in (row.text, FILLER))
        mine = encode_answers(row.id, [*row.before, user], answers, tokenizer)
        longest = max(len(one.ids) for one in mine)
        if longest > max_tokens:
            raise DataError(
                f"row {row.id}",
                f"{longest} tokens with its longest answer",
                f"at most max_tokens, {max_tokens}",
                "Raise max_tokens, or drop long rows by data.selection heuristics",
            )
        key = str(row.before)
        if key not in bare:
            bare[key] = encode_prompt([*row.before, filler], tokenizer)
        ids = mine[0].prompt
        first, last = _differs(ids, bare[key])
        asked.append(Question(row.id, ids, tuple(one.ids[len(ids) :] for one in mine), first, last))
    return asked


def _differs(ids: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """The range of ``ids`` outside the beginning and the end that it shares with ``other``."""
    most = min(len(ids), len(other))
    first = next((i for i in range(most) if ids[i] != other[i]), most)
    tail = next((i for i in range(most - first) if ids[-1 - i] != other[-1 - i]), most - first)
    return first, len(ids) - tail
