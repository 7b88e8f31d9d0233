"""The quantization stages: GPTQ with calibration rows, and rounding to nearest without.

`quantize` streams the model: the hidden states of all calibration rows go through one decoder layer at a time,
and what the quantized layer puts out feeds the next. Peak memory is one layer, its Hessians and the hidden
states, beside the packed result. Each finished layer lies in ``ctx.work`` and is not done again after a kill.
The maths is in `gptq` and `rtn`, the checkpoint in `writing`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from compress.context import StageContext, StageResult
from compress.encoding import load_tokenizer, token_rows
from compress.errors import ModelError
from compress.model.calibration import Batch, batches
from compress.model.checkpoint import check_folder, parameter_count, read_config
from compress.model.layers import LINEARS, linear_path, linears
from compress.model.quantization.blocks import EMBEDDING, HEAD, NORM, BlockStream, read_tensor, tensor_files
from compress.model.quantization.gptq import gptq_quantize, output_error
from compress.model.quantization.hessians import position_weights, second_moment
from compress.model.quantization.layout import Layout, choose
from compress.model.quantization.measuring import Check, bits_per_weight
from compress.model.quantization.packing import QuantizedLinear, dequantize, pack_layer, read_layer
from compress.model.quantization.params import GptqParams, RtnParams
from compress.model.quantization.rtn import round_to_nearest as round_matrix
from compress.model.quantization.writing import OUTER_FILE, outer_tensors, save_tensors, write_folder

CHECK_TOKENS = 8192  # tokens on which loss and divergence of the result are measured
Report = dict[str, Any]


def quantize(params: GptqParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` by GPTQ with rows of slot ``data``; ``model.quantization.gptq``.

    Raises ModelError for an unusable or already quantized checkpoint, DataError when no row is left.
    """
    torch.set_num_threads(ctx.threads)
    job = _open(params, ctx)
    stream = job.stream
    tokenizer = load_tokenizer(stream.folder)
    rows = token_rows(ctx.inputs["data"], tokenizer, max_tokens=stream.longest(params.max_tokens), truncate=True)
    pad = next((i for i in (tokenizer.pad_token_id, stream.config.get("pad_token_id")) if i is not None), 0)
    drawn = batches(
        rows, tokens=params.calibration_tokens, batch_size=params.batch_size, seed=ctx.seed, pad_id=int(pad)
    )
    checked = batches(rows, tokens=CHECK_TOKENS, batch_size=params.batch_size, seed=ctx.seed + 1, pad_id=int(pad))
    return _Run(job, params, drawn).finish(Check(stream, checked))


def round_to_nearest(params: RtnParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` by rounding to nearest; the stage ``model.quantization.rtn``.

    Raises ModelError for an unusable or already quantized checkpoint.
    """
    torch.set_num_threads(ctx.threads)
    job = _open(params, ctx)
    stream, layout = job.stream, job.layout
    tensors: dict[str, torch.Tensor] = {}
    reports: list[Report] = []
    for index in ctx.progress.track(range(stream.count), "layers rounded", stream.count):
        layer = stream.layer(index)
        done: dict[str, QuantizedLinear] = {}
        for name, linear in linears(layer).items():
            weight = linear.weight.data
            done[name] = _round(weight, layout, params)
            error = float((dequantize(*done[name]) - weight).double().square().sum())
            share = error / max(float(weight.double().square().sum()), 1e-30)
            reports.append({"linear": linear_path(index, name), "weight_error": share})
        tensors |= _layer_tensors(layer, index, done, layout)
    outer = {name: _outer(stream.tensor(name), layout, params, bits) for name, bits in _outer_bits(layout).items()}
    return _write(job, tensors, outer, reports)


@dataclass(frozen=True)
class _Job:
    """What both stages work with."""

    params: RtnParams
    ctx: StageContext
    stream: BlockStream
    layout: Layout


def _open(params: RtnParams, ctx: StageContext) -> _Job:
    source = ctx.inputs["model"]
    config = read_config(source)
    if config.get("quantization_config"):
        raise ModelError(str(source), "a quantized checkpoint", "plain weights", "Start from the model before it")
    check_folder(source)
    _settle_tie(source, config)
    layout = choose(config, params, where=ctx.name)
    for note in layout.notes:
        ctx.progress.say(f"{ctx.name}: {note}")
    return _Job(params, ctx, BlockStream(source, config, ffn=layout.ffn), layout)


def _settle_tie(source: Path, config: dict[str, Any]) -> None:
    """Make the config's word on tying true: a head stored beside a tied config counts where it differs."""
    files = tensor_files(source)
    if config.get("tie_word_embeddings") and HEAD in files:
        both = [read_tensor(files[name], name) for name in (EMBEDDING, HEAD)]
        config["tie_word_embeddings"] = torch.equal(*both)


@dataclass(frozen=True)
class _Run:
    """One run of GPTQ: what its layers share."""

    job: _Job
    params: GptqParams
    drawn: Sequence[Batch]

    def finish(self, check: Check) -> StageResult:
        """Do the layers that are missing, then the head, and write the folder."""
        stream, layout = self.job.stream, self.job.layout
        plain = stream.tensor(EMBEDDING)
        outer = {EMBEDDING: _outer(plain, layout, self.params, layout.embedding_bits)}
        embedding = _values(outer[EMBEDDING], plain)
        hidden = [nn.functional.embedding(batch.input_ids, embedding) for batch in self.drawn]
        weights = [position_weights(batch, prompt_weight=self.params.prompt_weight) for batch in self.drawn]
        check.begin(plain, embedding)
        tensors: dict[str, torch.Tensor] = {}
        reports: list[Report] = []
        with self.job.ctx.progress.bar("layers quantized", stream.count) as bar:
            for index in range(stream.count):
                layer = stream.layer(index)
                check.plain(layer)
                found, report = self.block(index, layer, hidden, weights)
                check.quantized(layer)
                tensors |= found
                reports += report
                bar.advance()
        if not layout.tied:
            plain = stream.tensor(HEAD)
            outer[HEAD], report = self.head(plain, hidden, weights)
            reports += report
        head = embedding if layout.tied else _values(outer[HEAD], plain)
        return _write(self.job, tensors, outer, reports, check.end(plain, head))

    def block(
        self, index: int, layer: nn.Module, hidden: list[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[Report]]:
        """Quantize one layer, or read what an earlier run left, and take ``hidden`` through it.

        ``layer`` then has the quantized weights.
        """
        path = self.job.ctx.work / f"layer-{index:04d}.safetensors"
        if path.is_file():
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                reports = json.loads(file.metadata()["edgestill"])
            for name, linear in linears(layer).items():
                found = read_layer(tensors, linear_path(index, name), bits=self.job.layout.stored_bits)
                linear.weight.data = dequantize(*found)
            self.advance(layer, hidden)
            return tensors, reports
        done, reports = self.linears(index, layer, hidden, weights)
        tensors = _layer_tensors(layer, index, done, self.job.layout)
        self.job.ctx.work.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, note=json.dumps(reports))
        return tensors, reports

    def advance(self, layer: nn.Module, hidden: list[torch.Tensor]) -> None:
        """Take ``hidden`` through ``layer`` in place, one batch after the other."""
        for i, values in enumerate(hidden):
            hidden[i] = self.job.stream.run(layer, values)

    def linears(
        self, index: int, layer: nn.Module, hidden: list[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> tuple[dict[str, QuantizedLinear], list[Report]]:
        """Quantize the seven linears: each step on what the quantized steps before it put out, or all at once."""
        done: dict[str, QuantizedLinear] = {}
        reports: list[Report] = []

        def replace(names: Sequence[str], moment: torch.Tensor) -> None:
            for name in names:
                linear = linears(layer)[name]
                path = linear_path(index, name)
                done[name], report = self.matrix(linear.weight.data, moment, path, bits=self.job.layout.bits)
                linear.weight.data = dequantize(*done[name])
                reports.append(report)

        if self.params.true_sequential:
            for names, inputs in self.job.stream.walk(layer, hidden):
                replace(names, second_moment(inputs, weights))
        else:
            steps = self.job.stream.walk(layer, list(hidden))
            moments = [(names, second_moment(inputs, weights)) for names, inputs in steps]
            for names, moment in moments:
                replace(names, moment)
            self.advance(layer, hidden)
        return done, reports

    def matrix(
        self, weight: torch.Tensor, moment: torch.Tensor, name: str, *, bits: int
    ) -> tuple[QuantizedLinear, Report]:
        """Quantize one matrix; the report compares it with rounding to nearest on the same inputs."""
        params, layout = self.params, self.job.layout
        result = gptq_quantize(
            weight,
            moment,
            bits=bits,
            group_size=layout.group_size,
            sym=params.sym,
            act_order=params.act_order,
            keep_groups=params.keep_groups,
            damp_frac=params.damp_frac,
            clip_steps=params.clip_steps if bits < 8 else 0,
        )
        rounded = _round(weight, layout, params, bits=bits)
        power = max(float(((weight.double() @ moment) * weight.double()).sum()), 1e-30)
        report: Report = {
            "linear": name,
            "error": result.loss / power,
            "error_rtn": output_error(weight, rounded, moment) / power,
            "damp_frac": result.damp_frac,
            "retries": result.retries,
            "fell_back": result.fell_back,
            "dead": result.dead,
        }
        return result.layer, report

    def head(
        self, plain: torch.Tensor, hidden: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> tuple[QuantizedLinear | None, list[Report]]:
        """Quantize an untied output head on the normed hidden states."""
        if self.job.layout.lm_head_bits == 16:
            return None, []
        norm = self.job.stream.final_norm()
        moment = second_moment((norm(values) for values in hidden), weights)
        layer, report = self.matrix(plain, moment, HEAD.removesuffix(".weight"), bits=self.job.layout.lm_head_bits)
        return layer, [report]


def _round(weight: torch.Tensor, layout: Layout, params: RtnParams, *, bits: int | None = None) -> QuantizedLinear:
    width = layout.bits if bits is None else bits
    steps = params.clip_steps if width < 8 else 0  # at 8 bits no clip is better than the whole range
    return round_matrix(weight, bits=width, group_size=layout.group_size, sym=params.sym, clip_steps=steps)


def _outer_bits(layout: Layout) -> dict[str, int]:
    return {EMBEDDING: layout.embedding_bits} | ({} if layout.tied else {HEAD: layout.lm_head_bits})


def _outer(weight: torch.Tensor, layout: Layout, params: RtnParams, bits: int) -> QuantizedLinear | None:
    """Round the embedding or head; None at 16 bits."""
    return None if bits == 16 else _round(weight, layout, params, bits=bits)


def _values(layer: QuantizedLinear | None, plain: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values that the checkpoint will hold."""
    return plain.to(torch.float16).float() if layer is None else dequantize(*layer)


def _layer_tensors(
    layer: nn.Module, index: int, done: Mapping[str, QuantizedLinear], layout: Layout
) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors of one layer: packed linears, and norms and biases as they are."""
    tensors: dict[str, torch.Tensor] = {}
    for name in LINEARS:
        packed = pack_layer(done[name], bits=layout.stored_bits)
        tensors |= {f"{linear_path(index, name)}.{suffix}": tensor for suffix, tensor in packed.items()}
    replaced = {f"{linear_path(index, name)}.weight" for name in LINEARS}
    others = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return tensors | {name: tensor.contiguous() for name, tensor in others.items() if name not in replaced}


def _write(
    job: _Job,
    tensors: Mapping[str, torch.Tensor],
    outer: Mapping[str, QuantizedLinear | None],
    reports: Sequence[Report],
    measured: Mapping[str, Any] | None = None,
) -> StageResult:
    """Write the folder and return the stage's figures."""
    params, ctx, stream, layout = job.params, job.ctx, job.stream, job.layout
    whole = dict(tensors) | {NORM: stream.tensor(NORM)}
    codes: dict[str, torch.Tensor] = {}
    for name, layer in outer.items():
        files = outer_tensors(name, layer, stream.tensor(name))
        whole |= files["model.safetensors"]
        codes |= files[OUTER_FILE]
    config = dict(stream.config) | {"intermediate_size": layout.ffn}
    metrics: dict[str, Any] = {
        "parameters": parameter_count(config),
        "bits": layout.bits,
        "group_size": layout.group_size,
        "embedding_bits": layout.embedding_bits,
        "lm_head_bits": layout.lm_head_bits,
        **bits_per_weight(whole, codes, config, params, layout),
        **(measured or {}),
        "layers": list(reports),
    }
    metadata = {"stage": ctx.name, "params": params.model_dump(mode="json"), "figures": metrics}
    write_folder(
        ctx.out,
        source=stream.folder,
        config=config,
        layout=layout,
        params=params,
        tensors=whole,
        outer=codes,
        metadata=metadata,
    )
    metrics["checkpoint_bytes"] = _bytes(ctx.out)
    return StageResult(metrics=metrics, notes=layout.notes + _notes(reports))


def _notes(reports: Sequence[Report]) -> list[str]:
    """Return what gave way in the matrices."""
    fallen = [report["linear"] for report in reports if report.get("fell_back")]
    raised = [report for report in reports if report.get("retries") and not report["fell_back"]]
    notes = []
    if fallen:
        notes.append(
            f"{len(fallen)} matrices were rounded to nearest, because their Hessian could not be inverted: "
            + ", ".join(fallen[:5])
            + (" ..." if len(fallen) > 5 else "")
        )
    if raised:
        most = max(report["damp_frac"] for report in raised)
        notes.append(f"damping raised for {len(raised)} matrices, to {most:g} of the mean diagonal at most")
    return notes


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in sorted(folder.glob("*.safetensors")))
