"""Class scores and attributions: against plain loops, completeness, gradients, and the library's own attention."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from compress.model.distillation.classifier.attributions import (
    attribution_distance,
    integrated_gradients,
    log_odds,
    quadrature,
)
from compress.model.distillation.classifier.model import (
    ClassifierModel,
    ClassLesson,
    calibration_error,
    class_divergence,
    label_loss,
)
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.classifier.rows import ClassTable, Question
from compress.model.distillation.classifier.scoring import answer_lengths, attention_scores, class_scores
from compress.model.distillation.classifier.teacher import Teacher, explain
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import LossWeights, fused_loss
from compress.model.distillation.packing import RowTable
from compress.model.layers import output_head
from tests.reference import classifier as slow
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

ASKED = [
    Question("a", (1, 2, 40, 41, 42, 4, 3), ((50, 4), (50, 51, 52, 4), (60, 61, 4)), 2, 5),
    Question("b", (1, 2, 70, 4, 3), ((50, 4), (50, 51, 52, 4), (60, 61, 4)), 2, 3),
    Question("c", (1, 2, 80, 81, 82, 83, 84, 4, 3), ((50, 4), (50, 51, 52, 4), (60, 61, 4)), 2, 7),
]
TABLE = ClassTable(ASKED, 3)
ALL = np.arange(3)


def double(arch="llama", **shape):
    """A model in float64 throughout: the library's norms would round to fp32."""
    model = tiny_model(arch, scale=0.3, **shape).double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(norm, module)
    return model


def norm(module, states):
    return module.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_that_share_a_prompt_score_as_sequences_of_their_own(arch):
    model = double(arch)
    tree = TABLE.batch(ALL)
    found = class_scores(model, tree, vocab=VOCAB).scores
    for row, question in enumerate(ASKED):
        expected = slow.scores(model, question.prompt, question.answers)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-10)
    assert answer_lengths(tree).tolist() == [[2, 4, 3]] * 3


def test_an_answer_does_not_see_the_others():
    model = double()
    other = [Question(q.id, q.prompt, (q.answers[0], (90, 91, 92, 4), q.answers[2]), q.first, q.last) for q in ASKED]
    before, after = (class_scores(model, ClassTable(side, 3).batch(ALL), vocab=VOCAB).scores for side in (ASKED, other))
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_scores_are_what_the_library_takes_the_softmax_of(arch):
    model = double(arch, heads=1, kv_heads=1)
    tree = TABLE.batch(ALL)
    heard = class_scores(model, tree, vocab=VOCAB, inner=True)
    found = attention_scores(model, heard.inner, tree)
    model.config._attn_implementation = "eager"
    for row, question in enumerate(ASKED):
        size = len(question.prompt)
        seen = model(torch.tensor([question.prompt]), output_attentions=True).attentions[-1][0, 0, -1]
        torch.testing.assert_close(torch.softmax(found[row, :size], 0), seen, rtol=0, atol=1e-6)  # theirs is fp32


def test_attention_scores_are_the_mean_over_heads_that_share_keys():
    model = double(heads=4, kv_heads=2)
    tree = TABLE.batch(ALL)
    inner = class_scores(model, tree, vocab=VOCAB, inner=True).inner
    layer = model.model.layers[-1]
    states = layer.input_layernorm(inner)
    query, key = layer.self_attn.q_proj(states), layer.self_attn.k_proj(states)
    cos, sin = model.model.rotary_emb(states, tree.positions)

    def turned(part):
        return part * cos + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin

    total = 0
    for head in range(4):
        one = turned(query[..., 8 * head : 8 * head + 8])
        other = turned(key[..., 8 * (head // 2) : 8 * (head // 2) + 8])
        end = one[torch.arange(3), tree.end]
        total = total + (end[:, None] * other).sum(-1) / 8**0.5 / 4
    torch.testing.assert_close(attention_scores(model, inner, tree), total, rtol=0, atol=1e-10)


def test_quadrature_is_exact_for_polynomials():
    for points in (1, 3, 8):
        for degree in range(2 * points):
            found = sum(weight * place**degree for place, weight in quadrature(points))
            assert found == pytest.approx(1 / (degree + 1), abs=1e-12)


def test_integrated_gradients_of_a_linear_score_are_weight_times_input():
    weight, inputs = torch.randn(2, 5, 3, dtype=torch.double), torch.randn(2, 5, 3, dtype=torch.double)
    baseline = torch.randn(2, 5, 3, dtype=torch.double)
    found = integrated_gradients(lambda at: (at * weight).sum((1, 2)), inputs, baseline, points=1)
    torch.testing.assert_close(found, ((inputs - baseline) * weight).sum(-1))


@pytest.mark.parametrize(("baseline", "points"), [("mean", 128), ("zero", 512)])
@pytest.mark.parametrize("score", ["sum", "mean"])
def test_attributions_add_up_to_the_difference_of_scores(baseline, points, score):
    params = ClassifierParams(attribution_points=points, attribution_baseline=baseline, score=score)
    teacher = Teacher(double(), None, VOCAB, params)
    tree = TABLE.batch(ALL)
    found, difference = explain(teacher, tree, torch.tensor([0, 1, 2]))
    assert difference.abs().min() > 1e-3
    torch.testing.assert_close(found.sum(1), difference, rtol=2e-3, atol=1e-6)
    assert found[~tree.content].abs().max() == 0


def test_attributions_are_those_of_the_plain_loop():
    model = double()
    teacher = Teacher(model, None, VOCAB, ClassifierParams(attribution_points=256))
    start = model.get_input_embeddings().weight.mean(0).detach()
    found, _ = explain(teacher, TABLE.batch(ALL[:2]), torch.tensor([2, 0]))
    for row, (question, chosen) in enumerate(zip(ASKED[:2], [2, 0], strict=True)):
        own = range(question.first, question.last)
        expected = slow.attributions(model, question.prompt, question.answers, own, start, chosen=chosen, steps=400)
        torch.testing.assert_close(found[row, : len(question.prompt)], expected, rtol=1e-2, atol=1e-3)


def test_log_odds():
    scores = torch.log(torch.tensor([[0.1, 0.3], [0.2, 0.02]]))
    torch.testing.assert_close(log_odds(scores, torch.tensor([0, 1])), torch.log(torch.tensor([1 / 3, 0.1])))


def test_distance_is_the_plain_one_and_keeps_to_the_mask():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 6, generator=draw, dtype=torch.double) for _ in range(2))
    mask = torch.rand(4, 6, generator=draw) > 0.4
    found = attribution_distance(ours, theirs, mask)
    for row in range(4):
        own = mask[row]
        expected = slow.distance(ours[row][own].tolist(), theirs[row][own].tolist())
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)
    whole = torch.ones_like(mask)
    assert attribution_distance(ours, 7 * ours, whole).abs().max() < 1e-12
    assert (attribution_distance(ours, -1e-200 * ours, whole) - 1).abs().max() < 1e-12


def test_distance_where_nothing_can_be_compared_is_zero_with_a_finite_gradient():
    ours = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    theirs = torch.randn(3, 4, dtype=torch.double)
    theirs[0] = 0
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    found = attribution_distance(ours, theirs, mask)
    found.sum().backward()
    assert found[:2].tolist() == [0, 0]
    assert ours.grad[:2].abs().max() == 0
    assert ours.grad[2].abs().max() > 0


def test_distance_gradient():
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(2, 4, generator=draw, dtype=torch.double) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: attribution_distance(x, theirs, mask), ours.requires_grad_())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradient_of_the_whole_loss_by_the_students_weights(arch):
    model = double(arch, layers=1, hidden=8, heads=2, kv_heads=1, ffn=8, vocab=100)
    table = ClassTable(ASKED[:2], 3)
    flat = torch.randn(table.flat.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.double)
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    lesson = ClassLesson(table, torch.tensor([1, -1]), scores, flat, 100, 0.7, 2.0, 0.5)
    batch = RowTable([question.row for question in ASKED[:2]], vocab=100).batch(np.arange(2))
    module = ClassifierModel(lesson, model, False)
    for weight in (model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].input_layernorm.weight):
        model.requires_grad_(False)
        weight.requires_grad_()

        def loss(value, weight=weight):
            with torch.no_grad():
                before = weight.clone()
            named = {name for name, p in module.named_parameters() if p is weight}
            given = dict.fromkeys(named, value)
            found = torch.func.functional_call(module, given, (batch,)).loss
            assert torch.equal(weight, before)
            return found

        assert torch.autograd.gradcheck(loss, weight.detach().clone().requires_grad_(), atol=1e-6)


def lesson_of(**more):
    values = {
        "table": TABLE, "labels": torch.tensor([0, 2, 1]), "scores": None, "attributions": None, "vocab": VOCAB,
        "kd_weight": 0.0, "temperature": 1.0, "attribution_weight": 0.0,
    }  # fmt: skip
    return ClassLesson(**(values | more))


def test_labels_alone_are_the_trainers_cross_entropy():
    model = double()
    batch = RowTable([question.row for question in ASKED], vocab=VOCAB).batch(ALL)
    lesson = lesson_of()
    found = ClassifierModel(lesson, model, False)(batch)
    rows = []
    for question, label in zip(ASKED, lesson.labels.tolist(), strict=True):
        rows.append(Question(question.id, question.prompt, (question.answers[label],), 0, 0).longest)
    plain = RowTable(rows, vocab=VOCAB).batch(ALL)
    hidden = kept_states(model, plain.input_ids, plain.keep, dtype=torch.double)
    head = output_head(model).weight
    expected = fused_loss(hidden, head, plain.labels, None, LossWeights(0.0), dtype=torch.double)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-7, atol=0)  # rotary angles are fp32 in both
    assert found.kl == 0


def test_no_attribution_weight_is_plain_distillation_bit_for_bit():
    model = tiny_model()
    batch = RowTable([question.row for question in ASKED], vocab=VOCAB).batch(ALL)
    theirs = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    flat = torch.randn(TABLE.flat.shape[1], generator=torch.Generator().manual_seed(2))
    scores = class_scores(model, TABLE.batch(ALL), vocab=VOCAB).scores
    apart, missing = class_divergence(scores, theirs, 3.0)
    plain = 0.25 * label_loss(scores, torch.tensor([0, 2, 1])).sum() + 0.75 * (9 * apart.sum() + missing.sum())
    for given in (None, flat):
        lesson = lesson_of(scores=theirs, attributions=given, kd_weight=0.75, temperature=3.0)
        assert torch.equal(ClassifierModel(lesson, model, False)(batch).loss, plain)
    lesson = lesson_of(scores=theirs, attributions=flat, kd_weight=0.75, temperature=3.0, attribution_weight=1.0)
    assert ClassifierModel(lesson, model, False)(batch).loss > plain


def test_divergence_at_temperature_one_is_the_forward_kl_of_whole_answers():
    draw = torch.Generator().manual_seed(5)
    whole = torch.log_softmax(torch.randn(4, 5, generator=draw, dtype=torch.double), 1)[:, :3]  # mass below one
    theirs = torch.randn(4, 3, generator=draw, dtype=torch.double)
    goal = torch.softmax(theirs, 1)
    apart, missing = class_divergence(whole, theirs, 1.0)
    torch.testing.assert_close(apart + missing, (goal * (goal.log() - whole)).sum(1))
    same, _ = class_divergence(whole, whole + 3.0, 2.0)
    assert same.abs().max() < 1e-12


def test_a_row_without_a_label_has_no_label_loss():
    assert label_loss(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([-1, 1])).tolist() == [0, 4]


def test_calibration_error():
    assert calibration_error(torch.tensor([0.95, 0.95, 0.35]), torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1.25 / 3)
