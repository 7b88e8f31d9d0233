"""The stage ``model.distillation.logits``: a teacher and rows in, a student's checkpoint out.

`distill` starts the student, makes the teacher's targets, trains and saves; `distill_from` does so with another source
of batches. What a kill must not lose (the targets, the training's state) lies in the work folder. Knows nothing of
profiles or of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compress.context import StageContext, StageResult
from compress.encoding import TokenRow, ids_of_source, load_tokenizer, token_rows
from compress.model.checkpoint import check_folder, count_parameters, load_model, save_model
from compress.model.distillation.confidence import confidence
from compress.model.distillation.features import feature_targets, projected
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import TIMED_REPORT, TRAINING_LOG, copy_log
from compress.model.distillation.packing import RowTable
from compress.model.distillation.parallel import OWN_TEXT
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.sharding import check_hardware
from compress.model.distillation.sources import BatchSource
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import TargetFn, check_rows_fit, local_folder, shared_vocabulary
from compress.model.distillation.trainer import TrainReport, threads, train
from compress.model.distillation.voices import Lesson, heard, targets_of
from compress.model.lora import Adapters, add_adapters
from compress.model.shapes import shape_of


class ReportingSource(BatchSource, Protocol):
    """A source that is made before the teacher's targets for the rows are, and has something to say in the end."""

    target_fn: TargetFn | None

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Figures and notes for the user."""
        ...


@dataclass(frozen=True)
class Classroom:
    """What a source of batches is made from, before the teacher is at work: what cannot work is refused early."""

    ctx: StageContext
    settings: TrainSettings
    teacher: PreTrainedModel
    student: PreTrainedModel
    rows: Sequence[TokenRow]
    lesson: Lesson


def distill(params: LogitsParams, ctx: StageContext) -> StageResult:
    """Train a student on the rows of slot ``data`` towards the teacher and save it.

    Raises:
        ModelError: the teacher is no local model, or teacher and student do not fit together or to the rows.
        DataError: no row, or a row without an answer.
        TrainingError: the loss is NaN or diverges.
    """
    return distill_from(params, ctx, None)


def distill_from(
    params: LogitsParams, ctx: StageContext, source_of: Callable[[Classroom], ReportingSource] | None
) -> StageResult:
    """`distill` with the batches that ``source_of`` gives; ``None``: the rows, each in its turn.

    Raises:
        ModelError: the teacher is no local model, or teacher and student do not fit together or to the rows.
        DataError: no row, or a row without an answer.
        TrainingError: the loss is NaN or diverges.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    check_hardware(ctx, train_settings(params, ctx.seed, 0.0), other="" if source_of is None else OWN_TEXT)
    start = ctx.inputs.get("model") if params.init == "checkpoint" else None
    if start is not None:
        check_folder(start)
    if params.kd_weight or params.hidden_weight or params.attention_weight:
        heard(params, ctx)  # refused before anything is loaded
    home = _home(ctx, start)
    tokenizer = load_tokenizer(home)
    rows = token_rows(ctx.inputs["data"], tokenizer, max_tokens=params.max_tokens, truncate=params.truncate)
    learned = [row.learning(params.learn) for row in rows]
    with threads(ctx.threads):
        teacher = load_model(home)
        student, notes = start_student(teacher, learned, params, checkpoint=start, seed=ctx.seed, where=ctx.name)
        adapters = _adapters(student, params, ctx)  # what does not fit is refused before the teacher is at work
        own = tokenizer if start is None else load_tokenizer(start)
        table = _table(learned, params, ctx, teacher, student, (tokenizer, own))
        if params.divergence == "skew_pair" and table.own is None and source_of is None:
            notes.append("no row is the student's own text, where skew_pair is skew_kl: name them by student_source")
        figures: dict[str, Any] = _size_of(teacher, ctx)
        lesson = Lesson(table, [row.id for row in rows], tokenizer)
        settings = _settings(params, ctx, teacher, table)
        source = None if source_of is None else source_of(Classroom(ctx, settings, teacher, student, rows, lesson))
        target_fn, more = _taught(params, ctx, teacher, student, lesson, settings)
        if source is not None:
            source.target_fn = target_fn
        log = ctx.work / TRAINING_LOG
        with projected(student, teacher, settings.loss, seed=ctx.seed):
            del teacher  # with cached targets this frees its memory before training
            report = train(student, target_fn, table, settings, ctx, log, vocab=table.vocab, source=source)
    figures |= more | _merged(adapters) | {"parameters": count_parameters(student)}
    metadata = {"stage": ctx.name, "init": params.init, "shape": asdict(shape_of(student.config.to_dict()))}
    save_model(student, ctx.out, tokenizer_from=start or home, metadata=metadata | {"training": _lasting(report)})
    copy_log(log, ctx.out / TRAINING_LOG)
    notes = notes + report.notes
    if source is not None:
        made, said = source.report()
        figures, notes = figures | made, notes + said
    return StageResult(metrics=figures | asdict(report) | metadata, notes=notes)


def _home(ctx: StageContext, start: Path | None) -> Path:
    """The folder whose tokenizer makes the rows: the teacher's, or the student's own where an endpoint teaches it.

    Raises:
        ModelError: the teacher has no weights at hand and there is no student to go on from.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    if ctx.teacher.folder is None and start is not None:
        return start
    folder = local_folder(ctx.teacher.folder, where=ctx.name, endpoint=True)
    check_folder(folder)
    return folder


def _size_of(teacher: PreTrainedModel, ctx: StageContext) -> dict[str, int]:
    """The figure of the teacher's size, where the teacher is a model at hand and not the student's own shape."""
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    return {} if ctx.teacher.folder is None else {"parameters_teacher": count_parameters(teacher)}


def _adapters(student: PreTrainedModel, params: LogitsParams, ctx: StageContext) -> Adapters | None:
    """Adapters on the student, where ``params`` ask for them; see `add_adapters`."""
    if not params.lora_rank:
        return None
    targets = params.lora_targets or "all"
    return add_adapters(
        student, params.lora_rank, alpha=params.lora_alpha, targets=targets, seed=ctx.seed, where=ctx.name
    )


def _merged(adapters: Adapters | None) -> dict[str, int]:
    """Make the student plain again; returns the figure about what was trained of it."""
    if adapters is None:
        return {}
    adapters.merge()
    return {"parameters_trained": adapters.parameters}


def _table(  # noqa: PLR0917 - both models with their tokenizers
    rows: Sequence[TokenRow],
    params: LogitsParams,
    ctx: StageContext,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> RowTable:
    """The rows, checked against both models; ``tokenizers`` are the teacher's and the student's."""
    configs = teacher.config.to_dict(), student.config.to_dict()
    sides = [(config, tokenizer.get_vocab()) for config, tokenizer in zip(configs, tokenizers, strict=True)]
    vocab = shared_vocabulary(sides[0], sides[1], where=ctx.name)
    written = ids_of_source(ctx.inputs["data"], params.student_source) if params.student_source else ()
    table = RowTable(rows, vocab=vocab, where=ctx.name, own=written)
    check_rows_fit(table, configs, where=ctx.name)
    return table


def _settings(params: LogitsParams, ctx: StageContext, teacher: PreTrainedModel, table: RowTable) -> TrainSettings:
    """What the trainer is told, with the teacher's confidence measured where it is the divergence's number."""
    share = confidence(teacher, table, ctx.seed) if params.kd_weight and params.number is None else None
    return train_settings(params, ctx.seed, share)


def _taught(  # noqa: PLR0917 - both models, and what they see
    params: LogitsParams,
    ctx: StageContext,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    lesson: Lesson,
    settings: TrainSettings,
) -> tuple[TargetFn | None, dict[str, Any]]:
    """The teacher's side of the training, and figures about it."""
    if not settings.loss.wants_teacher:
        return None, {}
    target_fn, figures = targets_of(params, ctx, lesson, teacher, settings)
    if settings.loss.wants_features:
        target_fn = feature_targets(target_fn, student, settings.loss, where=ctx.name)
    return target_fn, figures if params.number is not None else figures | {"confidence": settings.loss.number}


def train_settings(params: LogitsParams, seed: int, confidence: float | None = None) -> TrainSettings:
    """What the trainer is told; ``confidence`` is the teacher's, where the divergence's number is to be that."""
    number = params.number if confidence is None else confidence
    return TrainSettings(
        loss=LossWeights(
            params.kd_weight,
            params.temperature,
            params.label_smoothing,
            divergence=params.divergence,
            number=0.0 if number is None else number,
            adaptive=params.adaptive_skew,
            student_weight=params.student_weight,
            hidden_weight=params.hidden_weight,
            attention_weight=params.attention_weight,
            feature_layers=params.feature_layers,
        ),
        epochs=params.epochs,
        steps=params.steps,
        batch_tokens=params.batch_tokens,
        accumulate=params.accumulate,
        activation_checkpointing=params.activation_checkpointing,
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
    return {name: value for name, value in asdict(report).items() if name not in TIMED_REPORT}
