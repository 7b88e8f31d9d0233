"""Which tokens of a teacher and of a student spell the same bytes of one text.

`align` takes what the tokens of both sides spell and gives the smallest chunks that begin and end together on both
sides. Where both spell the same text every byte is in exactly one chunk. Where they differ (a template that adds a
line feed, a token whose text is lost, a row cut short) what agrees is aligned and the rest is counted. Pure: knows
nothing of tokenizers, rows or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

from compress.model.distillation.cross_tokenizer.symbols import UNKNOWN, Symbols

Numbers = npt.NDArray[np.int64]
SPACE = 0x20
SHORTEST = 4  # a run inside of differing text must agree in this many symbols: shorter ones agree by chance


@dataclass(frozen=True, slots=True)
class Alignment:
    """What was aligned of one row.

    Attributes:
        chunks: (C, 4) int64, rising: first and behind-the-last token of the teacher, then of the student.
        covered: symbols inside of chunks, the same on both sides.
        teacher_left: the teacher's symbols before the first chunk, between chunks and behind the last.
        student_left: the student's.
    """

    chunks: Numbers
    covered: int
    teacher_left: tuple[int, int, int]
    student_left: tuple[int, int, int]


def align(teacher: Sequence[Symbols], student: Sequence[Symbols]) -> Alignment:
    """Align the tokens of two spellings of one text; see `Alignment`.

    A space that one side alone has at the very start is a tokenizer's own (SentencePiece puts one before a text) and
    is taken off; a token that becomes empty by it belongs to the first chunk.
    """
    ours, theirs = _Side(teacher, UNKNOWN), _Side(student, UNKNOWN + 1)  # what is lost equals nothing
    extra = ours.spaces() - theirs.spaces()
    if abs(extra) == 1:
        (ours if extra == 1 else theirs).drop_first()
    found, spans = [], []
    for at, other, length in _runs(ours.symbols, theirs.symbols):
        edges = np.intersect1d(ours.inside(at, length), theirs.inside(other, length))
        if len(edges) < 2:
            continue
        here, there = ours.tokens(edges + at), theirs.tokens(edges + other)
        found.append(np.stack([here[:-1], here[1:], there[:-1], there[1:]], axis=1))
        spans.append((at + int(edges[0]), at + int(edges[-1]), other + int(edges[0]), other + int(edges[-1])))
    if not found:
        empty = np.zeros((0, 4), dtype=np.int64)
        return Alignment(empty, 0, (len(ours.symbols), 0, 0), (len(theirs.symbols), 0, 0))
    covered = sum(stop - start for start, stop, _, _ in spans)
    left = [
        (first, last - first - covered, total - last)
        for first, last, total in (
            (spans[0][0], spans[-1][1], len(ours.symbols)),
            (spans[0][2], spans[-1][3], len(theirs.symbols)),
        )
    ]
    return Alignment(np.concatenate(found), covered, left[0], left[1])


class _Side:
    """One side's symbols, and the edges between its tokens: token i spells ``symbols[edges[i] : edges[i + 1]]``."""

    def __init__(self, tokens: Sequence[Symbols], unknown: int) -> None:
        self.symbols: Numbers = np.array([value for token in tokens for value in token], dtype=np.int64)
        self.symbols[self.symbols == UNKNOWN] = unknown
        self.edges: Numbers = np.concatenate([[0], np.cumsum([len(token) for token in tokens])]).astype(np.int64)

    def spaces(self) -> int:
        """Spaces at the start."""
        other = np.flatnonzero(self.symbols != SPACE)
        return int(other[0]) if len(other) else len(self.symbols)

    def drop_first(self) -> None:
        """Take the first symbol off."""
        self.symbols = self.symbols[1:]
        self.edges = np.maximum(self.edges - 1, 0)

    def inside(self, start: int, length: int) -> Numbers:
        """Edges in a run of symbols, counted from its start."""
        here = self.edges[(self.edges >= start) & (self.edges <= start + length)] - start
        return np.unique(here)

    def tokens(self, edges: Numbers) -> Numbers:
        """The first token that begins at each of ``edges``: empty ones go with what follows them."""
        return np.searchsorted(self.edges, edges, side="left").astype(np.int64)


def _runs(ours: Numbers, theirs: Numbers) -> list[tuple[int, int, int]]:
    """Runs (start, other start, length) in which both sides agree, in order and apart from each other."""
    shorter = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    head = int(differs[0]) if len(differs) else shorter
    rest = shorter - head
    differs = np.flatnonzero(ours[len(ours) - rest :][::-1] != theirs[len(theirs) - rest :][::-1])
    tail = int(differs[0]) if len(differs) else rest
    runs = [(0, 0, head)] if head else []
    middle, other = ours[head : len(ours) - tail].tolist(), theirs[head : len(theirs) - tail].tolist()
    if middle and other:
        blocks = SequenceMatcher(None, middle, other, autojunk=False).get_matching_blocks()
        runs += [(a + head, b + head, size) for a, b, size in blocks if size >= SHORTEST]
    if tail:
        runs.append((len(ours) - tail, len(theirs) - tail, tail))
    return runs
