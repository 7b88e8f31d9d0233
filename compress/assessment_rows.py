"""The rows on which a model is measured, as tokens, and what becomes of those that are too long for it.

`judged_rows` cuts rows by the way that the model sees text, leaves out or cuts what does not fit the context, by the
profile's word, and says which rows those were; all of it before anything is measured. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from compress.assessment_params import EvaluateParams
from compress.data.rows import Row
from compress.encoding import TokenRow, encode_prompt, encode_rows, stop_ids
from compress.errors import DataError

NAMED = 5  # rows that a note names, at most
WHOLE = 1 << 31  # longer than any row


class TextPath(Protocol):
    """How a bundle's own script cuts texts."""

    def encode(self, requests: Any) -> list[list[int]]:
        """Token ids of each request, ``{"text": ...}`` or ``{"messages": [...]}``."""
        ...


@dataclass(frozen=True)
class JudgedRow:
    """A test row as the model sees it (``seen``), and as the teacher does (``taught``), whose targets are the same.

    ``taught`` is None where the two cut a text into other tokens, so that nothing can be compared token by token.
    """

    row: Row
    seen: TokenRow
    taught: TokenRow | None


@dataclass(frozen=True)
class JudgedRows:
    """Rows whose ``calls`` are generated, rows whose ``tokens`` are scored, notes, and counts for the record."""

    calls: list[JudgedRow]
    tokens: list[JudgedRow]
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def judged_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    params: EvaluateParams,
    *,
    context: int,
    device: TextPath | None = None,
    scored: bool = True,
) -> JudgedRows:
    """Return ``rows`` for the tasks of ``params``, none longer than ``context`` tokens.

    ``device`` is the bundle's own way from text to tokens; ``scored``: the loss on tokens is wanted, too.

    Raises:
        DataError: a row has no answer or text, is too long and ``too_long`` is ``error``, or no row is left.
    """
    encoded = encode_rows(rows, tokenizer, max_tokens=WHOLE) if scored else [_asked(row, tokenizer) for row in rows]
    all_rows = [JudgedRow(row, seen, seen) for row, seen in zip(rows, encoded, strict=True)]
    found = JudgedRows([], [])
    if device is not None:
        all_rows = _as_on_device(all_rows, device, found)
    if "function_call" in params.tasks:
        found.calls.extend(_fitting(all_rows, _Limit("function_call", context, "the context"), params.too_long, found))
    if scored:
        most = min(params.max_tokens, context)
        limit = _Limit("perplexity", most, "max_tokens" if most == params.max_tokens else "the context", cuts=True)
        found.tokens.extend(_fitting(all_rows[: params.perplexity_rows], limit, params.too_long, found))
    return found


@dataclass(frozen=True)
class _Limit:
    """The longest row of a task in tokens, what sets it, and whether a row without its end still serves the task."""

    task: str
    most: int
    named: str
    cuts: bool = False


def _asked(row: Row, tokenizer: Any) -> TokenRow:
    """A row that is only asked: its prompt, and its answer as that is cut alone."""
    prompt = encode_prompt(row.prompt, tokenizer)
    answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
    targets = len(answer) + 1  # with an end
    return TokenRow(row.id, (*prompt, *answer, *stop_ids(tokenizer)[:1]), (0,) * len(prompt) + (1,) * targets)


def _as_on_device(rows: Sequence[JudgedRow], device: TextPath, found: JudgedRows) -> list[JudgedRow]:
    """The rows with prompts and texts cut by the bundle itself; answers are the same tokens on both sides."""
    ids = device.encode([request_of(one.row) for one in rows])
    given = [one.seen.prompt if one.row.is_chat else one.seen.ids for one in rows]
    other = [at for at, one in enumerate(given) if list(one) != ids[at]]
    found.counts["rows_cut_otherwise"] = len(other)
    if other:
        named = _named([rows[at].seen for at in other])
        found.notes.append(f"the device cuts {len(other)} of {len(rows)} rows into other tokens than training: {named}")
    judged = list(rows)
    for at in other:
        one = rows[at]
        if one.row.is_chat:
            answer = one.seen.ids[len(one.seen.prompt) :]
            seen = TokenRow(one.seen.id, (*ids[at], *answer), (0,) * len(ids[at]) + (1,) * len(answer))
            judged[at] = replace(one, seen=seen)
        else:
            judged[at] = replace(one, seen=TokenRow(one.seen.id, tuple(ids[at]), (0,) + (1,) * (len(ids[at]) - 1)))
            judged[at] = replace(judged[at], taught=None)
    return judged


def request_of(row: Row) -> dict[str, Any]:
    """What a bundle is asked: the messages before the answer, or the text."""
    return {"messages": [dict(message) for message in row.prompt]} if row.is_chat else {"text": row.text}


def _fitting(rows: Sequence[JudgedRow], limit: _Limit, too_long: str, found: JudgedRows) -> list[JudgedRow]:
    """The rows within ``limit`` on either side; longer ones are dealt with by the profile's word, noted and counted."""
    most, task = limit.most, limit.task
    long = [one for one in rows if _length(one) > most]
    if long and too_long == "error":
        raise DataError(
            f"test row {long[0].seen.id}",
            f"has {_length(long[0])} tokens ({len(long)} of {len(rows)} rows are too long for {task})",
            f"at most {most} ({limit.named})",
            "Set evaluate.too_long to truncate or skip, or take the row out of the test rows.",
        )
    cuts = limit.cuts and too_long == "truncate"
    kept = [_cut(one, most) if cuts and _length(one) > most else one for one in rows if cuts or _length(one) <= most]
    left = [one for one in kept if any(one.seen.answer[1:])]
    ids = {one.row.id for one in left}
    shortened, gone = [one for one in long if one.row.id in ids], [one for one in rows if one.row.id not in ids]
    found.counts.update({f"{task}_left_out": len(gone), f"{task}_cut": len(shortened)})
    for what, those in (("cut", shortened), ("left out", gone)):
        if those:
            told = f"{task}: {len(those)} of {len(rows)} test rows are longer than {most} tokens ({limit.named})"
            found.notes.append(f"{told} and were {what}: {_named([one.seen for one in those])}")
    if not left:
        got = f"none of {len(rows)} rows has a token to predict within {most} tokens ({limit.named})"
        raise DataError("data.test", got, "rows with an answer, or with text", "Give shorter test rows.")
    return left


def _length(one: JudgedRow) -> int:
    return max(len(one.seen.ids), len(one.taught.ids) if one.taught else 0)


def _cut(one: JudgedRow, most: int) -> JudgedRow:
    """The row without its end: on both sides the same targets."""
    if one.taught is None or not one.row.is_chat:
        taught = one.taught and TokenRow(one.taught.id, one.taught.ids[:most], one.taught.answer[:most])
        return replace(one, seen=TokenRow(one.seen.id, one.seen.ids[:most], one.seen.answer[:most]), taught=taught)
    surplus = min(_length(one) - most, one.seen.targets)
    cut = [
        TokenRow(r.id, r.ids[: len(r.ids) - surplus], r.answer[: len(r.ids) - surplus]) for r in (one.seen, one.taught)
    ]
    return replace(one, seen=cut[0], taught=cut[1])


def _named(rows: Sequence[TokenRow]) -> str:
    told = ", ".join(f"row {row.id} ({len(row.ids)} tokens)" for row in rows[:NAMED])
    return told + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
