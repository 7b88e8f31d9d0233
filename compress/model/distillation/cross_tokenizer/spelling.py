"""The teacher's next token, spelled in the student's tokens: its word on every one of them, not on chunks.

While the student writes the pieces of one token of the teacher, the teacher has said only once what that token may be.
`Spelling` knows which of the teacher's tokens go on behind a piece, and by which of the student's tokens;
`next_tokens` sums their probabilities up, `Places` says where in the rows that can be asked. `SpelledTeacher` is then a
teacher as any other with the student's vocabulary: online or cached, for every loss. Knows nothing of training.

For a student of bytes this is the conversion of a teacher to bytes, with the teacher's own cut of the text taken as
given (Phan et al. 2024, arXiv:2410.09303; distilled from by Singh et al. 2026, arXiv:2604.07466). Behind a piece only
longer tokens count, since the text goes on inside of the token; over texts both cases occur as often as they should,
so that the student's mean target is the teacher's distribution over bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from compress.encoding import TokenRow
from compress.errors import ModelError
from compress.model.distillation.cross_tokenizer.alignment import Numbers
from compress.model.distillation.cross_tokenizer.pairs import Pairs
from compress.model.distillation.cross_tokenizer.symbols import UNKNOWN, Symbols, Vocabulary, usual_tokens
from compress.model.distillation.losses import CHUNK_ELEMENTS, Dense, States
from compress.model.distillation.packing import Batch, Indices, RowTable, entries, moved
from compress.model.distillation.targets import OnlineTargets


@dataclass(frozen=True, slots=True)
class Pieces:
    """What the student's next token may be behind each of S pieces of tokens; piece 0 is the empty one.

    Behind piece s any of the teacher's tokens ``teacher[starts[s] : starts[s + 1]]`` may be under way, and the student
    goes on by ``student`` at the same places. All int64; ``starts`` has S + 1 entries.
    """

    starts: Tensor
    teacher: Tensor
    student: Tensor


@dataclass(frozen=True, slots=True)
class Asked:
    """P places of a batch: the target of the student, which of the teacher's slots stands for it, and the piece.

    All (P,) int64; ``slots`` (C,) are targets of the teacher, rising, and ``owner`` says which of them, rising too.
    """

    student: Tensor
    owner: Tensor
    piece: Tensor
    slots: Tensor


class Spelling:
    """How the teacher's tokens are written in the student's: each time by the longest token that fits."""

    def __init__(self, teacher: Vocabulary, student: Vocabulary) -> None:
        self._teacher, self._student = teacher, student
        self._words = usual_tokens(student)
        self._longest = max((len(word) for word in self._words), default=0)
        self._numbers: dict[Symbols, int] = {(): 0}
        entries: list[list[tuple[int, int]]] = [[]]
        for token, spelled in enumerate(teacher.symbols):
            if UNKNOWN in spelled:
                continue
            for at in range(len(spelled)):
                following = self._next(spelled[at:])
                if following is None:
                    continue
                number = self._numbers.setdefault(spelled[:at], len(entries))
                if number == len(entries):
                    entries.append([])
                entries[number].append((token, following))
        counts = [len(part) for part in entries]
        flat = np.array([pair for part in entries for pair in part], dtype=np.int64).reshape(-1, 2)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.pieces = Pieces(*(torch.from_numpy(part.copy()) for part in (starts, flat[:, 0], flat[:, 1])))
        self._found: dict[tuple[int, int, int], int] = {}

    def _next(self, left: Symbols) -> int | None:
        """The longest token of the student that ``left`` begins with."""
        for length in range(min(len(left), self._longest), 0, -1):
            token = self._words.get(left[:length])
            if token is not None:
                return token
        return None

    def piece(self, teacher: int, at: int, student: int) -> int:
        """Number of the piece of ``at`` symbols of the teacher's token, if ``student`` goes on with it; else -1."""
        key = (teacher, at, student)
        if key not in self._found:
            spelled = self._teacher.symbols[teacher]
            fits = self._student.symbols[student] == spelled[at : at + len(self._student.symbols[student])]
            goes_on = fits and UNKNOWN not in spelled and self._next(spelled[at:]) == student
            self._found[key] = self._numbers[spelled[:at]] if goes_on else -1
        return self._found[key]

    def walk(self, teacher: Sequence[int], student: Sequence[int]) -> list[tuple[int, int, int]]:
        """(token of the student, token of the teacher, piece) of a chunk that both sides spell, counted from its start.

        Left out are tokens of the student that reach beyond the teacher's, or are not the longest that fit there.
        """
        ours = [len(self._teacher.symbols[token]) for token in teacher]
        theirs = [len(self._student.symbols[token]) for token in student]
        at = sum(ours) - sum(theirs)  # a space of its own before a text is on one side only
        found, holder, edge = [], 0, 0
        for index, length in enumerate(theirs):
            begin, at = at, at + length
            while holder < len(ours) and edge + ours[holder] <= begin:
                edge += ours[holder]
                holder += 1
            if begin < 0 or not length or holder == len(ours) or at > edge + ours[holder]:
                continue
            piece = self.piece(teacher[holder], begin - edge, student[index])
            if piece >= 0:
                found.append((index, holder, piece))
        return found


class Places:
    """Where the teacher's tokens can be spelled in the student's, of all rows: (student's target, teacher's, piece)."""

    def __init__(
        self, teacher: Sequence[TokenRow], student: Sequence[TokenRow], pairs: Pairs, spelling: Spelling
    ) -> None:
        """Walk through every chunk of ``pairs``."""
        parts: list[Numbers] = []
        for row, (ours, theirs) in enumerate(zip(teacher, student, strict=True)):
            a, b = ours.answer.index(1), theirs.answer.index(1)
            found: list[tuple[int, int, int]] = []
            for first, last, start, stop in pairs.chunks[pairs.starts[row] : pairs.starts[row + 1]].tolist():
                places = spelling.walk(ours.ids[a + first : a + last], theirs.ids[b + start : b + stop])
                found += [(start + one, first + other, piece) for one, other, piece in places]
            parts.append(np.array(found, dtype=np.int64).reshape(-1, 3))
        self.starts: Numbers = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        self.places: Numbers = np.concatenate(parts)
        self.ours, self.theirs, self.pieces = pairs.ours, pairs.theirs, spelling.pieces

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Indices) -> Asked:
        """The places of ``rows``, in their order."""
        owner, source = entries(self.starts, rows)
        shift = [np.cumsum(total) - total for total in (self.ours[rows], self.theirs[rows])]
        local = self.places[source]
        slots, of = np.unique(local[:, 1] + shift[0][owner], return_inverse=True)
        found = (local[:, 0] + shift[1][owner], of.reshape(-1), local[:, 2], slots)
        return Asked(*(torch.from_numpy(np.ascontiguousarray(part)) for part in found))


def next_tokens(teacher: Tensor, owner: Tensor, piece: Tensor, pieces: Pieces, vocab: int) -> Tensor:
    """Probabilities (P, ``vocab``) of the student's next token, from the teacher's log-probabilities (C, W).

    ``owner`` (P,) says which of the C holds for a place, ``piece`` (P,) what of the token stands there already. Tokens
    of the teacher that the student cannot write are left out; a row of zeros where nothing is left.
    """
    probabilities = teacher.exp()
    found = probabilities.new_zeros(len(owner), vocab)
    begin, inside = torch.nonzero(piece == 0)[:, 0], torch.nonzero(piece > 0)[:, 0]
    whole = slice(0, int(pieces.starts[1]))
    first = probabilities[owner[begin]][:, pieces.teacher[whole]]
    found[begin] = found.new_zeros(len(begin), vocab).index_add_(1, pieces.student[whole], first)
    start, stop = pieces.starts[piece[inside]], pieces.starts[piece[inside] + 1]
    counts = stop - start
    row = torch.repeat_interleave(inside, counts)
    entry = torch.arange(len(row), device=row.device) + torch.repeat_interleave(
        start - counts.cumsum(0) + counts, counts
    )
    mass = probabilities[owner[row], pieces.teacher[entry]]
    found.view(-1).index_add_(0, row * vocab + pieces.student[entry], mass)
    total = found.sum(dim=1, keepdim=True)
    return found / total.clamp(min=torch.finfo(total.dtype).tiny)


@dataclass(frozen=True, slots=True)
class SpelledTargets:
    """What the teacher says of the N targets of a batch, in the student's tokens: distributions are made on demand.

    Attributes:
        states: the teacher's states at the C slots of ``asked``.
        asked: which target is answered by which slot.
        pieces: see `Pieces`.
        labels: (N,) the student's targets, which stand for the teacher's word where it cannot be spelled.
        vocab: of the student.
    """

    states: States
    asked: Asked
    pieces: Pieces
    labels: Tensor
    vocab: int

    def narrow(self, start: int, stop: int) -> Dense:
        """Targets ``start`` to ``stop``, as `Dense`; raises ModelError where the teacher gives NaN."""
        labels = self.labels[start:stop]
        found = torch.nn.functional.one_hot(labels, self.vocab).to(torch.float32)
        place, end = torch.searchsorted(self.asked.student, torch.tensor([start, stop], device=labels.device)).tolist()
        most = max(1, CHUNK_ELEMENTS // self.states.head.shape[0])
        while place < end:  # no slice holds more than CHUNK_ELEMENTS of the teacher's probabilities
            slot = int(self.asked.owner[place])
            upto = min(end, int(torch.searchsorted(self.asked.owner, slot + most)))
            inside = slice(place, upto)
            owner = self.asked.owner[inside]
            said = self.states.narrow(slot, int(owner[-1]) + 1).logprobs
            if bool(torch.isnan(said[:, 0]).any()):  # one NaN or infinite logit makes its whole row NaN
                raise ModelError("teacher", "its log-probabilities are not finite", "a teacher that gives no NaN")
            mass = next_tokens(said, owner - slot, self.asked.piece[inside], self.pieces, self.vocab)
            known = mass.sum(dim=1) > 0.5  # zeros where nothing is left of the teacher's word
            found[self.asked.student[inside][known] - start] = mass[known]
            place = upto
        return Dense(found.clamp(min=torch.finfo(found.dtype).tiny).log())


class SpelledTeacher:
    """Runs the teacher on its own tokens of the rows and says it in the student's."""

    def __init__(self, online: OnlineTargets, table: RowTable, places: Places, *, vocab: int) -> None:
        """``table`` holds the rows in the teacher's tokens; ``vocab`` is the student's."""
        self.online, self.table, self.places, self.vocab = online, table, places, vocab

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return self.online.device

    @property
    def models(self) -> Sequence[nn.Module]:
        """The one that is run."""
        return self.online.models

    def __call__(self, batch: Batch) -> SpelledTargets:
        rows, device = batch.rows.cpu().numpy(), batch.labels.device
        states = self.online(self.table.batch(rows).to(device))
        asked = moved(self.places.batch(rows), device)
        states = replace(states, hidden=states.hidden[asked.slots])
        return SpelledTargets(states, asked, moved(self.places.pieces, device), batch.labels, self.vocab)
