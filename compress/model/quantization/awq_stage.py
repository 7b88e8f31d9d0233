"""The stage AWQ: scales for each decoder layer on its way through the stream, then rounding to nearest or GPTQ.

The maths is in `awq`, the way through the model in `streaming`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress.context import StageContext, StageResult
from compress.model.layers import linear_path
from compress.model.quantization import gptq_stage, streaming
from compress.model.quantization.awq import round_clipped, scale_layer
from compress.model.quantization.halves import halved
from compress.model.quantization.hessians import size_and_moment
from compress.model.quantization.layout import PLAIN
from compress.model.quantization.packing import dequantize
from compress.model.quantization.params import AwqParams
from compress.model.quantization.rtn import round_to_nearest
from compress.model.quantization.streaming import Job, Solved, Step, calibration_rows, grid_of, open_job
from compress.model.quantization.writing import Report

SCORING = (".q_proj", ".k_proj")  # the linears whose outputs say which positions are attended to


def quantize(params: AwqParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` by AWQ with rows of slot ``data``; ``model.quantization.awq``.

    Raises ModelError for an unusable or already quantized checkpoint, DataError when no row is left.
    """
    job = open_job(params, ctx)
    rows = calibration_rows(job, params)
    solver = gptq_stage.solve if params.rounding == "gptq" else solve
    return streaming.run(
        job,
        lambda step: solver(step, params),
        rows,
        prompt_weight=params.prompt_weight,
        prepare=lambda index, layer, hidden, weights: scaled(job, params, index, layer, hidden=hidden, weights=weights),
    )


def scaled(
    job: Job,
    params: AwqParams,
    index: int,
    layer: nn.Module,
    *,
    hidden: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> dict[str, Report]:
    """Scale ``layer`` in place, as its inputs ``hidden`` ask for; return exponent and gain for each linear's report."""
    specs = job.layout.linears

    def rounding(name: str, weight: torch.Tensor) -> torch.Tensor:
        spec = specs[linear_path(index, name)]
        if spec.bits == PLAIN:
            return halved(weight, linear_path(index, name))
        return dequantize(*round_to_nearest(weight, group_size=spec.group_size, **grid_of(spec, 0)))

    def measured() -> Iterator[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
        for names, inputs in job.stream.walk(layer, list(hidden), bf16=job.bf16):
            if any(specs[linear_path(index, name)].bits != PLAIN for name in names):
                yield names, *size_and_moment(inputs, weights)

    found = scale_layer(layer, measured(), rounding, grid_points=params.grid_points)
    return {
        linear_path(index, name): {"alpha": choice.alpha, "scaled_error": choice.error / max(choice.error_plain, 1e-30)}
        for names, choice in found.items()
        for name in names
    }


def solve(step: Step, params: AwqParams) -> dict[str, Solved]:
    """Round the linears of a step to nearest, with the clip that changes their outputs least."""
    found: dict[str, Solved] = {}
    for path, weight in step.weights.items():
        spec = step.specs[path]
        spared = path.endswith(SCORING) and not params.clip_attention
        grid = grid_of(spec, 0 if spared else params.clip_steps)
        if grid["clip_steps"]:
            layer = round_clipped(weight, step.moment, group_size=spec.group_size, **grid)
        else:
            layer = round_to_nearest(weight, group_size=spec.group_size, **grid)
        share = gptq_stage.output_share(weight, layer, step.moment)
        found[path] = Solved(layer, {"linear": path, "error": share})
    return found
