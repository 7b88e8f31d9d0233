"""Bits and groups that the runtime has no kernel for: told by the stage, by `plan` and by the export, never chosen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.model.quantization import mixed_stage
from compress.model.quantization.gptq_stage import round_to_nearest
from compress.model.quantization.layout import choose, has_kernel, slow_note
from compress.model.quantization.params import MixedParams, RtnParams
from deploy.export.onnx import OnnxOptions, write_onnx
from tests.deploy.tools import context, rounded
from tests.test_estimates import CONFIG, folder, foretold
from tests.tiny import tiny_checkpoint

SLOW = "groups of 16, for which onnxruntime has no int8 kernel"


@pytest.mark.parametrize(
    ("params", "slow"),
    [
        ({"bits": 2, "group_size": 16}, 210),
        ({"bits": 2, "group_size": 32}, 0),
        ({"bits": 4, "group_size": 16}, 0),
        ({"bits": 8, "group_size": 16}, 0),
        ({"bits": 3, "group_size": 16}, 0),  # stored in 4
        ({"bits": 4, "overrides": [{"pattern": "*.up_proj", "bits": 2, "group_size": 16}]}, 30),
        ({"bits": 2, "group_size": 16, "ignore": ["*"]}, 0),
    ],
)
def test_the_layout_tells_of_what_is_slow(params: dict[str, Any], slow: int) -> None:
    note = slow_note(choose(CONFIG, RtnParams(**params), where="rtn"))
    assert (note or "").startswith(f"{slow} linears have 2 bits in {SLOW}" if slow else "")
    assert (note is None) == (not slow)


def test_a_width_that_lets_groups_fall_to_16_is_told_of(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", hidden=48, heads=3, kv_heads=1, head_dim=16, ffn=48)
    ctx = context("model.quantization.rtn", tmp_path / "out", inputs={"model": source})
    assert any(SLOW in note for note in round_to_nearest(RtnParams(bits=2), ctx).notes)
    (tmp_path / "onnx").mkdir()
    told = write_onnx(ctx.out, tmp_path / "onnx", options=OnnxOptions()).notes
    assert any("matrices of 2 bits in blocks of 16: onnxruntime has no kernel" in note for note in told)


@pytest.mark.parametrize(("level", "told"), [(4, 0), (1, 1), (0, 1)])
def test_the_export_tells_that_fp32_arithmetic_has_no_kernel_for_8_bits(level: int, told: int, tmp_path: Path) -> None:
    source = rounded(tiny_checkpoint(tmp_path / "model", hidden=64, head_dim=16), tmp_path / "codes", bits=4)
    (tmp_path / "onnx").mkdir()
    report = write_onnx(source, tmp_path / "onnx", options=OnnxOptions(accuracy_level=level))
    found = [note for note in report.notes if "1 matrices of 8 bits in blocks of 32: onnxruntime has no kernel" in note]
    assert len(found) == told
    assert has_kernel(8, 32, accuracy_level=level) == (not told)


def test_the_plan_tells_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    sets = ["steps[1].model.quantization.bits=2", "steps[1].model.quantization.group_size=16"]
    assert any(SLOW in note for note in foretold(path, *sets).notes)
    assert not any(SLOW in note for note in foretold(path, sets[0]).notes)


@pytest.mark.parametrize(("groups", "kept"), [([16, 32], {"2g32", "4g16", "4g32"}), ([16], {"4g16"})])
def test_bits_per_part_are_never_chosen_without_a_kernel(groups: list[Any], kept: set[str]) -> None:
    params = MixedParams(candidates=[2, 4], groups=groups, budget_bits=3)
    job: Any = SimpleNamespace(stream=SimpleNamespace(config=CONFIG), layout=choose(CONFIG, params, where="mixed"))
    assert mixed_stage._options(job, params, "qkv").keys() == kept
