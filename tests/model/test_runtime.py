"""Batched greedy generation equals transformers' own generate, prompt by prompt."""

from __future__ import annotations

import random

import pytest
import torch

from compress.errors import DataError
from compress.model.checkpoint import TorchRuntime
from tests.tiny import tiny_model


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[1, *(draw.randrange(5, 320) for _ in range(draw.randrange(1, 12)))] for _ in range(count)]


def plain(model: object, prompt: list[int], new: int, stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[attr-defined]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[:-1] if out and out[-1] in stops else out


@pytest.mark.parametrize(("arch", "batch_size"), [("llama", 1), ("llama", 16), ("qwen2", 3), ("qwen3", 4)])
def test_generate_equals_transformers(arch: str, batch_size: int) -> None:
    model = tiny_model(arch, seed=3, scale=0.5)
    asked = prompts(9)
    free = [plain(model, prompt, 12, [4]) for prompt in asked]
    stops = [4, free[0][5], free[3][2]]  # rows must end at different steps
    expected = [plain(model, prompt, 12, stops) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 2
    got = TorchRuntime(model, batch_size=batch_size).generate(asked, 12, stops)
    assert got == expected


@pytest.mark.parametrize(("arch", "batch_size"), [("llama", 1), ("qwen2", 4), ("qwen3", 16)])
def test_would_write_is_true_exactly_where_generation_gives_the_answer(arch: str, batch_size: int) -> None:
    runtime = TorchRuntime(tiny_model(arch, seed=3, scale=0.5), batch_size=batch_size)
    asked = prompts(9)
    free = runtime.generate(asked, 12, [4])
    stops = frozenset({4, free[0][5], free[3][2], free[5][7]})
    written = runtime.generate(asked, 12, stops)
    ended = [len(answer) < 13 for answer in runtime.generate(asked, 13, stops)]
    assert any(ended), "some rows end at a stop token"
    assert not all(ended)
    assert runtime.would_write(asked, written, stops) == ended
    changed = [[*answer[:-1], (answer[-1] + 1) % 320] if answer else [7] for answer in written]
    cut = [answer[:-1] for answer in written]
    for other in (changed, cut):
        verdicts = runtime.would_write(asked, other, stops)
        assert verdicts == [a == b and end for a, b, end in zip(other, written, ended, strict=True)]


def test_generation_ends_where_the_context_ends() -> None:
    model = tiny_model(positions=10)
    runtime = TorchRuntime(model)
    answers = runtime.generate([[1, 5, 6], [1, 7, 8, 9, 10, 11]], 50, ())
    assert [len(answer) for answer in answers] == [7, 4]


@pytest.mark.parametrize("length", [0, 10])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(DataError, match=f"prompt 1: {length} tokens; expected 1 to 9"):
        TorchRuntime(tiny_model(positions=10)).generate([[1], [5] * length], 4, ())


def test_logits_are_the_models() -> None:
    model = tiny_model("qwen3")
    ids = prompts(1)[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    got = TorchRuntime(model).logits(ids)
    assert got.shape == (len(ids), 320)
    assert torch.equal(torch.from_numpy(got), expected)
