"""The stage ``model.quantization.qat``: a model trained through its own rounding, with itself as teacher.

Codes of another method to start from, then up to three phases: each layer alone, the whole model, the scales alone.
The rounding is in `quantizers`, the model in `qat_student`, the loop is the distillation's trainer. What a kill must
not lose lies in the work folder: finished layers, the trainer's checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compress.context import StageContext, StageResult
from compress.encoding import load_tokenizer, token_rows
from compress.errors import ModelError
from compress.model.checkpoint import check_folder, load_model, read_config
from compress.model.distillation.confidence import confidence
from compress.model.distillation.filling import reached
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import copy_log
from compress.model.distillation.packing import RowTable
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.sharding import check_sharding
from compress.model.distillation.targets import (
    TargetFn,
    check_rows_fit,
    shared_vocabulary,
    teacher_targets,
)
from compress.model.distillation.trainer import TrainReport, threads, train
from compress.model.quantization import gptq_stage
from compress.model.quantization.blocks import EMBEDDING, HEAD
from compress.model.quantization.clipping import STEPS as CLIP_STEPS
from compress.model.quantization.clipping import clip_quantize
from compress.model.quantization.halves import halved
from compress.model.quantization.layout import PLAIN
from compress.model.quantization.measuring import Check
from compress.model.quantization.params import QatParams
from compress.model.quantization.qat_student import build, parts_of, train_blocks
from compress.model.quantization.quantizers import STRETCHED, FakeQuantLinear, stretched_grid
from compress.model.quantization.streaming import (
    Job,
    Rows,
    Solved,
    Step,
    best_draw,
    calibration_rows,
    finish,
    open_job,
    outer_values,
    rounded,
)
from compress.model.quantization.writing import Parts

INSTEAD = "Set teacher: self, to learn from the model as it was before rounding"
TRAINING_FIGURES = ("start_loss", "validation_loss", "validation_ce", "validation_kl", "kept_step", "tokens")


def quantize(params: QatParams, ctx: StageContext) -> StageResult:
    """Quantize the checkpoint in slot ``model`` and train it through the rounding on rows of slot ``data``.

    Raises:
        ModelError: an unusable or already quantized checkpoint, no linear to round, or a teacher that does not fit.
        DataError: no row, or none with an answer.
        TrainingError: the loss is NaN or diverges.
    """
    if params.start != "gptq":  # what makes up for changed inputs is part of that method
        params = params.model_copy(update={"correction_damp": None})
    check_sharding(ctx.sharding, other="quantizers inside the student's layers")
    job = open_job(params, ctx)
    if all(spec.bits == PLAIN for spec in job.layout.linears.values()):
        raise ModelError(
            f"{ctx.name}.ignore",
            "leaves every linear alone, so there is no rounding to train through",
            "at least one linear that is rounded",
            "Take patterns out; model.quantization.rtn rounds embedding and head alone",
        )
    rows = calibration_rows(job, params)
    lesson = _lesson(job, params, rows.held)  # what is wrong is said before the work
    parts, before = best_draw(job, lambda step: start_codes(step, params), rows, prompt_weight=params.prompt_weight)
    figures: dict[str, Any] = {"start": {name: before[name] for name in ("loss", "kl")}}
    blocks = None
    with threads(ctx.threads):
        if params.block_steps:
            blocks = ctx.work / "blocks"
            drawn = rows.draws[before["calibration"]["kept"]]
            errors = train_blocks(job, parts, drawn, blocks)
            figures["blocks"] = {"error_before": [e[0] for e in errors], "error": [e[1] for e in errors]}
        model = build(job, parts, blocks)
        notes = [] if lesson is None else _train(job, params, model, lesson, figures)
    trained = parts_of(job, model, parts, "trained")
    norm = halved(model.model.norm.weight.detach().cpu())  # as it will be stored
    after = measure(job, trained, rows, norm)
    result = finish(job, trained, before | after | figures, norm=norm)
    for phase in ("whole", "scales"):
        if phase in figures:
            copy_log(ctx.work / f"{phase}.jsonl", ctx.out / f"training_{phase}.jsonl")
    if after["kl"] > before["kl"]:
        notes.append(f"training made the divergence worse: {before['kl']:.4g} to {after['kl']:.4g} nats per token")
    result.notes += [*rows.notes, *notes]
    return result


def start_codes(step: Step, params: QatParams) -> dict[str, Solved]:
    """Return the codes that training starts from, of linears that share their inputs."""
    if params.start == "gptq":
        return gptq_stage.solve(step, params)
    found = {}
    for path, weight in step.weights.items():
        spec = step.specs[path]
        rule = params.rule_of(spec.bits, sym=spec.sym)
        unclipped = params.start == "clip" and not params.clip_qk and path.endswith(("q_proj", "k_proj"))
        if rule in STRETCHED:
            steps = params.clip_steps if params.start == "clip" and not unclipped else 0
            layer = stretched_grid(weight, rule=rule, group_size=spec.group_size, clip_steps=steps)
        elif params.start == "rtn" or spec.bits == 8:
            layer = rounded(weight, spec, params)
        else:
            layer = clip_quantize(
                weight,
                step.moment,
                bits=spec.bits,
                group_size=spec.group_size,
                sym=spec.sym,
                steps=0 if unclipped else CLIP_STEPS,
                scale_bits=spec.scale_bits,
            )
        share = gptq_stage.output_share(weight, layer, step.moment)
        found[path] = Solved(layer, {"linear": path, "error": share})
    return found


class Lesson(NamedTuple):
    """What the whole model learns from."""

    table: RowTable
    tokenizer: PreTrainedTokenizerFast  # made the rows
    teacher: Path | None  # None: the labels alone
    notes: list[str]


def _lesson(job: Job, params: QatParams, held: frozenset[str]) -> Lesson | None:
    """Return what the parameters say to learn from; None where only layers are trained alone, or nothing.

    Rows with an id in ``held`` are checked in the end, so they are left out. Raises ModelError for a teacher that is no
    model folder, has another vocabulary or is too short for the rows.
    """
    if not params.steps and not params.scale_steps:
        return None
    ctx, source = job.ctx, job.stream.folder
    tokenizer, teacher = load_tokenizer(source), None if params.loss == "ce" else source
    own = job.stream.config, tokenizer.get_vocab()
    vocab, configs = shared_vocabulary(own, own, where=ctx.name), [job.stream.config]
    if teacher is not None and params.teacher == "pipeline":
        teacher = _pipeline_teacher(ctx)
        configs.append(read_config(teacher))
        try:
            vocab = shared_vocabulary((configs[1], load_tokenizer(teacher).get_vocab()), own, where=ctx.name)
        except ModelError as error:
            raise ModelError(f"{ctx.name}.teacher", error.got, error.allowed, INSTEAD) from error
    rows = token_rows(ctx.inputs["data"], tokenizer, max_tokens=job.stream.longest(params.max_tokens), truncate=True)
    rows = [row.learning(params.learn) for row in rows]
    fresh = [row for row in rows if row.id not in held]
    notes = [] if fresh else ["no row is left beside those that are checked: the divergence told is of learned rows"]
    table = RowTable(fresh or rows, vocab=vocab, where=ctx.name)
    check_rows_fit(table, configs, where=ctx.name)
    return Lesson(table, tokenizer, teacher, notes)


def _pipeline_teacher(ctx: StageContext) -> Path:
    """Return the folder of the profile's teacher; ModelError where there is none, or an unusable one."""
    where, allowed = f"{ctx.name}.teacher", "a teacher given as a model folder, which tells all its log-probabilities"
    if ctx.teacher is None:
        raise ModelError(where, "pipeline, but the profile names no teacher", allowed, INSTEAD)
    if ctx.teacher.folder is None:
        raise ModelError(where, "pipeline, but the profile's teacher is not a local model", allowed, INSTEAD)
    check_folder(ctx.teacher.folder)
    return ctx.teacher.folder


def _train(job: Job, params: QatParams, model: PreTrainedModel, lesson: Lesson, figures: dict[str, Any]) -> list[str]:
    """Train the whole model, then the scales alone, as the parameters say; fills ``figures``, returns notes."""
    ctx, table = job.ctx, lesson.table
    share = 0.0
    target_fn: TargetFn | None = None
    if lesson.teacher is not None:
        teacher = load_model(lesson.teacher)
        if params.loss == "cakld":
            share = confidence(teacher, table, ctx.seed) if params.confidence is None else params.confidence
            figures["confidence"] = share
        named = (lesson.tokenizer, f"{params.teacher} {_digest(teacher)}")
        cache = ctx.work / "targets"
        phases = [_settings(params, share, steps=steps, rate=0.0, seed=ctx.seed) for steps in _steps(params)]
        target_fn, more = teacher_targets(
            teacher, table, params, named=named, folder=cache, progress=ctx.progress, wanted=reached(table, *phases)
        )
        figures |= more
        del teacher
    notes = list(lesson.notes)
    for name, steps, rate in (
        ("whole", params.steps, params.learning_rate),
        ("scales", params.scale_steps, params.scale_learning_rate),
    ):
        if not steps:
            continue
        if name == "scales":
            freeze_codes(model)
        settings = _settings(params, share, steps=steps, rate=rate, seed=ctx.seed)
        log = ctx.work / f"{name}.jsonl"
        report = train(model, target_fn, table, settings, ctx, log, vocab=table.vocab, name=name)
        figures[name] = _lasting(report)
        notes += [f"{name}: {note}" for note in report.notes]
    return notes


def _steps(params: QatParams) -> list[int]:
    """Steps of the phases that there are."""
    return [steps for steps in (params.steps, params.scale_steps) if steps]


def freeze_codes(model: nn.Module) -> None:
    """Fix the codes of every rounded linear; of the model only their scales stay trainable."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.freeze_codes()
            module.log_step.requires_grad_(True)


def measure(job: Job, parts: Parts, rows: Rows, norm: torch.Tensor) -> dict[str, Any]:
    """Return loss and divergence of finished parts on the check rows."""
    stream, check = job.stream, Check(job.stream, rows.check)
    outer, _ = parts.load_outer()
    plain = stream.tensor(EMBEDDING)
    embedding = outer_values(outer[EMBEDDING], plain)
    check.begin(plain, embedding)
    for index in range(stream.count):
        layer = stream.layer(index)
        check.plain(layer)
        parts.load(index, layer)
        check.quantized(layer)
    if job.layout.tied:
        return check.end(plain, embedding, norm=norm)
    head = stream.tensor(HEAD)
    return check.end(head, outer_values(outer[HEAD], head), norm=norm)


def _settings(params: QatParams, share: float, *, steps: int, rate: float, seed: int) -> TrainSettings:
    return TrainSettings(
        loss=LossWeights(0.0 if params.loss == "ce" else 1.0, params.temperature, divergence="cakld", number=share),
        steps=steps,
        batch_tokens=params.batch_tokens,
        accumulate=params.accumulate,
        learning_rate=rate,
        warmup_ratio=params.warmup_ratio,
        final_lr_ratio=params.final_lr_ratio,
        optimizer=params.optimizer,
        weight_decay=0.0,  # it would pull latent weights into the cell of zero
        grad_clip=params.grad_clip,
        validation_share=params.validation_share,
        validation_rows=params.validation_rows,
        validations=params.validations,
        keep=params.keep,
        precision=params.precision,
        seed=seed,
    )


def _digest(teacher: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def _lasting(report: TrainReport) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(report).items() if name in TRAINING_FIGURES}
