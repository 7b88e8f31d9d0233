"""The back-end optimum in its own environment: the bundle runs, and computes what the checkpoint computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.model.checkpoint import load_model
from deploy.bench import bench_bundle
from deploy.bundle import open_bundle
from deploy.export import optimum
from deploy.export.stage import export
from deploy.params import ExportParams
from deploy.runners import GenaiRunner
from tests.deploy.tools import changed_config, context, rounded
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]
ROPE = {"rope_type": "default", "rope_theta": 50_000.0}  # transformers 4 would take 10000 and say nothing
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def environment() -> None:
    """Skip, or fail under ``make interop``, where optimum-onnx has no environment."""
    if not os.environ.get(optimum.VARIABLE) and not optimum._PLACE.is_file():
        complain = pytest.fail if os.environ.get("EDGESTILL_INTEROP") else pytest.skip
        complain("no environment of optimum-onnx: make optimum-env makes it")


@pytest.mark.parametrize(
    ("arch", "tied", "head_dim", "rope", "bits"),
    [
        ("llama", True, 16, LLAMA3 | {"original_max_position_embeddings": 64}, 4),
        ("qwen2", False, 8, ROPE, None),  # heads that the builder's graph has to pad
        ("qwen3", True, 16, ROPE, 2),
    ],
)
def test_the_bundle_computes_what_the_checkpoint_computes(
    arch: str, tied: bool, head_dim: int, rope: dict[str, Any], bits: int | None, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "plain", arch, tied=tied, hidden=64, head_dim=head_dim)
    changed_config(source, rope_parameters=rope)
    if bits is not None:
        source = rounded(source, tmp_path / "q", bits=bits, group_size=32, clip_steps=0)
    for name in ("a", "b"):
        ctx = context("deploy.export", tmp_path / name, inputs={"model": source}, target=None)
        result = export(ExportParams(backend="optimum", parity_tolerance=1e-5, max_kl=1e-8), ctx)
    assert any("values of the codes in fp32" in note for note in result.notes) == (bits is not None)
    bundle = open_bundle(tmp_path / "a")
    assert bundle.info["onnx"]["backend"] == "optimum"
    assert bundle.info["onnx"]["accuracy_level"] == 1
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    prompt = [1, 2, 77, 200, 31, 8, 150, 3]
    ids = load_model(source).generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    told = GenaiRunner(tmp_path / "a", threads=1).generate([prompt], 12, [])
    assert told[0] == ids[0, len(prompt) :].tolist()
    bench_bundle(tmp_path / "a", prompt_tokens=4, new_tokens=4, repeats=1, bandwidth=False)
