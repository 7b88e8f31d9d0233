"""Made answers: those of a loop of whole forward passes, of any block and batch; the limits are student and teacher."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress.model.distillation.rollouts import Ask, Drawing, sample, speculate, uniforms
from tests.reference import on_policy as slow
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

ASKS = [Ask(tuple(range(5, 6 + i % 4)), 8 + i % 5, 3, i) for i in range(12)]
DRAWING = Drawing(VOCAB, stops=(4, 7, 12, 44, 90, 200), seed=7)


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1, scale=0.3), tiny_model(seed=2, scale=0.3)


def rows(made):
    return [rollout.ids for rollout in made]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_and_their_chances_are_those_of_a_plain_loop(arch):
    student = tiny_model(arch, seed=1, scale=0.3)
    for ask, made in zip(ASKS, sample(student, ASKS, DRAWING), strict=True):
        assert list(made.ids) == slow.speculated(student, student, ask, DRAWING, VOCAB)
        assert (made.row, made.ids[: made.start]) == (ask.row, ask.prompt)
        assert made.finished == (made.ids[-1] in DRAWING.stops)
        assert made.finished or len(made.logprobs) == ask.limit
        for place, logprob in enumerate(made.logprobs):
            at = made.start + place
            chance = slow.distribution(student, list(made.ids[:at]), VOCAB)[made.ids[at]]
            assert logprob == pytest.approx(float(chance.log()), abs=1e-3)
        assert made.answer == (0,) * made.start + (1,) * len(made.logprobs)


def test_some_answers_end_and_some_are_cut(models):
    finished = [made.finished for made in sample(models[0], ASKS, DRAWING)]
    assert 0 < sum(finished) < len(finished)


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_blocks_give_what_the_teacher_would_let_pass_token_by_token(models, top_k):
    student, teacher = models
    wanted = [tuple(slow.speculated(student, teacher, ask, DRAWING, top_k)) for ask in ASKS]
    for block in (1, 3, 50):
        assert rows(speculate(student, teacher, ASKS, DRAWING, top_k=top_k, block=block)) == wanted


def test_top_1_is_the_teacher_greedy_and_the_whole_vocabulary_the_student(models):
    student, teacher = models
    for made in speculate(student, teacher, ASKS, DRAWING, top_k=1, block=4):
        for at in range(made.start, len(made.ids)):
            assert made.ids[at] == int(slow.distribution(teacher, list(made.ids[:at]), VOCAB).argmax())
    own = speculate(student, teacher, ASKS, DRAWING, top_k=VOCAB, block=4)
    assert rows(own) == rows(sample(student, ASKS, DRAWING))
    assert all(made.own == len(made.logprobs) for made in own)


def test_own_tokens_grow_with_top_k(models):
    shares = []
    for top_k in (1, 20, 100, VOCAB):
        made = speculate(*models, ASKS, DRAWING, top_k=top_k, block=4)
        shares.append(sum(m.own for m in made) / sum(len(m.logprobs) for m in made))
    assert shares == sorted(shares)
    assert shares[0] < 0.2 < shares[-1] == 1.0


def test_mixture_with_the_teacher(models):
    student, teacher = models
    assert rows(sample(student, ASKS, DRAWING, teacher=teacher, mix=0.0)) == rows(sample(student, ASKS, DRAWING))
    mixed = sample(student, ASKS, DRAWING, teacher=teacher, mix=0.3)
    assert rows(mixed) != rows(sample(student, ASKS, DRAWING))
    made = mixed[5]
    for place, logprob in enumerate(made.logprobs):
        before = list(made.ids[: made.start + place])
        both = [slow.distribution(model, before, VOCAB)[made.ids[made.start + place]] for model in models]
        assert logprob == pytest.approx(float((0.7 * both[0] + 0.3 * both[1]).log()), abs=1e-3)
    alone = sample(student, ASKS, DRAWING, teacher=teacher, mix=1.0)
    assert rows(alone) == rows(sample(teacher, ASKS, DRAWING))


def test_an_answer_follows_from_seed_step_and_row_alone(models):
    whole = sample(models[0], ASKS, DRAWING)
    assert rows(sample(models[0], ASKS[4:7], DRAWING)) == rows(whole[4:7])
    assert rows(sample(models[0], ASKS, dataclasses.replace(DRAWING, batch=5))) == rows(whole)
    for other in (dataclasses.replace(ASKS[4], step=4), dataclasses.replace(ASKS[4], row=5)):
        assert rows(sample(models[0], [other], DRAWING)) != rows(whole[4:5])
    assert rows(sample(models[0], ASKS, dataclasses.replace(DRAWING, seed=8))) != rows(whole)
    assert (uniforms(1, 2, 3, 9)[:, :5] == uniforms(1, 2, 3, 5)).all()


def test_tokens_come_as_often_as_they_are_likely(models):
    asks = [Ask((5,), 1, step, 0) for step in range(4000)]
    drawing = dataclasses.replace(DRAWING, temperature=0.7)
    found = torch.zeros(VOCAB)
    for made in sample(models[0], asks, drawing):
        found[made.ids[-1]] += 1
    likely = slow.distribution(models[0], [5], VOCAB, 0.7)
    error = (found / 4000 - likely).abs()
    assert bool((error < 5 * (likely / 4000).sqrt() + 1e-3).all())
