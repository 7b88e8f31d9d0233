"""Soft cap and logit scale: the library's logits of the models that have them, in value, gradient and training."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers

from compress.errors import ModelError
from compress.model.distillation.forward import kept_states
from compress.model.distillation.logit_map import IDENTITY, LogitMap, logit_map
from compress.model.distillation.losses import LossWeights, States, fused_loss
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import DistillationModel
from compress.model.layers import output_head
from tests.model.distillation.test_losses import H, N, V, draw, labels
from tests.tiny import tiny_model, tiny_token_rows

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 1.5}, LogitMap(1.0, 1.5)),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}, LogitMap(0.25)),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.5}, LogitMap(0.5)),
}
MAPS = [LogitMap(1.0, 1.5), LogitMap(0.25), LogitMap(3.0, 0.8)]


def build(name, seed=0):
    config, more, _ = MODELS[name]
    torch.manual_seed(seed)
    sizes = {key: value for key, value in SIZES.items() if not (name != "gemma2" and key == "head_dim")}
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes, **more), attn_implementation="eager")
    with torch.no_grad():
        output_head(model).weight.mul_(8.0)  # far enough for the cap to bend
    return model.float().eval()


def batch():
    return RowTable(tiny_token_rows(6, tokens=(6, 9), vocab=VOCAB), vocab=VOCAB).batch(torch.arange(6).numpy())


@pytest.mark.parametrize("name", MODELS)
def test_the_map_of_a_config_gives_the_librarys_logits(name):
    model, rows = build(name), batch()
    found = logit_map(model)
    assert found == MODELS[name][2]
    with torch.no_grad():
        states = kept_states(model, rows.input_ids, rows.keep)
        product = states @ output_head(model).weight.T
        expected = model(input_ids=rows.input_ids).logits.flatten(0, 1)[rows.keep]
        assert not torch.allclose(product, expected, rtol=0.01)
        torch.testing.assert_close(found(product), expected)


@pytest.mark.parametrize("name", MODELS)
def test_student_and_teacher_are_compared_by_the_logits_that_they_give(name):
    student, teacher, rows = build(name, 1), build(name, 2), batch()
    module = DistillationModel(student, LossWeights(0.7), VOCAB)
    parts = module(rows, OnlineTargets(teacher, vocab=VOCAB)(rows))
    parts.loss.backward()
    found = {key: value.grad.clone() for key, value in student.named_parameters() if value.grad is not None}
    student.zero_grad()
    logits = student(input_ids=rows.input_ids).logits.flatten(0, 1)[rows.keep]
    with torch.no_grad():
        p = torch.log_softmax(teacher(input_ids=rows.input_ids).logits.flatten(0, 1)[rows.keep], -1)
    kl = (p.exp() * (p - torch.log_softmax(logits, -1))).sum()
    loss = 0.3 * torch.nn.functional.cross_entropy(logits, rows.labels, reduction="sum") + 0.7 * kl
    assert parts.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for key, value in student.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[key], value.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_fused_with_a_map_it_passes_gradcheck(shape, name):
    hidden, head, given = draw(N, H).requires_grad_(), draw(V, H, seed=1).requires_grad_(), labels()
    targets = States(draw(N, 4, seed=2), draw(V, 4, seed=3), 1.5, shape)
    weights = LossWeights(0.4, 1.5, 0.05, divergence=name, number=0.3 if name == "jsd" else 0.0)

    def loss(one, other):
        return fused_loss(one, other, given, targets, weights, chunk_elements=3 * V, logits=shape).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))
    plain = fused_loss(hidden, head, given, targets, weights).loss
    assert abs(plain.item() - loss(hidden, head).item()) > 1e-3


def test_without_scale_and_cap_nothing_changes_bit_for_bit():
    logits = draw(N, V).float()
    assert torch.equal(IDENTITY(logits.clone()), logits)
    assert torch.equal(IDENTITY.back(logits.clone(), logits), logits)
    assert logit_map(tiny_model()) == IDENTITY
    wide = LogitMap(1.0, 1e4)(draw(N, V))
    torch.testing.assert_close(wide, draw(N, V), rtol=1e-5, atol=1e-5)  # a cap far away is none


def test_a_config_that_no_loss_accounts_for_is_refused():
    head = SimpleNamespace(bias=None)
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        fake = SimpleNamespace(config=SimpleNamespace(**{name: 0.0}), lm_head=head)
        with pytest.raises(ModelError, match=rf"{name} is 0\.0; expected a number above 0"):
            logit_map(fake)
    with pytest.raises(ModelError, match="its output head has a bias"):
        logit_map(SimpleNamespace(config=None, lm_head=torch.nn.Linear(2, 2)))
    assert dataclasses.asdict(IDENTITY) == {"scale": 1.0, "cap": None}
