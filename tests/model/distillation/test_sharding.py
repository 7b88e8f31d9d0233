"""A student cut up over two processes: the curve of one, half of the bytes in each, one kind of checkpoint."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from compress.errors import ProfileError, UserError
from compress.model.distillation import trainer
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.packing import RowTable
from compress.model.distillation.parallel import Team, assembled, told
from compress.model.distillation.resume import read_tensors
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.sharding import Shards, check_sharding, local, skeleton, whole
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import DistillationModel, train
from compress.profile import load_profile
from compress.stages import STAGES, load_function, params_model
from tests.model.distillation.test_parallel import PROFILE, ROWS, SETTINGS, TOLERANCE, Interrupted, curve, near
from tests.tiny import VOCAB, tiny_checkpoint, tiny_model

FULL = {"processes": 2, "sharding": "full"}
HARD = dataclasses.replace(SETTINGS, activation_checkpointing=True, average_decay=0.9, accumulate=2, keep="last")


def student_of(*, hard):
    student = tiny_model("qwen3" if hard else "llama", seed=1, layers=3, tied=not hard)
    if hard:
        student.model.layers[1].requires_grad_(False)
        student.lm_head.requires_grad_(False)
    return student


def run(context, *, hard=False):
    student, settings = student_of(hard=hard), HARD if hard else SETTINGS
    teacher = OnlineTargets(tiny_model(seed=9, scale=0.3), vocab=VOCAB)
    return student, train(student, teacher, ROWS, settings, context, context.work / "training.jsonl")


@contextmanager
def stopped_at(step, monkeypatch):
    """A run ends with `Interrupted` before step ``step``."""
    plain = trainer._Run._step

    def until(self, clock):
        if self.at.step == step:
            raise Interrupted
        return plain(self, clock)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", until)
        with pytest.raises(Interrupted):
            yield


@pytest.mark.parametrize("hard", [False, True], ids=["tied", "untied, frozen parts, averaged, computed twice"])
def test_the_curve_is_that_of_one_process(context, hard):
    alone, two = context("one"), context("two", **FULL)
    student, report = run(alone, hard=hard)
    other, told_of = run(two, hard=hard)
    print(f"largest difference {np.abs(curve(alone) - curve(two)).max():.1e} nats")
    assert len(curve(alone)) == 8
    assert np.abs(curve(alone) - curve(two)).max() < TOLERANCE
    assert told_of.validation_loss == pytest.approx(report.validation_loss, abs=TOLERANCE)
    assert near(student, other)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) is not hard
    start = student_of(hard=hard)
    frozen = [name for name, p in start.named_parameters() if not p.requires_grad]
    assert all(torch.equal(other.get_parameter(name), start.get_parameter(name)) for name in frozen)
    assert not torch.equal(other.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)
    assert {path.name for path in two.work.iterdir()} == {path.name for path in alone.work.iterdir()}


def test_one_process_then_two_with_parts_then_one(context, monkeypatch):
    whole_run, ctx = context("whole"), context("killed")
    student, _ = run(whole_run, hard=True)
    with stopped_at(5, monkeypatch):
        run(ctx, hard=True)
    with stopped_at(7, monkeypatch):
        run(dataclasses.replace(ctx, **FULL), hard=True)
    other, report = run(ctx, hard=True)
    assert report.resumed_from == 6
    assert np.abs(curve(whole_run) - curve(ctx)).max() < TOLERANCE
    assert near(student, other)


def test_checkpoints_are_of_one_kind(context, monkeypatch):
    """Names, shapes, number formats and fingerprint do not tell how many processes wrote one, nor how."""
    found = []
    for name, how in (("one", {}), ("two", {"processes": 2}), ("parts", FULL)):
        ctx = context(name, **how)
        with stopped_at(4, monkeypatch):
            run(ctx)
        found.append(read_tensors(ctx.work / "training.checkpoint.safetensors"))
    tensors, values = found[0]
    assert "optimizer.0.exp_avg" in tensors
    for others, told_of in found[1:]:
        assert (told_of["fingerprint"], list(others)) == (values["fingerprint"], list(tensors))
        for name, tensor in tensors.items():
            assert (others[name].shape, others[name].dtype) == (tensor.shape, tensor.dtype)
            assert name == "random" or torch.allclose(others[name], tensor, atol=1e-3)


# --- what a process holds, and which gradients it gets --------------------------------------------------------------


def step_of(team, twin, student, *, averaged):
    """Bytes of weights and optimizer state in this process, and the norm of the gradient, after one step."""
    plain = Shards._cut
    if averaged:
        Shards._cut = lambda self, part: fully_shard(part, mesh=self.mesh)
    shards = Shards(DistillationModel(twin, LossWeights(kd_weight=0.0), VOCAB), twin, student, team)
    Shards._cut = plain
    parameters = list(twin.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    rows, share = team.part(np.arange(6))
    batch = RowTable(ROWS, vocab=VOCAB).batch(rows)
    shards.model(batch, None).loss.mul(share / 100).backward()
    norm = float(whole(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    held = sum(local(tensor).untyped_storage().nbytes() for tensor in (*parameters, *state))
    bytes_of = np.zeros(team.size)
    bytes_of[team.rank] = held
    return team.sum(bytes_of).tolist(), norm


def follow_step(team, twin, averaged):
    step_of(team, twin, None, averaged=averaged)


def test_each_process_holds_half_and_gradients_are_summed():
    student = tiny_model(seed=1, layers=3)
    alone = DistillationModel(student, LossWeights(kd_weight=0.0), VOCAB)
    (alone(RowTable(ROWS, vocab=VOCAB).batch(np.arange(6)), None).loss / 100).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in student.parameters()]))
    everything = 3 * 4 * sum(p.numel() for p in student.parameters())  # weights and two moments in fp32

    steps = []
    with assembled(2, "here") as team:
        for averaged in (False, True):
            given = tiny_model(seed=1, layers=3)
            told(team, (follow_step, skeleton(given), averaged), "here")
            steps.append(step_of(team, skeleton(given), given, averaged=averaged))
            assert sum(p.numel() for p in given.parameters()) == 0  # the caller's weights are not held beside
    (held, found), (_, control) = steps
    assert all(0.49 < part / everything < 0.51 for part in held)
    assert sum(held) == pytest.approx(everything, rel=0.01)
    assert found == pytest.approx(norm, rel=1e-5)
    assert control == pytest.approx(norm / 2, rel=1e-5)  # as torch does it by itself


# --- what is refused ------------------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """A linear with something inside."""

    def forward(self, states):
        return super().forward(states) * 2


@pytest.mark.parametrize(
    ("settings", "adapted", "other", "message"),
    [
        (TrainSettings(optimizer="muon"), False, "", "optimizer: muon.*expected optimizer: adamw"),
        (TrainSettings(loss=LossWeights(hidden_weight=1.0)), False, "", "hidden_weight or attention_weight"),
        (TrainSettings(), True, "", "adapters or quantizers"),
        (TrainSettings(), False, "text that the student writes", "text that the student writes"),
    ],
)
def test_what_needs_whole_weights_is_refused(settings, adapted, other, message):
    student = tiny_model()
    check_sharding("full", TrainSettings(), student=student)
    check_sharding("none", settings, student=student, other=other)
    if adapted:
        student.model.layers[0].mlp.up_proj = Adapted(32, 64)
    with pytest.raises(UserError, match=rf"^hardware\.sharding: full with .*{message}.*Set sharding: none"):
        check_sharding("full", settings, student=student, other=other)


@pytest.mark.parametrize("more", [{"source": SimpleNamespace()}, {"loss_module": lambda *_: nn.Identity()}])
def test_other_ways_of_training_are_refused_before_a_process_starts(context, more):
    ctx = context(**FULL)
    with pytest.raises(UserError, match=r"hardware\.sharding"):
        train(tiny_model(), None, ROWS, TrainSettings(loss=LossWeights(kd_weight=0.0)), ctx, ctx.work / "log", **more)


REFUSED = [
    ("model.distillation.logits", {"optimizer": "muon"}, r"hardware\.sharding: full with optimizer: muon"),
    ("model.distillation.gkd", {}, r"hardware\.sharding: full with text that the student writes"),
    ("model.distillation.cross_tokenizer", {"loss": "alm"}, r"hardware\.sharding: full with loss: alm"),
    ("model.distillation.classifier", {}, r"hardware\.sharding: full with a loss on classes"),
    ("model.quantization.qat", {}, r"hardware\.sharding: full with quantizers inside"),
]


@pytest.mark.parametrize(("name", "params", "message"), REFUSED)
def test_stages_refuse_before_they_load_anything(context, name, params, message):
    stage = next(stage for stage in STAGES if stage.name == name)
    ctx = context(name, teacher=SimpleNamespace(folder=None), **FULL)
    with pytest.raises(UserError, match=message):
        load_function(stage)(params_model(stage)(**params), ctx)


def test_one_process_has_nothing_to_share_out(context, tmp_path):
    with pytest.raises(UserError, match=r"hardware\.sharding: full with one process.*2 processes or more"):
        run(context(sharding="full"))
    tiny_checkpoint(tmp_path / "teacher")
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "tiny.yaml").write_text(PROFILE.replace("PROCESSES", "1, sharding: full"))
    with pytest.raises(ProfileError, match=r"hardware.*sharding: full.*give processes, 2 or more"):
        load_profile(tmp_path / "tiny.yaml")
    (tmp_path / "tiny.yaml").write_text(PROFILE.replace("PROCESSES", "2, sharding: half"))
    with pytest.raises(ProfileError, match=r"hardware\.sharding: got 'half'"):
        load_profile(tmp_path / "tiny.yaml")


def test_a_skeleton_has_shapes_and_no_weights():
    student = tiny_model()
    bones = skeleton(student)
    assert all(p.is_meta for p in bones.parameters())
    assert bones.lm_head.weight is bones.model.embed_tokens.weight
    assert [p.shape for p in bones.parameters()] == [p.shape for p in student.parameters()]
    assert not any(p.is_meta for p in student.parameters())
    assert torch.equal(bones.model.rotary_emb.inv_freq, student.model.rotary_emb.inv_freq)


def test_one_process_alone_has_no_parts():
    tensor = nn.Parameter(torch.ones(3))
    assert torch.equal(whole(tensor), tensor)
    assert local(tensor).data_ptr() == tensor.data_ptr()
    assert Team().agreed(True)
    assert not Team().agreed(False)
