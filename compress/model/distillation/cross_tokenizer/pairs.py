"""Rows as both sides see them: the same rows encoded by two tokenizers, and which of their targets belong together.

`read_pairs` encodes a data artifact twice, `Pairs` aligns the rows and says which chunks a batch has, in positions of
the batch. Knows nothing of models or losses.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compress.encoding import TokenRow, token_rows
from compress.errors import DataError, UserError
from compress.model.distillation.cross_tokenizer.alignment import Alignment, Numbers, align
from compress.model.distillation.cross_tokenizer.symbols import END, Vocabulary
from compress.model.distillation.packing import Indices, RowTable, entries

logger = logging.getLogger(__name__)

Pairing = Literal["aligned", "index"]


@dataclass(frozen=True, slots=True)
class Chunks:
    """C chunks of a batch, as positions among the batch's targets on each side.

    ``teacher`` and ``student`` are (C, 2) int64, first and behind-the-last. ``joins`` (C,) bool: the next chunk of the
    row follows at once on both sides. ``last`` (C,) bool: nothing of the row follows on at least one side; ``ended``
    (C,) bool: since the answer ends here, by a token for it, and not since the row was cut or is a text.
    """

    teacher: Tensor
    student: Tensor
    joins: Tensor
    last: Tensor
    ended: Tensor


def read_pairs(
    folder: Path,
    teacher: Any,
    student: Any,
    *,
    max_tokens: int,
    teacher_max_tokens: int,
    truncate: bool,
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Encode a data artifact with both tokenizers; rows that truncation left without a target on a side are left out.

    Raises:
        DataError: no row, or as `compress.encoding.token_rows`; the message names the side.
        ModelError: a side has no chat template, but the rows are chats.
    """
    with _named("teacher", "teacher_max_tokens"):
        ours = token_rows(folder, teacher, max_tokens=teacher_max_tokens, truncate=truncate)
    with _named("student", "max_tokens"):
        theirs = token_rows(folder, student, max_tokens=max_tokens, truncate=truncate)
    by_id = {row.id: row for row in theirs}
    both = [(row, by_id[row.id]) for row in ours if row.id in by_id]
    lost = max(len(ours), len(theirs)) - len(both)
    if lost:
        logger.warning("%d rows have an answer within the limits of one side only and are left out", lost)
    if not both:
        raise DataError(str(folder), "no row has an answer on both sides", do="Raise max_tokens and teacher_max_tokens")
    return [row for row, _ in both], [row for _, row in both]


@contextmanager
def _named(side: str, limit: str) -> Iterator[None]:
    """Say of which side an error is, and which parameter is meant."""
    try:
        yield
    except UserError as error:
        allowed, do = (text.replace("max_tokens", limit) for text in (error.allowed, error.do))
        raise type(error)(f"{side}'s tokens: {error.where}", error.got, allowed, do) from error


class Pairs:
    """The aligned chunks of all rows, as flat arrays: those of row r are ``chunks[starts[r] : starts[r + 1]]``.

    A chunk is (teacher's first, behind-the-last, student's first, behind-the-last) target of its row.
    """

    def __init__(
        self,
        teacher: Sequence[TokenRow],
        student: Sequence[TokenRow],
        sides: tuple[Vocabulary, Vocabulary],
        *,
        where: str,
    ) -> None:
        """Align row by row.

        Raises:
            DataError: no row has a chunk.
        """
        parts, ended, figures = [], [], _Figures()
        for ours, theirs in zip(teacher, student, strict=True):
            found, shift = _aligned(ours, theirs, sides)
            kept = found.chunks - np.array([shift[0], shift[0], shift[1], shift[1]])
            kept = kept[(kept[:, 0] >= 0) & (kept[:, 2] >= 0)]  # a first token that is no target cannot be compared
            parts.append(kept)
            over = (END,) in (sides[0].symbols[ours.ids[-1]], sides[1].symbols[theirs.ids[-1]])
            ended.append(np.arange(len(kept)) == (len(kept) - 1 if over else -1))
            figures.add(found, len(kept))
        self.chunks: Numbers = np.concatenate(parts)
        self.ended = np.concatenate(ended)
        self.starts: Numbers = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        self.ours = np.array([row.targets for row in teacher], dtype=np.int64)
        self.theirs = np.array([row.targets for row in student], dtype=np.int64)
        self.figures = figures.report(len(parts))
        if not len(self.chunks):
            raise DataError(
                where,
                f"of {len(parts)} rows none can be aligned between the teacher's tokens and the student's",
                "two tokenizers that keep the text as it is",
                "Look at the normalizer in both tokenizer.json (lower case, stripped accents) and at max_tokens",
            )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def by_index(self) -> Pairs:
        """The same rows with the first target paired with the first, and so on to the end of the shorter side."""
        other = object.__new__(Pairs)
        shorter = np.minimum(self.ours, self.theirs)
        other.starts = np.concatenate([[0], np.cumsum(shorter)]).astype(np.int64)
        place = np.arange(int(other.starts[-1])) - np.repeat(other.starts[:-1], shorter)
        other.chunks = np.stack([place, place + 1, place, place + 1], axis=1)
        other.ended = np.zeros(len(other.chunks), dtype=bool)
        other.ours, other.theirs, other.figures = self.ours, self.theirs, self.figures
        return other

    def key(self, row: int, teacher: RowTable) -> bytes:
        """Hash of the teacher's tokens of a row and of where its chunks are: 16 bytes, the key of the cache."""
        part = self.chunks[self.starts[row] : self.starts[row + 1], :2]
        return hashlib.sha256(teacher.key(row) + part.astype("<i4").tobytes()).digest()[:16]

    def batch(self, rows: Indices) -> Chunks:
        """The chunks of ``rows``, in their order."""
        owner, source = entries(self.starts, rows)
        local = self.chunks[source]
        shift = [np.cumsum(total) - total for total in (self.ours[rows], self.theirs[rows])]
        ours, theirs = local[:, :2] + shift[0][owner, None], local[:, 2:] + shift[1][owner, None]
        joins = np.zeros(len(owner), dtype=bool)
        joins[:-1] = (owner[1:] == owner[:-1]) & (ours[1:, 0] == ours[:-1, 1]) & (theirs[1:, 0] == theirs[:-1, 1])
        last = (local[:, 1] >= self.ours[rows][owner]) | (local[:, 3] >= self.theirs[rows][owner])
        ended = self.ended[source] & last
        return Chunks(*(torch.from_numpy(part) for part in (ours, theirs, joins, last, ended)))


def _aligned(
    ours: TokenRow, theirs: TokenRow, sides: tuple[Vocabulary, Vocabulary]
) -> tuple[Alignment, tuple[int, int]]:
    """Alignment of a row's answers, and how many tokens of each side stand before the first target."""
    spelled, shift = [], []
    for row, side in zip((ours, theirs), sides, strict=True):
        first = row.answer.index(1)
        # a text without a BOS token: its first token is part of the text, but nothing predicts it
        start = 0 if first == 1 and not side.special[row.ids[0]] else first
        spelled.append([side.symbols[token] for token in row.ids[start:]])
        shift.append(first - start)
    return align(spelled[0], spelled[1]), (shift[0], shift[1])


class _Figures:
    """Sums over rows, for the run record."""

    def __init__(self) -> None:
        self.covered, self.chunks, self.bare = 0, 0, 0
        self.left = {"teacher": np.zeros(3, dtype=np.int64), "student": np.zeros(3, dtype=np.int64)}

    def add(self, found: Alignment, chunks: int) -> None:
        """Count one row."""
        self.covered += found.covered
        self.chunks += chunks
        self.bare += chunks == 0
        self.left["teacher"] += found.teacher_left
        self.left["student"] += found.student_left

    def report(self, rows: int) -> dict[str, Any]:
        """Figures by name: bytes, an end-of-turn token counted as one."""
        spelled = self.covered + int(self.left["student"].sum())
        figures: dict[str, Any] = {
            "aligned_share": round(self.covered / max(1, spelled), 6),
            "chunks": self.chunks,
            "bytes_per_chunk": round(self.covered / max(1, self.chunks), 3),
            "rows_without_chunks": self.bare,
            "rows": rows,
        }
        for side, (before, between, behind) in self.left.items():
            figures[f"{side}_unaligned_bytes"] = {
                "before": int(before), "between": int(between), "behind": int(behind)
            }  # fmt: skip
        return figures


def ends_by_token(rows: Sequence[TokenRow], side: Vocabulary) -> bool:
    """Whether any answer ends by a token for it, as those of chats do."""
    return any(side.symbols[row.ids[-1]] == (END,) for row in rows)
