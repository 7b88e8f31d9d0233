"""A real pretrained model: 4 bits cost little, and GPTQ costs less than rounding. Skipped where it is not at hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compress.context import StageContext
from compress.data.rows import make_row, write_rows
from compress.encoding import encode_rows, load_tokenizer
from compress.model.calibration import batches, mean_loss
from compress.model.checkpoint import load_model
from compress.model.distillation.losses import States
from compress.model.quantization import hessians, qat_stage, streaming
from compress.model.quantization.gptq_stage import quantize, round_to_nearest
from compress.model.quantization.params import GptqParams, QatParams, RtnParams
from compress.progress import Progress

SHARED = Path(__file__).parents[4] / "shared"
MODEL, TEXTS = SHARED / "models" / "stories260k", SHARED / "data" / "tinystories"


def stories(name: str, count: int) -> list[str]:
    text = (TEXTS / name).read_text(encoding="utf-8")
    return [part.strip() for part in text.split("<|endoftext|>") if part.strip()][:count]


def context(root: Path, out: str, *, seed: int = 1) -> StageContext:
    """A stage on the real model with sixty stories as rows; skips where it is not at hand."""
    if not (MODEL.is_dir() and TEXTS.is_dir()):
        pytest.skip("the stories model and texts are not beside the repository")
    folders = [root / name for name in (out, f"{out}-work", "data")]
    fresh = not folders[2].is_dir()
    for folder in folders:
        folder.mkdir(exist_ok=True)
    if fresh:
        write_rows(folders[2], [make_row(text=text) for text in stories("train.txt", 60)])
    return StageContext(
        name="model.quantization",
        inputs={"model": MODEL, "data": folders[2]},
        out=folders[0],
        work=folders[1],
        seed=seed,
        progress=Progress(quiet=True),
        threads=1,
    )


@pytest.mark.timeout(600)
def test_four_bits_of_a_real_model(tmp_path: Path) -> None:
    contexts = [context(tmp_path, name) for name in ("rtn", "gptq")]
    held_out = [make_row(text=text) for text in stories("valid-stories.txt", 24)]
    rows = encode_rows(held_out, load_tokenizer(MODEL), max_tokens=200, truncate=True)
    scored = batches(rows, tokens=10**6, batch_size=12, seed=0, pad_id=0)
    same = {"embedding_bits": 16, "clip_steps": 12}
    round_to_nearest(RtnParams(**same), contexts[0])
    result = quantize(GptqParams(**same, calibration_tokens=6000, max_tokens=200, batch_size=8), contexts[1])
    plain, rounded, compensated = (
        mean_loss(load_model(folder), scored) for folder in (MODEL, tmp_path / "rtn", tmp_path / "gptq")
    )
    # measured with 22k held-out tokens: fp32 1.311, rounding +0.092, GPTQ +0.059, with the correction less
    assert plain < 1.7
    assert plain < compensated < rounded
    assert compensated - plain < 0.08
    assert compensated - plain < 0.75 * (rounded - plain)
    assert result.metrics["loss"] - result.metrics["loss_before"] < 0.10
    assert any("172 padded with zeros to 192" in note for note in result.notes)


@pytest.mark.timeout(600)
def test_making_up_for_earlier_layers_helps_and_not_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three draws of rows; the negative control pairs each input with the plain input of another position."""
    found: dict[str, list[float]] = {}

    def divergences(kind: str, damp: float | None) -> None:
        options: dict[str, Any] = {"bits": 3, "embedding_bits": 16, "clip_steps": 8, "correction_damp": damp}
        options |= {"calibration_tokens": 5000, "calibration_draws": 1, "max_tokens": 128}
        for seed in (0, 1, 2):
            ctx = context(tmp_path, f"{kind}-{seed}", seed=seed)
            found.setdefault(kind, []).append(quantize(GptqParams(**options), ctx).metrics["kl"])

    divergences("without", None)
    divergences("with", 0.1)
    paired = hessians.paired_moments

    def mispaired(inputs: Any, wanted: Any, weights: Any) -> Any:
        return paired(inputs, (values.roll(7, dims=1) for values in wanted), weights)

    monkeypatch.setattr(streaming, "paired_moments", mispaired)
    divergences("mispaired", 0.1)
    for corrected, plain, wrong in zip(found["with"], found["without"], found["mispaired"], strict=True):
        assert corrected < 0.85 * plain
        assert wrong > plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_bits_trained_through_the_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of GPTQ's gap after 60 steps; the negative control learns what the teacher says elsewhere."""
    contexts = [context(tmp_path, name) for name in ("gptq", "trained", "wrong")]
    write_rows(tmp_path / "data", [make_row(text=text) for text in stories("train.txt", 1000)])
    held_out = [make_row(text=text) for text in stories("valid-stories.txt", 60)]
    rows = encode_rows(held_out, load_tokenizer(MODEL), max_tokens=256, truncate=True)
    scored = batches(rows, tokens=10**6, batch_size=12, seed=0, pad_id=0)

    def perplexity(number: int, **more: Any) -> float:
        options: dict[str, Any] = {"bits": 2, "calibration_draws": 1, "max_tokens": 128, "batch_tokens": 2048}
        options |= {"learning_rate": 3e-3}
        qat_stage.quantize(QatParams(**(options | {"steps": 60} | more)), contexts[number])
        return math.exp(mean_loss(load_model(contexts[number].out), scored))

    plain, gptq, trained = math.exp(mean_loss(load_model(MODEL), scored)), perplexity(0, steps=0), perplexity(1)
    honest = qat_stage.teacher_targets

    def elsewhere(*given: Any, **named: Any) -> Any:
        targets, figures = honest(*given, **named)

        def rolled(batch: Any) -> Any:
            states = targets(batch)
            return States(states.hidden.roll(7, dims=0), states.head, states.temperature)

        return rolled, figures

    monkeypatch.setattr(qat_stage, "teacher_targets", elsewhere)
    wrong = perplexity(2, keep="last")
    # measured with all of 120 held-out stories: plain 3.50, GPTQ 13.4, trained 7.3, the control 186
    assert plain < trained
    assert trained - plain < 0.5 * (gptq - plain)
    assert wrong > gptq
