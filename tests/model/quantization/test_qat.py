"""The stage on tiny models: what it starts from, what it writes, its phases, its teacher, resuming after a kill."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.context import StageContext, StageResult
from compress.data.rows import chat_row, write_rows
from compress.errors import ModelError
from compress.model.checkpoint import check_folder, load_model
from compress.model.distillation.confidence import confidence
from compress.model.distillation.packing import RowTable
from compress.model.distillation.trainer import train
from compress.model.layers import decoder_layers, linears
from compress.model.quantization import gptq_stage, qat_stage
from compress.model.quantization.params import GptqParams, QatParams, RtnParams
from compress.model.quantization.qat_student import build
from compress.model.quantization.quantizers import FakeQuantLinear
from compress.model.quantization.streaming import Rows, calibration_rows
from tests.model.quantization.test_stage import ONCE, context
from tests.tiny import ARCHITECTURES, VOCAB, tiny_checkpoint, tiny_model, tiny_token_rows

QUICK: dict[str, Any] = ONCE | {"steps": 6, "batch_tokens": 512, "group_size": 16}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from compress.model.distillation.trainer import _Run
from compress.model.quantization import qat_stage, qat_student
from tests.model.quantization.test_qat import PHASES, QatParams, context
name, save = sys.argv[3], _Run._save
_Run._checkpoint_due = lambda run, at: True
def save_then_die(run):
    save(run)
    if run.at.step == 3 and run.snapshots.checkpoint_path.name.startswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
_Run._save = save_then_die
write = qat_student.save_tensors
def write_half_then_die(tensors, path, **rest):
    if name == "blocks" and path.name == "layer-0001.safetensors":
        path.with_name(f".{path.name}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, **rest)
qat_student.save_tensors = write_half_then_die
qat_stage.quantize(QatParams(**PHASES), context(Path(sys.argv[1]), Path(sys.argv[2]), out="killed"))
"""
PHASES = QUICK | {"loss": "cakld", "block_steps": 3, "scale_steps": 5}


def qat(root: Path, model: Path, out: str = "out", **params: Any) -> StageResult:
    return qat_stage.quantize(QatParams(**(QUICK | params)), context(root, model, out=out))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [2, 3])
def test_without_steps_it_is_the_method_it_starts_from(bits: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    same = ONCE | {"bits": bits, "sym": False, "group_size": 16}
    qat(tmp_path, source, "qat", steps=0, bits=bits)
    gptq_stage.quantize(GptqParams(**same), context(tmp_path, source, out="gptq"))
    assert weights(tmp_path / "qat") == weights(tmp_path / "gptq")
    qat(tmp_path, source, "qat-rtn", steps=0, bits=bits, start="rtn")
    plain = RtnParams(bits=bits, sym=False, group_size=16, clip_steps=ONCE["clip_steps"])
    gptq_stage.round_to_nearest(plain, context(tmp_path, source, out="rtn"))
    assert weights(tmp_path / "qat-rtn") == weights(tmp_path / "rtn")


KINDS: list[dict[str, Any]] = [
    {},
    {"bits": 3, "sym": True, "start": "clip", "loss": "cakld"},
    {"bits": 2, "sym": True, "rule": "elastic", "start": "clip", "loss": "ce"},
    {"bits": 2, "sym": True, "rule": "ternary", "start": "rtn", "optimizer": "muon"},
    {"bits": 2, "block_steps": 3, "scale_steps": 3, "start": "rtn", "ignore": ["*.o_proj"], "train_norms": False},
    {"bits": 4, "keep_groups": False, "targets": "cache", "overrides": [{"pattern": "*.down_proj", "bits": 2}]},
]


@pytest.mark.parametrize(("arch", "kind"), list(zip((*ARCHITECTURES, *ARCHITECTURES), KINDS, strict=True)))
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_the_trained_model_exactly(
    arch: str, kind: dict[str, Any], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, tied=tied, ffn=60)  # padded to 64
    made: list[Any] = []

    def kept(*given: Any) -> Any:
        made.append(build(*given))
        return made[0]

    monkeypatch.setattr(qat_stage, "build", kept)
    result = qat(tmp_path, source, **({"overrides": []} | kind))
    check_folder(tmp_path / "out")
    opened, trained = load_model(tmp_path / "out"), made[0]
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, trained(input_ids=ids).logits)
    modules = [m for layer in decoder_layers(trained) for m in linears(layer).values()]
    assert sum(isinstance(m, FakeQuantLinear) for m in modules) == 14 - 2 * bool(kind.get("ignore"))
    if kind.get("rule") == "elastic":
        assert result.metrics["bits_per_weight"] == pytest.approx(4 + 16 / 16)
        assert any("stored in 4 bits" in note for note in result.notes)
    if kind.get("rule") == "ternary":
        assert result.metrics["bits_per_weight"] == pytest.approx(2 + 16 / 16)


def test_training_lowers_loss_and_divergence_and_moves_codes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    result = qat(tmp_path, source, steps=40, learning_rate=5e-3, start="rtn")
    figures = result.metrics
    assert figures["whole"]["validation_loss"] < 0.8 * figures["whole"]["start_loss"]
    assert figures["kl"] < 0.8 * figures["start"]["kl"]
    assert not [note for note in result.notes if "worse" in note]
    start = qat(tmp_path, source, "start", steps=0, start="rtn")
    assert start.metrics["kl"] == figures["start"]["kl"]
    assert weights(tmp_path / "out") != weights(tmp_path / "start")


def test_training_that_makes_it_worse_is_said(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    result = qat(tmp_path, source, steps=8, learning_rate=0.5, keep="last")
    assert any("divergence worse" in note for note in result.notes)
    kept = qat(tmp_path, source, "kept", steps=8, learning_rate=0.5, validation_share=0.2)
    assert kept.metrics["kl"] <= kept.metrics["start"]["kl"] * 1.05  # the best by held-out loss: the start


def test_scales_alone_lower_the_loss_and_leave_the_codes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    qat(tmp_path, source, "codes", steps=0)
    result = qat(tmp_path, source, "scales", steps=0, scale_steps=30, scale_learning_rate=3e-3)
    assert result.metrics["scales"]["validation_loss"] < 0.97 * result.metrics["scales"]["start_loss"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("codes", "scales"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scales"}


def test_layers_trained_alone_come_nearer_to_their_outputs(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3)
    alone = qat(tmp_path, source, "blocks", steps=0, start="rtn", block_steps=30, block_learning_rate=3e-3)
    found = alone.metrics["blocks"]
    assert all(after < 0.9 * before for before, after in zip(found["error_before"], found["error"], strict=True))
    assert alone.metrics["kl"] < alone.metrics["start"]["kl"]


@pytest.mark.parametrize("phase", ["blocks", "whole", "scales"])
def test_a_kill_in_a_phase_changes_nothing(phase: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    whole = qat(tmp_path, source, "whole", **PHASES)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(source), phase]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    assert not any((tmp_path / "killed").iterdir())
    first = tmp_path / "killed-work" / "blocks" / "layer-0000.safetensors"
    written = first.stat().st_mtime_ns
    resumed = qat(tmp_path, source, "killed", **PHASES)
    assert first.stat().st_mtime_ns == written  # not trained again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert resumed.metrics == whole.metrics


def test_confidence_is_the_mean_probability_of_the_targets_alone() -> None:
    teacher = tiny_model(scale=0.4)
    rows = tiny_token_rows(12, seed=2)
    found = confidence(teacher, RowTable(rows, vocab=VOCAB), 0)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            p = teacher(input_ids=torch.tensor([row.ids])).logits[0].double().softmax(-1)
        for at in range(1, len(row.ids)):
            if row.answer[at]:
                total, count = total + float(p[at - 1, row.ids[at]]), count + 1
    assert found == pytest.approx(total / count, rel=1e-4)
    assert 0 < count < sum(len(row.ids) for row in rows)


def taught_by(ctx: StageContext, folder: Path | None) -> StageContext:
    return replace(ctx, teacher=SimpleNamespace(folder=folder))  # type: ignore[arg-type]


def test_another_teacher_may_be_learned_from(tmp_path: Path) -> None:
    source, other = (tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (("model", 0), ("other", 7)))
    ctx = taught_by(context(tmp_path, source), other)
    taught = qat_stage.quantize(QatParams(**QUICK, teacher="pipeline"), ctx)
    alone = qat(tmp_path, source, "alone")
    assert taught.metrics["whole"]["start_loss"] > alone.metrics["whole"]["start_loss"]


def test_a_teacher_that_cannot_be_learned_from_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = (tiny_checkpoint(tmp_path / name, vocab=vocab) for name, vocab in (("model", 320), ("other", 300)))
    short = tiny_checkpoint(tmp_path / "short", positions=16)
    plain = context(tmp_path, source)
    monkeypatch.setattr(qat_stage, "best_draw", lambda *_, **__: pytest.fail("the work has begun"))
    for ctx, said in (
        (plain, "names no teacher.*Set teacher: self"),
        (taught_by(plain, None), "not a local model.*Set teacher: self"),
        (taught_by(plain, other), "different tokenizers.*Set teacher: self"),
        (taught_by(plain, short), "at most 16, the model's context"),
    ):
        with pytest.raises(ModelError, match=said):
            qat_stage.quantize(QatParams(**QUICK, teacher="pipeline"), ctx)


def test_labels_alone_need_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(qat_stage, "load_model", lambda *_: pytest.fail("a teacher was loaded"))
    result = qat(tmp_path, source, loss="ce", teacher="pipeline")
    assert result.metrics["whole"]["validation_ce"] > 0


def test_no_row_is_both_learned_from_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    learned: list[RowTable] = []
    checked: list[Rows] = []

    def drawn(*given: Any) -> Rows:
        checked.append(calibration_rows(*given))
        return checked[0]

    def trained(*given: Any, **more: Any) -> Any:
        learned.append(given[2])
        return train(*given, **more)

    monkeypatch.setattr(qat_stage, "calibration_rows", drawn)
    monkeypatch.setattr(qat_stage, "train", trained)
    qat(tmp_path, source, steps=1, scale_steps=1)
    held = {
        tuple(ids[mask.bool()].tolist())
        for batch in checked[0].check
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    }
    for table in learned:
        pieces = zip(table.starts, table.lengths, strict=True)
        seen = {tuple(table.ids[start : start + length].tolist()) for start, length in pieces}
        assert seen
        assert not seen & held
    assert len(learned) == 2
    assert held


def test_rows_that_are_all_checked_are_learned_from_and_that_is_said(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", [chat_row("lock the hall door", "locked"), chat_row("lock the hall door", "locked")])
    result = qat(tmp_path, source, steps=1)
    assert any("the divergence told is" in note for note in result.notes)


def test_layers_may_be_left_alone_but_not_all(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    result = qat(tmp_path, source, steps=2, block_steps=2, scale_steps=2, ignore=["model.layers.0.*"])
    assert result.metrics["blocks"]["error_before"][0] == result.metrics["blocks"]["error"][0]
    with pytest.raises(ModelError, match="no rounding to train through"):
        qat(tmp_path, source, "all", ignore=["*"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rule": "lsq"}, "symmetric grid: set sym: true"),
        ({"rule": "elastic", "sym": True}, "start: clip or rtn"),
        ({"rule": "ternary", "sym": True, "bits": 3, "start": "rtn"}, "for 2 bits, not 3"),
        ({"bits": 3, "grid": "nf3"}, "no rule of qat"),
        ({"start": "rtn", "correction_damp": 0.5}, "part of GPTQ: leave it out with start rtn"),
        ({"confidence": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QatParams(**given)
