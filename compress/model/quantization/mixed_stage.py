"""The stage model.quantization.mixed: GPTQ with the bits of every part chosen under a budget of bytes.

Sensitivities are measured, the knapsack is solved exactly, and the chosen bits become overrides of an ordinary GPTQ
run. The maths is in `sensitivity` and `allocation`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.context import StageContext, StageResult
from compress.errors import ModelError, TargetError
from compress.model.quantization import sensitivity, streaming
from compress.model.quantization.allocation import Allocation, Option, frontier, within
from compress.model.quantization.gptq_stage import solve
from compress.model.quantization.layout import LinearSpec, choose, fit_group_size
from compress.model.quantization.params import MixedParams, ModuleOverride
from compress.model.quantization.streaming import Job, Rows, calibration_rows, open_job
from compress.model.shapes import linear_shapes, parameter_count

SHOWN = 64  # points of the frontier in the record


def quantize(params: MixedParams, ctx: StageContext) -> StageResult:
    """Choose bits per part under the budget and quantize by GPTQ; the stage ``model.quantization.mixed``.

    Raises ModelError for an unusable checkpoint or a budget below the smallest options, TargetError when no budget is
    given and there is no target to take it from, DataError when no row is left.
    """
    job = open_job(params, ctx)
    rows = calibration_rows(job, params)
    options = _options(job, params)
    costs = sensitivity.measure(
        job,
        lambda step: solve(step, params),
        rows.draws[0],
        _few(rows, params.sensitivity_tokens),
        options,
        prompt_weight=params.prompt_weight,
    )
    sizes = {part: {name: _bytes(job, part, spec) for name, spec in options.items()} for part in costs}
    found = frontier({part: [Option(name, sizes[part][name], costs[part][name]) for name in options] for part in costs})
    chosen = within(found, _budget(job, params), where=f"{ctx.name}.budget_bits")
    final = params.model_copy(update={"overrides": _overrides(chosen, options)})
    inner = replace(job, params=final, layout=choose(job.stream.config, final, where=ctx.name))
    result = streaming.run(inner, lambda step: solve(step, final), rows, prompt_weight=params.prompt_weight)
    result.metrics |= {"allocation": _record(chosen, found, costs)}
    result.notes.append(_note(chosen, options))
    return result


def _options(job: Job, params: MixedParams) -> dict[str, LinearSpec]:
    """Return what each part may become: bits times group sizes, by a name such as ``4g32``."""
    wanted = params.groups or [params.group_size]
    sizes = {
        fit_group_size(dict(job.stream.config) | {"intermediate_size": job.layout.ffn}, size)[0] for size in wanted
    }
    return {
        f"{bits}g{size}": LinearSpec(bits, size, params.sym)
        for bits, size in itertools.product(sorted(set(params.candidates)), sorted(sizes))
    }


def _config(job: Job) -> dict[str, Any]:
    """Return the config with the feed-forward width as it is quantized."""
    return dict(job.stream.config) | {"intermediate_size": job.layout.ffn}


def _few(rows: Rows, tokens: int) -> list[Any]:
    """Return check batches up to ``tokens`` tokens."""
    kept, total = [], 0
    for batch in rows.check:
        kept.append(batch)
        total += int(batch.attention_mask.sum())
        if total >= tokens:
            break
    return kept


def _bytes(job: Job, part: str, spec: LinearSpec) -> int:
    """Return what a part takes: codes as stored, fp16 scales, zero points where they are not all the same."""
    shapes, total = linear_shapes(_config(job)), 0
    for path in sensitivity.part_paths(part):
        rows, inputs = shapes[path.split(".", 3)[3]]
        groups = 1 if spec.group_size == -1 else math.ceil(inputs / spec.group_size)
        bits = rows * inputs * spec.stored_bits + rows * groups * (16 + (0 if spec.sym else spec.stored_bits))
        total += math.ceil(bits / 8)
    return total


def _budget(job: Job, params: MixedParams) -> int:
    """Return the bytes that the linears may take."""
    config = _config(job)
    weights = int(config["num_hidden_layers"]) * sum(rows * inputs for rows, inputs in linear_shapes(config).values())
    if params.budget_bits is not None:
        return int(params.budget_bits * weights / 8)
    around = (parameter_count(config) - weights) * job.layout.embedding_bits // 8
    if params.budget_bytes is not None:
        if params.budget_bytes <= around:
            raise ModelError(
                f"{job.ctx.name}.budget_bytes", f"{params.budget_bytes:,}", f"more than {around:,}, what is no linear"
            )
        return params.budget_bytes - around
    target = job.ctx.target
    if target is None:
        raise TargetError(
            f"{job.ctx.name}.budget_bits",
            "no budget and no target to take it from",
            "budget_bits, budget_bytes, or a profile that names a target",
        )
    return int(min(target.storage_bytes, target.usable_memory_bytes // 2)) - around


def _overrides(chosen: Allocation, options: Mapping[str, LinearSpec]) -> list[ModuleOverride]:
    return [
        ModuleOverride.model_validate(
            {"pattern": path, "bits": options[name].bits, "group_size": options[name].group_size}
        )
        for part, name in chosen.chosen.items()
        for path in sensitivity.part_paths(part)
    ]


def _record(chosen: Allocation, found: list[Allocation], costs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return what the run record keeps: the choice, the measured sensitivities, the frontier thinned out evenly."""
    step = max(1, math.ceil(len(found) / SHOWN))
    shown = [*found[::step], *(found[-1:] if (len(found) - 1) % step else [])]
    return {
        "chosen": dict(chosen.chosen),
        "bytes": chosen.size,
        "foretold_kl": chosen.cost,
        "sensitivity": {part: dict(values) for part, values in costs.items()},
        "frontier": [{"bytes": one.size, "kl": one.cost} for one in shown],
    }


def _note(chosen: Allocation, options: Mapping[str, LinearSpec]) -> str:
    counts = {name: list(chosen.chosen.values()).count(name) for name in options}
    listed = ", ".join(f"{count} parts in {name}" for name, count in counts.items() if count)
    return f"bits per part under the budget: {listed}; {chosen.size:,} bytes, foretold divergence {chosen.cost:.4g}"
