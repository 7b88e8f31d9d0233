"""The stage ``model.distillation.cross_tokenizer``: a teacher and rows in, a student with its own tokenizer out.

`distill` encodes the rows for both sides, aligns them, makes the teacher's targets, trains and saves. What a kill must
not lose lies in the work folder. Knows nothing of profiles or of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.context import StageContext, StageResult
from compress.encoding import TokenRow, load_tokenizer
from compress.errors import DataError, ModelError
from compress.model.checkpoint import check_folder, count_parameters, load_model, save_model
from compress.model.distillation.cache import TargetCache
from compress.model.distillation.cross_tokenizer.cache import ChunkCache, ChunkHeader
from compress.model.distillation.cross_tokenizer.losses import Common
from compress.model.distillation.cross_tokenizer.model import CrossLoss, CrossTokenizerModel
from compress.model.distillation.cross_tokenizer.pairs import Pairs, ends_by_token, read_pairs
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.cross_tokenizer.shapes import scratch_config, tokenizer_size
from compress.model.distillation.cross_tokenizer.spelling import Places, SpelledTeacher, Spelling
from compress.model.distillation.cross_tokenizer.symbols import Vocabulary, common_tokens, vocabulary
from compress.model.distillation.cross_tokenizer.targets import CachedTeacher, OnlineTeacher, fill_cache
from compress.model.distillation.filling import reached
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import TIMED_REPORT, TRAINING_LOG, copy_log
from compress.model.distillation.packing import Indices, RowTable
from compress.model.distillation.resume import kept_choice, value_digest
from compress.model.distillation.settings import TrainSettings, choose_bf16
from compress.model.distillation.sharding import check_hardware
from compress.model.distillation.students import random_student
from compress.model.distillation.targets import (
    Codec,
    OnlineTargets,
    TargetFn,
    cache_header,
    cached_targets,
    check_rows_fit,
    local_folder,
)
from compress.model.distillation.trainer import LossModule, TrainReport, threads, train
from compress.model.shapes import shape_of

_SETTINGS = (
    "epochs", "steps", "batch_tokens", "accumulate", "learning_rate", "warmup_ratio", "final_lr_ratio", "optimizer",
    "weight_decay", "grad_clip", "average_decay", "validation_share", "validation_rows", "validations", "keep",
    "precision",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Side:
    """A tokenizer, what its tokens spell, and the rows in them."""

    tokenizer: Any
    words: Vocabulary
    rows: list[TokenRow]

    @property
    def written(self) -> tuple[str, str]:
        """Digests of how tokens and chats are written."""
        return value_digest(self.tokenizer.get_vocab()), value_digest(self.tokenizer.chat_template)

    def table(self, config: Mapping[str, Any], name: str, where: str) -> RowTable:
        """The rows as a table that fits the model of this ``config``."""
        table = RowTable(self.rows, vocab=self.words.size, where=f"{where}: {name}'s rows")
        check_rows_fit(table, [config], where=f"{where}: {name}")
        return table


@dataclass(frozen=True, slots=True)
class _Lesson:
    """Both sides, how their rows are aligned, and the rows as tables: the teacher's and the student's."""

    ours: _Side
    theirs: _Side
    pairs: Pairs
    tables: tuple[RowTable, RowTable]


def distill(params: CrossTokenizerParams, ctx: StageContext) -> StageResult:
    """Train a student on the rows of slot ``data``, in its own tokens, towards the teacher, and save it.

    Raises:
        ModelError: the teacher is no local model; a tokenizer has no chat template, no token that ends an answer, or
            does not keep the spaces of a text; a model does not fit its tokenizer or the rows.
        DataError: no row, a row without an answer, or none whose tokens can be aligned.
        TrainingError: the loss is NaN or diverges.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    other = "" if params.loss == "spelled" else f"loss: {params.loss}"
    settings = train_settings(params, ctx.seed)
    check_hardware(ctx, settings, other=other)
    folder, home = local_folder(ctx.teacher.folder, where=ctx.name), _student_folder(params, ctx)
    check_folder(folder)
    ours, theirs = _sides(params, ctx, folder, home)
    pairs = Pairs(ours.rows, theirs.rows, (ours.words, theirs.words), where=ctx.name)
    with threads(ctx.threads):
        teacher = load_model(folder)
        student = _student(params, teacher.config.to_dict(), theirs.tokenizer, home, ctx)
        ours_table = ours.table(teacher.config.to_dict(), "teacher", ctx.name)
        table = theirs.table(student.config.to_dict(), "student", ctx.name)
        before = count_parameters(teacher)
        lesson = _Lesson(ours, theirs, pairs, (ours_table, table))
        target_fn, module, figures = _taught(params, ctx, teacher, lesson, settings)
        figures = pairs.figures | figures
        del teacher  # with cached targets this frees its memory before training
        log, vocab = ctx.work / TRAINING_LOG, theirs.words.size
        report = train(student, target_fn, table, settings, ctx, log, vocab=vocab, loss_module=module)
    shape = asdict(shape_of(student.config.to_dict()))
    figures |= {"parameters": count_parameters(student), "parameters_teacher": before, "shape": shape}
    metadata = {"stage": ctx.name, "init": params.init, "loss": params.loss, "shape": shape}
    save_model(student, ctx.out, tokenizer_from=home, metadata=metadata | {"training": _told(report, lasting=True)})
    copy_log(log, ctx.out / TRAINING_LOG)
    return StageResult(metrics=figures | _told(report) | metadata, notes=_notes(figures) + report.notes)


def train_settings(params: CrossTokenizerParams, seed: int) -> TrainSettings:
    """What the trainer is told."""
    given = {name: getattr(params, name) for name in _SETTINGS}
    return TrainSettings(loss=LossWeights(params.kd_weight), seed=seed, **given)


def _student_folder(params: CrossTokenizerParams, ctx: StageContext) -> Path:
    """Where the student's tokenizer is, and with ``init: checkpoint`` its weights."""
    if params.init == "scratch":
        assert params.tokenizer is not None, "the parameters ask for it"
        tokenizer_size(Path(params.tokenizer))
        return Path(params.tokenizer)
    start = ctx.inputs.get("model")
    if start is None:
        raise ModelError(
            f"{ctx.name}.init",
            "checkpoint, but no step before this one leaves a model",
            "a step that leaves a model before this one, or init: scratch with a tokenizer",
        )
    check_folder(start)
    return start


def _sides(params: CrossTokenizerParams, ctx: StageContext, folder: Path, home: Path) -> tuple[_Side, _Side]:
    """Both tokenizers and the rows in their tokens."""
    tokenizers = load_tokenizer(folder), load_tokenizer(home)
    words = [vocabulary(one, where=str(place)) for one, place in zip(tokenizers, (folder, home), strict=True)]
    rows = read_pairs(
        ctx.inputs["data"],
        *tokenizers,
        max_tokens=params.max_tokens,
        teacher_max_tokens=params.teacher_max_tokens or params.max_tokens,
        truncate=params.truncate,
    )
    for name, place, side, other, their_rows in (
        ("student", home, words[1], words[0], rows[0]),
        ("teacher", folder, words[0], words[1], rows[1]),
    ):
        if not side.end and other.end and ends_by_token(their_rows, other):
            raise ModelError(
                str(place),
                f"the {name}'s tokenizer has no token that ends an answer, and the other side's answers end by one",
                "an eos_token, or a chat template that puts a special token behind the assistant's turn",
                "Name one in tokenizer_config.json",
            )
    return _Side(tokenizers[0], words[0], rows[0]), _Side(tokenizers[1], words[1], rows[1])


def _student(
    params: CrossTokenizerParams, teacher: Mapping[str, Any], tokenizer: Any, home: Path, ctx: StageContext
) -> PreTrainedModel:
    """The student, fp32."""
    if params.init == "checkpoint":
        return load_model(home, dtype=torch.float32)
    values = scratch_config(teacher, params)
    for name in ("bos", "eos", "pad"):
        values[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    return random_student(values, shape_of(values), head_dim=params.head_dim, seed=ctx.seed, where=ctx.name)


def _taught(
    params: CrossTokenizerParams,
    ctx: StageContext,
    teacher: PreTrainedModel,
    lesson: _Lesson,
    settings: TrainSettings,
) -> tuple[TargetFn | None, LossModule | None, dict[str, Any]]:
    """The teacher's side of the training, what computes the loss if the trainer does not, and figures about both."""
    ours, theirs = lesson.ours, lesson.theirs
    if not params.kd_weight:
        return None, None, {}
    wanted = reached(lesson.tables[1], settings)
    if params.loss == "spelled":
        target_fn, figures = _spelled(params, ctx, teacher, lesson, wanted)
        return target_fn, None, figures
    module = partial(_module, _loss(params, lesson.pairs, ours.words, theirs.words), theirs.words.size)
    target_fn, figures = _targets(params, ctx, teacher, lesson, wanted)
    return target_fn, module, figures


def _spelled(
    params: CrossTokenizerParams, ctx: StageContext, teacher: PreTrainedModel, lesson: _Lesson, wanted: Indices
) -> tuple[TargetFn, dict[str, Any]]:
    """The teacher's tokens in the student's, online or stored as the distributions of any other teacher are."""
    ours, theirs, pairs, tables = lesson.ours, lesson.theirs, lesson.pairs, lesson.tables
    places = Places(ours.rows, theirs.rows, pairs, Spelling(ours.words, theirs.words))
    if not len(places):
        raise DataError(
            ctx.name,
            "no token of the student's rows lies inside of one of the teacher's",
            "a student whose tokens are pieces of the teacher's, such as bytes",
            "Choose loss: alm",
        )
    cached = params.targets == "cache"
    online = OnlineTargets(teacher, vocab=ours.words.size, bf16=_bf16(params, ctx, teacher, cached=cached))
    spelled = SpelledTeacher(online, tables[0], places, vocab=theirs.words.size)
    figures: dict[str, Any] = {"spelled_share": round(len(places) / int(pairs.theirs.sum()), 6)}
    if not cached:
        return spelled, figures
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    about = value_digest(
        {"spelled": 1, "by": [ctx.teacher.identity, *ours.written], "student": [ctx.teacher.identity, *theirs.written]}
    )
    header = cache_header(
        (theirs.tokenizer, about), vocab=theirs.words.size, codec=Codec(top_k=params.top_k), temperature=1.0
    )
    cache = TargetCache(ctx.work / "targets", header)
    target_fn, more = cached_targets(cache, tables[1], spelled, ctx.progress, wanted)
    return target_fn, figures | more


def _bf16(params: CrossTokenizerParams, ctx: StageContext, teacher: PreTrainedModel, *, cached: bool) -> bool:
    """The teacher's number format, chosen once."""
    width, device = int(teacher.config.hidden_size), teacher.device.type if cached else None
    chosen = choose_bf16(params.precision, width=width, training=not cached, device=device)
    return kept_choice(ctx.work / "targets.json", chosen)


def _loss(params: CrossTokenizerParams, pairs: Pairs, ours: Vocabulary, theirs: Vocabulary) -> CrossLoss:
    """The loss with the numbers that follow from both vocabularies and the rows."""
    debias = params.loss == "alm" and params.debias
    common = None
    if params.loss == "gold":
        ids = torch.tensor(common_tokens(ours, theirs), dtype=torch.long).reshape(-1, 2)
        common = Common(ids[:, 0], ids[:, 1])
    assert params.loss != "spelled", "the trainer's own loss"
    return CrossLoss(
        kind=params.loss,
        kd_weight=params.kd_weight,
        scale=float(pairs.theirs.sum()) / len(_paired(params, pairs).chunks),
        temperature=params.alm_temperature,
        debias=params.debias_threshold if debias else None,
        edges=torch.tensor(theirs.boundary) if debias else None,
        common=common,
        unmatched=params.gold_unmatched,
    )


def _paired(params: CrossTokenizerParams, pairs: Pairs) -> Pairs:
    return pairs.by_index() if params.loss == "uld" and params.uld_pairs == "index" else pairs


def _targets(
    params: CrossTokenizerParams,
    ctx: StageContext,
    model: PreTrainedModel,
    lesson: _Lesson,
    wanted: Indices | None = None,
) -> tuple[TargetFn, dict[str, Any]]:
    """The callable that the trainer asks, and figures; a cache is made, or gone on with, in the work folder."""
    ours, theirs, pairs = lesson.ours, lesson.theirs, lesson.pairs
    whole = params.loss != "alm"
    cached = params.targets == "cache" and not whole
    debias = params.debias and not whole
    online = OnlineTeacher(
        OnlineTargets(model, vocab=ours.words.size, bf16=_bf16(params, ctx, model, cached=cached)),
        lesson.tables[0],
        _paired(params, pairs),
        edges=torch.tensor(ours.words.boundary) if debias else None,
        whole=whole,
    )
    if not cached:
        return cast(TargetFn, online), {}
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    header = ChunkHeader(ctx.teacher.identity, *ours.written, *theirs.written, columns=2 if debias else 1)
    cache = ChunkCache(ctx.work / "targets", header)
    fill_cache(cache, online, ctx.progress, wanted)
    figures = {"target_bytes_per_chunk": header.bytes_per_chunk, "target_chunks": cache.chunks}
    return cast(TargetFn, CachedTeacher(cache, lesson.tables[0], pairs, wanted)), figures


def _module(loss: CrossLoss, vocab: int, student: nn.Module, bf16: bool) -> nn.Module:
    return CrossTokenizerModel(student, loss, vocab, bf16=bf16)


def _told(report: TrainReport, *, lasting: bool = False) -> dict[str, Any]:
    """The trainer's figures; what it calls a KL is the cross loss here."""
    figures = {name: value for name, value in asdict(report).items() if not (lasting and name in TIMED_REPORT)}
    figures["validation_cross_loss"] = figures.pop("validation_kl")
    return figures


def _notes(figures: Mapping[str, Any]) -> list[str]:
    """What of the rows the teacher says nothing about."""
    notes = []
    if figures["rows_without_chunks"]:
        notes.append(
            f"{figures['rows_without_chunks']} of {figures['rows']} rows could not be aligned; they train on their "
            "labels alone"
        )
    if figures["aligned_share"] < 0.9:
        notes.append(
            f"only {figures['aligned_share']:.0%} of the answers' bytes are aligned between teacher and student"
        )
    if figures.get("spelled_share", 1.0) < 0.9:
        notes.append(
            f"the teacher can be spelled at {figures['spelled_share']:.0%} of the student's tokens, and the others "
            "train on their labels alone; loss: alm also compares longer chunks"
        )
    return notes
