"""Hidden states and attention: known answers, gradients, and projections that train with the student and then go."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import ModelError
from compress.model.distillation.features import (
    PROJECTIONS,
    Features,
    FeatureTargets,
    Projections,
    attention_loss,
    feature_loss,
    feature_targets,
    hidden_loss,
    layer_pairs,
    projected,
    read_features,
)
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import DistillationModel, train
from tests.model.distillation.test_stage import QUICK, place, ready  # noqa: F401 - fixtures
from tests.model.distillation.test_trainer import ROWS, make, weights
from tests.tiny import VOCAB, tiny_config, tiny_model

BOTH = LossWeights(0.5, hidden_weight=0.5, attention_weight=0.5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hidden_loss_is_the_relative_squared_error():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    assert hidden_loss(student, teacher).tolist() == [4.0, 1.0, 0.0]


def test_attention_loss_is_the_mean_kl_over_heads_and_ignores_what_is_masked():
    teacher = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    student = torch.tensor([[[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]])
    expected = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()) / 2
    torch.testing.assert_close(attention_loss(student, teacher), expected[None])


def test_layers_are_spread_over_the_teachers():
    assert layer_pairs(2, 4, "all") == [(1, 2), (2, 4)]
    assert layer_pairs(3, 3, "all") == [(1, 1), (2, 2), (3, 3)]
    assert layer_pairs(5, 2, "all")[-1] == (5, 2)
    assert layer_pairs(2, 6, "last") == [(2, 6)]


def test_the_sum_of_both_passes_gradcheck():
    start = Projections(BOTH, 1, tiny_config(hidden=8, heads=2), tiny_config(hidden=12, heads=3), seed=0).double()
    assert start.maps[0].shape == (12, 8)
    torch.testing.assert_close(start.maps[0].T @ start.maps[0], torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    states, scores, other = draw(4, 8), draw(4, 2, 5, seed=1), draw(4, 12, seed=2)
    wanted = Features((other,), (torch.softmax(draw(4, 3, 5, seed=3), -1),))

    def loss(one, two, matrix, mix):
        projections = SimpleNamespace(maps=[matrix], mixes=[mix])
        own = Features((one,), (torch.softmax(two, -1),))
        return feature_loss(own, wanted, projections, BOTH)

    inputs = states, scores, start.maps[0].detach(), start.mixes[0].detach()
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


def test_equal_models_differ_in_nothing_and_projections_start_as_nearly_nothing():
    model = tiny_model(seed=9, scale=0.3)
    model.set_attn_implementation("eager")
    rows = RowTable(ROWS, vocab=VOCAB).batch(torch.arange(6).numpy())
    last, found = read_features(model, rows, [1, 2], BOTH, dtype=torch.float32)
    torch.testing.assert_close(last, kept_states(model, rows.input_ids, rows.keep))
    torch.testing.assert_close(found.hidden[1], last)
    assert found.attention[0].shape == (len(rows.keep), 4, rows.input_ids.shape[1])
    torch.testing.assert_close(found.attention[0].sum(-1), torch.ones(len(rows.keep), 4))
    projections = Projections(BOTH, 2, model.config, model.config, seed=0)
    only = dataclasses.replace(BOTH, attention_weight=0.0)
    hidden = Features(found.hidden)
    assert feature_loss(hidden, hidden, Projections(only, 2, model.config, model.config, seed=0), only).item() == 0.0
    assert 0.0 <= feature_loss(found, found, projections, BOTH).item() < 0.05 * len(rows.keep)


def learn(context, name, loss):
    """Train a student under ``loss`` towards a wider and deeper teacher; returns it and its report."""
    teacher, student = tiny_model(seed=9, scale=0.3, layers=4, hidden=48), tiny_model(seed=1)
    online, ctx = OnlineTargets(teacher, vocab=VOCAB), context(name)
    settings = dataclasses.replace(make(steps=40, keep="last", validation_share=0.1), loss=loss)
    with projected(student, teacher, loss, seed=3):
        targets = feature_targets(online, student, loss, where="stage") if loss.wants_features else online
        report = train(student, targets, ROWS, settings, ctx, ctx.work / "log.jsonl", vocab=VOCAB)
    return student, report


def test_projections_train_with_the_student_and_are_gone_afterwards(context):
    student, report = learn(context, "both", BOTH)
    assert report.validation_loss < report.start_loss
    assert not hasattr(student, PROJECTIONS)
    assert student.config._attn_implementation == "sdpa"
    assert set(weights(student)) == set(weights(tiny_model(seed=1)))


def test_in_bf16_the_features_are_nearly_the_same(context):
    teacher, student = tiny_model(seed=9, scale=0.3), tiny_model(seed=1)
    rows = RowTable(ROWS, vocab=VOCAB).batch(torch.arange(6).numpy())
    found = []
    with projected(student, teacher, BOTH, seed=3):
        for bf16 in (False, True):
            online = OnlineTargets(teacher, vocab=VOCAB, bf16=bf16)
            targets = feature_targets(online, student, BOTH, where="stage")
            module = DistillationModel(student, BOTH, VOCAB, bf16=bf16)
            student.zero_grad()
            loss = module(rows, targets(rows)).loss
            loss.backward()
            found.append((loss.item(), student.distillation_projections.maps[0].grad.clone()))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), dim=0) > 0.99


def test_weights_of_zero_are_the_plain_loss_bit_for_bit(context):
    none, _ = learn(context, "none", LossWeights(0.5))
    zero, _ = learn(context, "zero", LossWeights(0.5, hidden_weight=0.0, attention_weight=0.0, feature_layers="last"))
    one, other = weights(none), weights(zero)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_goes_on_with_its_projections(context):
    teacher = tiny_model(seed=9, scale=0.3)
    found = []
    for name, stop in (("whole", None), ("cut", 9)):
        ctx = context(name)
        for limit in (stop, None) if stop else (None,):
            student = tiny_model(seed=1)
            with projected(student, teacher, BOTH, seed=3):
                inner = feature_targets(OnlineTargets(teacher, vocab=VOCAB), student, BOTH, where="stage")
                calls = 0

                def targets(batch, inner=inner, limit=limit):
                    nonlocal calls
                    calls += 1
                    if calls == limit:
                        raise KeyError("killed")
                    return inner(batch)

                settings = dataclasses.replace(make(), loss=BOTH)
                if limit:
                    with pytest.raises(KeyError, match="killed"):
                        train(student, targets, ROWS, settings, ctx, ctx.work / "log.jsonl")
                    continue
                report = train(student, targets, ROWS, settings, ctx, ctx.work / "log.jsonl")
        found.append((weights(student), report.resumed_from))
    assert found[1][1] == 5
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


def test_targets_that_tell_no_features_are_refused(context):
    teacher, student, ctx = tiny_model(seed=9), tiny_model(seed=1), context()
    with pytest.raises(ModelError, match=r"stage\.hidden_weight.*a teacher that does not run beside the student"):
        feature_targets(lambda batch: None, student, BOTH, where="stage")
    settings = dataclasses.replace(make(), loss=BOTH)
    with pytest.raises(ModelError, match="feature losses without projections"):
        train(student, OnlineTargets(teacher, vocab=VOCAB), ROWS, settings, ctx, ctx.work / "log.jsonl")


def test_the_stage_trains_with_features_and_saves_a_plain_model(ready):  # noqa: F811 - a fixture
    ctx = ready()
    given = {"targets": "online", "hidden_weight": 0.5, "attention_weight": 0.5, "layers": 2, "heads": 2}
    result = distill(LogitsParams(**QUICK, **given), ctx)
    model = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, local_files_only=True)
    assert result.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert not any(PROJECTIONS in name for name, _ in model.named_parameters())
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    alone = distill(LogitsParams(**QUICK, **given, kd_weight=0.0), ready("alone"))
    assert alone.metrics["validation_kl"] == 0.0
    assert alone.metrics["validation_loss"] > alone.metrics["validation_ce"]


def test_the_teacher_tells_the_layers_that_are_compared():
    teacher = tiny_model(seed=9, layers=4)
    targets = FeatureTargets(OnlineTargets(teacher, vocab=VOCAB), BOTH, student_layers=2)
    assert targets.layers == [2, 4]
