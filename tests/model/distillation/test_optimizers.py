"""Muon: its maths against the singular value decomposition and torch's own, its state, and who gets which rule."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.model.distillation.optimizers import Muon, make_optimizer, orthogonalize
from tests.tiny import tiny_model

CHOICE = {"learning_rate": 1e-2, "decay": 0.1, "betas": (0.9, 0.95), "bf16": False}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(model, seed):
    for at, parameter in enumerate(model.parameters()):
        parameter.grad = draw(*parameter.shape, seed=100 * seed + at)
    return model


@pytest.mark.parametrize("shape", [(3, 4, 9), (1, 8, 8), (2, 1, 5)])
def test_singular_values_come_near_one_and_their_vectors_stay(shape):
    given = draw(*shape)
    found = orthogonalize(given)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    spread = torch.diagonal(left.mT @ found @ right.mT, dim1=1, dim2=2)
    off = left.mT @ found @ right.mT - torch.diag_embed(spread)
    assert off.abs().max() < 1e-4
    well = values > 0.05 * values.amax(dim=1, keepdim=True)
    assert ((spread[well] > 0.6) & (spread[well] < 1.3)).all()


def test_a_batch_is_its_matrices_one_by_one_and_zero_stays_zero():
    given = draw(3, 4, 6)
    given[1] = 0
    found = orthogonalize(given)
    assert torch.equal(found[1], torch.zeros(4, 6))
    for at in (0, 2):
        torch.testing.assert_close(found[at], orthogonalize(given[at : at + 1])[0])


def test_steps_are_torchs_own_up_to_its_bf16():
    mine, theirs = (torch.nn.Parameter(draw(6, 10)) for _ in range(2))
    own = Muon([mine], [], decay=0.1, dtype=torch.float32, lr=0.02)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = mine.detach().clone()
    for seed in range(4):
        mine.grad = theirs.grad = draw(6, 10, seed=seed)
        own.step()
        peer.step()
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.03 * float((theirs.detach() - start).abs().max()))


def test_layers_go_to_muon_and_all_else_is_adamw_to_the_bit():
    one, other = tiny_model(tied=False), tiny_model(tied=False)
    muon, adamw = make_optimizer(one, "muon", **CHOICE), make_optimizer(other, "adamw", **CHOICE)
    assert isinstance(muon, Muon)
    for seed in range(3):
        with_gradients(one, seed), with_gradients(other, seed)
        muon.step()
        adamw.step()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        inner = a.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        assert torch.equal(a, b) is not inner, name


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_goes_through_a_state_dict(name):
    whole = tiny_model()
    optimizer = make_optimizer(whole, name, **CHOICE)
    with_gradients(whole, 0)
    optimizer.step()
    part = copy.deepcopy(whole)
    again = make_optimizer(part, name, **CHOICE)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, stepping in ((whole, optimizer), (part, again)):
        for seed in (1, 2):
            with_gradients(model, seed)
            stepping.step()
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_are_left_alone():
    model = tiny_model()
    frozen = next(p for name, p in model.named_parameters() if "q_proj" in name).requires_grad_(False)
    before = frozen.clone()
    optimizer = make_optimizer(model, "muon", **CHOICE)
    with_gradients(model, 0)
    optimizer.step()
    assert torch.equal(frozen, before)
