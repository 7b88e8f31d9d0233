"""The stage ``model.distillation.logits``: a teacher and rows in, a student's checkpoint out.

`distill` starts the student, makes the teacher's targets, trains and saves; `distill_from` does so with another source
of batches. What a kill must not lose (the targets, the training's state) lies in the work folder. Knows nothing of
profiles or of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compress.context import StageContext, StageResult
from compress.encoding import TokenRow, load_tokenizer, token_rows
from compress.model.checkpoint import check_folder, count_parameters, load_model, save_model
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import copy_log
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.sources import BatchSource
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import (
    TargetFn,
    check_rows_fit,
    local_folder,
    shared_vocabulary,
    teacher_targets,
)
from compress.model.distillation.trainer import TrainReport, threads, train
from compress.model.shapes import shape_of

TRAINING_LOG = "training.jsonl"
_TIMED = ("seconds", "tokens_per_s", "resumed_from")  # not the same in every run: kept out of the artifact


class ReportingSource(BatchSource, Protocol):
    """A source that is made before the teacher's targets for the rows are, and has something to say in the end."""

    target_fn: TargetFn | None

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Figures and notes for the user."""
        ...


@dataclass(frozen=True)
class Lesson:
    """What a source of batches is made from, before the teacher is at work: what cannot work is refused early."""

    ctx: StageContext
    settings: TrainSettings
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    rows: Sequence[TokenRow]
    table: RowTable


def distill(params: LogitsParams, ctx: StageContext) -> StageResult:
    """Train a student on the rows of slot ``data`` towards the teacher and save it.

    Raises:
        ModelError: the teacher is no local model, or teacher and student do not fit together or to the rows.
        DataError: no row, or a row without an answer.
        TrainingError: the loss is NaN or diverges.
    """
    return distill_from(params, ctx, None)


def distill_from(
    params: LogitsParams, ctx: StageContext, source_of: Callable[[Lesson], ReportingSource] | None
) -> StageResult:
    """`distill` with the batches that ``source_of`` gives; ``None``: the rows, each in its turn.

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
    learned = [row.learning(params.learn) for row in rows]
    with threads(ctx.threads):
        teacher = load_model(folder)
        student, notes = start_student(teacher, learned, params, checkpoint=start, seed=ctx.seed, where=ctx.name)
        configs = teacher.config.to_dict(), student.config.to_dict()
        own = tokenizer if start is None else load_tokenizer(start)
        vocab = shared_vocabulary((configs[0], tokenizer.get_vocab()), (configs[1], own.get_vocab()), where=ctx.name)
        table = RowTable(learned, vocab=vocab, where=ctx.name)
        check_rows_fit(table, configs, where=ctx.name)
        told, source = train_settings(params, ctx.seed), None
        if source_of is not None:
            source = source_of(Lesson(ctx, told, teacher, student, tokenizer, rows, table))
        before = count_parameters(teacher)
        target_fn: TargetFn | None = None
        figures: dict[str, Any] = {}
        if params.kd_weight:
            named, cache = (tokenizer, ctx.teacher.identity), ctx.work / "targets"
            target_fn, figures = teacher_targets(
                teacher, table, params, named=named, folder=cache, progress=ctx.progress
            )
        if source is not None:
            source.target_fn = target_fn
        del teacher  # with cached targets this frees its memory before training
        log = ctx.work / TRAINING_LOG
        report = train(student, target_fn, table, told, ctx, log, vocab=vocab, source=source)
    figures |= {"parameters": count_parameters(student), "parameters_teacher": before}
    metadata = {"stage": ctx.name, "init": params.init, "shape": asdict(shape_of(student.config.to_dict()))}
    save_model(student, ctx.out, tokenizer_from=start or folder, metadata=metadata | {"training": _lasting(report)})
    copy_log(log, ctx.out / TRAINING_LOG)
    notes = notes + report.notes
    if source is not None:
        made, said = source.report()
        figures, notes = figures | made, notes + said
    return StageResult(metrics=figures | asdict(report) | metadata, notes=notes)


def train_settings(params: LogitsParams, seed: int) -> TrainSettings:
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
        patience=params.patience,
        keep=params.keep,
        precision=params.precision,
        seed=seed,
    )


def _lasting(report: TrainReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name not in _TIMED}
