"""The stage ``model.distillation.classifier``: a teacher and rows in, a small model that answers with a class out.

The student is a causal model whose answers are the words of the classes, not a model with a head for classes: so it
goes through every later stage (pruning, quantization, export, evaluation), and a runner for language models runs it.
Knows nothing of profiles or of the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compress.context import StageContext, StageResult
from compress.encoding import load_tokenizer
from compress.errors import DataError, ModelError
from compress.model.checkpoint import check_folder, count_parameters, load_model, save_model
from compress.model.distillation.classifier.model import ClassifierModel, ClassLesson, measure
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.classifier.rows import ClassTable, Questions, read_questions
from compress.model.distillation.classifier.teacher import Taught, Teacher, teach
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import TIMED_REPORT, TRAINING_LOG, copy_log
from compress.model.distillation.packing import RowTable, split_rows
from compress.model.distillation.settings import TrainSettings, training_device
from compress.model.distillation.sharding import check_hardware
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import check_rows_fit, local_folder, shared_vocabulary
from compress.model.distillation.trainer import threads, train
from compress.model.shapes import shape_of

GAP = 0.05  # of the sum of attributions, above which the user is told
_SETTINGS = (
    "epochs", "steps", "batch_tokens", "accumulate", "learning_rate", "warmup_ratio", "final_lr_ratio", "optimizer",
    "weight_decay", "grad_clip", "average_decay", "validation_share", "validation_rows", "validations", "patience",
    "keep", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class _Models:
    teacher: PreTrainedModel
    student: PreTrainedModel
    vocab: int


def distill(params: ClassifierParams, ctx: StageContext) -> StageResult:
    """Train a student to answer the rows of slot ``data`` with their class and save it.

    The loss of a row is (1 - kd_weight) * CE of its label's answer + kd_weight * (temperature^2 * KL of the classes -
    log of the student's mass on them) + attribution_weight * (1 - cosine of attributions) / 2.

    Raises:
        ModelError: the teacher is no local model, or teacher, student and rows do not fit together.
        DataError: rows that are no questions of class, as `read_questions`, or none to learn from.
        TrainingError: the loss is NaN or diverges.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    check_hardware(ctx, other="a loss on classes")
    home = local_folder(ctx.teacher.folder, where=ctx.name)
    start = ctx.inputs.get("model") if params.init == "checkpoint" else None
    for folder in (home, start):
        if folder is not None:
            check_folder(folder)
    tokenizer = load_tokenizer(home)
    questions = read_questions(ctx.inputs["data"], tokenizer, params)
    with threads(ctx.threads):
        models, notes = _models(params, ctx, questions, tokenizer, start)
        figures: dict[str, Any] = {"parameters_teacher": count_parameters(models.teacher)}
        teacher = Teacher(models.teacher, tokenizer, models.vocab, params)
        lesson, kept, more, said = _lesson(teacher, questions, ctx)
        student, figures, notes = models.student, figures | more, notes + said
        del models, teacher  # frees the teacher's memory before training
        table = RowTable([question.row for question in kept.asked], vocab=lesson.vocab, where=ctx.name)
        settings, log = _train_settings(params, ctx.seed), ctx.work / TRAINING_LOG
        module = partial(ClassifierModel, lesson)
        report = train(student, None, table, settings, ctx, log, vocab=lesson.vocab, loss_module=module)
        _, held = split_rows(
            table, validation_share=params.validation_share, validation_rows=params.validation_rows, seed=ctx.seed
        )
        figures |= {f"validation_{name}": value for name, value in measure(student, lesson, held).items()}
    metadata = {
        "stage": ctx.name,
        "init": params.init,
        "shape": asdict(shape_of(student.config.to_dict())),
        "prompt": params.prompt,
        "classes": {name: params.answers.get(name, name) for name in questions.classes},
    }
    told = asdict(report)
    training = {name: value for name, value in told.items() if name not in TIMED_REPORT}
    save_model(student, ctx.out, tokenizer_from=start or home, metadata=metadata | {"training": training})
    copy_log(log, ctx.out / TRAINING_LOG)
    figures |= {"parameters": count_parameters(student)}
    return StageResult(metrics=figures | told | metadata, notes=notes + report.notes)


def _models(
    params: ClassifierParams,
    ctx: StageContext,
    questions: Questions,
    tokenizer: PreTrainedTokenizerFast,
    start: Path | None,
) -> tuple[_Models, list[str]]:
    """Both models, fit for each other and for the rows."""
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    teacher = load_model(local_folder(ctx.teacher.folder, where=ctx.name))
    longest = [question.longest for question in questions.asked]
    student, notes = start_student(teacher, longest, params.student, checkpoint=start, seed=ctx.seed, where=ctx.name)
    configs = teacher.config.to_dict(), student.config.to_dict()
    own = tokenizer if start is None else load_tokenizer(start)
    vocab = shared_vocabulary((configs[0], tokenizer.get_vocab()), (configs[1], own.get_vocab()), where=ctx.name)
    check_rows_fit(RowTable(longest, vocab=vocab, where=ctx.name), configs, where=ctx.name)
    check_windows(configs, max(len(row.ids) for row in longest), where=ctx.name)
    return _Models(teacher, student, vocab), notes


def check_windows(configs: Sequence[Mapping[str, Any]], longest: int, *, where: str) -> None:
    """Raise ModelError when a model would not see a whole row: answers that share a prompt know no window."""
    for config in configs:
        windows = any(kind != "full_attention" for kind in config.get("layer_types") or ())
        if windows and longest > int(config.get("sliding_window") or longest):
            raise ModelError(
                where,
                f"a row of {longest} tokens, and layers that see {config['sliding_window']} tokens back",
                "rows within the window, or a model without one",
                "Lower max_tokens and drop longer rows",
            )


def _lesson(
    teacher: Teacher, questions: Questions, ctx: StageContext
) -> tuple[ClassLesson, Questions, dict[str, Any], list[str]]:
    """What the student learns from, the rows that are left, figures and notes."""
    params = teacher.params
    table = ClassTable(questions.asked, len(questions.classes))
    teacher.model.to(training_device()).requires_grad_(False)
    taught = teach(teacher, questions, table, ctx.work, ctx.progress) if params.wants_teacher else None
    figures, notes = _said(taught, questions, params)
    labels = torch.from_numpy(questions.labels)
    if taught is not None and params.unlabelled == "teacher":
        sure = (labels < 0) & (taught.confidence >= params.min_confidence)
        labels = torch.where(sure, taught.scores.argmax(1), labels)
        figures["rows_labelled_by_teacher"] = int(sure.sum())
    learned = (labels >= 0).numpy() | bool(params.kd_weight or params.attribution_weight)
    rows = np.flatnonzero(learned)
    if not len(rows):
        raise DataError(
            str(ctx.inputs["data"]),
            "no row has a label, and nothing else is learned from",
            "rows with a label, or the teacher's word on the others",
            "Set kd_weight above 0, or unlabelled: teacher",
        )
    if len(rows) < len(labels):
        notes.append(f"{len(labels) - len(rows)} of {len(labels)} rows have no label and were left out")
    kept = questions.pick(rows.tolist())
    flat = None if taught is None or taught.attributions is None else _picked(taught.attributions, table, rows)
    lesson = ClassLesson(
        table=ClassTable(kept.asked, len(kept.classes)),
        labels=labels[torch.from_numpy(rows)],
        scores=None if taught is None else taught.scores[torch.from_numpy(rows)],
        attributions=flat,
        vocab=teacher.vocab,
        kd_weight=params.kd_weight,
        temperature=params.temperature,
        attribution_weight=params.attribution_weight,
    )
    figures |= {"rows": len(rows), "rows_labelled": int((lesson.labels >= 0).sum())}
    return lesson, kept, figures, notes


def _picked(flat: torch.Tensor, table: ClassTable, rows: np.ndarray[Any, Any]) -> torch.Tensor:
    """The attributions of ``rows``, one row behind the other."""
    parts = [flat[int(table.starts[row]) : int(table.starts[row] + table.lengths[row])] for row in rows]
    return torch.cat(parts)


def _said(taught: Taught | None, questions: Questions, params: ClassifierParams) -> tuple[dict[str, Any], list[str]]:
    """Figures about the teacher, and what the user should know of them."""
    if taught is None:
        return {}, []
    figures: dict[str, Any] = {"teacher_confidence": float(taught.confidence.mean())}
    known = torch.from_numpy(questions.labels)
    right = (taught.scores.argmax(1) == known)[known >= 0].float()
    if len(right):
        figures["teacher_accuracy"] = float(right.mean())
    if params.deeper:
        figures["rows_asked_again"] = list(taught.asked_again)
    notes = []
    if taught.gap is not None:
        figures["attribution_gap"] = taught.gap
        if taught.gap > GAP:
            notes.append(
                f"the attributions miss the difference of scores that they should add up to by {taught.gap:.0%} of it; "
                f"raise attribution_points (now {params.attribution_points})"
            )
    most = 1.0 / len(questions.classes)
    if len(right) and figures["teacher_accuracy"] <= most:
        notes.append(
            f"the teacher is right on {figures['teacher_accuracy']:.0%} of the rows with a label, no more than chance: "
            "it does not know these answers; word prompt and answers otherwise, or train it first"
        )
    return figures, notes


def _train_settings(params: ClassifierParams, seed: int) -> TrainSettings:
    """What the trainer is told; the loss on classes is not its own."""
    given = {name: getattr(params, name) for name in _SETTINGS}
    return TrainSettings(loss=LossWeights(0.0), seed=seed, **given)
