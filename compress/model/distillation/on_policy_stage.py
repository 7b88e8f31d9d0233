"""The stages ``model.distillation.gkd``, ``.minillm`` and ``.speculative``: a student that learns from what it writes.

Each is the stage of ``stage`` with another source of batches: how answers are made, and by which loss they are learned.
Knows nothing of profiles or of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from compress.context import StageContext, StageResult
from compress.encoding import stop_ids
from compress.errors import UserError
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.on_policy import (
    AnswerSettings,
    AnswerSource,
    MadeLoss,
    Maker,
    divergence,
    policy,
    prompts,
)
from compress.model.distillation.on_policy_params import GkdParams, MiniLlmParams, OnPolicyParams, SpeculativeParams
from compress.model.distillation.policy import PolicySettings
from compress.model.distillation.replay import Health, health
from compress.model.distillation.rollouts import Ask, Drawing, Rollout, sample, speculate
from compress.model.distillation.settings import choose_bf16
from compress.model.distillation.stage import Classroom, distill_from
from compress.model.distillation.targets import OnlineTargets, local_folder


def gkd(params: GkdParams, ctx: StageContext) -> StageResult:
    """Generalized KD: steps on the rows given and steps on the student's own answers (Agarwal et al. 2024, section 3).

    With ``on_policy_share`` 0 it is ``model.distillation.logits``, bit for bit. Raises as `stage.distill`, and:

    Raises:
        DataError: a row without a prompt, or without room for an answer.
        TrainingError: the student's answers collapse, and ``collapse: stop``.
    """

    def maker(room: Classroom, drawing: Drawing) -> Maker:
        return lambda asks: sample(room.student, asks, drawing)

    return distill_from(params, ctx, partial(_source, params, maker, loss=partial(_own_divergence, params)))


def speculative(params: SpeculativeParams, ctx: StageContext) -> StageResult:
    """Speculative KD: like `gkd`, on answers that the teacher corrects while they are written (Xu et al. 2024).

    Where the paper draws a replaced token from the teacher's whole distribution, it is drawn here from its
    ``accept_top_k`` likeliest, those that the student may propose. Raises as `gkd`.
    """

    def maker(room: Classroom, drawing: Drawing) -> Maker:
        def make(asks: Sequence[Ask]) -> list[Rollout]:
            teacher = room.teacher.to(room.student.device)
            return speculate(room.student, teacher, asks, drawing, top_k=params.accept_top_k, block=params.block)

        return make

    return distill_from(params, ctx, partial(_source, params, maker, loss=partial(_own_divergence, params)))


def minillm(params: MiniLlmParams, ctx: StageContext) -> StageResult:
    """MiniLLM: reverse KL of whole answers by policy gradient (Gu et al. 2024), among steps on the rows given.

    The paper adds the loss on plain text to every step; here steps of the two kinds alternate by ``on_policy_share``.
    The divergence of the other parameters is that of the steps on rows. Raises as `gkd`.
    """

    def maker(room: Classroom, drawing: Drawing) -> Maker:
        def make(asks: Sequence[Ask]) -> list[Rollout]:
            teacher = room.teacher.to(room.student.device)
            return sample(room.student, asks, drawing, teacher=teacher, mix=params.teacher_mix)

        return make

    told = PolicySettings(params.discount, params.length_normalize, params.largest_weight)
    return distill_from(params, ctx, partial(_source, params, maker, loss=lambda _: policy(told), temperature=1.0))


def _own_divergence(params: GkdParams, weights: LossWeights) -> MadeLoss:
    rule = params.made_rule()
    if rule is not None:
        weights = replace(weights, divergence=rule[0], number=rule[1], adaptive=False)
    return divergence(weights)


def _source(
    params: OnPolicyParams,
    maker: Callable[[Classroom, Drawing], Maker],
    room: Classroom,
    *,
    loss: Callable[[LossWeights], MadeLoss],
    temperature: float | None = None,
) -> AnswerSource:
    """The batches of a stage; ``loss`` of made answers, from that of rows, and the teacher's ``temperature`` for it."""
    where, table, vocab = room.ctx.name, room.lesson.table, room.lesson.table.vocab
    assert room.ctx.teacher is not None, "the table says that these stages use the teacher"
    local_folder(room.ctx.teacher.folder, where=where)
    if params.mixture:
        raise UserError(
            f"{where}.mixture", "several teachers, and made answers are judged by one", "no mixture", "Leave it out"
        )
    contexts = [int(model.config.max_position_embeddings) for model in (room.teacher, room.student)]
    asked = prompts(
        room.rows,
        context=min(params.max_tokens, *contexts),
        max_new_tokens=params.max_new_tokens,
        prompt_tokens=params.prompt_tokens,
        where=where,
    )
    stops = stop_ids(room.lesson.tokenizer)
    drawing = Drawing(vocab, stops, room.ctx.seed, params.sample_temperature)
    width = int(room.teacher.config.hidden_size)
    online = OnlineTargets(
        room.teacher,
        vocab=vocab,
        temperature=params.temperature if temperature is None else temperature,
        bf16=choose_bf16(params.precision, width=width),
    )
    given = [row.ids[len(prompt) :] for row, (prompt, _) in zip(room.rows, asked, strict=True)]
    return AnswerSource(
        table,
        asked,
        _settings(params, room),
        make=maker(room, drawing),
        made_targets=online,
        made_loss=loss(room.settings.loss),
        watch=Health(health(given, stops), where=where, stop=params.collapse == "stop"),
        stops=stops,
    )


def _settings(params: OnPolicyParams, room: Classroom) -> AnswerSettings:
    kept = params if isinstance(params, GkdParams) else None
    return AnswerSettings(
        share=params.on_policy_share,
        seed=room.ctx.seed,
        batch_tokens=params.batch_tokens,
        accumulate=params.accumulate,
        adaptive=params.share_schedule == "adaptive",
        buffer_rows=kept.buffer_rows if kept else 0,
        replay_share=kept.replay_share if kept else 0.0,
        rollout_steps=params.rollout_steps,
        stop=params.collapse == "stop",
        name=params.model_dump_json(),
    )
