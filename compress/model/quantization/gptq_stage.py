"""The quantization stages: GPTQ with calibration rows, and rounding to nearest without.

The maths is in `gptq` and `rtn`, the way through the model in `streaming`, the checkpoint in `writing`.
"""

from __future__ import annotations

import torch

from compress.context import StageContext, StageResult
from compress.model.layers import linear_path, linears
from compress.model.quantization import streaming
from compress.model.quantization.blocks import EMBEDDING, HEAD
from compress.model.quantization.gptq import gptq_quantize, output_error
from compress.model.quantization.layout import PLAIN, LinearSpec
from compress.model.quantization.packing import QuantizedLinear, dequantize
from compress.model.quantization.params import GptqParams, RtnParams
from compress.model.quantization.streaming import (
    Solved,
    Step,
    calibration_rows,
    grid_of,
    open_job,
    outer_codes,
    rounded,
)
from compress.model.quantization.writing import Report


def quantize(params: GptqParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` by GPTQ with rows of slot ``data``; ``model.quantization.gptq``.

    Raises ModelError for an unusable or already quantized checkpoint, DataError when no row is left.
    """
    job = open_job(params, ctx)
    rows = calibration_rows(job, params)
    return streaming.run(job, lambda step: solve(step, params), rows, prompt_weight=params.prompt_weight)


def round_to_nearest(params: RtnParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` by rounding to nearest; the stage ``model.quantization.rtn``.

    Raises ModelError for an unusable or already quantized checkpoint.
    """
    job = open_job(params, ctx)
    stream, parts = job.stream, job.parts("rounded")
    for index in ctx.progress.track(range(stream.count), "layers rounded", stream.count):
        if parts.has(index):
            continue
        layer = stream.layer(index)
        done: dict[str, QuantizedLinear] = {}
        reports: list[Report] = []
        for name, linear in linears(layer).items():
            path = linear_path(index, name)
            if job.layout.linears[path].bits == PLAIN:
                continue
            weight = linear.weight.data
            done[name] = rounded(weight, job.layout.linears[path], params)
            error = float((dequantize(*done[name]) - weight).double().square().sum())
            share = error / max(float(weight.double().square().sum()), 1e-30)
            reports.append({"linear": path, "weight_error": share})
        parts.save(index, layer, done, reports)
    bits = {EMBEDDING: job.layout.embedding_bits} | ({} if job.layout.tied else {HEAD: job.layout.lm_head_bits})
    parts.save_outer({name: outer_codes(stream.tensor(name), job, width) for name, width in bits.items()}, [])
    return streaming.finish(job, parts)


def solve(step: Step, params: GptqParams) -> dict[str, Solved]:
    """Quantize the linears of a step by GPTQ; those of one kind as one matrix, since they share inputs and factor."""
    kinds: dict[LinearSpec, list[str]] = {}
    for path, spec in step.specs.items():
        kinds.setdefault(spec, []).append(path)
    found: dict[str, Solved] = {}
    for spec, paths in kinds.items():
        stacked = torch.cat([step.weights[path] for path in paths])
        result = gptq_quantize(
            stacked,
            step.moment,
            group_size=spec.group_size,
            act_order=params.act_order,
            keep_groups=params.keep_groups,
            damp_frac=params.damp_frac,
            **grid_of(spec, params.clip_steps),
        )
        at = 0
        for path in paths:
            rows = slice(at, at + len(step.weights[path]))
            codes, scales, zero_points, g_idx = result.layer
            layer = QuantizedLinear(codes[rows], scales[rows], zero_points[rows], g_idx.clone())
            given = {"damp_frac": result.damp_frac, "retries": result.retries}
            given |= {"fell_back": result.fell_back, "dead": result.dead}
            report: Report = {"linear": path, "error": output_share(step.weights[path], layer, step.moment)}
            found[path] = Solved(layer, report | given)
            at = rows.stop
    return {path: found[path] for path in step.specs}


def output_share(weight: torch.Tensor, layer: QuantizedLinear, moment: torch.Tensor) -> float:
    """Return the mean squared change of the outputs on inputs of second ``moment``, as a share of their power."""
    power = float(((weight @ moment.to(weight.dtype)) * weight).sum(dtype=torch.float64))
    return output_error(weight, layer, moment) / max(power, 1e-30)
