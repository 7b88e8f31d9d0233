"""The stage ``model.distillation.logits``: a teacher and rows in, a student's checkpoint out.

`distill` starts the student, makes the teacher's targets, trains and saves. What a kill must not lose (the targets,
the training's state) lies in the work folder. Knows nothing of profiles or of the store.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from compress.context import StageContext, StageResult
from compress.encoding import load_tokenizer, token_rows
from compress.model.checkpoint import check_folder, count_parameters, load_model, save_model
from compress.model.distillation.cache import TargetCache
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import copy_log
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings, choose_bf16
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import (
    CachedTargets,
    OnlineTargets,
    TargetFn,
    cache_header,
    check_rows_fit,
    fill_cache,
    local_folder,
    shared_vocabulary,
)
from compress.model.distillation.trainer import TrainReport, threads, train
from compress.model.shapes import shape_of

if TYPE_CHECKING:
    from compress.teachers import Teacher

TRAINING_LOG = "training.jsonl"
_TIMED = ("seconds", "tokens_per_s", "resumed_from")  # not the same in every run: kept out of the artifact


def distill(params: LogitsParams, ctx: StageContext) -> StageResult:
    """Train a student on the rows of slot ``data`` towards the teacher and save it.

    Raises:
        ModelError: the teacher is no local model, or teacher and student do not fit together or to the rows.
        DataError: no row, or a row without an answer.
        TrainingError: the loss is NaN or diverges.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    folder = local_folder(ctx.teacher.folder, where=ctx.name)
    check_folder(folder)
    start = ctx.inputs.get("model") if params.init == "checkpoint" else None
    if start is not None:
        check_folder(start)
    tokenizer = load_tokenizer(folder)
    rows = token_rows(ctx.inputs["data"], tokenizer, max_tokens=params.max_tokens, truncate=params.truncate)
    rows = [row.learning(params.learn) for row in rows]
    with threads(ctx.threads):
        teacher = load_model(folder)
        student, notes = start_student(teacher, rows, params, checkpoint=start, seed=ctx.seed, where=ctx.name)
        configs = teacher.config.to_dict(), student.config.to_dict()
        own = tokenizer if start is None else load_tokenizer(start)
        vocab = shared_vocabulary((configs[0], tokenizer.get_vocab()), (configs[1], own.get_vocab()), where=ctx.name)
        table = RowTable(rows, vocab=vocab, where=ctx.name)
        check_rows_fit(table, configs, where=ctx.name)
        bf16 = choose_bf16(params.precision, width=student.config.hidden_size)
        before = count_parameters(teacher)
        target_fn, figures = _targets(params, ctx, teacher, table, header=(tokenizer, ctx.teacher), bf16=bf16)
        del teacher  # with cached targets this frees its memory before training
        log = ctx.work / TRAINING_LOG
        report = train(student, target_fn, table, train_settings(params, ctx.seed, bf16=bf16), ctx, log, vocab=vocab)
    figures |= {"parameters": count_parameters(student), "parameters_teacher": before}
    metadata = {"stage": ctx.name, "init": params.init, "shape": asdict(shape_of(student.config.to_dict()))}
    save_model(student, ctx.out, tokenizer_from=start or folder, metadata=metadata | {"training": _lasting(report)})
    copy_log(log, ctx.out / TRAINING_LOG)
    return StageResult(metrics=figures | asdict(report) | metadata, notes=notes + report.notes)


def train_settings(params: LogitsParams, seed: int, *, bf16: bool) -> TrainSettings:
    """What the trainer is told."""
    return TrainSettings(
        loss=LossWeights(params.kd_weight, params.temperature, params.label_smoothing),
        epochs=params.epochs,
        steps=params.steps,
        batch_tokens=params.batch_tokens,
        accumulate=params.accumulate,
        learning_rate=params.learning_rate,
        warmup_ratio=params.warmup_ratio,
        final_lr_ratio=params.final_lr_ratio,
        optimizer=params.optimizer,
        weight_decay=params.weight_decay,
        grad_clip=params.grad_clip,
        average_decay=params.average_decay,
        validation_share=params.validation_share,
        validation_rows=params.validation_rows,
        validations=params.validations,
        keep=params.keep,
        precision="bf16" if bf16 else "fp32",
        seed=seed,
    )


def _targets(
    params: LogitsParams,
    ctx: StageContext,
    teacher: PreTrainedModel,
    table: RowTable,
    *,
    header: tuple[Any, Teacher],
    bf16: bool,
) -> tuple[TargetFn | None, dict[str, Any]]:
    """The callable that the trainer asks, and figures about it."""
    if params.kd_weight == 0:
        return None, {}
    online = OnlineTargets(teacher, vocab=table.vocab, temperature=params.temperature, bf16=bf16)
    if params.targets == "online":
        return online, {}
    tokenizer, source = header
    about = cache_header(
        tokenizer, teacher=source.identity, vocab=table.vocab, top_k=params.top_k, temperature=params.temperature
    )
    cache = TargetCache(ctx.work / "targets", about)
    fill_cache(cache, table, online, ctx.progress)
    figures = {"target_bytes_per_token": about.bytes_per_token, "target_positions": cache.positions}
    return CachedTargets(cache, table), figures


def _lasting(report: TrainReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name not in _TIMED}
