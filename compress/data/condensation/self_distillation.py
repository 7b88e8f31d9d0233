"""Self-data distillation: the unpruned model says each reference answer again in its own words.

Self-Data Distillation (Thangarasa et al. 2024, section 3): fine-tuning a pruned model on answers that the unpruned one
wrote moves it less far from what it knew than the original answers do. The teacher sees the request and the reference;
its rewrite takes the reference's place only where `objection` finds the same result in both. No row is ever lost.
Knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from compress.context import StageContext, StageResult
from compress.data.condensation.params import SelfDistillationParams
from compress.data.funnel import finish
from compress.data.journal import Journal
from compress.data.rows import Row, canonical_json, make_row, read_rows
from compress.data.selection.near_duplicates import answer_key
from compress.data.turns import Message
from compress.endpoint import Reply
from compress.errors import UserError

CHUNK = 64  # rows rewritten between two checkpoints
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
UNENDED, EMPTY, SAME_TEXT = "rewrite does not end", "rewrite is empty", "rewrite is the reference itself"
UNCHECKED, OTHER = "reference has no result to check", "rewrite has another result"


def self_distillation(params: SelfDistillationParams, ctx: StageContext) -> StageResult:
    """Replace answers by the teacher's rewrites where the result is the same; every row stays in its place.

    A rewritten row keeps its old answer in the scores as ``was``; a refused rewrite leaves its reason as ``kept``.
    Rewrites are kept under ``ctx.work``, so that a killed run goes on where it was and gives the same rows.

    Raises:
        UserError: there is no teacher.
        DataError: there are no rows.
    """
    if ctx.teacher is None:
        raise UserError(ctx.name, "needs a teacher, but the profile names none", "", "Set teacher in the profile")
    rows = read_rows(ctx.inputs["data"])
    able = [i for i, row in enumerate(rows) if row.answer.strip() and row.prompt and row.prompt[-1]["role"] == "user"]
    asked = [i for i in able if chosen(rows[i].id, ctx.seed, params.share)]
    labels = {row.label for row in rows if row.label}
    rewritten, refused = 0, Counter[str]()
    for index, reply in zip(asked, _rewrites([rows[i] for i in asked], params, ctx), strict=True):
        reason = objection(rows[index], reply, labels, params)
        if reason:
            refused[reason] += 1
            rows[index] = rows[index].with_scores(ctx.name, kept=reason)
        else:
            rewritten += 1
            rows[index] = _rewritten(rows[index], reply, ctx.name)
    metrics = {
        "asked": len(asked),
        "rewritten": rewritten,
        "kept_reference": dict(sorted(refused.items())),
        "cannot_be_asked": len(rows) - len(able),
    }
    notes = [f"{len(rows) - len(able)} rows have no request and answer; they stay"] if len(able) < len(rows) else []
    if asked and not rewritten:
        counts = ", ".join(f"{reason}: {n}" for reason, n in refused.most_common(3))
        notes.append(f"no answer was rewritten ({counts}); look at check, pattern and max_new_tokens")
    return finish(ctx, rows, [], do="Check the source", metrics=metrics, notes=notes)


def chosen(row_id: str, seed: int, share: float) -> bool:
    """Whether this row is among the ``share`` to be rewritten: by a digest, so that it hangs on no other row."""
    digest = hashlib.sha256(f"self_distillation/{seed}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def conversation(row: Row, request: str) -> list[Message]:
    """The row's prompt, its last turn put into ``request`` together with the reference answer."""
    parts = {"{prompt}": row.prompt[-1]["content"], "{answer}": row.answer}
    # one pass: a prompt that happens to hold "{answer}" stays as it is
    text = re.sub(r"\{prompt\}|\{answer\}", lambda found: parts[found.group()], request)
    return [*row.prompt[:-1], {**row.prompt[-1], "content": text}]


def objection(row: Row, reply: Reply, labels: Iterable[str], params: SelfDistillationParams) -> str:
    """Why the reference stays; empty when the rewrite has the same result and may take its place."""
    text = reply.text.strip()
    if not reply.finished:
        return UNENDED
    if not text:
        return EMPTY
    if text == row.answer.strip():
        return SAME_TEXT
    check = _check(row, labels) if params.check == "auto" else params.check
    if check == "none":
        return ""
    wanted = result(row.answer, check, labels, params.pattern)
    if wanted is None:
        return UNCHECKED
    return "" if result(text, check, labels, params.pattern) == wanted else OTHER


def _check(row: Row, labels: Iterable[str]) -> str:
    """JSON, else the labels named, else the last number."""
    if row.answer.strip()[:1] in ("{", "["):
        return "json"
    return "label" if row.label and result(row.answer, "label", labels, "") else "number"


def result(text: str, check: str, labels: Iterable[str], pattern: str) -> str | None:
    """What two answers must agree in; None when ``text`` has none.

    ``json``: the canonical JSON. ``label``: the set of ``labels`` named as whole words, in any case. ``number``: the
    last number, without thousands commas and trailing zeros. ``pattern``: the last match, its first group if any.
    """
    if check == "json":
        key = answer_key(make_row(messages=({"role": "assistant", "content": text},)))
        return key if key[:1] in ("{", "[") else None
    if check == "label":
        named = [label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE)]
        return canonical_json(sorted(named)) if named else None
    found = list((NUMBER if check == "number" else re.compile(pattern)).finditer(text))
    if not found:
        return None
    if check == "number":
        return _plain_number(found[-1].group())
    last = found[-1]
    return (last.group(1) or "").strip() if last.re.groups else last.group().strip()


def _plain_number(text: str) -> str:
    text = text.replace(",", "")
    sign = "-" if text.startswith("-") else ""
    whole, _, part = text.lstrip("+-").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    plain = f"{whole}.{part}" if part else whole
    return plain if plain == "0" else sign + plain


def _rewrites(rows: Sequence[Row], params: SelfDistillationParams, ctx: StageContext) -> list[Reply]:
    """The teacher's rewrites, in chunks that are kept."""
    assert ctx.teacher is not None
    journal = Journal(ctx.work, "rewrites")
    replies: list[Reply] = []
    with ctx.progress.bar("rewrites", len(rows)) as bar:
        for number, start in enumerate(range(0, len(rows), CHUNK)):
            chunk = rows[start : start + CHUNK]
            kept: list[Any] | None = journal.get(number)
            if kept is None:
                found = ctx.teacher.answer(
                    [conversation(row, params.request) for row in chunk],
                    max_new_tokens=params.max_new_tokens,
                    temperature=params.temperature,
                    seed=(ctx.seed + number) % 2**31,
                )
                kept = [[r.text, r.mean_logprob if math.isfinite(r.mean_logprob) else None, r.finished] for r in found]
                journal.put(number, kept)
            replies += [Reply(text, math.nan if mean is None else mean, finished) for text, mean, finished in kept]
            bar.advance(len(chunk))
    return replies


def _rewritten(row: Row, reply: Reply, stage: str) -> Row:
    messages = (*row.prompt, {**row.messages[-1], "content": reply.text.strip()})
    made = make_row(messages=messages, label=row.label, source=row.source, meta=row.meta)
    sure = {"logprob": round(reply.mean_logprob, 6)} if math.isfinite(reply.mean_logprob) else {}
    return made.with_scores(stage, was=row.answer, **sure)
