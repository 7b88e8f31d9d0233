"""The stage: target sizes, rounds, resuming, notes and errors. Training after trimming: test_recovery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.context import StageContext, StageResult
from compress.data.rows import chat_row, write_rows
from compress.errors import ModelError
from compress.model import checkpoint
from compress.model.pruning import structured
from compress.model.pruning.params import RecoveryParams, StructuredParams
from compress.model.pruning.schedule import final_shape, removed, rounds
from compress.model.shapes import StudentShape, check_shape, shape_of, with_shape
from compress.progress import Progress
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_config, tiny_conversations

TRIM = RecoveryParams(steps=0)
SIZES = {"layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "ffn": 128}


def context(tmp_path: Path, model: Path, **change: Any) -> StageContext:
    data = tmp_path / "data"
    if not data.is_dir():
        data.mkdir()
        talks = tiny_conversations(40, seed=3)
        write_rows(data, [chat_row(talk[0]["content"], talk[1]["content"]) for talk in talks])
    out, work = tmp_path / change.pop("out", "out"), tmp_path / change.pop("work", "work")
    for folder in (out, work):
        folder.mkdir(exist_ok=True)
    known: dict[str, Any] = {"name": "model.pruning.structured", "seed": 5, "threads": 1}
    return StageContext(
        inputs={"model": model, "data": data}, out=out, work=work, progress=Progress(quiet=True), **(known | change)
    )


def run(tmp_path: Path, model: Path, **params: Any) -> StageResult:
    return structured.prune(StructuredParams(**({"recovery": TRIM} | params)), context(tmp_path, model))


@pytest.mark.parametrize(
    ("params", "stored"), [({"prune_ratio": 0.0}, torch.float32), ({"layers": 4, "ffn": 128}, torch.bfloat16)]
)
def test_nothing_to_prune_gives_the_very_weights(params: dict[str, Any], stored: torch.dtype, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", **SIZES)
    checkpoint.save_model(checkpoint.load_model(source, dtype=stored), source, tokenizer_from=source)
    result = run(tmp_path, source, **params)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == stored for name in before)
    assert result.metrics["prune_ratio"] == 0
    assert result.notes == ["nothing was removed: the model has the wanted shape already"]


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_the_stage_writes_what_it_says(arch: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, tied=tied, **SIZES)
    result = run(tmp_path, source, layers=3, heads=4, kv_heads=2, ffn=64, hidden=32)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint.check_folder(tmp_path / "out")
    assert checkpoint.count_parameters(student) == result.metrics["parameters"]
    assert result.metrics["shape"] == {"layers": 3, "heads": 4, "kv_heads": 2, "ffn": 64, "hidden": 32}
    assert result.metrics["rounds"] == len(result.metrics["loss_trimmed"]) > 1
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    record = json.loads((tmp_path / "out" / "edgestill.json").read_text())
    assert len(record["rounds"]) == result.metrics["rounds"]
    assert student.config._name_or_path == str(tmp_path / "out")
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_same_inputs_give_the_same_bytes_and_rounding_is_told(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", **SIZES)
    params = StructuredParams(ffn=100, heads=6, recovery=TRIM)
    results = [
        structured.prune(params, context(tmp_path, source, out=f"out-{i}", work=f"work-{i}", seed=seed))
        for i, seed in enumerate((5, 5, 6))
    ]
    assert results[0].notes == ["heads 6 rounded to 4", "ffn 100 rounded to 96"]
    assert results[0] == results[1]
    for path in sorted((tmp_path / "out-0").iterdir()):
        assert path.read_bytes() == (tmp_path / "out-1" / path.name).read_bytes(), path.name


class Killed(BaseException):
    """As a kill: no handler of ours catches it."""


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", **SIZES)
    params = StructuredParams(prune_ratio=0.6, axes=("heads", "ffn", "hidden"), multiple_of=8, recovery=TRIM)
    whole = structured.prune(params, context(tmp_path, source, out="whole", work="whole-work"))
    assert whole.metrics["rounds"] == 3
    done: list[int] = []
    real = structured.slice_model

    def dying(*args: Any, **kwargs: Any) -> dict[str, Any]:
        done.append(1)
        if len(done) in (1, 3, 5):  # in round 1, in round 2, in round 3
            (tmp_path / "work" / f"round-{len(done) // 2 + 1}.partial").mkdir()  # as a kill while saving leaves it
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(structured, "slice_model", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            structured.prune(params, context(tmp_path, source))
        assert not any((tmp_path / "out").iterdir())
    again = structured.prune(params, context(tmp_path, source))
    assert len(done) == 6  # the finished rounds were not done again
    assert again == whole
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_unusable_inputs_are_model_errors(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", **SIZES)
    with pytest.raises(ModelError, match=r"structured\.prune_ratio: 0\.9 of the parameters by ffn; expected at most"):
        run(tmp_path, source, prune_ratio=0.9, axes=("ffn",))
    with pytest.raises(ModelError, match="layers 5; expected 1 to 4"):
        run(tmp_path, source, layers=5)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"a quantized checkpoint; expected plain weights\. Prune before quantization"):
        run(tmp_path, source)
    shutil.rmtree(source)
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        run(tmp_path, source)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prune_ratio": 0.5, "ffn": 64}, r"prune_ratio and target sizes \(ffn\) exclude each other"),
        ({"prune_ratio": 1.0}, "less than 1"),
        ({"axes": ["ffn", "ffn"]}, "axes names one twice"),
        ({"axes": ["depth"]}, "Input should be 'heads', 'ffn', 'hidden' or 'layers'"),
        ({"ratio": 0.5}, "Extra inputs"),
        ({"layers": "3"}, "valid integer"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StructuredParams(**params)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_rounds_shrink_steadily_through_shapes_that_can_be_cut(arch: str, ratio: float) -> None:
    config = tiny_config(arch, layers=8, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=768, vocab=512).to_dict()
    params = StructuredParams(prune_ratio=ratio, axes=("heads", "ffn", "hidden", "layers"))
    final, _ = final_shape(config, params, where="test")
    path = rounds(config, final, max_step=1 / 3)
    assert path[-1] == final
    assert removed(config, final) == pytest.approx(ratio, abs=0.05)
    now = config
    for step in path:
        check_shape(now, step, where="test")
        assert removed(now, step) < 0.5
        assert shape_of(now) != step
        now = with_shape(now, step)
    assert len(path) == {0.2: 1, 0.5: 2, 0.8: 4}[ratio]


def test_no_rounds_for_the_own_shape() -> None:
    config = tiny_config().to_dict()
    assert rounds(config, shape_of(config), max_step=0.1) == []


def test_explicit_sizes_in_small_steps() -> None:
    config = tiny_config("llama", hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=512, layers=6).to_dict()
    final = StudentShape(layers=3, heads=2, kv_heads=1, ffn=128, hidden=128)
    path = rounds(config, final, max_step=0.2)
    assert len(path) > 4
    assert [step.layers for step in path] == sorted((step.layers for step in path), reverse=True)
