"""Training after trimming: it wins back loss, resumes to the same bytes, and says whose logits it learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.errors import ModelError
from compress.model import checkpoint
from compress.model.distillation import targets
from compress.model.pruning import recovery, structured
from compress.model.pruning.params import RecoveryParams, StructuredParams
from tests.model.pruning.test_structured import SIZES, Killed, context
from tests.tiny import tiny_checkpoint

STEPS = RecoveryParams(steps=12, batch_tokens=256, learning_rate=3e-3, target="unpruned", precision="fp32")


def params(**change: Any) -> StructuredParams:
    return StructuredParams(
        prune_ratio=0.5, axes=("heads", "ffn", "hidden"), multiple_of=8, recovery=STEPS.model_copy(update=change)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", **SIZES)


def test_recovery_brings_the_student_nearer_to_the_unpruned(source: Path, tmp_path: Path) -> None:
    result = structured.prune(params(steps=40), context(tmp_path, source))
    assert result.metrics["rounds"] == 2
    for report in result.metrics["recovery"]:
        assert report["steps"] == 20
        assert report["validation_loss"] < 0.8 * report["start_loss"]
    points = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == sorted(point["step"] for point in points)
    assert points[-1]["step"] == 40
    assert not any("tokens_per_s" in point for point in points)
    checkpoint.check_folder(tmp_path / "out")


def test_cached_targets_give_nearly_what_the_running_model_gives(source: Path, tmp_path: Path) -> None:
    losses = []
    for kind, top_k in (("online", 32), ("cache", 1 << 16)):
        ctx = context(tmp_path, source, out=kind, work=f"{kind}-work")
        result = structured.prune(params(steps=40, targets=kind, top_k=top_k), ctx)
        losses.append([report["validation_loss"] for report in result.metrics["recovery"]])
    assert (tmp_path / "cache-work" / "targets" / "shard-00000.safetensors").is_file()
    assert losses[1] == pytest.approx(losses[0], rel=2e-3), "fp16 rounds the cache"


def test_kills_in_training_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recovery.settings
    monkeypatch.setattr(
        recovery, "settings", lambda *given: dataclasses.replace(plain(*given), checkpoint_every_steps=2)
    )
    whole = structured.prune(params(), context(tmp_path, source, out="whole", work="whole-work"))
    calls: list[int] = []
    real = targets.OnlineTargets.__call__

    def dying(self: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) in (4, 9, 13):
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(targets.OnlineTargets, "__call__", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            structured.prune(params(), context(tmp_path, source))
    again = structured.prune(params(), context(tmp_path, source))
    assert again == whole
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_the_profiles_teacher_is_learned_from_where_it_can_be(source: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "teacher", seed=9, layers=3)
    wish = STEPS.model_copy(update={"target": "teacher"})
    for folder, expected, note in [
        (other, other, []),
        (None, source, ["recovery from the unpruned model: the teacher is not at hand as weights"]),
    ]:
        ctx = context(tmp_path, source, teacher=SimpleNamespace(folder=folder))
        assert recovery.target_folder(wish, ctx, source) == (expected, note)
        assert recovery.target_folder(STEPS, ctx, source) == (source, [])
    foreign = tiny_checkpoint(tmp_path / "foreign", vocab=300)
    ctx = context(tmp_path, source, teacher=SimpleNamespace(folder=foreign))
    folder, notes = recovery.target_folder(wish, ctx, source)
    assert (folder, notes) == (source, ["recovery from the unpruned model: the teacher has another tokenizer"])
    result = structured.prune(params(target="teacher", steps=2), ctx)
    assert result.notes.count(notes[0]) == 1


def test_a_damaged_teacher_is_a_model_error(source: Path, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(tmp_path / "teacher")
    (teacher / "model.safetensors").write_bytes(b"short")
    ctx = context(tmp_path, source, teacher=SimpleNamespace(folder=teacher))
    with pytest.raises(ModelError, match="damaged or cut off"):
        structured.prune(params(target="teacher"), ctx)


def test_without_distillation_the_rows_alone_train(source: Path, tmp_path: Path) -> None:
    result = structured.prune(params(kd_weight=0.0, steps=30), context(tmp_path, source))
    assert result.metrics["loss"] < result.metrics["loss_trimmed"][-1]
    assert result.metrics["recovery"][-1]["validation_kl"] in (0.0, None)
