"""Batches: the same tokens as the rows, a pure order, little padding, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.encoding import TokenRow
from compress.errors import DataError, ModelError
from compress.model.distillation.packing import BatchOrder, RowTable, cut, split_rows
from tests.tiny import VOCAB, tiny_token_rows

ROWS = tiny_token_rows(200, tokens=(4, 9, 17, 30))


def test_batch_holds_the_rows_and_the_positions_before_their_targets():
    table = RowTable(ROWS, vocab=VOCAB)
    picked = np.array([3, 0, 2])
    batch = table.batch(picked)
    flat = batch.input_ids.flatten()
    at = 0
    for line, index in enumerate(picked):
        row = ROWS[index]
        assert tuple(batch.input_ids[line, : len(row.ids)].tolist()) == row.ids
        targets = [i for i, bit in enumerate(row.answer) if bit]
        mine = batch.keep[at : at + len(targets)]
        assert mine.tolist() == [line * batch.input_ids.shape[1] + i - 1 for i in targets]
        assert batch.labels[at : at + len(targets)].tolist() == [row.ids[i] for i in targets]
        assert flat[mine + 1].tolist() == [row.ids[i] for i in targets]
        at += len(targets)
    assert at == len(batch.keep)
    assert batch.counts.tolist() == [sum(ROWS[i].answer) for i in picked]
    assert batch.tokens == sum(len(ROWS[i].ids) for i in picked)


def test_first_token_is_never_a_target():
    table = RowTable([TokenRow("a", (5, 6, 7), (1, 1, 0))], vocab=VOCAB)
    batch = table.batch(np.array([0]))
    assert batch.keep.tolist() == [0]
    assert batch.labels.tolist() == [6]


def test_every_epoch_holds_every_row_once_within_the_budget():
    table = RowTable(ROWS, vocab=VOCAB)
    order = BatchOrder(table.lengths, np.arange(len(ROWS)), batch_tokens=128, seed=3)
    seen = []
    for number in range(3):
        batches = order.epoch(number)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(ROWS)))
        assert max(table.lengths[b].max() * len(b) for b in batches) <= 128
        seen.append([b.tolist() for b in batches])
    assert seen[0] != seen[1] != seen[2]
    padded = sum(table.lengths[np.array(b)].max() * len(b) for b in seen[0])
    assert padded <= 1.1 * table.lengths.sum()


def test_order_is_a_pure_function_of_the_step():
    lengths = RowTable(ROWS, vocab=VOCAB).lengths
    make = lambda seed: BatchOrder(lengths, np.arange(len(ROWS)), batch_tokens=128, seed=seed)  # noqa: E731
    straight, jumping = make(3), make(3)
    walked = [straight[step].tolist() for step in range(100)]
    assert jumping[99].tolist() == walked[99]
    assert jumping[0].tolist() == walked[0]
    assert walked[: len(straight.epoch(0))] == [b.tolist() for b in straight.epoch(0)]
    assert make(4)[0].tolist() != walked[0]


@pytest.mark.parametrize(("epochs", "share"), [(1, 1.0), (2, 2.0), (0.5, 0.5), (1.25, 1.25), (1e-6, 0.0)])
def test_steps_of_whole_and_partial_epochs(epochs, share):
    lengths = np.full(400, 8)
    order = BatchOrder(lengths, np.arange(400), batch_tokens=32, seed=0)
    assert order.steps(epochs) == max(1, round(100 * share))


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    lengths = np.array([3, 4, 50, 60])
    assert [piece.tolist() for piece in cut(np.arange(4), lengths, 8)] == [[0, 1], [2], [3]]


def test_held_out_rows_follow_content_so_that_equal_rows_stay_together():
    twice = RowTable([*ROWS, *ROWS], vocab=VOCAB)
    training, held = split_rows(twice, validation_share=0.1, validation_rows=1000, seed=1)
    assert sorted([*training, *held]) == list(range(400))
    assert len(held) == pytest.approx(40, abs=2)
    assert not {twice.key(i) for i in training} & {twice.key(i) for i in held}
    assert split_rows(twice, validation_share=0.1, validation_rows=7, seed=1)[1].size in (7, 8)
    assert split_rows(twice, validation_share=0.1, validation_rows=1000, seed=2)[1].tolist() != held.tolist()
    assert split_rows(twice, validation_share=0.0, validation_rows=1000, seed=1)[1].size == 0


def test_rows_without_an_answer_are_refused():
    bare = TokenRow("feed", (5, 6, 7), (0, 0, 0))
    with pytest.raises(DataError, match="row feed: 1 of 201 rows have no answer token"):
        RowTable([*ROWS, bare], vocab=VOCAB)
    with pytest.raises(DataError, match="no rows"):
        RowTable([], vocab=VOCAB)


def test_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ModelError, match="row dead: token id 900; expected ids below 320"):
        RowTable([*ROWS, TokenRow("dead", (5, 900, 7), (0, 1, 1))], vocab=VOCAB)


def test_key_sees_ids_and_answer():
    rows = [
        TokenRow("a", (5, 6, 7), (0, 1, 1)),
        TokenRow("b", (5, 6, 7), (0, 0, 1)),
        TokenRow("c", (5, 6, 7), (0, 1, 1)),
    ]
    table = RowTable(rows, vocab=VOCAB)
    assert table.key(0) == table.key(2) != table.key(1)


def test_rows_that_the_student_wrote_are_marked_in_the_batch():
    own = {ROWS[0].id, ROWS[3].id}
    table, plain = RowTable(ROWS, vocab=VOCAB, own=own), RowTable(ROWS, vocab=VOCAB)
    assert table.batch(np.array([3, 1, 0])).own.tolist() == [True, False, True]
    assert table.batch(np.array([3, 1, 0])).to(torch.device("cpu")).own is not None
    assert plain.batch(np.array([3])).own is None
    assert table.fingerprint() != plain.fingerprint() == RowTable(ROWS, vocab=VOCAB, own={"other"}).fingerprint()
    assert [table.key(row) for row in range(5)] == [plain.key(row) for row in range(5)]  # the teacher says the same
