"""Mixed bits: the knapsack against brute force, sensitivities against a whole model, the stage under its budget."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.errors import ModelError, TargetError
from compress.model.checkpoint import load_model, read_config
from compress.model.layers import decoder_layers, linears
from compress.model.quantization import mixed_stage, sensitivity
from compress.model.quantization.allocation import Option, frontier, within
from compress.model.quantization.gptq_stage import quantize, solve
from compress.model.quantization.layout import LinearSpec, stored_as
from compress.model.quantization.packing import dequantize
from compress.model.quantization.params import GptqParams, MixedParams
from compress.model.quantization.streaming import Step, calibration_rows, open_job
from tests.model.quantization.test_stage import ONCE, context
from tests.tiny import tiny_checkpoint


def some_parts(seed: int, count: int) -> dict[str, list[Option]]:
    draw = random.Random(seed)
    return {
        f"part{at}": [
            Option(f"{bits}", draw.choice([10, 20, 40]) * bits, draw.random() / bits**2) for bits in (2, 4, 8)
        ]
        for at in range(count)
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_brute_force(seed: int) -> None:
    parts = some_parts(seed, 6)
    every = [
        (sum(option.size for option in chosen), sum(option.cost for option in chosen))
        for chosen in itertools.product(*parts.values())
    ]
    best = [(size, cost) for size, cost in every if not any(s <= size and c < cost for s, c in every)]
    found = frontier(parts)
    assert [one.size for one in found] == sorted({size for size, _ in best})
    assert [one.cost for one in found] == pytest.approx(sorted({round(cost, 15) for _, cost in best}, reverse=True))
    for one in found:  # the choices that are told are those that were summed
        chosen = [next(o for o in parts[part] if o.name == name) for part, name in one.chosen.items()]
        assert sum(option.size for option in chosen) == one.size
        assert sum(option.cost for option in chosen) == pytest.approx(one.cost)


def test_the_budget_is_kept_and_used() -> None:
    found = frontier(some_parts(9, 5))
    middle = found[len(found) // 2]
    assert within(found, middle.size, where="x") is middle
    assert within(found, middle.size - 1, where="x").cost > middle.cost
    assert within(found, 10**9, where="x") is found[-1]
    with pytest.raises(ModelError, match="at least"):
        within(found, found[0].size - 1, where="x")


def test_sensitivity_is_the_divergence_with_one_part_quantized(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3)
    params = MixedParams.model_validate(ONCE | {"budget_bits": 4.0})
    job = open_job(params, context(tmp_path, source))
    rows = calibration_rows(job, params)
    spec = LinearSpec(2, 32, True)
    check = rows.check[:2]
    found = sensitivity.measure(
        job,
        lambda step: solve(step, params),
        rows.draws[0],
        check,
        {kind: {"2g32": spec} for kind in sensitivity.PARTS},
        prompt_weight=1.0,
    )
    assert list(found) == [f"{index}.{part}" for index in range(3) for part in ("qkv", "o", "gate_up", "down")]
    plain, changed = (load_model(source).requires_grad_(False) for _ in range(2))
    caught: list[torch.Tensor] = []
    linear = linears(decoder_layers(plain)[1])["down_proj"]
    hook = linear.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    for batch in rows.draws[0]:
        plain(input_ids=batch.input_ids)
    hook.remove()
    inputs = torch.cat(
        [values[batch.attention_mask.bool()] for values, batch in zip(caught, rows.draws[0], strict=True)]
    )
    moment = (inputs.T @ inputs).double() / len(inputs)
    path = "model.layers.1.mlp.down_proj"
    solved = solve(Step({path: linear.weight.data}, {path: spec}, moment), params)[path]
    linears(decoder_layers(changed)[1])["down_proj"].weight.data = dequantize(*solved.layer)
    total, count = 0.0, 0
    for batch in check:
        targets = batch.answer[:, 1:].bool()
        p, q = (m(input_ids=batch.input_ids).logits[:, :-1][targets].log_softmax(-1) for m in (plain, changed))
        total, count = total + float((p.exp() * (p - q)).sum()), count + int(targets.sum())
    assert found["1.down"]["2g32"] == pytest.approx(total / count, rel=0.02)


def test_the_stage_keeps_its_budget_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3)
    params = MixedParams.model_validate(ONCE | {"budget_bits": 5.0, "candidates": [2, 4, 8], "groups": [16, 32]})
    ctx = context(tmp_path, source)
    result = mixed_stage.quantize(params, ctx)
    assert result.metrics["bits_per_weight"] <= 5.0
    assert result.metrics["bits_per_weight"] > 4.0  # the budget is used
    allocation = result.metrics["allocation"]
    settings = read_config(ctx.out)["quantization_config"]
    for part, name in allocation["chosen"].items():
        for path in sensitivity.part_paths(part):
            assert "{}g{}".format(*stored_as(settings, path)) == name
    sizes = [point["bytes"] for point in allocation["frontier"]]
    costs = [point["kl"] for point in allocation["frontier"]]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert MixedParams.model_validate(json.loads((ctx.out / "edgestill.json").read_text())["params"]) == params
    monkeypatch.setattr(mixed_stage, "solve", None)  # all parts are there: nothing is solved anew
    again = mixed_stage.quantize(params, context(tmp_path, source))
    assert again.metrics == result.metrics


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_of_bytes_holds_for_what_a_runtime_keeps(tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3, tied=tied)
    given = ONCE | {"budget_bytes": 40_000 if tied else 50_000, "embedding_bits": 4, "act_order": True}
    given |= {} if tied else {"lm_head_bits": 8}
    params = MixedParams.model_validate(given | {"keep_groups": False})
    result = mixed_stage.quantize(params, context(tmp_path, source))
    whole = result.metrics["bits_per_weight_model"] * result.metrics["parameters"] / 8
    assert whole <= given["budget_bytes"]
    assert whole > 0.8 * given["budget_bytes"]


def test_one_candidate_is_plain_gptq(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    mixed = MixedParams.model_validate(ONCE | {"budget_bits": 6.0, "candidates": [4], "group_size": 32})
    mixed_stage.quantize(mixed, context(tmp_path, source, out="mixed"))
    quantize(GptqParams.model_validate(ONCE | {"group_size": 32}), context(tmp_path, source, out="plain"))
    files = [tmp_path / name / "model.safetensors" for name in ("mixed", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({}, TargetError, "no budget and no target"),
        ({"budget_bits": 1.5}, ModelError, "at least"),
        ({"budget_bytes": 100}, ModelError, "what is no linear"),
    ],
)
def test_budgets_that_cannot_be_kept(tmp_path: Path, values: dict[str, Any], error: Any, words: str) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=1)
    with pytest.raises(error, match=words):
        mixed_stage.quantize(MixedParams.model_validate(ONCE | values), context(tmp_path, source))


def test_contradicting_parameters_are_refused() -> None:
    with pytest.raises(ValidationError, match="mixed chooses"):
        MixedParams.model_validate({"ignore": ["*"]})
    with pytest.raises(ValidationError, match="one budget counts"):
        MixedParams.model_validate({"budget_bits": 4.0, "budget_bytes": 10})
