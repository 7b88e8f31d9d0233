"""Mixtures: the probabilities of several teachers, added up; weight 1 is that teacher, whatever stands beside it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from compress.errors import DataError
from compress.model.distillation.cache import CacheHeader, TargetCache
from compress.model.distillation.losses import LossWeights, fused_loss
from compress.model.distillation.mixtures import MixedTargets, routed, row_scores, shared_out, told
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import CachedTargets, OnlineTargets, fill_cache
from compress.progress import Progress
from tests.tiny import VOCAB, tiny_model, tiny_token_rows

QUIET = Progress(quiet=True)
ROWS = tiny_token_rows(40, tokens=(4, 9, 17, 30))
HEADER = CacheHeader("mixture", "tokenizer", "template", vocab=VOCAB, top_k=VOCAB, temperature=1.0)


@pytest.fixture(scope="module")
def teachers():
    return [OnlineTargets(tiny_model(seed=seed, scale=0.5), vocab=VOCAB) for seed in (5, 6, 7)]


@pytest.fixture(scope="module")
def table():
    return RowTable(ROWS, vocab=VOCAB)


@pytest.fixture(scope="module")
def weights(table):
    drawn = torch.rand((len(table), 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn / drawn.sum(dim=1, keepdim=True)


def dense(target_fn, batch):
    return target_fn(batch).narrow(0, len(batch.keep)).logprobs


def test_the_mixture_is_the_weighted_sum_of_probabilities(teachers, table, weights):
    batch = table.batch(np.array([3, 30, 11]))
    found = dense(MixedTargets(teachers, weights), batch).exp()
    expected = torch.zeros_like(found)
    position = 0
    for row, count in zip([3, 30, 11], batch.counts.tolist(), strict=True):
        for at in range(position, position + count):
            for teacher, weight in zip(teachers, weights[row].tolist(), strict=True):
                expected[at] += weight * dense(teacher, batch)[at].exp()
        position += count
    torch.testing.assert_close(found, expected)
    part = MixedTargets(teachers, weights)(batch).narrow(4, 9).logprobs.exp()
    torch.testing.assert_close(part, found[4:9])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_weight_one_is_that_teacher_bit_for_bit(teachers, table, at):
    one = torch.zeros((len(table), 3), dtype=torch.float64)
    one[:, at] = 1.0
    batch = table.batch(np.arange(9))
    exact = dense(teachers[at], batch)
    assert torch.equal(dense(MixedTargets(teachers, one), batch), exact)
    mixed_rows = one.clone()
    mixed_rows[0] = torch.tensor([0.2, 0.3, 0.5])  # the others stand beside it in the batch, and still count nothing
    found = dense(MixedTargets(teachers, mixed_rows), batch)
    own = int(batch.counts[0])
    assert torch.equal(found[own:], exact[own:])
    assert not torch.equal(found[:own], exact[:own])
    student = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    head = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1))
    losses = [
        fused_loss(student, head, batch.labels[:9], target(batch), LossWeights(0.7)).loss
        for target in (teachers[at], MixedTargets(teachers, one))
    ]
    assert torch.equal(*losses)


def test_teachers_without_weight_are_not_run(teachers, table):
    class Mute(OnlineTargets):
        def __call__(self, batch):
            raise AssertionError("nobody asked")

    mute = Mute(tiny_model(seed=1), vocab=VOCAB)
    weights = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64).repeat(len(table), 1)
    dense(MixedTargets([mute, *teachers[:2]], weights), table.batch(np.arange(5)))


@pytest.mark.parametrize("codec", ["topk", "sample"])
def test_a_cache_of_the_mixture_holds_the_mixture(tmp_path, teachers, table, weights, codec):
    header = HEADER if codec == "topk" else dataclasses.replace(HEADER, codec="sample", top_k=0, samples=200, seed=1)
    mixed = MixedTargets(teachers, weights)
    cache = TargetCache(tmp_path, header)
    fill_cache(cache, table, mixed, QUIET)
    batch = table.batch(np.array([39, 2, 8]))
    found, exact = CachedTargets(cache, table)(batch), dense(mixed, batch).exp()
    chances = found.logprobs.exp() if codec == "topk" else found.shares
    spread = torch.zeros_like(exact).scatter_add_(1, found.ids, chances)
    assert ((spread - exact).abs() < (2e-3 if codec == "topk" else 1 / 200 + 1e-4)).all()


def test_scores_are_means_over_the_targets_of_a_row(teachers, table):
    loss, entropy = (row_scores(teachers[0], table, kind, QUIET) for kind in ("loss", "entropy"))
    for row in (0, 17, 39):
        batch = table.batch(np.array([row]))
        logprobs = dense(teachers[0], batch).double()
        assert float(loss[row]) == pytest.approx(float(-logprobs.gather(1, batch.labels[:, None]).mean()), rel=1e-5)
        assert float(entropy[row]) == pytest.approx(float(-(logprobs.exp() * logprobs).sum(-1).mean()), rel=1e-5)


def test_routing_goes_to_the_lower_score_and_is_even_when_the_temperature_is_endless():
    scores = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    found = routed([1.0, 3.0], scores, 0.5)
    first = [math.exp(-2), 3 * math.exp(-4)]
    assert found[0].tolist() == pytest.approx([value / sum(first) for value in first])
    assert found.argmax(dim=1).tolist() == [0, 1]
    torch.testing.assert_close(routed([1.0, 3.0], scores, 1e12), shared_out([1.0, 3.0], 2))
    assert routed([1.0, 1.0], scores, 1e-3).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert shared_out([2.0, 6.0], 2).tolist() == [[0.25, 0.75]] * 2


def test_rows_say_whom_to_learn_from():
    found = told({"a": 1.0, "b": 2.0}, ["a", "b", {"a": 3, "b": 0.5}, {"b": 7}], list("wxyz"), where="meta.by")
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.75, 0.25], [0.0, 1.0]]
    for wrong in ("c", {"c": 1.0}, {"a": -1.0}, {"a": 0.0}, {"a": float("nan")}, {}, {"a": "1"}, 3):
        with pytest.raises(DataError, match=r"row y: meta\.by: got .*expected one of a, b, or a mapping"):
            told({"a": 1.0, "b": 2.0}, ["a", wrong], ["x", "y"], where="meta.by")
