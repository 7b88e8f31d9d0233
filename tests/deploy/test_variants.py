"""Copies of an exported model over the same weights: the last position alone against every position."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

from deploy.export.onnx import OnnxOptions, write_onnx
from deploy.runners import GenaiRunner
from deploy.variants import accuracy_copy, every_position_copy
from tests.deploy.tools import rounded
from tests.tiny import tiny_checkpoint

IDS = [9, 8, 7, 6, 5, 11, 12]
# On some processors the runtime adds up a product of one row in another order than that of several.
ROUNDING = 2e-6


def read(folder: Path, *, chunk: int | None = None) -> np.ndarray:
    """The runtime's own logits of IDS, all that it gives."""
    config = og.Config(str(folder))
    if chunk is not None:
        config.overlay(json.dumps({"search": {"chunk_size": chunk}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=32)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(IDS, dtype=np.int32))
    return np.array(generator.get_output("logits")[0])


def test_what_ships_gives_the_last_position_and_the_copy_gives_all(bundle: Path, tmp_path: Path) -> None:
    assert every_position_copy(bundle, tmp_path)
    shipped, every = read(bundle), read(tmp_path)
    assert shipped.shape == (1, 320)
    assert every.shape == (len(IDS), 320)
    assert np.abs(shipped[0] - every[-1]).max() < ROUNDING


def test_the_runner_reads_every_position_of_what_ships(bundle: Path) -> None:
    runner = GenaiRunner(bundle, threads=1)
    every = runner.logits(IDS)
    assert every.shape == (len(IDS), 320)
    assert np.abs(every[-1] - runner.next_logits(IDS)).max() < ROUNDING


def test_a_prompt_read_in_chunks_gives_the_same_position(bundle: Path) -> None:
    assert np.abs(read(bundle, chunk=3) - read(bundle)).max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_position_can_be_exported(tmp_path: Path, arch: str, layers: int) -> None:
    source = rounded(tiny_checkpoint(tmp_path / "plain", arch, layers=layers), tmp_path / "codes", bits=4)
    found = {}
    for last in (True, False):
        out = tmp_path / f"last-{last}"
        out.mkdir()
        write_onnx(source, out, options=OnnxOptions(last_logits=last))
        found[last] = read(out)
    assert found[False].shape == (len(IDS), 320)
    assert np.abs(found[False][-1:] - found[True]).max() < ROUNDING
    (tmp_path / "copy").mkdir()
    assert not every_position_copy(tmp_path / "last-False", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_the_copy_in_fp32_is_one_only_where_something_changes(bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert accuracy_copy(bundle, first, 1)
    assert not accuracy_copy(first, second, 1)
    assert {path.name for path in first.iterdir()} == {path.name for path in bundle.iterdir() if path.is_file()}
