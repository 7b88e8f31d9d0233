"""MiniLLM's loss: against plain loops, exact over all answers of a small world, and the mode that it seeks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import log_softmax

from compress.model.distillation.logit_map import IDENTITY, LogitMap
from compress.model.distillation.losses import Dense
from compress.model.distillation.policy import PolicySettings, policy_loss, returns
from tests.reference import on_policy as slow

COUNTS = (4, 1, 3, 6)
N, V, H = sum(COUNTS), 7, 5


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (N,), generator=generator)
    drawn = -draw(N).abs() - 0.5
    return draw(N, H).requires_grad_(), draw(V, H).requires_grad_(), labels, draw(N, V), drawn


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("normalize", [True, False])
def test_returns_equal_their_definition_and_stay_within_an_answer(discount, normalize):
    reward = torch.arange(1.0, N + 1, dtype=torch.float64) ** 1.5
    found = returns(reward, torch.tensor(COUNTS), discount=discount, normalize=normalize)
    wanted = [v for part in reward.split(COUNTS) for v in slow.returns(part.tolist(), discount, normalize)]
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("logits", [IDENTITY, LogitMap(0.5, 2.0), LogitMap(3.0)])
@pytest.mark.parametrize("chunk_elements", [V, 3 * V, 1 << 20])
@pytest.mark.parametrize(
    "settings", [PolicySettings(), PolicySettings(discount=1.0, normalize=False, largest_weight=1.1)]
)
def test_value_and_gradient_equal_plain_loops(settings, chunk_elements, logits):
    hidden, head, labels, teacher, drawn = case()
    targets = Dense(log_softmax(teacher, -1))
    counts = torch.tensor(COUNTS)
    parts = policy_loss(
        hidden,
        head,
        labels,
        targets,
        counts=counts,
        drawn=drawn,
        settings=settings,
        chunk_elements=chunk_elements,
        logits=logits,
    )
    product = logits.scale * (hidden @ head.T)
    mapped = product if logits.cap is None else logits.cap * torch.tanh(product / logits.cap)
    found = torch.autograd.grad(3.0 * parts.loss, (hidden, head))
    value, surrogate = slow.policy_surrogate(
        mapped,
        teacher,
        labels.tolist(),
        list(COUNTS),
        drawn.tolist(),
        discount=settings.discount,
        normalize=settings.normalize,
        largest_weight=settings.largest_weight,
    )
    assert float(parts.loss.detach()) == pytest.approx(value, rel=1e-9)
    for mine, plain in zip(found, torch.autograd.grad(3.0 * surrogate, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, plain)
    assert float(parts.ce) == pytest.approx(float(-log_softmax(mapped, -1)[range(N), labels].sum().detach()))
    assert float(parts.loss.detach()) >= 0
    assert float(parts.kl) >= 0


def test_answers_of_one_token_have_the_exact_gradient_of_the_reverse_kl():
    hidden, head, labels, teacher, _ = case()
    log_p = log_softmax(teacher, -1)

    def exact(states):
        log_q = log_softmax(states @ head.detach().T, -1)
        return float((log_q.exp() * (log_q - log_p)).sum())

    drawn = log_softmax(hidden @ head.T, -1)[range(N), labels].detach()
    ones = torch.ones(N, dtype=torch.int64)
    parts = policy_loss(hidden, head, labels, Dense(log_p), counts=ones, drawn=drawn, settings=PolicySettings())
    assert float(parts.loss.detach()) == pytest.approx(exact(hidden.detach()))
    (grad,) = torch.autograd.grad(parts.loss, hidden)
    for at in itertools.product(range(0, N, 4), range(H)):
        step = torch.zeros_like(hidden)
        step[at] = 1e-6
        difference = (exact(hidden.detach() + step) - exact(hidden.detach() - step)) / 2e-6
        assert float(grad[at]) == pytest.approx(difference, abs=1e-7)


def world(seed=3, vocab=3):
    """Logits of the next token after 0, 1 or 2 tokens, a table for the student and one for the teacher."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(3) for p in itertools.product(range(vocab), repeat=n)]
    tables = torch.randn(2, len(prefixes), vocab, generator=generator, dtype=torch.float64) * 1.5
    return {prefix: i for i, prefix in enumerate(prefixes)}, tables[0].requires_grad_(), tables[1]


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_expected_gradient_is_that_of_the_reverse_kl_of_whole_answers(mix):
    """Over all 27 answers. A mixture's importance weights hold for one token each: exact for the last, close before."""
    places, student, teacher = world()
    log_p, log_q = log_softmax(teacher, -1), log_softmax(student, -1)
    q, p = log_q.detach().exp(), log_p.exp()
    total, expected = torch.zeros((), dtype=torch.float64), torch.zeros_like(student)
    settings = PolicySettings(discount=1.0, normalize=False, largest_weight=100.0)
    eye = torch.eye(len(places), dtype=torch.float64)
    for answer in itertools.product(range(3), repeat=3):
        at = [places[answer[:t]] for t in range(3)]
        labels = torch.tensor(answer)
        both = log_q[at, labels].sum(), log_p[at, labels].sum()
        total = total + both[0].exp() * (both[0] - both[1])
        chance = (1 - mix) * q[at, labels] + mix * p[at, labels]
        hidden = eye[at]
        parts = policy_loss(
            hidden,
            student.T.contiguous(),
            labels,
            Dense(log_p[at]),
            counts=torch.tensor([3]),
            drawn=chance.log(),
            settings=settings,
        )
        (grad,) = torch.autograd.grad(parts.loss, student)
        expected += chance.prod() * grad
    (exact,) = torch.autograd.grad(total, student)
    if mix == 0.0:
        torch.testing.assert_close(expected, exact)
    else:
        cosine = float((expected * exact).sum() / expected.norm() / exact.norm())
        assert 0.9 < cosine < 1.0


def test_it_seeks_a_mode_where_the_forward_kl_covers_both():
    """A teacher with two peaks, a student that can have one: logits of a parabola over 31 places."""
    places = torch.arange(31, dtype=torch.float64)
    teacher = torch.logaddexp(-0.5 * (places - 9) ** 2, -0.5 * (places - 21) ** 2 - 0.3)
    log_p = log_softmax(teacher, -1)[None]
    ends = {}
    for kind in ("reverse", "forward"):
        centre = torch.tensor(13.0, dtype=torch.float64, requires_grad=True)
        spread = torch.tensor(math.log(3.0), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([centre, spread], lr=0.05)
        for _ in range(200):
            logits = (-0.5 * ((places - centre) / spread.exp()) ** 2)[None]
            optimizer.zero_grad()
            if kind == "reverse":
                log_q = log_softmax(logits, -1)
                parts = policy_loss(
                    logits,
                    torch.eye(31, dtype=torch.float64),
                    torch.tensor([8]),
                    Dense(log_p),
                    counts=torch.tensor([1]),
                    drawn=log_q[0, 8].detach()[None],
                    settings=PolicySettings(),
                )
                parts.loss.backward()
            else:
                (log_p.exp() * (log_p - log_softmax(logits, -1))).sum().backward()
            optimizer.step()
        ends[kind] = float(centre.detach()), float(spread.detach().exp())
    assert ends["reverse"] == pytest.approx((9.0, 1.0), abs=0.01)
    assert 13 < ends["forward"][0] < 15
    assert ends["forward"][1] > 5
