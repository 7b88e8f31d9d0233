"""Calibration batches: whole rows, drawn by seed up to the budget, padded on the right; the loss is of targets only."""

from __future__ import annotations

import pytest
import torch

from compress.errors import DataError
from compress.model.calibration import batches, mean_loss, sample
from tests.tiny import tiny_model, tiny_token_rows


def test_rows_are_drawn_by_seed_up_to_the_budget() -> None:
    rows = tiny_token_rows(30, tokens=10)
    drawn = sample(rows, tokens=45, seed=1)
    assert len(drawn) == len({row.id for row in drawn}) == 5
    assert drawn == sample(rows, tokens=45, seed=1)
    assert drawn != sample(rows, tokens=45, seed=2)
    assert sorted(row.id for row in sample(rows, tokens=10**6, seed=1)) == [row.id for row in rows]


def test_batches_hold_each_row_once_with_padding_masked() -> None:
    rows = tiny_token_rows(7, tokens=(4, 9, 6))
    made = batches(rows, tokens=10**6, batch_size=3, seed=0, pad_id=0)
    seen = []
    for batch in made:
        for ids, mask, answer in zip(*batch, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert ids[length:].tolist() == answer[length:].tolist() == [0] * (len(mask) - length)
            seen.append((tuple(ids[:length].tolist()), tuple(answer[:length].tolist())))
    assert sorted(seen) == sorted((row.ids, row.answer) for row in rows)


def test_no_usable_row_is_an_error() -> None:
    for rows in ([], tiny_token_rows(3, tokens=1)):
        with pytest.raises(DataError, match="calibration: no rows"):
            batches(rows, tokens=10, batch_size=2, seed=0, pad_id=0)


def test_mean_loss_is_the_mean_over_targets_whatever_the_batches() -> None:
    model, rows = tiny_model(scale=0.3), tiny_token_rows(7)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        for place in range(1, len(row.ids)):
            if row.answer[place]:
                total, count = total - float(logprobs[place - 1, row.ids[place]]), count + 1
    for batch_size in (1, 4):
        made = batches(rows, tokens=10**6, batch_size=batch_size, seed=0, pad_id=0)
        assert mean_loss(model, made) == pytest.approx(total / count, rel=1e-5)
