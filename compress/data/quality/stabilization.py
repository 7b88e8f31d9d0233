"""Stages that make the pool right and even: `mislabel` finds wrong answers, `stabilize` evens out the mix.

Each stage function reads the rows, asks the teacher where it must, and leaves the decision to pure functions in
``disagreement`` and ``mixes``. Rows that go are kept with reason and figures. Knows nothing of weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compress.context import StageContext, StageResult
from compress.data.answer_loss import mark
from compress.data.asking import Asker
from compress.data.chunks import map_chunks
from compress.data.condensation.k_center import farthest_points
from compress.data.embeddings import hashed, normalised
from compress.data.funnel import finish
from compress.data.quality import disagreement, mixes
from compress.data.quality.disagreement import Figures
from compress.data.quality.params import MislabelParams, StabilizeParams
from compress.data.rows import Dropped, Row, make_row, read_rows
from compress.data.selection.near_duplicates import answer_key
from compress.encoding import encode_rows
from compress.endpoint import Reply
from compress.errors import DataError, UserError
from compress.teachers import Teacher
from compress.thoughts import split_thoughts

CHUNK = 256  # rows measured or answered between two checkpoints
CONTRADICTED, UNSURE = "teacher contradicts the answer", "contradicted, and the teacher's own answer is unsure"


# ---------------------------------------------------------------------------------- wrong answers


def mislabel(params: MislabelParams, ctx: StageContext) -> StageResult:
    """Drop or relabel rows whose answer the teacher contradicts with confidence; see `disagreement` for sources.

    A teacher that can score is asked by one forward pass per row; one that only answers (an endpoint) by its answer.
    Every measured row gets its figures as scores; a relabelled one keeps its old answer there as ``was``.

    Raises:
        UserError: there is no teacher.
        DataError: no row has an answer, or none is left.
    """
    rows = read_rows(ctx.inputs["data"])
    asker = Asker(ctx)
    at = [i for i, row in enumerate(rows) if row.is_chat and row.messages[-1]["role"] == "assistant" and row.prompt]
    if not at:
        raise DataError(ctx.name, "no row has a prompt and an answer", "chat rows", "Take this step out for texts")
    finder = _contradicted if "score" in asker.teacher.can else _answered_otherwise
    suspects, replies, verdicts = finder(rows, at, asker, params, ctx)
    dropped: dict[int, Dropped] = {}
    relabelled = 0
    sure = disagreement.confident(
        [-reply.mean_logprob for reply in replies], gate=params.entropy_gate, max_entropy=params.max_entropy
    )
    for index, reply, trusted in zip(suspects, replies, sure, strict=True):
        if params.action == "drop":
            dropped[index] = Dropped(rows[index], CONTRADICTED, _detail(rows[index], reply, ctx.name))
        elif trusted and reply.finished and reply.text.strip():
            rows[index] = _relabelled(rows[index], reply, ctx.name)
            relabelled += 1
        else:
            dropped[index] = Dropped(rows[index], UNSURE, _detail(rows[index], reply, ctx.name))
    kept = [row for i, row in enumerate(rows) if i not in dropped]
    notes = [f"{len(rows) - len(at)} rows have no prompt and answer to check; they stay"] if len(at) < len(rows) else []
    return finish(
        ctx,
        kept,
        [dropped[i] for i in sorted(dropped)],
        do="Raise min_margin, or choose a teacher that knows this task",
        metrics={"relabelled": relabelled, **{f"rows_{kind}": n for kind, n in sorted(verdicts.items())}},
        notes=[*notes, *_share_note(len(suspects), len(at)), *asker.notes(confidence=True)],
    )


def _share_note(suspects: int, checked: int) -> list[str]:
    """A teacher that contradicts half of the pool is more likely to be wrong than the pool."""
    if suspects * 2 <= checked:
        return []
    return [f"the teacher contradicts {suspects} of {checked} answers: is it the right teacher for this task?"]


def _teacher(ctx: StageContext) -> Teacher:
    if ctx.teacher is None:
        raise UserError(f"{ctx.name}", "needs a teacher, but the profile names none", "", "Set teacher in the profile")
    return ctx.teacher


def _contradicted(
    rows: list[Row], at: Sequence[int], asker: Asker, params: MislabelParams, ctx: StageContext
) -> tuple[list[int], list[Reply], Counter[str]]:
    """Rows contradicted by the scores, the teacher's answers to them, and how many rows got which verdict.

    Writes the figures into ``rows``. Where ``same_call``, an answer that is the same but for its layout is let pass.
    """
    figures = _figures([rows[i] for i in at], asker.teacher, params, ctx)
    verdicts: Counter[str] = Counter()
    suspects = []
    for index, found in zip(at, figures, strict=True):
        kind = disagreement.judge(found, min_margin=params.min_margin, max_mean_logprob=params.max_mean_logprob)
        verdicts[kind] += 1
        if kind == "unmeasured":
            continue
        rows[index] = rows[index].with_scores(
            ctx.name,
            agrees=bool(found.agrees),
            mean_logprob=round(found.mean_logprob, 6),
            margin=round(found.margin, 4),
            position=int(found.position),
            scored=mark(asker.teacher.identity, rows[index], params.max_tokens),
        )
        if kind == "contradicts":
            suspects.append(index)
    if not params.same_call and params.action == "drop":
        return suspects, [Reply("", math.nan, False)] * len(suspects), verdicts
    replies = _answers([rows[i] for i in suspects], asker, params, ctx)
    if not params.same_call:
        return suspects, replies, verdicts
    differing = [(i, r) for i, r in zip(suspects, replies, strict=True) if not _same(rows[i], r)]
    verdicts["same_in_other_layout"] = len(suspects) - len(differing)
    verdicts["contradicts"] = len(differing)
    return [i for i, _ in differing], [r for _, r in differing], verdicts


def _figures(
    rows: Sequence[Row], teacher: Teacher, params: MislabelParams, ctx: StageContext
) -> list[disagreement.Figures]:
    def measure(chunk: Sequence[Row]) -> NDArray[np.float64]:
        encoded = encode_rows(chunk, teacher.tokenizer, max_tokens=params.max_tokens, truncate=True)
        return np.array([disagreement.measure(scores) for scores in teacher.score(encoded)])

    found = map_chunks(
        rows, measure, folder=ctx.work, name="figures", size=CHUNK, progress=ctx.progress, what="mislabel"
    )
    return [Figures(*line) for line in found.tolist()]


def _answered_otherwise(
    rows: list[Row], at: Sequence[int], asker: Asker, params: MislabelParams, ctx: StageContext
) -> tuple[list[int], list[Reply], Counter[str]]:
    """The same from answers alone: a suspect is a row answered otherwise with enough confidence."""
    replies = _answers([rows[i] for i in at], asker, params, ctx)
    verdicts: Counter[str] = Counter()
    found = []
    for index, reply in zip(at, replies, strict=True):
        known = math.isfinite(reply.mean_logprob)
        same = _same(rows[index], reply)
        if known:
            rows[index] = rows[index].with_scores(ctx.name, agrees=same, teacher_logprob=round(reply.mean_logprob, 5))
        sure = known and reply.finished and bool(reply.text.strip()) and -reply.mean_logprob <= params.max_entropy
        verdicts["agrees" if same else "contradicts" if sure else "unsure"] += 1
        if sure and not same:
            found.append((index, reply))
    return [i for i, _ in found], [reply for _, reply in found], verdicts


def _answers(rows: Sequence[Row], asker: Asker, params: MislabelParams, ctx: StageContext) -> list[Reply]:
    """The teacher's greedy answers, in chunks; what is there is kept."""
    replies: list[Reply] = []
    with ctx.progress.bar("teacher's answers", len(rows)) as bar:
        for start in range(0, len(rows), CHUNK):
            asked = [row.prompt for row in rows[start : start + CHUNK]]
            replies += asker.answers(asked, place=f"mislabel/{start}", max_new_tokens=params.max_new_tokens)
            bar.advance(len(asked))
    return replies


def _same(row: Row, reply: Reply) -> bool:
    """Whether both say the same, thoughts before the row's answer left aside."""
    given, own = (
        make_row(messages=({"role": "assistant", "content": text},))
        for text in (reply.text, split_thoughts(row.answer).answer)
    )
    return reply.finished and answer_key(own) == answer_key(given)


def _relabelled(row: Row, reply: Reply, stage: str) -> Row:
    """The row with the teacher's answer; a label that named the old answer's function names the new one's."""
    answer = reply.text.strip()
    label = row.label
    if label is not None and label == mixes.function_name(row.answer):
        label = mixes.function_name(answer)
    messages = (*row.prompt, {"role": "assistant", "content": answer})
    made = make_row(messages=messages, label=label, source=row.source, meta=row.meta)
    return made.with_scores(stage, was=row.answer, new_logprob=round(reply.mean_logprob, 5))


def _detail(row: Row, reply: Reply, stage: str) -> str:
    parts = []
    scores = row.scores(stage)
    if "margin" in scores:
        parts.append(f"another token by {scores['margin']:.2f} nats at answer token {scores['position']}")
        parts.append(f"mean log probability {scores['mean_logprob']:.3f}")
    if reply.text:
        parts.append(f"teacher says {reply.text[:200]!r}")
    if math.isfinite(reply.mean_logprob):
        parts.append(f"with entropy {-reply.mean_logprob:.3f} nats")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------- the mix


def stabilize(params: StabilizeParams, ctx: StageContext) -> StageResult:
    """Take fewer rows of groups that are too common and repeat those of groups that are too rare.

    The result is the nearest mix to the wanted one, in KL divergence, that ``rows`` and ``max_repeat`` allow. Kept
    rows stay in the order of the file; repeats follow at the end, marked ``meta.repeat`` = 2, 3, ... and with the id of
    their original (a later dedup step would take them out again).

    Raises:
        UserError: reference rows, a teacher or a score are asked for and are not there.
        DataError: no group has both rows and a wanted share.
    """
    rows = read_rows(ctx.inputs["data"])
    reference = _reference(params, ctx)
    points = _points([*rows, *reference], params, ctx) if "cluster" in params.by or params.keep == "diverse" else None
    groups, reference_groups = _groups(rows, reference, points, params, ctx)
    counts = mixes.count_groups(groups)
    wanted = _wanted(counts, mixes.count_groups(reference_groups), params, ctx)
    total = len(rows) if params.rows is None else params.rows
    taken = mixes.allocate(counts, wanted, total=total, max_repeat=params.max_repeat)
    if not sum(taken.values()):
        raise DataError(
            ctx.name,
            f"no group of the rows ({_names(counts)}) is wanted ({_names(wanted)})",
            do="Check by, and that reference or weights use the same groups",
        )
    times = _times(rows, groups, taken, points=points, params=params, ctx=ctx)
    kept = [row for row, n in zip(rows, times, strict=True) if n > 0]
    for copy in range(2, max(times) + 1):
        kept += [replace(r, meta={**r.meta, "repeat": copy}) for r, n in zip(rows, times, strict=True) if n >= copy]
    dropped = [
        Dropped(row, "group over its share", f"{group}: {counts[group]} rows, {taken[group]} wanted")
        for row, group, n in zip(rows, groups, times, strict=True)
        if n == 0
    ]
    repeated = sum(n - 1 for n in times if n > 1)
    metrics = {"rows_in": len(rows), "repeated": repeated, **_mix_metrics(counts, taken, wanted)}
    notes = _mix_notes(counts, taken, total, params)
    return finish(ctx, kept, dropped, do="Raise rows", metrics=metrics, notes=notes)


def _reference(params: StabilizeParams, ctx: StageContext) -> list[Row]:
    if params.mix != "reference":
        return []
    if "reference" not in ctx.inputs:
        raise UserError(
            f"{ctx.name}.mix",
            "reference, but the profile names no reference rows",
            "uniform or weights",
            "Or set data.reference in the profile",
        )
    return read_rows(ctx.inputs["reference"])


def _groups(
    rows: Sequence[Row],
    reference: Sequence[Row],
    points: NDArray[np.float32] | None,
    params: StabilizeParams,
    ctx: StageContext,
) -> tuple[list[str], list[str]]:
    """Group names of the rows and of the reference rows; clusters are found among the rows alone."""
    if params.by != "cluster":
        return [mixes.group_of(r, params.by) for r in rows], [mixes.group_of(r, params.by) for r in reference]
    assert points is not None, "clusters need points"
    own, centers = mixes.kmeans(points[: len(rows)], params.clusters, seed=ctx.seed)
    others = mixes.nearest_centers(points[len(rows) :], centers)
    return [f"cluster {k:04d}" for k in own], [f"cluster {k:04d}" for k in others]


def _wanted(
    counts: Mapping[str, int], reference: Mapping[str, int], params: StabilizeParams, ctx: StageContext
) -> dict[str, float]:
    if params.mix == "weights":
        unknown = sorted(set(params.weights) - set(counts))
        if len(unknown) == len(params.weights):
            raise UserError(f"{ctx.name}.weights", f"no rows of {', '.join(unknown)}", _names(counts))
        return mixes.wanted_shares(params.weights, tempering=params.tempering)
    if params.mix == "uniform":
        named = [name for name in counts if name not in (mixes.NO_FUNCTION, mixes.NO_LABEL)]
        return mixes.wanted_shares(dict.fromkeys(named or counts, 1.0))  # rows of no group are no group to level up
    union = sorted({*counts, *reference})
    return mixes.wanted_shares(
        {name: reference.get(name, 0) + params.smoothing for name in union}, tempering=params.tempering
    )


def _points(rows: Sequence[Row], params: StabilizeParams, ctx: StageContext) -> NDArray[np.float32]:
    """Points of length 1 for rows and reference rows together."""
    if params.embedding == "hashed":
        return hashed(["\n".join(m["content"] for m in r.prompt) if r.is_chat else r.text for r in rows], dims=512)
    teacher = _teacher(ctx)

    def measure(chunk: Sequence[Row]) -> NDArray[np.float32]:
        return teacher.embed(encode_rows(chunk, teacher.tokenizer, max_tokens=params.max_tokens, truncate=True))

    return normalised(
        map_chunks(rows, measure, folder=ctx.work, name="points", size=CHUNK, progress=ctx.progress, what="embed")
    )


def _times(
    rows: Sequence[Row],
    groups: Sequence[str],
    taken: Mapping[str, int],
    *,
    points: NDArray[np.float32] | None,
    params: StabilizeParams,
    ctx: StageContext,
) -> list[int]:
    """How often each row stands in the result."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    values = _score_values(rows, params, ctx) if params.keep == "score" else None
    rng = np.random.default_rng(ctx.seed)
    times = [0] * len(rows)
    for name in sorted(members):  # the order of drawing is part of the result
        own = members[name]
        whole, rest = divmod(taken[name], len(own))
        if values is not None:
            first = sorted(own, key=lambda i: -values[i])[:rest]
        elif params.keep == "diverse" and rest:
            assert points is not None, "diverse needs points"
            first = [own[k] for k in farthest_points(points[own], rest).chosen]
        else:
            first = [own[k] for k in rng.permutation(len(own))[:rest]]
        for index in own:
            times[index] = whole
        for index in first:
            times[index] += 1
    return times


def _score_values(rows: Sequence[Row], params: StabilizeParams, ctx: StageContext) -> list[float]:
    stage, _, key = params.score.rpartition(".")
    found = [row.scores(stage).get(key) for row in rows]
    values = [float(v) if isinstance(v, int | float) and math.isfinite(v) else -math.inf for v in found]
    if not any(math.isfinite(value) for value in values):
        raise UserError(
            f"{ctx.name}.score",
            f"no row has a score {params.score!r}",
            "STAGE.KEY of an earlier step",
            "Or keep: random",
        )
    return values


def _mix_metrics(counts: Mapping[str, int], taken: Mapping[str, int], wanted: Mapping[str, float]) -> dict[str, object]:
    """KL(mix || wanted) in nats before and after; None where a group that is not wanted has rows."""
    figures = {"kl_before": mixes.kl_divergence(counts, wanted), "kl_after": mixes.kl_divergence(taken, wanted)}
    return {
        **{name: round(value, 6) if math.isfinite(value) else None for name, value in figures.items()},
        "groups": {
            name: {
                "before": counts.get(name, 0),
                "after": taken.get(name, 0),
                "wanted": round(wanted.get(name, 0.0), 6),
            }
            for name in sorted({*counts, *wanted})
        },
    }


def _mix_notes(counts: Mapping[str, int], taken: Mapping[str, int], total: int, params: StabilizeParams) -> list[str]:
    full = [name for name, count in counts.items() if count and taken.get(name, 0) == count * params.max_repeat]
    notes = []
    if full and params.max_repeat > 1:
        notes.append(f"{_names(full)}: every row stands {params.max_repeat} times and the share is still not reached")
    if sum(taken.values()) < total:
        notes.append(f"{sum(taken.values())} rows instead of {total}: every group is at its limit")
    return notes


def _names(groups: Mapping[str, object] | Sequence[str]) -> str:
    names = list(groups)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
