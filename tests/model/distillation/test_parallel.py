"""Several processes: the curve of one, resumed by any number of them, and no silent stand-in for a lost one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress.errors import TrainingError, UserError
from compress.model.distillation import trainer
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.parallel import Team, assembled, check_size, told
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import train
from compress.pipeline import run as go
from compress.profile import load_profile
from compress.progress import Progress
from compress.store import Store
from tests.tiny import VOCAB, tiny_checkpoint, tiny_conversations, tiny_model, tiny_token_rows

ROOT = Path(__file__).parents[3]
ROWS = tiny_token_rows(60, tokens=(6, 10, 16))
SETTINGS = TrainSettings(
    loss=LossWeights(kd_weight=0.5),
    steps=8,
    batch_tokens=96,
    learning_rate=3e-3,
    validations=2,
    checkpoint_every_steps=3,
    log_every=1,
    precision="fp32",
)
TOLERANCE = 2e-5  # nats: sums in another order, blown up by AdamW; largest seen is far below


class Interrupted(Exception):
    """Stands for a kill."""


def curve(context):
    lines = [json.loads(line) for line in (context.work / "training.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def run(context, settings=SETTINGS, **more):
    student = tiny_model(seed=1)
    teacher = OnlineTargets(tiny_model(seed=9, scale=0.3), vocab=VOCAB)
    return student, train(student, teacher, ROWS, settings, context, context.work / "training.jsonl", **more)


def near(one, other):
    return all(torch.allclose(a, b, atol=1e-3) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_processes_give_the_curve_of_one(context):
    alone, two = context("one"), context("two", processes=2)
    student, report = run(alone)
    other, told_of = run(two)
    assert len(curve(alone)) == 8
    assert np.abs(curve(alone) - curve(two)).max() < TOLERANCE
    assert told_of.validation_loss == pytest.approx(report.validation_loss, abs=TOLERANCE)
    assert near(student, other)
    assert (told_of.steps, told_of.tokens, told_of.kept_step) == (report.steps, report.tokens, report.kept_step)
    assert {path.name for path in two.work.iterdir()} == {path.name for path in alone.work.iterdir()}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(context, monkeypatch, before, after):
    whole, killed = context("whole"), context("killed", processes=before)
    student, _ = run(whole)
    step = trainer._Run._step

    def until(self, clock):
        if self.at.step == 5:
            raise Interrupted
        return step(self, clock)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", until)
        with pytest.raises(Interrupted):
            run(killed)
    other, report = run(dataclasses.replace(killed, processes=after))
    assert report.resumed_from == 3
    assert np.abs(curve(whole) - curve(killed)).max() < TOLERANCE
    assert near(student, other)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_process_that_dies_ends_all(context, monkeypatch, sharding):
    children = []
    step = trainer._Run._step

    def kill(self, clock):
        if self.at.step == 2:
            children.extend(child for child, _ in self.team.children)
            children[0].kill()
            children[0].wait()
        return step(self, clock)

    monkeypatch.setattr(trainer._Run, "_step", kill)
    with pytest.raises(TrainingError, match=r"process 1 of 2 ended with code -9"):
        run(context(processes=2, sharding=sharding))
    assert all(child.poll() is not None for child in children)
    assert not torch.distributed.is_initialized()


def test_a_process_that_fails_tells_why(context):
    with assembled(2, "here") as team:
        child, log = team.children[0]
        assert child.poll() is None
        assert log.exists()
    assert child.poll() is not None
    with pytest.raises(TrainingError, match="ValueError: broken"):
        _tell_to_fail()


def _tell_to_fail():
    with assembled(2, "here") as team:
        told(team, (_fail,), "here")
        team.sum(np.ones(1))


def _fail(_team):
    raise ValueError("broken")


def test_what_only_one_process_can_do_is_refused(context):
    with pytest.raises(UserError, match=r"2 processes for a loss of its own kind.*hardware\.processes"):
        run(context(processes=2), loss_module=lambda *_: nn.Identity())


def test_a_launcher_that_started_too_few_is_refused(monkeypatch):
    check_size(None, 2, "here")
    check_size(2, 2, "here")
    with pytest.raises(UserError, match="started 1 of 2 processes"):
        check_size(1, 2, "here")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what `accelerate launch --cpu` leaves
    with pytest.raises(UserError, match="started 1 of 2 processes"), assembled(2, "here"):
        pass


def test_every_row_is_taken_once():
    rows = np.arange(7)
    parts = [Team(rank, 3).part(rows) for rank in range(3)]
    assert sorted(np.concatenate([part for part, _ in parts]).tolist()) == rows.tolist()
    assert Team(2, 3).part(rows[:2])[1] == 0.0


PROFILE = """\
edgestill: 1
name: tiny
seed: 3
teacher: teacher
data: {pool: pool.jsonl, test: pool.jsonl}
hardware: {threads: 2, processes: PROCESSES}
steps:
  - model.distillation: {layers: 2, steps: 6, batch_tokens: 256, top_k: 16, validation_share: 0.2}
evaluate: null
gate: []
bench: null
"""


def test_the_command_starts_them_from_the_profile(tmp_path):
    """By itself, with whole weights and with parts of them, and with processes that torchrun started."""
    tiny_checkpoint(tmp_path / "teacher", layers=3)
    lines = (json.dumps({"messages": talk}) for talk in tiny_conversations(40, seed=0))
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    found, students = [], []
    for name, hardware in (
        ("one", "1"),
        ("two", "2"),
        ("parts", "2, sharding: full"),
        ("torchrun", "2, sharding: full"),
    ):
        (tmp_path / "tiny.yaml").write_text(PROFILE.replace("PROCESSES", hardware))
        store = tmp_path / f"store-{name}"
        if name != "torchrun":
            go(load_profile(tmp_path / "tiny.yaml"), store=Store(store), progress=Progress(quiet=True))
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
            command += ["compress.entry", "run", "tiny.yaml", "--store", str(store)]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        (log,) = store.rglob("training.jsonl")
        found.append([json.loads(line) for line in log.read_text().splitlines()])
        students.append((log.parent.name, load_file(log.parent / "model.safetensors")))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert theirs == pytest.approx(mine, abs=TOLERANCE)
    for key, student in students[1:]:
        assert key == students[0][0]  # how it was trained is no part of what it is
        assert list(student) == list(students[0][1])
        assert all(torch.allclose(student[name], tensor, atol=1e-3) for name, tensor in students[0][1].items())
