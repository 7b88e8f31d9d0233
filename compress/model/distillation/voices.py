"""From the teachers that a stage was given to the one callable that the trainer asks.

`heard` looks up who teaches, by name; `targets_of` makes the callable: one local model (online or cached), several
mixed, or an endpoint that is asked once. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.encoding import load_tokenizer, row_values
from compress.errors import DataError, ModelError, UserError
from compress.model.checkpoint import check_folder, load_model
from compress.model.distillation.cache import TargetCache
from compress.model.distillation.endpoint_targets import endpoint_targets
from compress.model.distillation.filling import reached
from compress.model.distillation.mixtures import MixedTargets, routed, row_scores, shared_out, told
from compress.model.distillation.packing import Indices, RowTable
from compress.model.distillation.resume import kept_choice, read_tensors, save_tensors, value_digest
from compress.model.distillation.settings import TrainSettings, choose_bf16
from compress.model.distillation.targets import (
    Codec,
    OnlineTargets,
    TargetFn,
    cache_header,
    cached_targets,
    check_rows_fit,
    local_folder,
    shared_vocabulary,
    teacher_targets,
)
from compress.names import OWN_TEACHER
from compress.teachers import EndpointTeacher, Teacher

if TYPE_CHECKING:
    from compress.context import StageContext
    from compress.model.distillation.params import LogitsParams


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is taught: the rows as a table, their ids in the table's order, and the tokenizer that made them."""

    table: RowTable
    ids: Sequence[str]
    tokenizer: Any


def heard(params: LogitsParams, ctx: StageContext) -> dict[str, Teacher]:
    """The teachers that have a weight, by name, in the order of the mixture.

    Raises:
        UserError: the mixture names a teacher that was not given.
        ModelError: a teacher among several is not a local model, or one alone is neither that nor an endpoint.
    """
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    known = {OWN_TEACHER: ctx.teacher, **ctx.teachers}
    for name in params.voices:
        if name not in known:
            raise UserError(
                f"{ctx.name}.mixture.{name}", "no teacher of that name", ", ".join(known), "Name it under teachers"
            )
    found = {name: known[name] for name in params.voices}
    for name, teacher in found.items():
        if len(found) > 1 or not isinstance(teacher, EndpointTeacher):
            where = f"{ctx.name}.mixture.{name}" if params.mixture else ctx.name
            local_folder(teacher.folder, where=where, endpoint=True)
        elif params.number is None:
            got = "to be measured, and an endpoint's confidence is not"
            raise UserError(f"{ctx.name}.reverse_share", got, "a number from 0 to 1", "Give it")
    return found


def targets_of(
    params: LogitsParams, ctx: StageContext, lesson: Lesson, own: PreTrainedModel, settings: TrainSettings
) -> tuple[TargetFn, dict[str, Any]]:
    """The callable that the trainer asks, and figures about it. ``own`` is the profile's own teacher as a model.

    A cache holds the rows that a training by ``settings`` reaches.

    Raises:
        UserError, ModelError: as `heard`, or teachers with other tokenizers, or a setting that an endpoint cannot meet.
        DataError: a row that does not say whom to learn from, with ``routing: column``.
        EdgestillError: an endpoint gives no usable reply; what it gave before is kept.
    """
    who = heard(params, ctx)
    (name, first), *others = who.items()
    codec = Codec(params.codec, params.top_k, params.samples, ctx.seed)
    folder, wanted = ctx.work / "targets", reached(lesson.table, settings)
    if others:
        models = {name: _model(name, teacher, lesson, ctx, own) for name, teacher in who.items()}
        return _mixed(params, ctx, lesson, models, {name: teacher.identity for name, teacher in who.items()}, wanted)
    named = (lesson.tokenizer, first.identity)
    if isinstance(first, EndpointTeacher):
        return endpoint_targets(first, lesson.table, params, named=named, folder=folder, ctx=ctx, wanted=wanted)
    return teacher_targets(
        _model(name, first, lesson, ctx, own),
        lesson.table,
        params,
        named=named,
        folder=folder,
        progress=ctx.progress,
        codec=codec,
        wanted=wanted,
    )


def _model(name: str, teacher: Teacher, lesson: Lesson, ctx: StageContext, own: PreTrainedModel) -> PreTrainedModel:
    """The model of one teacher, whose vocabulary must be that of the rows."""
    if name == OWN_TEACHER:
        return own
    where = f"{ctx.name}.mixture.{name}"
    folder = local_folder(teacher.folder, where=where)
    check_folder(folder)
    model = load_model(folder)
    config, ours = model.config.to_dict(), lesson.tokenizer.get_vocab()
    theirs = load_tokenizer(folder).get_vocab()
    if theirs != ours:
        raise ModelError(
            where, "its tokenizer is another one than that of the rows", "teachers of one vocabulary",
            "Give teachers of one family, or leave this one out",
        )  # fmt: skip
    shared_vocabulary((config, theirs), (config, ours), where=where)
    check_rows_fit(lesson.table, [config], where=where)
    return model


def _mixed(  # noqa: PLR0917 - the teachers, and what they see
    params: LogitsParams,
    ctx: StageContext,
    lesson: Lesson,
    models: Mapping[str, PreTrainedModel],
    identities: Mapping[str, str],
    wanted: Indices,
) -> tuple[TargetFn, dict[str, Any]]:
    """Several teachers as one: online, or stored as their mixture."""
    table, folder = lesson.table, ctx.work / "targets"
    online_too = params.targets == "online"
    width = min(int(model.config.hidden_size) for model in models.values())
    device = None if online_too else next(iter(models.values())).device.type
    bf16 = kept_choice(
        folder.with_suffix(".json"), choose_bf16(params.precision, width=width, training=online_too, device=device)
    )
    about = {"teachers": dict(identities), "weights": params.voices, "routing": params.routing}
    about |= {"temperature": params.routing_temperature, "column": params.routing_column}
    of = value_digest(about | {"rows": table.fingerprint()})
    weights = _weights(params, ctx, lesson, models, {"about": of, "bf16": bf16})
    teachers = [
        OnlineTargets(model, vocab=table.vocab, temperature=params.temperature, bf16=bf16) for model in models.values()
    ]
    mixed = MixedTargets(teachers, weights)
    figures: dict[str, Any] = {
        "mixture": {name: round(float(share), 6) for name, share in zip(models, weights.mean(dim=0), strict=True)}
    }
    if online_too:
        return mixed, figures
    if params.routing == "column":  # what rows say is no part of their keys in the cache
        _same_for_equal_rows(lesson, weights, where=f"{ctx.name}.routing_column")
        about |= {"rows": table.fingerprint(), "said": weights.tolist()}
    codec = Codec(params.codec, params.top_k, params.samples, ctx.seed)
    header = cache_header(
        (lesson.tokenizer, value_digest(about)), vocab=table.vocab, codec=codec, temperature=params.temperature
    )
    target_fn, more = cached_targets(TargetCache(folder, header), table, mixed, ctx.progress, wanted)
    return target_fn, figures | more


def _same_for_equal_rows(lesson: Lesson, weights: Tensor, *, where: str) -> None:
    """Raise DataError when rows of the same tokens name different teachers: the cache holds them once."""
    first: dict[bytes, int] = {}
    for row, name in enumerate(lesson.ids):
        other = first.setdefault(lesson.table.key(row), row)
        if not torch.equal(weights[row], weights[other]):
            raise DataError(
                f"row {name}: {where}",
                f"the same text as row {lesson.ids[other]}, with other teachers",
                "equal rows with equal teachers",
                "Drop duplicates by data.selection dedup, or set targets: online",
            )


def _weights(
    params: LogitsParams,
    ctx: StageContext,
    lesson: Lesson,
    models: Mapping[str, PreTrainedModel],
    of: Mapping[str, Any],
) -> Tensor:
    """How much each teacher counts on each row (R, M); what the teachers had to be run for is kept in the work folder.

    The teachers are scored at temperature 1, whatever that of the loss.
    """
    base, rows = [params.voices[name] for name in models], len(lesson.table)
    if params.routing == "fixed":
        return shared_out(base, rows)
    if params.routing == "column":
        assert params.routing_column is not None, "validated with routing"
        values = row_values(ctx.inputs["data"], params.routing_column)
        where = f"{ctx.name}.routing_column {params.routing_column}"
        return told(params.voices, [values[name] for name in lesson.ids], lesson.ids, where=where)
    path = ctx.work / "routing.safetensors"
    found = read_tensors(path)
    if found is not None and found[1] == dict(of):
        return found[0]["weights"]
    scores = [
        row_scores(
            OnlineTargets(model, vocab=lesson.table.vocab, bf16=bool(of["bf16"])),
            lesson.table,
            params.routing,
            ctx.progress,
        )
        for model in models.values()
    ]
    weights = routed(base, torch.stack(scores, dim=1), params.routing_temperature)
    save_tensors(path, {"weights": weights}, of)
    return weights
