"""Losses: against plain loops, gradients against autograd and finite differences, limits, and the bias of top-k."""

from __future__ import annotations

import pytest
import torch

from compress.model.distillation.cache import decode, encode
from compress.model.distillation.losses import (
    Dense,
    LossWeights,
    Sparse,
    States,
    combined,
    cross_entropy,
    forward_kl,
    fused_loss,
    log_softmax_at,
)
from tests.reference import distillation as reference

N, V, H = 7, 13, 5
TEMPERATURES = (0.5, 1.0, 2.0)


def draw(*shape, seed=0, spread=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def labels(seed=0, vocab=V, count=N):
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def top_k(teacher_logits, k, temperature=1.0):
    """Exact sparse targets in float64, without the rounding of the cache."""
    logprobs = log_softmax_at(teacher_logits, temperature)
    top, ids = logprobs.topk(k, dim=-1)
    return Sparse(ids, top, logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=-1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_plain_loops_and_autograd(smoothing):
    logits, given = draw(N, V).requires_grad_(), labels()
    loss, grad = cross_entropy(logits.detach(), given, label_smoothing=smoothing)
    expected = [
        reference.cross_entropy(row, label, smoothing) for row, label in zip(logits.tolist(), given, strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    torch.nn.functional.cross_entropy(logits, given, label_smoothing=smoothing, reduction="sum").backward()
    torch.testing.assert_close(grad, logits.grad)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dense_kl_equals_plain_loops_and_autograd(temperature):
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2).requires_grad_()
    loss, grad = forward_kl(student.detach(), Dense(log_softmax_at(teacher, temperature)), temperature=temperature)
    expected = [
        reference.forward_kl(p, q, temperature) for p, q in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    p = torch.softmax(teacher / temperature, -1)
    (p * (p.log() - torch.log_softmax(student / temperature, -1))).sum().backward()
    torch.testing.assert_close(grad, student.grad)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_sparse_kl_equals_plain_loops_and_autograd(k, temperature):
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2).requires_grad_()
    targets = top_k(teacher, k, temperature)
    loss, grad = forward_kl(student.detach(), targets, temperature=temperature)
    expected = [
        reference.forward_kl_top_k(p, q, k, temperature)
        for p, q in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    q = torch.softmax(student / temperature, -1)
    p_top, q_top = targets.logprobs.exp(), q.gather(1, targets.ids)
    by_hand = (p_top * (targets.logprobs - q_top.log())).sum()
    if k < V:
        q_tail = q.scatter(1, targets.ids, 0.0).sum(-1)
        by_hand = by_hand + (targets.log_tail.exp() * (targets.log_tail - q_tail.log())).sum()
    by_hand.backward()
    torch.testing.assert_close(grad, student.grad)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sparse_over_the_whole_vocabulary_is_dense(temperature):
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    dense = forward_kl(student, Dense(log_softmax_at(teacher, temperature)), temperature=temperature)
    sparse = forward_kl(student, top_k(teacher, V, temperature), temperature=temperature)
    torch.testing.assert_close(sparse[0], dense[0])
    torch.testing.assert_close(sparse[1], dense[1])


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("k", [1, 4, V, None])
def test_the_shared_softmax_gives_the_sum_of_both_losses(k, smoothing, share):
    teacher, student, given = draw(N, V, seed=1), draw(N, V, seed=2), labels()
    targets = Dense(log_softmax_at(teacher, 1.0)) if k is None else top_k(teacher, k)
    loss, ce, kl, grad = combined(student, given, targets, LossWeights(share, 1.0, smoothing))
    alone = cross_entropy(student, given, label_smoothing=smoothing), forward_kl(student, targets)
    torch.testing.assert_close(ce, alone[0][0])
    torch.testing.assert_close(kl, alone[1][0])
    torch.testing.assert_close(loss, (1 - share) * alone[0][0] + share * alone[1][0])
    torch.testing.assert_close(grad, (1 - share) * alone[0][1] + share * alone[1][1])


def test_bf16_products_change_the_gradients_little_and_the_loss_not_at_all():
    teacher, given = draw(N, V, seed=1).float(), labels()
    targets = Dense(log_softmax_at(teacher, 1.0))
    found = []
    for dtype in (None, torch.bfloat16):
        hidden, head = draw(N, H, seed=3).float().requires_grad_(), draw(V, H, seed=4).float().requires_grad_()
        loss = fused_loss(hidden, head, given, targets, LossWeights(0.5), dtype=dtype).loss
        loss.backward()
        found.append((loss.detach(), hidden.grad, head.grad))
    assert found[0][0] == found[1][0]
    for exact, rounded in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_kl_is_zero_with_zero_gradient_exactly_where_student_is_teacher():
    logits = draw(N, V)
    for targets in (Dense(log_softmax_at(logits, 1.0)), top_k(logits, 4)):
        loss, grad = forward_kl(logits, targets)
        assert loss.abs().max() < 1e-12
        assert grad.abs().max() < 1e-12
        assert forward_kl(logits + draw(N, V, seed=3), targets)[0].min() > 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_losses_are_never_negative_even_after_the_cache_rounded_the_targets(seed, spread):
    teacher, student = draw(64, 300, seed=seed, spread=spread).float(), draw(64, 300, seed=seed + 50, spread=spread)
    targets = decode(encode(log_softmax_at(teacher, 1.0), 8))
    assert forward_kl(student.float(), targets)[0].min() >= -1e-5
    assert forward_kl(teacher, targets)[0].min() >= -1e-5
    assert cross_entropy(student.float(), labels(count=64))[0].min() >= 0


def test_gradient_pushes_down_the_tail_only_as_far_as_the_teacher_does():
    """At a student that is right within the tail but has too little of it, the tail must be pushed up."""
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    _, grad = forward_kl(student, top_k(teacher, 2))
    assert (grad[0, 2:] < 0).all()
    assert grad.sum().abs() < 1e-12


def test_extreme_logits_stay_finite():
    student = torch.tensor([[200.0, -200.0, 0.0, -90.0], [0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[-200.0, 200.0, 0.0, 0.0], [90.0, 0.0, -90.0, 0.0]])
    for targets in (Dense(log_softmax_at(teacher, 1.0)), decode(encode(log_softmax_at(teacher, 1.0), 2))):
        loss, grad = forward_kl(student, targets)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", ["dense", "sparse", "states", "none"])
@pytest.mark.parametrize("chunk_elements", [1, 3 * V, 1 << 22])
def test_fused_loss_passes_gradcheck_in_chunks_of_any_size(kind, chunk_elements):
    weights = LossWeights(kd_weight=0.3, temperature=1.5, label_smoothing=0.05)
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1).requires_grad_(), labels()
    teacher_hidden, teacher_head = draw(N, 4, seed=2), draw(V, 4, seed=3)
    targets = {
        "dense": Dense(log_softmax_at(teacher_hidden @ teacher_head.T, 1.5)),
        "sparse": top_k(teacher_hidden @ teacher_head.T, 3, 1.5),
        "states": States(teacher_hidden, teacher_head, 1.5),
        "none": None,
    }[kind]

    def loss(states, matrix):
        return fused_loss(states, matrix, given, targets, weights, chunk_elements=chunk_elements).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))
    if kind in ("dense", "states"):
        expected = reference.mixed(
            (teacher_hidden @ teacher_head.T).tolist(),
            (hidden @ head.T).tolist(),
            given.tolist(),
            kd_weight=0.3,
            temperature=1.5,
            label_smoothing=0.05,
        )
        assert loss(hidden, head).item() == pytest.approx(expected, rel=1e-12)


def test_fused_loss_without_gradient_gives_the_same_sums():
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1), labels()
    targets = Dense(log_softmax_at(draw(N, V, seed=2), 1.0))
    with_grad = fused_loss(hidden, head, given, targets, LossWeights())
    with torch.no_grad():
        without = fused_loss(hidden, head, given, targets, LossWeights())
    assert [x.item() for x in (with_grad.loss, with_grad.ce, with_grad.kl)] == [
        x.item() for x in (without.loss, without.ce, without.kl)
    ]
    assert with_grad.loss.item() == pytest.approx(0.5 * with_grad.ce.item() + 0.5 * with_grad.kl.item())


def test_kd_weight_zero_is_cross_entropy_whatever_the_teacher_says():
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1).requires_grad_(), labels()
    fused_loss(hidden, head, given, Dense(log_softmax_at(draw(N, V, seed=2), 1.0)), LossWeights(0.0)).loss.backward()
    grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    torch.nn.functional.cross_entropy(hidden @ head.T, given, reduction="sum").backward()
    torch.testing.assert_close(grads[0], hidden.grad)
    torch.testing.assert_close(grads[1], head.grad)


def test_padded_rows_of_the_vocabulary_get_neither_probability_nor_gradient():
    """Handing over the head's first rows only equals masking the others with -inf; zero logits would not."""
    hidden, whole, given = draw(N, H), draw(V + 4, H, seed=1).requires_grad_(), labels()
    loss = fused_loss(hidden, whole[:V], given, None, LossWeights(0.0)).loss
    loss.backward()
    masked = (hidden @ whole.detach().T).index_fill(1, torch.arange(V, V + 4), -torch.inf)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(masked, given, reduction="sum").item())
    assert whole.grad[V:].abs().max() == 0
    assert whole.grad[:V].abs().min() > 0


def test_high_temperature_limit_is_a_square_loss_on_centred_logits():
    """T^2 KL tends to |z_t - z_s|^2 / (2 V) of centred logits (Hinton et al. 2015, section 2.1)."""
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    temperature = 1e4
    loss, _ = forward_kl(student, Dense(log_softmax_at(teacher, temperature)), temperature=temperature)
    difference = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
    torch.testing.assert_close(loss * temperature**2, difference.square().sum(-1) / (2 * V), rtol=1e-3, atol=0)


def test_low_temperature_limit_is_cross_entropy_on_the_teachers_choice():
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    temperature = 0.01
    loss, _ = forward_kl(student, Dense(log_softmax_at(teacher, temperature)), temperature=temperature)
    choice = teacher.argmax(-1)
    expected = torch.nn.functional.cross_entropy(student / temperature, choice, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def fitted(targets, steps=4000):
    """The student's distribution after gradient descent on free logits."""
    logits = torch.zeros(targets.logprobs.shape[0], V, dtype=torch.float64)
    for _ in range(steps):
        logits -= forward_kl(logits, targets)[1]
    return torch.softmax(logits, -1)


def test_top_k_without_a_tail_is_biased_and_with_a_tail_is_not():
    """What a free student learns: with the tail the teacher's own top probabilities, without it renormalised ones."""
    teacher = draw(1, V, seed=4, spread=1.0)
    exact = torch.softmax(teacher, -1)
    with_tail = top_k(teacher, 3)
    total = with_tail.logprobs.logsumexp(-1, keepdim=True)
    without = Sparse(with_tail.ids, with_tail.logprobs - total, torch.full((1,), -torch.inf, dtype=torch.float64))
    learned = fitted(with_tail).gather(1, with_tail.ids)
    torch.testing.assert_close(learned, exact.gather(1, with_tail.ids), rtol=1e-4, atol=1e-6)
    biased = fitted(without).gather(1, with_tail.ids)
    assert biased.sum() > 0.99
    assert (biased - exact.gather(1, with_tail.ids)).min() > 0.02


def test_a_fixed_head_costs_no_gradient_and_changes_none():
    hidden, head, given = draw(N, H, seed=3), draw(V, H, seed=4), labels()
    targets = States(draw(N, H, seed=5), draw(V, H, seed=6), 1.0)
    found = []
    for fixed in (False, True):
        states, table = hidden.clone().requires_grad_(), head.clone().requires_grad_(not fixed)
        fused_loss(
            states, table, given, targets, LossWeights(0.7, divergence="cakld", number=0.4), chunk_elements=3 * V
        ).loss.backward()
        found.append((states.grad, table.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] is None
    assert found[0][1].abs().max() > 0
    wanted = hidden.clone().requires_grad_()
    p, log_q = states_logprobs(targets).exp(), torch.log_softmax(wanted @ head.T, -1)
    gap = log_q - p.log()
    kls = 0.6 * -(p * gap).sum() + 0.4 * (log_q.exp() * gap).sum()
    (0.3 * torch.nn.functional.nll_loss(log_q, given, reduction="sum") + 0.7 * kls).backward()
    torch.testing.assert_close(found[0][0], wanted.grad)


def states_logprobs(targets):
    return targets.narrow(0, N).logprobs
