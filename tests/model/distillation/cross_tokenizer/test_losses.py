"""Losses across tokenizers: against plain loops, gradients, what they are for equal tokenizers, and slices."""

from __future__ import annotations

import pytest
import torch

from compress.model.distillation.cross_tokenizer import losses as module
from compress.model.distillation.cross_tokenizer.losses import (
    Common,
    Spans,
    alm,
    chunk_sums,
    distances,
    gold,
    label_scores,
    merged,
    uld,
)
from compress.model.distillation.losses import Dense, States, forward_kl
from tests.reference import cross_tokenizer as reference

C, V, W, H = 6, 9, 13, 4
COMMON = [(0, 3), (2, 1), (5, 0), (11, 8), (12, 4)]


def draw(*shape, seed=0, spread=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def logprobs(*shape, seed=0):
    return torch.log_softmax(draw(*shape, seed=seed), dim=-1)


def ids(high, count=C, seed=0):
    return torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(seed))


def common():
    pairs = torch.tensor(COMMON)
    return Common(pairs[:, 0], pairs[:, 1])


def everything(vocab):
    return Common(torch.arange(vocab), torch.arange(vocab))


# -- ULD -------------------------------------------------------------------------------------------------------------


def test_uld_equals_plain_loops_whichever_side_is_wider():
    q, p = logprobs(C, V, seed=1), logprobs(C, W, seed=2)
    expected = [reference.sorted_distance(a, b) for a, b in zip(q.exp().tolist(), p.exp().tolist(), strict=True)]
    torch.testing.assert_close(uld(q, p), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(uld(p, q), uld(q, p))


def test_uld_is_blind_to_the_order_of_a_vocabulary_and_bounded():
    q, p = logprobs(C, V, seed=1), logprobs(C, W, seed=2)
    mixed = p[:, torch.randperm(W, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(uld(q, mixed), uld(q, p))
    assert (uld(q, q[:, torch.arange(V - 1, -1, -1)]) == 0).all()
    assert ((uld(q, p) > 0) & (uld(q, p) <= 2)).all()


def test_uld_is_the_wasserstein_distance_of_equal_costs():
    """With cost 1 between different ranks: one minus what both have in common, so half the sum of differences."""
    q, p = (side.sort(dim=1, descending=True).values for side in (logprobs(C, V, seed=1).exp(), logprobs(C, V).exp()))
    torch.testing.assert_close(uld(q.log(), p.log()) / 2, 1 - torch.minimum(q, p).sum(dim=1))


# -- ALM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_alm_equals_plain_loops(temperature):
    student, teacher = -draw(C, seed=1).abs(), -draw(C, seed=2).abs()
    expected = [reference.alm(a, b, temperature) for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(
        alm(student, teacher, temperature=temperature), torch.tensor(expected, dtype=torch.float64)
    )
    assert (alm(student, teacher, temperature=temperature) > 0).all()
    assert (alm(teacher, teacher, temperature=temperature) == 0).all()


def test_alm_of_two_tokens_at_temperature_one_is_the_token_wise_kl():
    student, teacher = logprobs(C, 2, seed=1), logprobs(C, 2, seed=2)
    expected = forward_kl(student, Dense(teacher))[0]
    torch.testing.assert_close(alm(student[:, 0], teacher[:, 0], temperature=1.0), expected)


def test_alm_tends_to_the_divergence_of_surprisals():
    x, y = draw(C, seed=2).abs(), draw(C, seed=1).abs()
    limit = x * (x / y).log() - x + y
    torch.testing.assert_close(alm(-y, -x, temperature=1e6), limit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_alm_stays_finite_where_a_side_is_certain_or_hopeless(kind):
    values = torch.tensor([0.0, -1e-30, -1e-6, -1.0, -80.0, -500.0], dtype=kind)
    student, teacher = torch.meshgrid(values, values, indexing="ij")
    student = student.flatten().clone().requires_grad_()
    for temperature in (1.0, 100.0):
        loss = alm(student, teacher.flatten(), temperature=temperature)
        assert torch.isfinite(loss).all()
        assert (loss >= -1e-6).all()
        loss.sum().backward()
        assert torch.isfinite(student.grad).all()


# -- GOLD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unmatched", [0.0, 0.7])
def test_gold_equals_plain_loops(unmatched):
    q, p = logprobs(C, V, seed=1), logprobs(C, W, seed=2)
    firsts, rests = (torch.tensor([3, 1, 2, 6, 4, 3]), torch.tensor([0, 2, 5, 7, 1, 9])), []
    expected = []
    for seed in (3, 4):
        rest = -draw(C, seed=seed).abs()
        rest[0] = 0.0  # a single token
        rests.append(rest)
    for row in range(C):
        ours, theirs = (firsts[0][row].item(), rests[0][row].exp().item()), (
            firsts[1][row].item(), rests[1][row].exp().item(),
        )  # fmt: skip
        kl, rest = reference.gold(q[row].exp().tolist(), p[row].exp().tolist(), ours, theirs, COMMON)
        expected.append(kl + unmatched * rest)
    found = gold(q, p, Spans(firsts[0], rests[0]), Spans(firsts[1], rests[1]), common(), unmatched=unmatched)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gold_of_one_tokenizer_is_the_token_wise_kl():
    student, teacher, first = logprobs(C, V, seed=1), logprobs(C, V, seed=2), ids(V)
    span = Spans(first, torch.zeros(C, dtype=torch.float64))
    torch.testing.assert_close(
        gold(student, teacher, span, span, everything(V)), forward_kl(student, Dense(teacher))[0]
    )
    assert (gold(teacher, teacher, span, span, everything(V)) == 0).all()


def test_gold_counts_all_probability_once():
    """Shared outcomes and the others add up to one on each side, so that only their sum can be lost or found."""
    q, rest = logprobs(C, V, seed=1), -draw(C, seed=3).abs()
    span, ids_ = Spans(ids(V), rest), common().student
    shared = ids_[None] != span.first[:, None]
    others = module._others(q, span, ids_, shared).sum(dim=1)
    inside = (
        torch.where(shared, q[:, ids_].exp(), 0.0).sum(dim=1) + (q.gather(1, span.first[:, None])[:, 0] + rest).exp()
    )
    torch.testing.assert_close(others + inside, torch.ones(C, dtype=torch.float64))


def test_gold_without_common_tokens_still_compares_the_chunk():
    q, p = logprobs(C, V, seed=1), logprobs(C, W, seed=2)
    none = Common(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    zero = torch.zeros(C, dtype=torch.float64)
    found = gold(q, p, Spans(ids(V), zero), Spans(ids(W), zero), none, unmatched=0.0)
    a, b = p.gather(1, ids(W)[:, None])[:, 0], q.gather(1, ids(V)[:, None])[:, 0]
    torch.testing.assert_close(found, a.exp() * (a - b) - a.exp() + b.exp())


# -- gradients, and what equal and wrong teachers give ---------------------------------------------------------------


def test_gradients_agree_with_finite_differences():
    logits, rest = draw(C, V, seed=1, spread=1.0).requires_grad_(), (-draw(C, seed=3).abs()).requires_grad_()
    teacher, other = logprobs(C, W, seed=2), Spans(ids(W), -draw(C, seed=4).abs())
    torch.autograd.gradcheck(lambda x: uld(torch.log_softmax(x, 1), teacher), logits)
    torch.autograd.gradcheck(lambda x: alm(x, -draw(C, seed=4).abs(), temperature=100.0), rest)
    torch.autograd.gradcheck(
        lambda x, y: gold(torch.log_softmax(x, 1), teacher, Spans(ids(V), y), other, common(), unmatched=0.5),
        (logits, rest),
    )


def test_a_teacher_of_other_chunks_costs_more_than_the_right_one():
    student = logprobs(C, V, seed=1)
    right = torch.log_softmax(student + draw(C, V, seed=5, spread=0.1), dim=1)
    wrong, first = right.roll(1, 0), ids(V)
    zero = torch.zeros(C, dtype=torch.float64)
    span, rolled = Spans(first, zero), Spans(first.roll(1), zero)
    assert (
        gold(student, wrong, span, rolled, everything(V)).sum()
        > 3 * gold(student, right, span, span, everything(V)).sum()
    )
    assert uld(student, wrong).sum() > 3 * uld(student, right).sum()
    ours, theirs = (side.gather(1, first[:, None])[:, 0] for side in (student, right))
    assert alm(ours, theirs.roll(1), temperature=100.0).sum() > 3 * alm(ours, theirs, temperature=100.0).sum()


# -- chunks ----------------------------------------------------------------------------------------------------------


def test_chunk_sums_equal_plain_sums_with_gaps_and_empty_ranges():
    values = draw(12, seed=1).requires_grad_()
    starts, stops = torch.tensor([0, 3, 3, 7]), torch.tensor([2, 3, 6, 12])
    found = chunk_sums(values, starts, stops)
    torch.testing.assert_close(found, torch.stack([values[a:b].sum() for a, b in zip(starts, stops, strict=True)]))
    torch.autograd.gradcheck(lambda x: chunk_sums(x, starts, stops), values)
    assert chunk_sums(values, starts[:0], stops[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(30))
def test_merged_groups_equal_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 20, (1,), generator=generator))
    edges = torch.rand(count, generator=generator).log()
    joins = torch.rand(count, generator=generator) < 0.8
    joins[-1] = False
    group, ends = merged(edges, joins, 0.4)
    expected = reference.groups(edges.tolist(), joins.tolist(), 0.4)
    assert ends.tolist() == [run[-1] for run in expected]
    assert [torch.nonzero(group == number)[:, 0].tolist() for number in range(len(ends))] == expected
    assert int((group >= 0).sum()) == sum(map(len, expected))


# -- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 2 * V, 1 << 22])
def test_slices_change_neither_values_nor_gradients(elements):
    hidden, head = draw(C, H, seed=6).requires_grad_(), draw(V, H, seed=7).requires_grad_()
    labels, edges = ids(V), torch.arange(V) % 3 == 0
    teacher = States(draw(C, H, seed=8), draw(W, H, seed=9), 1.0)
    whole = torch.log_softmax(hidden @ head.T, dim=1)
    places = torch.tensor([0, 2, 2, 3, 5, 1])
    plain = (
        whole.gather(1, labels[:, None]).sum() * 0.3
        + whole[:, edges].logsumexp(1).square().sum()
        + uld(whole[places], teacher.narrow(0, C).logprobs).sum()
    )
    wanted = torch.autograd.grad(plain, (hidden, head))
    scores = label_scores(hidden, head, labels, edges, chunk_elements=elements)
    far = distances(hidden, head, places, teacher, lambda a, b, *_: uld(a, b), chunk_elements=elements)
    loss = scores.labels.sum() * 0.3 + scores.edges.square().sum() + far.sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), wanted)


def test_no_slice_holds_more_than_it_may(monkeypatch):
    sizes = []
    original = module.log_probabilities

    def watched(hidden, head):
        sizes.append(hidden.shape[0] * head.shape[0])
        return original(hidden, head)

    monkeypatch.setattr(module, "log_probabilities", watched)
    hidden = draw(40, H).requires_grad_()
    label_scores(hidden, draw(V, H), ids(V, 40), chunk_elements=5 * V).labels.sum().backward()
    assert max(sizes) <= 5 * V
    assert len(sizes) == 16, "each slice once forward and once more for its gradient"
