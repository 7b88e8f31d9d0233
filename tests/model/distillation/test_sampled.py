"""Draws with counts: packed and read back, the loss against plain loops, unbiased where the cut-off top k is not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from compress.errors import DataError, ModelError
from compress.model.distillation import targets as module
from compress.model.distillation.cache import CacheHeader, TargetCache
from compress.model.distillation.losses import (
    Dense,
    LossWeights,
    Sparse,
    combined,
    cross_entropy,
    forward_kl,
    fused_loss,
)
from compress.model.distillation.packing import RowTable
from compress.model.distillation.sampled import Drawn, DrawnShard, Sampled, draw, entry_bytes, shares_of, unpack
from compress.model.distillation.targets import CachedTargets, OnlineTargets, cache_figures, fill_cache
from compress.progress import Progress
from tests.reference import distillation as reference
from tests.tiny import VOCAB, tiny_model, tiny_token_rows

QUIET = Progress(quiet=True)
N, V, S = 7, 13, 12
ROWS = tiny_token_rows(60, tokens=(4, 9, 17, 30))
HEADER = CacheHeader("teacher", "tokenizer", "template", VOCAB, 0, 1.0, codec="sample", samples=S, seed=3)


def noise(*shape, seed=0, spread=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def uniform(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(drawn, samples, vocab, count):
    """All positions of what was drawn."""
    shard = DrawnShard(drawn, vocab=vocab, samples=samples)
    return shares_of(*shard.read(torch.arange(count), samples), samples)


def spread_out(targets, vocab):
    """Shares as a matrix over the vocabulary."""
    return torch.zeros(len(targets.ids), vocab).scatter_add_(1, targets.ids, targets.shares)


@pytest.mark.parametrize(("vocab", "samples"), [(V, 12), (V, 1), (V, 255), (5_000, 12), (152_000, 12), (152_000, 40)])
def test_draws_come_back_and_each_count_is_its_expectation_rounded_up_or_down(vocab, samples):
    logprobs = torch.log_softmax(noise(9, vocab, spread=3.0), -1)
    logprobs[0] = torch.full((vocab,), -torch.inf)
    logprobs[0, vocab - 1] = 0.0  # the highest id, and a teacher that is certain
    drawn = draw(logprobs, uniform(9), samples)
    assert drawn.codes.shape[1] == entry_bytes(vocab, samples)
    assert unpack(drawn.codes, vocab)[1].sum() == 9 * samples
    shares = spread_out(read(drawn, samples, vocab, 9), vocab)
    wanted = samples * logprobs.exp()
    assert ((shares * samples - wanted).abs() < 1 + 1e-6).all()
    assert shares[0, vocab - 1] == 1.0
    assert len(drawn.codes) * drawn.codes.shape[1] <= 9 * min(samples, vocab) * entry_bytes(vocab, samples)


def test_a_token_takes_at_most_three_bytes_and_twelve_draws_at_most_36():
    for vocab in (512, 32_000, 65_536, 151_936, 262_144, 1_398_101):
        assert dataclasses.replace(HEADER, vocab=vocab).bytes_per_token <= 36
    assert [entry_bytes(vocab, 12) for vocab in (512, 5_461, 5_462, 151_936, 1_398_101, 1_398_102)] == [
        2,
        2,
        3,
        3,
        3,
        4,
    ]


def test_positions_can_be_read_in_any_order_and_padding_counts_nothing():
    logprobs = torch.log_softmax(noise(40, V, spread=4.0), -1)
    drawn = draw(logprobs, uniform(40), S)
    whole = spread_out(read(drawn, S, V, 40), V)
    order = torch.tensor([39, 3, 3, 0, 17])
    ids, counts = DrawnShard(drawn, vocab=V, samples=S).read(order, S)
    torch.testing.assert_close(spread_out(shares_of(ids, counts, S), V), whole[order])
    assert DrawnShard(Drawn(drawn.codes[:0]), vocab=V, samples=S).starts.tolist() == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_loss_equals_plain_loops_autograd_and_finite_differences(temperature):
    teacher, student = noise(N, V, seed=1), noise(N, V, seed=2).requires_grad_()
    drawn = draw(torch.log_softmax(teacher / temperature, -1), uniform(N), S)
    targets = read(drawn, S, V, N)
    shares = spread_out(targets, V)
    loss, grad = forward_kl(student.detach(), targets, temperature=temperature)
    expected = [
        reference.kl(p, reference.softmax(q, temperature))
        for p, q in zip(shares.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (loss >= 0).all()
    (torch.xlogy(shares, shares) - shares * torch.log_softmax(student / temperature, -1)).sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [LossWeights(1.0), LossWeights(0.3, 1.0, 0.1), LossWeights(0.3, 2.0, 0.1)])
def test_the_fused_form_passes_gradcheck_and_equals_the_sum_of_both_losses(weights):
    given = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    logprobs = torch.log_softmax(noise(N, V, seed=1) / weights.temperature, -1)
    targets = read(draw(logprobs, uniform(N), S), S, V, N)
    targets = Sampled(targets.ids, targets.shares.double())
    hidden, head = noise(N, 5, seed=3).requires_grad_(), noise(V, 5, seed=4).requires_grad_()

    def run(hidden, head):
        return fused_loss(hidden, head, given, targets, weights, chunk_elements=3 * V).loss

    assert torch.autograd.gradcheck(run, (hidden, head))
    logits = (hidden @ head.T).detach()
    loss, ce, kl, grad = combined(logits, given, targets, weights)
    alone = cross_entropy(logits, given, label_smoothing=weights.label_smoothing)
    divergence = forward_kl(logits, targets, temperature=weights.temperature)
    share, squared = weights.kd_weight, weights.kd_weight * weights.temperature**2
    torch.testing.assert_close(ce, alone[0])
    torch.testing.assert_close(kl, divergence[0])
    torch.testing.assert_close(loss, (1 - share) * alone[0] + squared * divergence[0])
    torch.testing.assert_close(grad, (1 - share) * alone[1] + squared * divergence[1])
    torch.testing.assert_close(run(hidden, head), loss.sum())


def test_shares_that_are_the_probabilities_give_the_dense_loss():
    """The neutral case: 16 draws from multiples of 1 / 16 are the distribution itself."""
    parts = torch.tensor([[8, 4, 2, 1, 1, 0, 0], [16, 0, 0, 0, 0, 0, 0], [5, 3, 3, 2, 1, 1, 1]], dtype=torch.float64)
    dense, student = Dense((parts / 16).log()), noise(3, 7, seed=2)
    targets = read(draw(dense.logprobs, uniform(3), 16), 16, 7, 3)
    for temperature in (1.0, 2.0):
        found, exact = (forward_kl(student, aim, temperature=temperature) for aim in (targets, dense))
        torch.testing.assert_close(found[0], exact[0])
        torch.testing.assert_close(found[1], exact[1])


def z_score(gradients, exact, teacher):
    """By how many standard errors the mean of ``gradients`` (R, V) lies off ``exact`` (V,), at the worst token.

    The count of a token is S p rounded down or up, so its variance is that of the part behind the point.
    """
    part = (S * teacher.exp()) % 1.0
    error = (part * (1 - part)).sqrt() / S / math.sqrt(len(gradients))
    return ((gradients.mean(dim=0) - exact).abs() / error).max()


def test_the_mean_gradient_is_the_dense_one_and_that_of_top_k_without_a_tail_is_not():
    """4,000 draws at one position; 4.5 standard errors over 40 tokens, with a fixed seed.

    The same measure turns down the renormalised top 12, by far.
    """
    vocab, repeats = 40, 4_000
    teacher, student = torch.log_softmax(noise(vocab, seed=1), -1), noise(vocab, seed=2)
    exact = forward_kl(student[None], Dense(teacher[None]))[1][0]
    many = draw(teacher.expand(repeats, -1), uniform(repeats, seed=5), S)
    gradients = forward_kl(student.expand(repeats, -1), read(many, S, vocab, repeats))[1]
    assert z_score(gradients, exact, teacher) < 4.5
    top, ids = teacher[None].topk(S)
    cut = Sparse(ids, top - top.logsumexp(-1, keepdim=True), torch.full((1,), -torch.inf, dtype=torch.float64))
    bias = forward_kl(student[None], cut)[1][0] - exact
    assert z_score(gradients + bias, exact, teacher) > 50
    spread = gradients.var(dim=0).sum()
    alone = torch.distributions.Multinomial(S, teacher.exp()).variance.sum() / S**2
    assert spread < 0.7 * alone, "evenly spaced draws vary less than independent ones"


def test_the_loss_of_draws_exceeds_the_dense_one_by_a_constant_alone():
    """Its mean is KL and the entropy that draws lack: the same for every student, so that losses can be compared."""
    vocab, repeats = 20, 4_000
    teacher = torch.log_softmax(noise(vocab, seed=1), -1)
    targets = read(draw(teacher.expand(repeats, -1), uniform(repeats, seed=5), S), S, vocab, repeats)
    gaps = []
    for seed in (2, 3):
        student = noise(vocab, seed=seed)
        dense = forward_kl(student[None], Dense(teacher[None]))[0]
        gaps.append(float(forward_kl(student.expand(repeats, -1), targets)[0].mean() - dense))
    lacking = -(teacher.exp() * teacher).sum() + torch.xlogy(targets.shares, targets.shares).sum(-1).mean()
    assert gaps == pytest.approx([float(lacking)] * 2, abs=0.02)
    assert lacking > 0.05


def test_other_divergences_are_refused():
    targets = Sampled(torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    for weights in (LossWeights(1.0, divergence="jsd", number=0.5), LossWeights(0.5, 2.0, divergence="reverse_kl")):
        with pytest.raises(ModelError, match=r"codec: sample, with another divergence.*Set codec: topk"):
            combined(noise(1, V), torch.tensor([1]), targets, weights)


# ---------------------------------------------------------------------------------- in the cache


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(seed=5, scale=0.5)


@pytest.fixture
def table():
    return RowTable(ROWS, vocab=VOCAB)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_POSITIONS", 100)
    monkeypatch.setattr(module, "CACHE_TOKENS", 64)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cache_gives_each_row_its_own_draws(tmp_path, teacher, table, small_shards, temperature):
    header = dataclasses.replace(HEADER, temperature=temperature)
    online = OnlineTargets(teacher, vocab=VOCAB, temperature=temperature)
    cache = TargetCache(tmp_path, header)
    fill_cache(cache, table, online, QUIET)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 2
    batch = table.batch(np.array([40, 3, 17, 59, 0]))
    exact = online(batch).narrow(0, len(batch.keep)).logprobs.exp()
    for cached in (CachedTargets(cache, table), CachedTargets(TargetCache(tmp_path, header), table)):
        shares = spread_out(cached(batch), VOCAB)
        assert ((shares - exact).abs() < 1 / S + 1e-5).all()
    row = int(batch.rows[1])
    offsets = header.offsets(table.key(row), int(table.counts[row]))
    alone = table.batch(np.array([row]))
    again = draw(online(alone).narrow(0, len(offsets)).logprobs, offsets, S)
    assert (spread_out(cached(alone), VOCAB) == spread_out(read(again, S, VOCAB, len(offsets)), VOCAB)).all()


def test_bytes_per_token_are_those_on_the_disk(tmp_path, teacher, table):
    cache = TargetCache(tmp_path, HEADER)
    fill_cache(cache, table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    found = cache_figures(cache)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert found["target_bytes_per_token_stored"] == round(on_disk / sum(row.targets for row in ROWS), 2)
    assert found["target_bytes_per_token"] == 24
    codes = sum(part.codes.numel() for part in cache._parts)
    assert codes / cache.positions <= 24
    assert TargetCache(tmp_path, HEADER).stored_bytes == cache.stored_bytes == on_disk


def test_a_filling_cut_short_goes_on_to_the_same_bytes_and_new_rows_are_appended(tmp_path, teacher, small_shards):
    class Dying(OnlineTargets):
        left = 9

        def __call__(self, batch):
            self.left -= 1
            if self.left < 0:
                raise InterruptedError("killed")
            return super().__call__(batch)

    table, online = RowTable(ROWS, vocab=VOCAB), OnlineTargets(teacher, vocab=VOCAB)
    fill_cache(TargetCache(tmp_path / "whole", HEADER), table, online, QUIET)
    with pytest.raises(InterruptedError, match="killed"):
        fill_cache(TargetCache(tmp_path / "cut", HEADER), table, Dying(teacher, vocab=VOCAB), QUIET)
    assert 1 < len(files(tmp_path / "cut")) < len(files(tmp_path / "whole"))
    fill_cache(TargetCache(tmp_path / "cut", HEADER), table, online, QUIET)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    grown = TargetCache(tmp_path / "grown", HEADER)
    fill_cache(grown, RowTable(ROWS[:30], vocab=VOCAB), online, QUIET)
    before = files(tmp_path / "grown")
    fill_cache(grown, table, online, QUIET)
    assert {name: files(tmp_path / "grown")[name] for name in before} == before
    batch = table.batch(np.arange(60))
    one, other = (CachedTargets(TargetCache(tmp_path / name, HEADER), table)(batch) for name in ("whole", "grown"))
    same = spread_out(one, VOCAB) == spread_out(other, VOCAB)
    assert same.float().mean() > 0.9999, "a row draws the same whatever is beside it, but for a product's last bit"


def test_a_damaged_shard_is_computed_again(tmp_path, teacher, table, small_shards, caplog):
    online = OnlineTargets(teacher, vocab=VOCAB)
    fill_cache(TargetCache(tmp_path, HEADER), table, online, QUIET)
    shard = tmp_path / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    cache = TargetCache(tmp_path, HEADER)
    assert "computed again" in caplog.text
    with pytest.raises(DataError, match="is not in the teacher's cache"):
        CachedTargets(cache, table)
    fill_cache(cache, table, online, QUIET)
    CachedTargets(TargetCache(tmp_path, HEADER), table)


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 8), ("seed", 4), ("codec", "topk"), ("temperature", 2.0), ("teacher", "x")]
)
def test_a_cache_of_other_draws_is_refused(tmp_path, field, value):
    TargetCache(tmp_path, HEADER)
    with pytest.raises(DataError, match=f"the cache's {field} is .* expected {value!r}.* remove the folder"):
        TargetCache(tmp_path, dataclasses.replace(HEADER, **{field: value}))


def test_a_header_from_before_the_draws_is_still_read(tmp_path):
    old = dataclasses.replace(HEADER, codec="topk", top_k=4, samples=0, seed=0)
    TargetCache(tmp_path, old)
    path = tmp_path / "header.json"
    lines = [line for line in path.read_text().splitlines() if '"samples"' not in line and '"seed"' not in line]
    path.write_text("\n".join(lines))
    TargetCache(tmp_path, old)


def test_a_teacher_that_gives_no_numbers_is_refused(tmp_path, table):
    broken = tiny_model(seed=5)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="its log-probabilities are not finite"):
        fill_cache(TargetCache(tmp_path, HEADER), table, OnlineTargets(broken, vocab=VOCAB), QUIET)
