"""Every divergence of the table: against plain loops, autograd and finite differences, and at its ends."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from compress.model.distillation import divergences as module
from compress.model.distillation.cache import decode, encode
from compress.model.distillation.divergences import DIVERGENCES, PLAIN, Divergence, Numbers, adaptive_skew, rule_of
from compress.model.distillation.losses import (
    Dense,
    LossWeights,
    Marks,
    Sparse,
    States,
    combined,
    divergence,
    forward_kl,
    fused_loss,
    log_softmax_at,
)
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import DivergenceName
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import DistillationModel
from tests.model.distillation.test_losses import H, N, V, draw, labels, top_k
from tests.reference import distillation as reference
from tests.reference import divergences as loops
from tests.tiny import VOCAB, tiny_model, tiny_token_rows

NUMBERS = {"cakld": 0.3, "jsd": 0.7, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "skew_pair": 0.1}
CASES = [(name, NUMBERS.get(name, 0.0)) for name in DIVERGENCES] + [("jsd", 0.5), ("skew_kl", 0.6)]
KS = [1, 3, V - 1, V, None]
OWN = torch.tensor([True, False, True])  # rows of 2, 4 and 1 positions
COUNTS = torch.tensor([2, 4, 1])


def aim(teacher, k, temperature=1.0):
    return Dense(log_softmax_at(teacher, temperature)) if k is None else top_k(teacher, k, temperature)


def terms(name):
    return DIVERGENCES[name].terms


def by_autograd(function, logits):
    given = logits.clone().requires_grad_()
    function(given).sum().backward()
    return given.grad


def coarse_logprobs(logits, targets):
    """Log-probabilities of the K tokens and of all others together, by differentiable operators."""
    log_q = torch.log_softmax(logits, -1)
    if isinstance(targets, Dense):
        return log_q
    rest = log_q.scatter(1, targets.ids, -torch.inf)
    kept = log_q.gather(1, targets.ids)
    return kept if targets.ids.shape[1] == V else torch.cat([kept, rest.logsumexp(-1, keepdim=True)], 1)


def value(name, number, log_p, log_q):
    """The divergences by differentiable operators."""
    p, q = log_p.exp(), log_q.exp()

    def kl(one, other):
        return (one * (one.log() - other.log())).sum(-1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "cakld": lambda: (1 - number) * kl(p, q) + number * kl(q, p),
        "jsd": lambda: (
            number * kl(p, number * p + (1 - number) * q) + (1 - number) * kl(q, number * p + (1 - number) * q)
        ),
        "skew_kl": lambda: kl(p, number * p + (1 - number) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - number) * p + number * q),
        "skew_pair": lambda: kl(p, number * p + (1 - number) * q),
    }[name]()


def test_the_names_of_the_table_are_those_of_the_parameters():
    assert set(DIVERGENCES) == set(get_args(DivergenceName)) == set(loops.OF)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_value_and_gradient_equal_plain_loops_and_autograd(name, number, k, temperature):
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    targets = aim(teacher, k, temperature)
    found, kl, _, grad = divergence(student, targets, terms(name), Numbers(number), temperature=temperature)
    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    for which, wanted, got in ((name, number, found), (PLAIN, 0.0, kl)):
        expected = [loops.divergence(which, p, q, wanted, temperature=temperature, k=k) for p, q in rows]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    log_p = log_softmax_at(teacher, temperature)
    if isinstance(targets, Sparse):
        log_p = targets.logprobs if k == V else torch.cat([targets.logprobs, targets.log_tail[:, None]], 1)
    wanted = by_autograd(lambda z: value(name, number, log_p, coarse_logprobs(z / temperature, targets)), student)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_all_tokens_as_sparse_targets_are_the_dense_ones_and_fewer_say_less(name, number):
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    dense = divergence(student, aim(teacher, None), terms(name), Numbers(number))
    sparse = divergence(student, aim(teacher, V), terms(name), Numbers(number))
    torch.testing.assert_close(sparse[0], dense[0])
    torch.testing.assert_close(sparse[3], dense[3])
    fewer = divergence(student, aim(teacher, 3), terms(name), Numbers(number))[0]
    assert (fewer <= dense[0] + 1e-12).all()  # no coarser view tells two distributions apart better


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_never_negative_and_finite_after_the_cache_rounded_the_targets(name, number, spread):
    for seed in range(3):
        teacher, student = (draw(64, 300, seed=seed + shift, spread=spread).float() for shift in (0, 50))
        for targets in (decode(encode(log_softmax_at(teacher, 1.0), 8)), Dense(log_softmax_at(teacher, 1.0))):
            for at in (student, teacher):
                found, kl, _, grad = divergence(at, targets, terms(name), Numbers(number))
                assert found.min() >= -1e-5
                assert kl.min() >= -1e-5
                assert torch.isfinite(found).all()
                assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_zero_with_zero_gradient_exactly_where_student_is_teacher(name, number):
    logits = draw(N, V)
    for k in (4, None):
        found, _, _, grad = divergence(logits, aim(logits, k), terms(name), Numbers(number))
        assert found.abs().max() < 1e-12
        assert grad.abs().max() < 1e-12
        assert divergence(logits + draw(N, V, seed=3), aim(logits, k), terms(name), Numbers(number))[0].min() > 1e-4


@pytest.mark.parametrize(("name", "number"), CASES)
def test_extreme_logits_and_a_teacher_that_gives_nothing_stay_finite(name, number):
    student = torch.tensor([[200.0, -200.0, 0.0, -90.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[-200.0, 200.0, 0.0, 0.0], [90.0, 0.0, -90.0, 0.0], [0.0] + [-torch.inf] * 3])
    for targets in (Dense(log_softmax_at(teacher, 1.0)), decode(encode(log_softmax_at(teacher, 1.0), 2))):
        found, _, _, grad = divergence(student, targets, terms(name), Numbers(number))
        assert torch.isfinite(found).all()
        assert torch.isfinite(grad).all()


# -- the ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [4, None])
def test_jsd_tends_to_the_kls_and_is_symmetric_and_bounded(k):
    """The convention: JSD / beta to KL(teacher || student) at 0, JSD / (1 - beta) to KL(student || teacher) at 1."""
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    targets = aim(teacher, k)
    forward = divergence(student, targets, terms(PLAIN), Numbers())
    reverse = divergence(student, targets, terms("reverse_kl"), Numbers())
    small = 1e-7
    for beta, limit in ((small, forward), (1 - small, reverse)):
        found = divergence(student, targets, terms("jsd"), Numbers(beta))
        torch.testing.assert_close(found[0] / small, limit[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[3] / small, limit[3], rtol=1e-3, atol=1e-4)
    half = divergence(student, targets, terms("jsd"), Numbers(0.5))[0]
    assert half.max() < math.log(2)
    far = torch.full((1, V), -40.0, dtype=torch.float64)
    one, other = far.clone(), far.clone()
    one[0, 0] = other[0, 1] = 40.0
    apart = divergence(one, Dense(log_softmax_at(other, 1.0)), terms("jsd"), Numbers(0.5))[0]
    assert apart.item() == pytest.approx(math.log(2))
    if k is None:
        turned = divergence(teacher, aim(student, None), terms("jsd"), Numbers(0.5))[0]
        torch.testing.assert_close(half, turned)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize(
    ("name", "number", "end"),
    [(name, number, end) for name, line in DIVERGENCES.items() for number, end in line.ends.items()],
)
def test_at_its_ends_it_is_another_divergence_bit_for_bit(name, number, end, k, temperature):
    teacher, student, given = draw(N, V, seed=1).float(), draw(N, V, seed=2).float(), labels()
    targets = aim(teacher, k, temperature)
    here = combined(student, given, targets, LossWeights(0.6, temperature, 0.1, divergence=name, number=number))
    plain = combined(student, given, targets, LossWeights(0.6, temperature, 0.1, divergence=end))
    assert all(torch.equal(one, other) for one, other in zip(here, plain, strict=True))
    near = DIVERGENCES[name].terms
    if name != "jsd":  # its end is a convention, the others' a limit of their own formula
        limit = divergence(student.double(), aim(teacher.double(), k), near, Numbers(number))
        wanted = divergence(student.double(), aim(teacher.double(), k), terms(end), Numbers())
        torch.testing.assert_close(limit[0], wanted[0])
        torch.testing.assert_close(limit[3], wanted[3])


def test_the_plain_divergence_goes_its_own_way_and_the_table_agrees_with_it():
    assert rule_of(PLAIN, 0.5) is rule_of("jsd", 0.0) is rule_of("cakld", 0.0) is None
    teacher, student, given = draw(N, V, seed=1), draw(N, V, seed=2), labels()
    for k in (3, None):
        targets = aim(teacher, k)
        one = divergence(student, targets, terms(PLAIN), Numbers())
        torch.testing.assert_close((one[0], one[3]), forward_kl(student, targets))
        mixed = combined(student, given, targets, LossWeights(0.6))
        assert torch.allclose(mixed[2], one[0])


def test_skew_bounds_value_and_gradient_where_the_plain_kl_has_no_bound():
    """DistiLLM, section 3.1: at most -log a, and a gradient that does not blow up as the student leaves the teacher."""
    far = torch.zeros(1, V, dtype=torch.float64)
    far[0, 0] = 60.0
    teacher = torch.zeros(1, V, dtype=torch.float64)
    teacher[0, 1] = 60.0
    targets = Dense(log_softmax_at(teacher, 1.0))
    for name in ("skew_kl", "skew_reverse_kl"):
        assert divergence(far, targets, terms(name), Numbers(0.1))[0].item() <= -math.log(0.1) + 1e-9
    assert divergence(far, targets, terms(PLAIN), Numbers())[0].item() > 50
    assert divergence(far, targets, terms("reverse_kl"), Numbers())[0].item() > 50


# -- mixes, chunks, flags ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("k", [4, None])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_mixed_with_the_cross_entropy_it_is_the_sum_of_both(name, number, k, temperature):
    teacher, student, given = draw(N, V, seed=1), draw(N, V, seed=2), labels()
    targets = aim(teacher, k, temperature)
    weights = LossWeights(0.3, temperature, 0.1, divergence=name, number=number)
    loss, ce, kl, grad = combined(student, given, targets, weights)
    alone, plain, _, own = divergence(student, targets, terms(name), Numbers(number), temperature=temperature)
    entropy = torch.tensor(
        [reference.cross_entropy(row, y, 0.1) for row, y in zip(student.tolist(), given.tolist(), strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(ce, entropy)
    torch.testing.assert_close(kl, plain)
    torch.testing.assert_close(loss, 0.7 * entropy + 0.3 * temperature**2 * alone)
    smoothed = torch.nn.functional.one_hot(given, V) * 0.9 + 0.1 / V
    torch.testing.assert_close(grad, 0.7 * (torch.softmax(student, -1) - smoothed) + 0.3 * temperature**2 * own)
    assert combined(student, given, targets, weights, with_grad=False)[3] is None


@pytest.mark.parametrize("kind", ["dense", "sparse", "states"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_fused_in_chunks_it_passes_gradcheck(name, number, temperature, kind):
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1).requires_grad_(), labels()
    states, matrix = draw(N, 4, seed=2), draw(V, 4, seed=3)
    targets = {
        "dense": aim(states @ matrix.T, None, temperature),
        "sparse": aim(states @ matrix.T, 3, temperature),
        "states": States(states, matrix, temperature),
    }[kind]
    weights = LossWeights(0.4, temperature, 0.05, divergence=name, number=number, student_weight=0.7)
    marks = Marks(COUNTS, OWN)

    def loss(one, other, chunk=3 * V):
        return fused_loss(one, other, given, targets, weights, chunk_elements=chunk, marks=marks).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))
    assert loss(hidden, head).item() == pytest.approx(loss(hidden, head, 1 << 20).item(), rel=1e-12)


def test_the_pair_takes_each_half_in_its_own_text():
    teacher, student = draw(N, V, seed=1), draw(N, V, seed=2)
    flags = torch.repeat_interleave(OWN, COUNTS)
    for k in (3, None):
        targets = aim(teacher, k)
        both = divergence(student, targets, terms("skew_pair"), Numbers(0.1, flags[:, None], 0.6))
        ahead = divergence(student, targets, terms("skew_kl"), Numbers(0.1))
        back = divergence(student, targets, terms("skew_reverse_kl"), Numbers(0.1))
        for index in (0, 3):
            torch.testing.assert_close(both[index][flags], 0.6 * back[index][flags])
            torch.testing.assert_close(both[index][~flags], 1.4 * ahead[index][~flags])
    alone = combined(student, labels(), targets, LossWeights(0.5, divergence="skew_pair", number=0.1))
    plain = combined(student, labels(), targets, LossWeights(0.5, divergence="skew_kl", number=0.1))
    assert all(torch.equal(one, other) for one, other in zip(alone, plain, strict=True))


def test_the_trainers_model_hands_the_marks_on():
    student, teacher = tiny_model(seed=1), OnlineTargets(tiny_model(seed=9, scale=0.3), vocab=VOCAB)
    rows = tiny_token_rows(2, tokens=(6, 10))
    table = RowTable(rows, vocab=VOCAB, own={rows[1].id})

    def loss(name, *picked):
        batch = table.batch(np.array(picked))
        module = DistillationModel(student, LossWeights(1.0, divergence=name, number=0.1), VOCAB)
        return module(batch, teacher(batch)).loss.item()

    expected = loss("skew_kl", 0) + loss("skew_reverse_kl", 1)
    assert loss("skew_pair", 0, 1) == pytest.approx(expected, rel=1e-5)
    assert loss("skew_kl", 0, 1) != pytest.approx(expected, rel=1e-3)


# -- adaptive skew ----------------------------------------------------------------------------------------------------


def test_adaptive_skew_equals_plain_loops_and_widens_with_the_gap():
    log_p = torch.log(torch.tensor([0.9, 0.8, 0.5, 0.6, 0.7, 0.9, 0.2, 0.3], dtype=torch.float64))
    log_q = torch.log(torch.tensor([0.1, 0.2, 0.4, 0.5, 0.1, 0.85, 0.9, 0.5], dtype=torch.float64))
    counts, own = torch.tensor([2, 2, 1, 1, 1, 1]), [False, False, False, False, True, True]
    pairs, at = [], 0
    for count in counts.tolist():
        pairs.append(list(zip(log_p[at : at + count].tolist(), log_q[at : at + count].tolist(), strict=True)))
        at += count
    for skew, floor in ((0.1, 0.01), (0.6, 0.05)):
        expected = loops.adaptive_skew(pairs, own, skew, floor)
        found = adaptive_skew(log_p, log_q, counts, torch.tensor(own), skew=skew, floor=floor)
        torch.testing.assert_close(found, torch.repeat_interleave(torch.tensor(expected, dtype=torch.float64), counts))
    assert found[0] > found[2] >= 0.05  # the row with the larger gap is skewed more
    alike = adaptive_skew(log_p[:2], log_p[:2], torch.tensor([1, 1]), None, skew=0.1)
    assert torch.isfinite(alike).all()


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl", "skew_pair"])
def test_an_adaptive_loss_is_that_of_the_rows_own_skews(name, k):
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1), labels()
    teacher = draw(N, V, seed=2)
    targets, logits = aim(teacher, k), hidden.detach() @ head.T
    weights = LossWeights(0.4, divergence=name, number=0.5, adaptive=True)
    found = fused_loss(hidden, head, given, targets, weights, chunk_elements=3 * V, marks=Marks(COUNTS, OWN))
    log_p, log_q = (log_softmax_at(z, 1.0).gather(1, given[:, None])[:, 0] for z in (teacher, logits))
    if k is not None:  # outside the top k nothing but the tail is known
        inside = (targets.ids == given[:, None]).any(-1)
        log_p = torch.where(inside, log_p, targets.log_tail - math.log(V - k))
    own = torch.ones(3, dtype=torch.bool) if name == "skew_reverse_kl" else OWN
    skew = adaptive_skew(log_p, log_q, COUNTS, own, skew=0.5)
    assert len(skew.unique()) > 1
    numbers = Numbers(skew[:, None], torch.repeat_interleave(OWN, COUNTS)[:, None])
    loss, *_, grad = combined(logits, given, targets, weights, numbers=numbers)
    assert found.loss.item() == pytest.approx(loss.sum().item(), rel=1e-12)
    found.loss.backward()
    torch.testing.assert_close(hidden.grad, grad @ head)


# -- tomorrow's ------------------------------------------------------------------------------------------------------


def test_one_function_and_one_line_make_a_divergence(monkeypatch):
    """Total variation, sum |p - q| / 2, which the table does not have."""

    def total_variation(at, _):
        return 0.5 * (at.p - at.q).abs(), 0.5 * at.q * (at.q - at.p).sign()

    monkeypatch.setitem(module.DIVERGENCES, "total_variation", Divergence(total_variation))
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1).requires_grad_(), labels()
    teacher = draw(N, V, seed=2)
    for k in (3, V, None):
        weights, targets = LossWeights(1.0, divergence="total_variation"), aim(teacher, k)

        def loss(one, other, targets=targets, weights=weights):
            return fused_loss(one, other, given, targets, weights, chunk_elements=3 * V).loss

        assert torch.autograd.gradcheck(loss, (hidden, head))
    p, q = torch.softmax(teacher, -1), torch.softmax(hidden.detach() @ head.detach().T, -1)
    assert loss(hidden, head).item() == pytest.approx((p - q).abs().sum().item() / 2, rel=1e-12)
