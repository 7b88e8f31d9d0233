"""Static filtering: stages that judge rows once, before any training.

`dedup` drops exact and near duplicates, `heuristics` drops rows of wrong length, characters or tone, and `ifd` keeps
rows by instruction-following difficulty. Each writes what it dropped with the reason. The maths lives in
``near_duplicates``, ``heuristic_rules`` and ``difficulty``; this module joins it to artifacts and to the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.context import StageContext, StageResult
from compress.data.answer_loss import known
from compress.data.chunks import map_chunks
from compress.data.funnel import finish
from compress.data.quality.mixes import label_of
from compress.data.rows import Dropped, Row, make_row, read_rows
from compress.data.selection.difficulty import Scored, bare, first_targets, mean_losses, ratio, select
from compress.data.selection.heuristic_rules import judge_all
from compress.data.selection.near_duplicates import Rules, choose_bands, find_duplicates
from compress.data.selection.params import DedupParams, HeuristicsParams, IfdParams
from compress.encoding import encode_rows
from compress.errors import DataError, UserError
from compress.execution import map_shards

if TYPE_CHECKING:
    from compress.teachers import Teacher

CHUNK = 512  # rows scored between two checkpoints
SHARD = 2000  # rows judged by one call
MANY = 50_000  # rows from which starting worker processes pays


def dedup(params: DedupParams, ctx: StageContext) -> StageResult:
    """Drop rows whose normalised content, or nearly all of whose shingles, an earlier row had.

    Raises:
        DataError: ``keep: score`` names a score that no row has.
    """
    rows = read_rows(ctx.inputs["data"])
    rules = Rules(**params.model_dump(include=set(Rules.__dataclass_fields__)))
    order = _order(rows, params, ctx)
    matches = find_duplicates(rows, rules, order=order, seed=ctx.seed)
    kept, dropped = [], []
    for row, match in zip(rows, matches, strict=True):
        if match is None:
            kept.append(row)
        elif match.jaccard is None:
            dropped.append(Dropped(row, "exact duplicate", f"of {rows[match.of].id}"))
        else:
            detail = f"of {rows[match.of].id} (jaccard {match.jaccard:.3f})"
            dropped.append(Dropped(row, "near duplicate", detail))
    bands, per_band = choose_bands(params.threshold, params.num_perm, params.recall)
    metrics = {"bands": bands, "rows_per_band": per_band} if params.near else {}
    return finish(ctx, kept, dropped, do="Raise threshold, or turn near off", metrics=metrics)


def _order(rows: Sequence[Row], params: DedupParams, ctx: StageContext) -> list[int]:
    """Row numbers, those first that should stay; equal ones in the order of the file."""
    if params.keep == "first":
        return list(range(len(rows)))
    if params.keep == "longest":
        return sorted(range(len(rows)), key=lambda i: -_length(rows[i]))
    stage, _, key = params.score.rpartition(".")
    found = [row.scores(stage).get(key) for row in rows]
    values = [float(v) if isinstance(v, (int, float)) else -np.inf for v in found]
    if not np.isfinite(values).any():
        have = sorted({f"{s}.{k}" for row in rows for s, kv in row.meta.get("scores", {}).items() for k in kv})
        raise DataError(
            f"{ctx.name}.score",
            f"no row has a score {params.score!r}",
            ", ".join(have) or "a score of an earlier step, but there is none",
            "Name one of them, or set keep: first",
        )
    return sorted(range(len(rows)), key=lambda i: -values[i])


def _length(row: Row) -> int:
    return len(row.text) + sum(len(message["content"]) for message in row.messages)


def heuristics(params: HeuristicsParams, ctx: StageContext) -> StageResult:
    """Drop rows that a rule objects to; the first objection is the reason, its measured value the detail."""
    rows = read_rows(ctx.inputs["data"])
    judgements = map_shards(
        partial(judge_all, params=params),
        rows,
        shards=-(-len(rows) // SHARD) or 1,
        backend="processes" if len(rows) >= MANY and ctx.threads > 1 else "inline",
        workers=ctx.threads,
        progress=ctx.progress,
        what="heuristics",
    )
    kept, dropped = [], []
    for row, objection in zip(rows, chain.from_iterable(judgements), strict=True):
        if objection is None:
            kept.append(row)
        else:
            dropped.append(Dropped(row, objection.reason, objection.detail))
    return finish(ctx, kept, dropped, do="Loosen the limit that dropped most")


# ---------------------------------------------------------------------------------- difficulty


def ifd(params: IfdParams, ctx: StageContext) -> StageResult:
    """Keep the rows whose prompt helps the answer, the hardest first; scores go into every row's meta.

    Rows without a prompt and an answer (texts) have no such ratio: they stay, and a note says how many.

    Raises:
        DataError: no row has both a prompt and an answer.
        UserError: ``scorer: student`` before any step made one.
    """
    rows = read_rows(ctx.inputs["data"])
    scored = [i for i, row in enumerate(rows) if row.user.strip() and row.answer.strip()]
    if not scored:
        raise DataError(ctx.name, "no row has a prompt and an answer", "chat rows", "Take this step out for texts")
    scorer = _scorer(params, ctx)
    losses = answer_losses([rows[i] for i in scored], scorer, params, ctx)
    measured = [bool(np.isfinite(pair).all()) for pair in losses]
    ratios = ratio(losses[:, 0], losses[:, 1], definition=params.definition)
    items = [
        Scored(index, float(r), label_of(rows[index]) if params.by_label else None)
        for index, r, ok in zip(scored, ratios, measured, strict=True)
        if ok
    ]
    reasons = select(items, max_ratio=params.max_ratio, keep=params.keep)
    for index, r, (with_prompt, alone), ok in zip(scored, ratios, losses, measured, strict=True):
        if ok:
            rows[index] = rows[index].with_scores(
                ctx.name, ratio=_short(r), loss=_short(with_prompt), loss_alone=_short(alone)
            )
    kept = [row for i, row in enumerate(rows) if i not in reasons]
    dropped = [Dropped(rows[i], reason, detail) for i, (reason, detail) in sorted(reasons.items())]
    notes = []
    if len(items) < len(rows):
        notes.append(f"{len(rows) - len(items)} rows have no prompt and answer to score; they stay")
    metrics = _summary(np.array([item.ratio for item in items]), params)
    return finish(ctx, kept, dropped, do="Raise max_ratio or keep", metrics=metrics, notes=notes)


def _summary(ratios: NDArray[np.float64], params: IfdParams) -> dict[str, object]:
    quantiles = {f"ratio_p{q}": _short(float(np.percentile(ratios, q))) for q in (5, 50, 95)} if len(ratios) else {}
    return {"definition": params.definition, "scored": len(ratios), **quantiles}


def _scorer(params: IfdParams, ctx: StageContext) -> Teacher:
    if params.scorer == "student":
        if "model" not in ctx.inputs:
            raise UserError(
                f"{ctx.name}.scorer", "student, but no earlier step made a model", "teacher", "Move this step down"
            )
        from compress.teachers import LocalTeacher  # torch loads on use

        return LocalTeacher(ctx.inputs["model"], threads=ctx.threads)
    if ctx.teacher is None:
        raise UserError(f"{ctx.name}.scorer", "teacher, but the profile names none", "", "Set teacher in the profile")
    return ctx.teacher


def answer_losses(rows: Sequence[Row], scorer: Teacher, params: IfdParams, ctx: StageContext) -> NDArray[np.float64]:
    """Mean loss per answer token (nats) with and without the prompt: (rows, 2) float64; NaN where no token is left.

    Scored in chunks that are kept under ``ctx.work``, so that a killed run goes on where it was. A loss that an earlier
    stage measured with the same scorer on the same row is taken over.
    """

    def score(chunk: Sequence[Row]) -> NDArray[np.float64]:
        tokenizer = scorer.tokenizer
        full = encode_rows(chunk, tokenizer, max_tokens=params.max_tokens, truncate=True)
        if params.alone == "bare":
            alone = [bare(row) for row in full]
        else:
            emptied = [_without_prompt(row) for row in chunk]
            whole = encode_rows(emptied, tokenizer, max_tokens=params.max_tokens, truncate=True)
            alone = [first_targets(row, whole_row.targets) for row, whole_row in zip(whole, full, strict=True)]
        losses = [known(scorer.identity, row, params.max_tokens) for row in chunk]
        unknown = [at for at, loss in enumerate(losses) if loss is None]
        found = np.array([np.nan if loss is None else loss for loss in losses])
        found[unknown] = mean_losses(scorer.score([full[at] for at in unknown]))
        return np.stack([found, mean_losses(scorer.score(alone))], axis=1)

    return map_chunks(rows, score, folder=ctx.work, name="losses", size=CHUNK, progress=ctx.progress, what="ifd")


def _without_prompt(row: Row) -> Row:
    """The same chat with every user turn emptied: the template stays, the question goes."""
    turns = [{**m, "content": ""} if m["role"] == "user" else m for m in row.messages]
    return make_row(messages=turns)


def _short(value: float) -> float:
    """Six significant digits: enough to rank by, and the same on every machine that computes alike."""
    return float(f"{float(value):.6g}")
