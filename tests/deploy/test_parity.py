"""The proof of parity keeps its power: graphs that are wrong in one thing are refused, in every part of the runtime."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.errors import ParityError
from compress.progress import Progress
from deploy.export import parity
from deploy.export.onnx import OnnxOptions, write_onnx
from deploy.export.tokenizer import write_tokenizer
from deploy.params import ExportParams
from deploy.runners import GenaiRunner
from tests.tiny import tiny_token_rows

PROMPTS = [list(row.ids) for row in tiny_token_rows(12, tokens=(1, 2, 9, 30, 25, 14))]
DEFAULTS = ExportParams()


@pytest.fixture(scope="module")
def exported(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right graph."""
    out = tmp_path_factory.mktemp("parity") / "onnx"
    out.mkdir()
    write_onnx(quantized, out, options=OnnxOptions())
    write_tokenizer(quantized, out)
    return out


def check(folder: Path, source: Path, work: Path, progress: Progress | None = None) -> parity.Parity:
    limits = {"tolerance": DEFAULTS.parity_tolerance, "max_kl": DEFAULTS.max_kl}
    return parity.check(folder, source, PROMPTS, **limits, threads=1, work=work, progress=progress)


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def wrong_rotation(model: onnx.ModelProto) -> None:
    """Every frequency one percent too high."""
    table = next(node for node in model.graph.node if node.op_type == "Cos").input[0]
    product = next(node for node in model.graph.node if table in node.output)
    tensor = constant(model, product.input[1])
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * 1.01).astype(np.float32), tensor.name))


def wrong_epsilon(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-3


def swapped_weight(model: onnx.ModelProto) -> None:
    gate, up = named(model, "1.gate_proj"), named(model, "1.up_proj")
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def swapped_scales(model: onnx.ModelProto) -> None:
    gate, up = named(model, "1.gate_proj"), named(model, "1.up_proj")
    gate.input[2], up.input[2] = up.input[2], gate.input[2]


def swapped_cache(model: onnx.ModelProto) -> None:
    """Prompts come out right: only what is read through the cache does not."""
    first, second = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    first.input[3], second.input[3] = second.input[3], first.input[3]


def wrong_position_kept(model: onnx.ModelProto) -> None:
    """The copy of the graph for every position is right: only the graph that ships is not."""
    kept = next(node for node in model.graph.node if node.op_type == "Gather" and node.name.startswith("last."))
    tensor = constant(model, kept.input[1])
    tensor.CopyFrom(numpy_helper.from_array(np.array([0], np.int64), tensor.name))


BREAKS = [wrong_rotation, wrong_epsilon, swapped_weight, swapped_scales, swapped_cache, wrong_position_kept]


@pytest.mark.parametrize("wrong", BREAKS)
def test_a_graph_that_is_wrong_in_one_thing_is_refused(
    wrong: Callable[[onnx.ModelProto], None], exported: Path, quantized: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(str(folder / "model.onnx"))
    wrong(model)
    onnx.save(model, str(folder / "model.onnx"))
    with pytest.raises(ParityError, match=r"its logits differ from torch's by .* \(parity_tolerance\)"):
        check(folder, quantized, tmp_path)


def test_one_pass_over_all_positions_and_a_few_steps(
    exported: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, since times depend on what else runs: what the runtime is given, and what scratch space holds after."""
    given: list[int] = []
    start = GenaiRunner.start

    class Counting:
        def __init__(self, generator: object) -> None:
            self.generator = generator

        def append_tokens(self, ids: np.ndarray) -> None:
            given.append(len(ids))
            self.generator.append_tokens(ids)

        def get_output(self, name: str) -> object:
            return self.generator.get_output(name)

    monkeypatch.setattr(GenaiRunner, "start", lambda *args, **named: Counting(start(*args, **named)))
    stream = io.StringIO()
    monkeypatch.setattr("compress.progress.LINE_EVERY_S", 0.0)
    found = check(exported, quantized, tmp_path, Progress(stream=stream))
    tokens = sum(len(ids) for ids in PROMPTS)
    assert found.exact.positions == found.shipped.positions == tokens
    steps = 2 * parity.CACHED_ROWS * parity.CACHED_STEPS  # of both graphs
    passes = 2 * (len(PROMPTS) + parity.CACHED_ROWS)
    assert len(given) <= passes + steps
    assert sum(given) <= 2 * (tokens + parity.CACHED_ROWS * max(len(ids) for ids in PROMPTS))
    for what in ("prompts read in torch", "prompts compared, in fp32", "prompts compared, as shipped"):
        assert re.search(rf"{what} \d+/{len(PROMPTS)} ", stream.getvalue())  # how often depends on the time taken
    assert not list(tmp_path.iterdir())
