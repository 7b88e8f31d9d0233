"""Batches: which rows go into which step, and how they become tensors.

`RowTable` holds all rows as flat arrays; `BatchOrder` says which rows make step s, as a pure function of (seed, s),
so that a resumed run sees the same batches; `RowTable.batch` builds one batch without a loop over rows.
Rows of similar length share a batch and are padded on the right. Under causal attention a padded place can only
look back and nobody looks at it, so no attention mask is needed and the fast causal kernel serves; packing several
rows into one sequence would need a block mask and costs more than the few per cent of padding that it saves.
Knows nothing of models, teachers or losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import DataError, ModelError

Indices = npt.NDArray[np.int64]
Record = TypeVar("Record")
WINDOW = 64  # batches whose rows are sorted together: 2 % padding on chats of 20 to 80 tokens, and still well mixed


class TokenIds(Protocol):
    """What is needed of `compress.encoding.TokenRow`."""

    @property
    def id(self) -> str: ...

    @property
    def ids(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded on the right to T tokens; N positions whose next token is a target, row after row.

    Attributes:
        input_ids: (B, T) int64.
        keep: (N,) int64, places in the flattened (B * T) whose hidden state predicts a target.
        labels: (N,) int64, the target tokens.
        rows: (B,) int64, which rows of the table these are.
        counts: (B,) int64, targets of each row; they add up to N.
        tokens: real tokens, padding not counted.
        own: (B,) bool, rows whose answer the student wrote; ``None``: no such row.
    """

    input_ids: Tensor
    keep: Tensor
    labels: Tensor
    rows: Tensor
    counts: Tensor
    tokens: int
    own: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; what tells of rows stays where it is, for look-up."""
        if device.type == "cpu":
            return self
        ids, keep, labels = (tensor.to(device) for tensor in (self.input_ids, self.keep, self.labels))
        return Batch(ids, keep, labels, self.rows, self.counts, self.tokens, self.own)


def moved(record: Record, device: torch.device) -> Record:
    """A dataclass of tensors alone, on ``device``."""
    if device.type == "cpu":
        return record
    return type(record)(*(getattr(record, field.name).to(device) for field in fields(cast(Any, record))))


def entries(starts: Indices, rows: Indices) -> tuple[Indices, Indices]:
    """Of flat entries, those of row r being ``starts[r]`` to ``starts[r + 1]``, the ones of ``rows``, in their order.

    Returns, for each, its row's place in ``rows``, and where it stands.
    """
    counts = starts[rows + 1] - starts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner] + starts[rows][owner]


class RowTable:
    """All rows as flat arrays: row r is ``ids[starts[r] : starts[r] + lengths[r]]``.

    ``counts[r]`` is its number of targets. The first token is never a target: nothing stands before it.
    """

    def __init__(self, rows: Sequence[TokenIds], *, vocab: int, where: str = "rows", own: Collection[str] = ()) -> None:
        """Lay ``rows`` out; ``vocab`` is the number of token ids that teacher and student share.

        ``own`` are the ids of rows whose answer the student wrote.

        Raises:
            DataError: no rows, or a row has no answer token.
            ModelError: a token id is outside the vocabulary.
        """
        if not rows:
            raise DataError(where, "no rows", "at least one row with an answer")
        self.lengths: Indices = np.array([len(row.ids) for row in rows], dtype=np.int64)
        self.starts: Indices = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.ids = np.fromiter((token for row in rows for token in row.ids), np.int64, int(self.lengths.sum()))
        self.answer = np.fromiter((bit for row in rows for bit in row.answer), np.bool_, len(self.ids))
        nonempty = self.starts[self.lengths > 0]
        self.answer[nonempty] = False
        sums = np.concatenate([[0], np.cumsum(self.answer)])
        self.counts: Indices = (sums[self.starts + self.lengths] - sums[self.starts]).astype(np.int64)
        self._check(rows, vocab, where)
        self.vocab = vocab
        flags = np.fromiter((row.id in own for row in rows), np.bool_, len(rows)) if own else None
        self.own = flags if flags is not None and flags.any() else None

    def _check(self, rows: Sequence[TokenIds], vocab: int, where: str) -> None:
        bare = np.flatnonzero(self.counts == 0)
        if len(bare):
            raise DataError(
                f"{where}: row {rows[int(bare[0])].id}",
                f"{len(bare)} of {len(rows)} rows have no answer token",
                "an answer of at least one token behind a prompt of at least one",
                "Drop them by data.selection heuristics, or raise max_tokens if answers were cut off",
            )
        if int(self.ids.max()) >= vocab or int(self.ids.min()) < 0:
            row = int(np.searchsorted(self.starts, int(self.ids.argmax()), side="right")) - 1
            raise ModelError(
                f"{where}: row {rows[row].id}",
                f"token id {int(self.ids.max())}",
                f"ids below {vocab}, the vocabulary that teacher and student share",
                "Encode the rows with the tokenizer of the teacher",
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def key(self, row: int) -> bytes:
        """Hash of a row's token ids and of which of them are targets, 16 bytes: the key of the teacher's cache."""
        piece = slice(int(self.starts[row]), int(self.starts[row] + self.lengths[row]))
        content = self.ids[piece].astype("<i4").tobytes() + self.answer[piece].tobytes()
        return hashlib.sha256(content).digest()[:16]

    def fingerprint(self) -> str:
        """Hash of all rows in their order."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        digest.update(self.answer.tobytes())
        if self.own is not None:
            digest.update(self.own.tobytes())
        return digest.hexdigest()

    def batch(self, rows: Indices, width: int | None = None) -> Batch:
        """Build the batch of ``rows``, padded to ``width`` tokens, or to the longest of them."""
        lengths = self.lengths[rows]
        places = np.arange(int(lengths.max()) if width is None else width)
        real = places[None, :] < lengths[:, None]  # (B, T)
        source = np.where(real, self.starts[rows][:, None] + places[None, :], 0)
        ids = np.where(real, self.ids[source], 0)  # any id serves as padding: no kept position attends to it
        target = self.answer[source] & real
        keep = np.flatnonzero(target) - 1  # the hidden state before a token predicts it; the first is never a target
        return Batch(
            input_ids=torch.from_numpy(ids),
            keep=torch.from_numpy(keep),
            labels=torch.from_numpy(ids[target]),
            rows=torch.from_numpy(rows),
            counts=torch.from_numpy(self.counts[rows]),
            tokens=int(lengths.sum()),
            own=None if self.own is None else torch.from_numpy(self.own[rows]),
        )


class BatchOrder:
    """Which rows make which step: a pure function of (lengths, rows, batch_tokens, seed) and the step's number.

    Every epoch is a new permutation. Inside windows of `WINDOW` batches rows are sorted by length and cut at
    ``batch_tokens`` padded tokens; then the batches of the epoch are shuffled.
    """

    def __init__(self, lengths: Indices, rows: Indices, *, batch_tokens: int, seed: int) -> None:
        self.lengths, self.rows, self.batch_tokens, self.seed = lengths, rows, batch_tokens, seed
        self._epochs: list[list[Indices]] = []
        self._ends: list[int] = []  # batches up to the end of each epoch

    def epoch(self, number: int) -> list[Indices]:
        """The batches of epoch ``number``, in order."""
        draw = np.random.Generator(np.random.PCG64([self.seed, number]))
        order = self.rows[draw.permutation(len(self.rows))]
        mean = max(1.0, float(self.lengths[self.rows].mean()))
        window = WINDOW * max(1, int(self.batch_tokens / mean))
        batches: list[Indices] = []
        for start in range(0, len(order), window):
            piece = order[start : start + window]
            piece = piece[np.argsort(self.lengths[piece], kind="stable")]
            batches.extend(cut(piece, self.lengths, self.batch_tokens))
        return [batches[i] for i in draw.permutation(len(batches))]

    def steps(self, epochs: float) -> int:
        """Number of steps in ``epochs`` epochs, at least one; a part of an epoch is rounded to whole steps."""
        whole = int(epochs)
        self._grow_to_epoch(whole)
        before = self._ends[whole - 1] if whole else 0
        return max(1, before + round((epochs - whole) * len(self._epochs[whole])))

    def __getitem__(self, step: int) -> Indices:
        """Rows of step ``step``, counted from 0 over all epochs."""
        while not self._ends or step >= self._ends[-1]:
            self._grow_to_epoch(len(self._epochs))
        number = int(np.searchsorted(self._ends, step, side="right"))
        return self._epochs[number][step - (self._ends[number - 1] if number else 0)]

    def _grow_to_epoch(self, number: int) -> None:
        while len(self._epochs) <= number:
            self._epochs.append(self.epoch(len(self._epochs)))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epochs[-1]))


def cut(rows: Indices, lengths: Indices, batch_tokens: int) -> Iterator[Indices]:
    """Cut ``rows``, sorted by rising length, into pieces of at most ``batch_tokens`` padded tokens, or one row."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or int(lengths[rows[end]]) * (end + 1 - start) > batch_tokens:
            yield rows[start:end]
            start = end


def split_rows(table: RowTable, *, validation_share: float, validation_rows: int, seed: int) -> tuple[Indices, Indices]:
    """Return (training rows, held-out rows), both sorted; held out are at most ``validation_rows``, by ``seed``.

    Equal rows fall on the same side, else the held-out loss would measure memory.
    """
    wanted = min(validation_rows, round(validation_share * len(table)))
    everything = np.arange(len(table), dtype=np.int64)
    if wanted < 1 or len(table) < 2:
        return everything, everything[:0]
    salt = seed.to_bytes(8, "big", signed=True)
    ranks = [hashlib.sha256(salt + table.key(row)).digest() for row in range(len(table))]
    edge = sorted(ranks)[wanted - 1]
    held = np.array([rank <= edge for rank in ranks])
    if held.all():
        return everything, everything[:0]
    return everything[~held], everything[held]
