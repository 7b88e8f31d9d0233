"""The stage model.quantization.mixed: GPTQ with the bits of every part chosen under a budget of bytes.

Sensitivities are measured, the knapsack is solved exactly, and the chosen bits become overrides of an ordinary GPTQ
run. The maths is in `sensitivity` and `allocation`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.context import StageContext, StageResult
from compress.errors import ModelError, TargetError
from compress.model.calibration import Batch
from compress.model.quantization import sensitivity, streaming
from compress.model.quantization.allocation import Allocation, Option, frontier, within
from compress.model.quantization.gptq_stage import solve
from compress.model.quantization.layout import PLAIN, LinearSpec, choose, fitting_group, has_kernel
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
    options = {kind: _options(job, params, kind) for kind in sensitivity.PARTS}
    parts = [(index, kind) for index in range(job.stream.count) for kind in sensitivity.PARTS]
    sizes = {
        sensitivity.part_name(index, kind): {name: _bytes(job, kind, spec) for name, spec in options[kind].items()}
        for index, kind in parts
    }
    budget, where = _budget(job, params)
    least = Allocation(sum(min(found.values()) for found in sizes.values()), 0.0, {})
    within([least], budget, where=where)  # what cannot be kept is said before the work
    rows = calibration_rows(job, params)
    costs = sensitivity.measure(
        job,
        lambda step: solve(step, params),
        rows.draws[0],
        _few(rows, params.sensitivity_tokens),
        options,
        prompt_weight=params.prompt_weight,
    )
    found = frontier(
        {part: [Option(name, sizes[part][name], cost) for name, cost in costs[part].items()] for part in sizes}
    )
    chosen = within(found, budget, where=where)
    final = params.model_copy(update={"overrides": _overrides(chosen, options)})
    inner = replace(job, layout=choose(job.stream.config, final, where=ctx.name))
    result = streaming.run(inner, lambda step: solve(step, params), rows, prompt_weight=params.prompt_weight)
    result.metrics |= {"allocation": _record(chosen, found, costs)}
    result.notes.append(_note(chosen))
    return result


def _options(job: Job, params: MixedParams, kind: str) -> dict[str, LinearSpec]:
    """Return what a part may become: bits times the group sizes that divide its inputs, by a name such as ``4g32``.

    What the runtime has no kernel for is no choice, unless there is no other.
    """
    shapes = linear_shapes(_config(job))
    inputs = shapes[sensitivity.part_paths(f"0.{kind}")[0].split(".", 3)[3]][1]
    fitting = {fitting_group(inputs, size) for size in params.groups or [params.group_size]} - {None}
    sizes = sorted(size for size in fitting if size is not None) or [job.layout.group_size]
    ways = list(itertools.product(sorted(set(params.candidates)), sizes))
    fast = [(bits, size) for bits, size in ways if size == -1 or has_kernel(4 if bits == 3 else bits, size)]
    return {f"{bits}g{size}": LinearSpec(bits, size, params.sym) for bits, size in fast or ways}


def _config(job: Job) -> dict[str, Any]:
    """Return the config with the feed-forward width as it is quantized."""
    return dict(job.stream.config) | {"intermediate_size": job.layout.ffn}


def _few(rows: Rows, tokens: int) -> list[Batch]:
    """Return check batches of about ``tokens`` tokens, evenly from short rows to long ones."""
    whole = sum(int(batch.attention_mask.sum()) for batch in rows.check)
    count = max(1, min(len(rows.check), round(len(rows.check) * tokens / max(whole, 1))))
    return [rows.check[(2 * at + 1) * len(rows.check) // (2 * count)] for at in range(count)]


def _bytes(job: Job, kind: str, spec: LinearSpec) -> int:
    """Return what a part takes: codes as stored, fp16 scales, zero points and the index of a free order if needed."""
    shapes, params = linear_shapes(_config(job)), job.params
    free = isinstance(params, MixedParams) and params.act_order and not params.keep_groups
    total = 0
    for path in sensitivity.part_paths(f"0.{kind}"):
        rows, inputs = shapes[path.split(".", 3)[3]]
        total += _matrix(rows, inputs, spec) + (4 * inputs if free else 0)
    return total


def _matrix(rows: int, inputs: int, spec: LinearSpec) -> int:
    """Return the bytes of codes, fp16 scales and zero points of a matrix."""
    groups = 1 if spec.group_size == -1 else math.ceil(inputs / spec.group_size)
    return math.ceil(rows * (inputs * spec.stored_bits + groups * (16 + (0 if spec.sym else spec.stored_bits))) / 8)


def _budget(job: Job, params: MixedParams) -> tuple[int, str]:
    """Return the bytes that the linears may take, and where that is said."""
    config, layout, name = _config(job), job.layout, job.ctx.name
    weights = int(config["num_hidden_layers"]) * sum(rows * inputs for rows, inputs in linear_shapes(config).values())
    if params.budget_bits is not None:
        return int(params.budget_bits * weights / 8), f"{name}.budget_bits"
    vocabulary, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    outer = [layout.embedding_bits] if layout.tied else [layout.embedding_bits, layout.lm_head_bits]
    around = 4 * (parameter_count(config) - weights - len(outer) * vocabulary * hidden)  # norms and biases
    for bits in outer:
        spec = LinearSpec(bits, layout.group_size, params.sym)
        around += vocabulary * hidden * 2 if bits == PLAIN else _matrix(vocabulary, hidden, spec)
    target = job.ctx.target
    if params.budget_bytes is not None:
        whole, where = params.budget_bytes, f"{name}.budget_bytes"
    elif target is not None:
        # the bundle's other files are small beside 5 %; running holds the weights about twice, and the cache
        whole, where = int(min(0.95 * target.storage_bytes, target.usable_memory_bytes / 3)), f"target {target.name}"
    else:
        raise TargetError(
            f"{name}.budget_bits",
            "no budget and no target to take it from",
            "budget_bits, budget_bytes, or a profile that names a target",
        )
    if whole <= around:
        raise ModelError(where, f"{whole:,} bytes for all weights", f"more than {around:,}, what is no linear")
    return whole - around, where


def _overrides(chosen: Allocation, options: Mapping[str, Mapping[str, LinearSpec]]) -> list[ModuleOverride]:
    specs = {part: options[part.split(".")[1]][name] for part, name in chosen.chosen.items()}
    return [
        ModuleOverride.model_validate({"pattern": path, "bits": spec.bits, "group_size": spec.group_size})
        for part, spec in specs.items()
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


def _note(chosen: Allocation) -> str:
    counts = Counter(chosen.chosen.values())
    listed = ", ".join(f"{count} parts in {name}" for name, count in sorted(counts.items()))
    return f"bits per part under the budget: {listed}; {chosen.size:,} bytes, foretold divergence {chosen.cost:.4g}"
