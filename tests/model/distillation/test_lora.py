"""Adapters: neutral at the start, merged to W + scale * B A, alone trained, resumed bit for bit, clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from compress import doctor
from compress.errors import MissingExtraError, ModelError
from compress.model.checkpoint import load_model
from compress.model.distillation import stage as module
from compress.model.distillation.decoding import Decoder
from compress.model.distillation.forward import is_plain, kept_states
from compress.model.distillation.on_policy_params import GkdParams
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.model.layers import ATTENTION, LINEARS, MLP, decoder_layers, linears
from compress.model.lora import add_adapters, effective_weight, is_adapter
from compress.stages import find, load_function
from tests.model.distillation.conftest import files, killed_while_saving
from tests.model.distillation.test_stage import QUICK, place, ready  # noqa: F401 - fixtures
from tests.tiny import VOCAB, tiny_model

LORA = QUICK | {"init": "teacher_layers", "layers": 2, "lora_rank": 4, "precision": "fp32"}
IDS = torch.arange(3, 27).reshape(2, 12)


def adapted(arch="llama", rank=4, alpha=None, targets="all", *, drawn=True):
    """A model with adapters; ``drawn``: B is not zero."""
    model = tiny_model(arch, seed=1, layers=2)
    adapters = add_adapters(model, rank, alpha=alpha, targets=targets, seed=0, where="w")
    if drawn:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model, adapters


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_start_is_neutral(arch):
    plain = tiny_model(arch, seed=1, layers=2)
    model, _ = adapted(arch, drawn=False)
    keep = torch.arange(IDS.numel() - 1)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert is_plain(model)
    torch.testing.assert_close(kept_states(model, IDS, keep), kept_states(plain, IDS, keep), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (1.0, 0.25)])
@pytest.mark.parametrize(("targets", "names"), [("all", LINEARS), ("attention", ATTENTION), ("ffn", MLP)])
def test_merging_adds_the_scaled_product(alpha, scale, targets, names):
    before = tiny_model(seed=1, layers=2)
    model, adapters = adapted(alpha=alpha, targets=targets)
    wanted, count = [], 0
    for layer, old in zip(decoder_layers(model), decoder_layers(before), strict=True):
        for name, part in linears(layer).items():
            base = linears(old)[name].weight
            assert is_adapter(part) == (name in names)
            if name in names:
                up, down = part.lora_B["default"].weight, part.lora_A["default"].weight
                count += up.numel() + down.numel()
                base = base + scale * (up @ down)
            torch.testing.assert_close(effective_weight(part), base)
            wanted.append(base.detach())
    assert adapters.parameters == count
    logits, states = model(IDS).logits, kept_states(model, IDS, torch.arange(23))
    adapters.merge()
    found = [part.weight for layer in decoder_layers(model) for part in linears(layer).values()]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.detach(), want)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept_states(model, IDS, torch.arange(23)), states, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]


def test_own_forward_passes_give_the_gradients_and_texts_of_the_plain_one():
    model, _ = adapted()
    keep = torch.arange(23)
    grads = []
    for states in (kept_states(model, IDS, keep), model.model(IDS).last_hidden_state.flatten(0, 1)[keep]):
        model.zero_grad()
        states.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all("lora_" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-4)
    decoder = Decoder(model, rows=2, slots=12, vocab=VOCAB)
    with torch.no_grad():
        found = decoder.logits(decoder.read(IDS))
        torch.testing.assert_close(found, model(IDS).logits.view_as(found), rtol=1e-3, atol=1e-3)


def test_the_stage_trains_adapters_alone_and_saves_a_plain_student(ready):  # noqa: F811
    ctx = ready()
    kept = {}

    def watching(student, *given, **more):
        kept["names"] = [name for name, p in student.named_parameters() if p.requires_grad]
        kept["before"] = {n: p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
        report = original(student, *given, **more)
        after = dict(student.named_parameters())
        kept["same"] = all(torch.equal(value, after[name]) for name, value in kept["before"].items())
        return report

    original = module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", watching)
        result = distill(LogitsParams(**LORA), ctx)
    assert kept["same"]
    assert len(kept["names"]) == 2 * 2 * len(LINEARS)
    assert all("lora_" in name for name in kept["names"])
    student = load_model(ctx.out)
    assert is_plain(student)
    assert not any("lora" in name for name in student.state_dict())
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert 0 < result.metrics["parameters_trained"] < result.metrics["parameters"] / 2


def test_rank_0_gives_the_bytes_of_a_run_without_adapters(ready):  # noqa: F811
    made = []
    for name, more in (("a", {}), ("b", {"lora_rank": 0})):
        ctx = ready(name)
        plain = {key: value for key, value in LORA.items() if key != "lora_rank"}
        distill(LogitsParams(**plain, **more), ctx)
        made.append(files(ctx.out))
    assert made[0] == made[1]


def test_killed_and_resumed_ends_with_the_same_bytes(ready):  # noqa: F811
    whole = ready("whole")
    distill(LogitsParams(**LORA), whole)

    ctx = ready("cut")
    killed_while_saving(module, lambda ctx: distill(LogitsParams(**LORA), ctx), ctx)
    assert distill(LogitsParams(**LORA), ctx).metrics["resumed_from"] == 6
    assert files(ctx.out) == files(whole.out)
    held = ctx.work / "training.checkpoint.safetensors"
    assert held.stat().st_size < (whole.out / "model.safetensors").stat().st_size * 1.5  # adapters and their moments


def test_two_processes_train_the_same_adapters(ready):  # noqa: F811
    one, two = (distill(LogitsParams(**LORA), ready(str(count), processes=count)) for count in (1, 2))
    assert two.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=1e-5)


def test_made_answers_are_those_of_the_adapted_student(ready):  # noqa: F811
    line = find("model.distillation", "gkd")
    params = GkdParams(**LORA, max_new_tokens=8)
    result = load_function(line)(params, ready())
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]


def test_muon_steps_by_the_adapters_matrices(ready):  # noqa: F811
    result = distill(LogitsParams(**LORA | {"optimizer": "muon", "learning_rate": 0.02}), ready())
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_alpha": 4.0}, "belong to adapters: give lora_rank above 0 too"),
        ({"lora_targets": "ffn"}, "belong to adapters"),
        ({"lora_rank": 4, "init": "scratch"}, "init: scratch has none"),
        ({"lora_rank": 4, "lora_targets": ".*"}, "Input should be 'all', 'attention' or 'ffn'"),
    ],
)
def test_params_refuse_nonsense(given, message):
    with pytest.raises(ValidationError, match=message):
        LogitsParams(**given)


def test_a_rank_as_large_as_a_matrix_is_refused():
    with pytest.raises(ModelError, match=r"w\.lora_rank: 32, and k_proj is a matrix of 16 x 32.*below 16"):
        adapted(rank=32)


def test_without_peft_the_install_command_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lora_rank.*pip install 'edgestill\[lora\]'"):
        doctor.check_extras(LogitsParams(lora_rank=4), "steps[0]")
    doctor.check_extras(LogitsParams(), "steps[0]")


def test_a_copy_of_an_adapted_model_is_one_too():
    model, _ = adapted()
    twin = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
