"""Timing of a checkpoint in torch, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.assessment_params import CheckpointBenchParams
from compress.checkpoint_bench import bench
from compress.context import StageContext
from compress.errors import EdgestillError
from compress.progress import Progress
from tests.tiny import tiny_checkpoint


def context(tmp_path: Path, model: Path) -> StageContext:
    out = tmp_path / "out"
    out.mkdir()
    return StageContext("deploy.bench.checkpoint", {"model": model}, out, tmp_path, 1, Progress(quiet=True), threads=1)


def test_figures_fit_together(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    params = CheckpointBenchParams(prompt_tokens=8, new_tokens=4, repeats=2, warmup=1)
    figures = bench(params, context(tmp_path, model)).metrics
    assert figures["first_token_s"] * figures["prefill_tokens_per_s"] == pytest.approx(8)
    assert figures["decode_tokens_per_s"] > 0
    assert figures["peak_memory_bytes"] > 100_000_000  # torch itself
    assert (figures["threads"], figures["repeats"], figures["runtime"]) == (1, 2, "torch fp32")
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert figures["weight_bytes"] == pytest.approx(stored, rel=0.05)  # fp32 both, the file has a header


def test_process_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(
        EdgestillError, match=r"deploy\.bench\.checkpoint: the measuring process failed: .*config\.json"
    ):
        bench(CheckpointBenchParams(), context(tmp_path, tmp_path / "model"))
