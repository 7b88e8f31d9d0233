"""The bundle's runtime gives what torch gives, in batches and alone, up to its ends and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import DataError, ModelError
from compress.model.checkpoint import TorchRuntime, load_model
from deploy.runners import GenaiRunner
from tests.tiny import PAD, tiny_token_rows


@pytest.fixture(scope="module")
def runner(bundle: Path) -> GenaiRunner:
    """The bundle, opened on one thread."""
    return GenaiRunner(bundle, threads=1, batch_size=3)


def test_batches_answer_as_each_prompt_does_alone(runner: GenaiRunner) -> None:
    prompts = [list(row.ids) for row in tiny_token_rows(17, tokens=(5, 8, 5, 12), seed=4)]
    together = runner.generate(prompts, 10, {4})
    assert together == [runner.generate([prompt], 10, {4})[0] for prompt in prompts]
    assert len({tuple(answer) for answer in together}) > 3  # they are not all the same


def test_the_stop_token_ends_an_answer_and_is_left_out(runner: GenaiRunner) -> None:
    prompt = list(tiny_token_rows(1, tokens=9, seed=2)[0].ids)
    free = runner.generate([prompt], 12, set())[0]
    assert len(free) == 12
    stop = free[3]
    assert runner.generate([prompt, prompt], 12, {stop}) == [free[: free.index(stop)]] * 2


def test_the_runtimes_own_end_token_does_not_count(bundle: Path, runner: GenaiRunner) -> None:
    prompt = list(tiny_token_rows(1, tokens=9, seed=2)[0].ids)
    first = runner.generate([prompt], 1, set())[0]
    assert first == runner.generate([prompt], 1, {first[0] + 1})[0]
    assert runner.generate([prompt], 0, set()) == [[]]


def test_a_pad_token_inside_a_prompt_is_read_like_any_other(quantized: Path, bundle: Path) -> None:
    exact = TorchRuntime(load_model(quantized))
    runner = GenaiRunner(bundle, threads=1)
    for prompt in ([PAD, 9, 8, 7], [9, PAD, PAD, 7], [9, 8, 7, PAD]):
        assert np.abs(runner.logits(prompt) - exact.logits(prompt)).max() < 0.15  # activations are in 8 bits
    together = [[9, 8, 7, 6], [PAD, 9, 8, 7], [9, 8, 7, 5], [9, 8, 7, PAD]]
    assert runner.generate(together, 6, set()) == [runner.generate([prompt], 6, set())[0] for prompt in together]


def test_logits_have_a_row_per_token_and_do_not_depend_on_the_chunks(runner: GenaiRunner) -> None:
    ids = list(tiny_token_rows(1, tokens=20, seed=5)[0].ids)
    whole = runner.logits(ids)
    assert whole.shape == (20, 320)
    assert whole.dtype == np.float32
    for prefill in (1, 7, 19, 20):
        assert np.abs(runner.logits(ids, prefill=prefill) - whole).max() < 0.1
    assert runner.logits([7] * runner.context).shape == (runner.context, 320)


def test_generation_stops_when_the_context_is_full(runner: GenaiRunner) -> None:
    prompt = [7] * (runner.context - 3)
    assert len(runner.generate([prompt], 50, set())[0]) == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"prompt 0: 0 tokens; expected 1 to 255"),
        ([5] * 256, r"prompt 0: 256 tokens; expected 1 to 255"),
        ([5, 320], r"prompt 0: token id 320; expected 0 to 319"),
        ([5, -1], r"prompt 0: token id -1; expected 0 to 319"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(runner: GenaiRunner, ids: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        runner.generate([ids], 4, set())


def test_a_broken_graph_is_refused_in_one_sentence(bundle: Path, tmp_path: Path) -> None:
    for path in bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match="onnxruntime-genai cannot open it"):
        GenaiRunner(tmp_path, threads=1, verify=False)


def test_reading_allocates_what_is_read(runner: GenaiRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime allocates the whole length that a generator is given, whatever is read."""
    sizes: list[int] = []
    start = GenaiRunner.start

    def watched(self: GenaiRunner, max_length: int, *arguments: Any, **more: Any) -> Any:
        sizes.append(max_length)
        return start(self, max_length, *arguments, **more)

    monkeypatch.setattr(GenaiRunner, "start", watched)
    runner.logits([5, 6, 7])
    runner.logits([5, 6, 7, 8], prefill=2)
    runner.next_logits([5, 6])
    runner.generate([[5, 6, 7]], 4, set())
    assert sizes == [3, 4, 2, 7]
