"""Importances equal the plain loops, whatever the batching and padding."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ModelError
from compress.model.calibration import batches
from compress.model.pruning.importance import Importance, kv_group_scores, measure, strongest
from tests.reference import pruning as reference
from tests.tiny import ARCHITECTURES, tiny_model, tiny_token_rows


def scores(model: Any, rows: list[Any], batch_size: int = 4) -> Importance:
    return measure(model, batches(rows, tokens=10**6, batch_size=batch_size, seed=0, pad_id=0))


def assert_same(got: Importance, expected: Importance, tolerance: float) -> None:
    for ours, theirs in zip([*got.ffn, *got.heads], [*expected.ffn, *expected.heads], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.hidden, expected.hidden, rtol=tolerance, atol=tolerance)
    assert got.blocks == pytest.approx(expected.blocks, abs=tolerance)
    for name, value in got.moments.items():
        torch.testing.assert_close(value, expected.moments[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_importances_equal_the_plain_loops(arch: str) -> None:
    model = tiny_model(arch, hidden=16, heads=4, kv_heads=2, ffn=12, vocab=64, scale=0.4, head_dim=6)
    rows = tiny_token_rows(5, tokens=(3, 7, 5), vocab=64)
    got = scores(model, rows, batch_size=3)
    seen = [reference.run_row(model, list(row.ids)) for row in rows]

    def column(name: str) -> list[Any]:
        return [activations[name] for activations in seen]

    for index in range(2):
        np.testing.assert_allclose(got.ffn[index], reference.channel_scores(column(f"ffn.{index}")), rtol=1e-4)
        np.testing.assert_allclose(got.heads[index], reference.head_scores(column(f"heads.{index}"), 6), rtol=1e-4)
        expected = reference.block_score(column(f"in.{index}"), column(f"out.{index}"))
        assert got.blocks[index] == pytest.approx(expected, abs=1e-5)
    norms = [name for name in seen[0] if name.startswith("norm.")]
    assert len(norms) == 5
    hidden = sum(reference.channel_scores(column(name)) for name in norms)
    np.testing.assert_allclose(got.hidden, hidden, rtol=1e-4)
    entering = np.concatenate(column("in.1"))
    np.testing.assert_allclose(got.moments["model.layers.1.input_layernorm"], (entering**2).mean(axis=0), rtol=1e-4)
    assert got.tokens == sum(len(row.ids) for row in rows)


def test_batch_size_order_and_padding_change_nothing() -> None:
    model = tiny_model("qwen3", scale=0.3)
    rows = tiny_token_rows(9, tokens=(4, 12, 7))
    one_by_one = scores(model, rows, batch_size=1)
    assert_same(scores(model, rows, batch_size=9), one_by_one, 1e-5)
    random.Random(0).shuffle(rows)
    assert_same(scores(model, rows, batch_size=4), one_by_one, 1e-5)


def test_the_model_and_its_hooks_are_left_as_they_were() -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores(model, tiny_token_rows(3))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_group_scores_are_the_norm_over_the_groups_heads() -> None:
    heads = torch.tensor([3.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    assert kv_group_scores(heads, 2).tolist() == [5.0, 1.0]
    assert kv_group_scores(heads, 4).tolist() == [3.0, 4.0, 1.0, 0.0]


def test_strongest_is_ascending_and_settles_ties_by_order() -> None:
    assert strongest(torch.tensor([1.0, 5.0, 5.0, 5.0, 0.0]), 2) == [1, 2]
    assert strongest(torch.tensor([1.0, 0.0, 9.0]), 2) == [0, 2]


def test_overflowing_activations_are_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
        model.model.layers[0].mlp.up_proj.weight.fill_(1e10)
    with pytest.raises(ModelError, match="activations are NaN or infinite"):
        scores(model, tiny_token_rows(3))
