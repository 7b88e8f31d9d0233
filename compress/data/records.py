"""Finds the messages or the text in one JSON object, whatever its columns are called.

`parse_record` knows the shapes that data sets come in: ``messages`` (role/content), ``conversations`` (from/value,
ShareGPT), ``prompt``+``response``, ``instruction``+``output`` (Alpaca), ``question``+``answers`` (SQuAD),
``prompt``+``chosen`` (preferences), ``text``, and the columns of edgestill's own ``rows.parquet``. What a model needs
beside question and answer goes into the messages (``turns``). Everything else is kept under ``meta`` and named in
`Parsed.kept`. It raises `RecordError` with plain words; who calls it adds file and line. Knows nothing of files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from compress.data.plain import RecordError, check_text, kind, names, parse_json, plain_json, plain_text, shown
from compress.data.turns import (
    ANSWERS,
    CONTEXTS,
    CONVERSATIONS,
    PREFERRED,
    PROMPTS,
    SEVERAL_ANSWERS,
    SYSTEMS,
    TOOLS,
    Message,
    chat,
    string,
)
from compress.names import closest, nearest

ACCEPTED = (
    "one of the column sets: messages | conversations | prompt + response | question + answer | prompt + completion | "
    "instruction (+ input) + output | input + output | prompt + chosen | text; with context, system, history or tools"
)
# What a profile may rename by `columns: {prompt: question}`; the left-hand names.
CANONICAL = (
    "messages", "prompt", "response", "instruction", "input", "output", "context", "system", "history", "tools",
    "text", "label", "source", "meta",
)  # fmt: skip
# Columns that are known in any letter case, and of which an empty value says nothing.
KNOWN = frozenset(
    (*CANONICAL, *CONVERSATIONS, *PROMPTS, *ANSWERS, *SEVERAL_ANSWERS, *PREFERRED, *CONTEXTS, *SYSTEMS, *TOOLS)
)
SCORES = "scores"  # the key of meta in which stages keep theirs
PREFERENCE_LABEL = "label is true or false: what is labelled false is learned from like the rest"


class Parsed(NamedTuple):
    """The parts of a row; exactly one of ``messages`` and ``text`` is filled by a well-formed record.

    ``kept`` are the columns that went to ``meta`` and so to no model, ``said`` phrases about what else was decided.
    """

    messages: tuple[Message, ...]
    text: str
    label: str | None
    source: str
    meta: dict[str, Any]
    kept: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


def parse_record(record: object, columns: Mapping[str, str]) -> Parsed:
    """Read one JSON object; ``columns`` maps a canonical name to the name in this file."""
    if not isinstance(record, dict):
        raise RecordError(f"a JSON {kind(record)}", "a JSON object per row", "Write each row as {...}")
    said: list[str] = []
    fields = _known_case(_rename(record, columns))
    messages, text = _content(fields, record, said, mapped="response" in columns)
    label = _label(fields.pop("label", None), messages, said)
    source = fields.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise RecordError(f"source is a {kind(source)}", "a string")
    meta, kept = _meta(fields, said)
    check_text((text, *(part for message in messages for pair in message.items() for part in pair)))
    return Parsed(messages, text, label, plain_text(source or "", said), meta, kept, tuple(dict.fromkeys(said)))


def _rename(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The filled columns of ``record``, the mapped ones under their canonical names."""
    fields = dict(record)
    for canonical, found in columns.items():
        if found not in record:
            hint = nearest(found, record) or "Correct the columns setting"
            raise RecordError(f"no column {found!r} (mapped to {canonical}); found {names(record)}", "", hint)
        fields.pop(found, None)
    for canonical, found in columns.items():
        fields[canonical] = record[found]
    return {name: value for name, value in fields.items() if value is not None}


def _known_case(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with names such as ``Context`` and ``System Prompt`` as they are known, unless both are there."""
    for name in sorted(fields):
        known = "_".join(name.lower().replace("-", " ").split())
        if known in KNOWN and known not in fields:
            fields[known] = fields.pop(name)
    return fields


def _content(
    fields: dict[str, Any], record: dict[str, Any], said: list[str], *, mapped: bool
) -> tuple[tuple[Message, ...], str]:
    """Take the columns that hold the content out of ``fields``."""
    if isinstance(fields.get("messages"), str):  # edgestill's own parquet, and others that store JSON in a column
        fields["messages"] = _json_list(fields["messages"])
    if fields.get("messages") and fields.get("text"):
        raise RecordError("both messages and text are filled", "one of the two per row", "Remove one column")
    messages = chat(fields, said, mapped=mapped)
    if messages is not None:
        return messages, ""
    if fields.get("text") is not None:
        return (), string(fields.pop("text"), "text")
    raise _wrong_columns(record)


def _json_list(text: str) -> list[Any] | None:
    value = parse_json(text, "messages") if text.strip() else None
    if value is not None and not isinstance(value, list):
        raise RecordError(f"messages is a {kind(value)}", "a list of {role, content}")
    return value


def _wrong_columns(record: dict[str, Any]) -> RecordError:
    filled = {k: v for k, v in record.items() if v is not None}
    known = (*PROMPTS, *ANSWERS, "messages", "conversations", "instruction", "text")
    hints = [
        f"{shown(name)!r} looks like {near!r}"
        for name in list(filled)[:20]
        if name not in known and len(name) < 40 and (near := closest(name, known, cutoff=0.75))
    ]
    do = "Rename the columns, or name them in the profile, such as columns: {prompt: QUESTION, response: REPLY}"
    return RecordError(f"the columns are {names(filled)}", ACCEPTED, "; ".join([*hints, do]))


def _label(value: object, messages: tuple[Message, ...], said: list[str]) -> str | None:
    if isinstance(value, str):
        check_text((value,))
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):  # NaN: how pandas writes none
        return None
    if isinstance(value, (bool, int, float)):
        if isinstance(value, bool) and messages:
            said.append(PREFERENCE_LABEL)
        return json.dumps(value)
    raise RecordError(f"label is a {kind(value)}", "text or a number")


def _meta(fields: dict[str, Any], said: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The given ``meta`` and all columns that are left, and the names of these; empty known columns say nothing."""
    given = fields.pop("meta", None)
    if isinstance(given, str):  # edgestill's own parquet
        given = parse_json(given, "meta")
    if given is not None and not isinstance(given, dict):
        raise RecordError(f"meta is a {kind(given)}", "an object")
    meta = _plain_column("meta", given or {}, said, depth=0)
    if not _are_scores(meta.get(SCORES, {})):
        meta[_free(SCORES, meta)] = meta.pop(SCORES)
    left = {name: value for name, value in fields.items() if name not in KNOWN or value not in ("", [], {})}
    kept = []
    for name, value in left.items():
        key = plain_text(name, said)
        if key in meta or key == SCORES:  # a stage's scores, or meta's own: neither is written over
            key = _free(key, meta)
        meta[key] = _plain_column(name, value, said, depth=1)
        kept.append(key)
    return meta, tuple(kept)


def _plain_column(name: str, value: object, said: list[str], *, depth: int) -> Any:
    try:
        return plain_json(value, said, depth)
    except RecordError as error:
        raise RecordError(f"{shown(name)}: {error.got}", error.allowed, error.do) from None


def _are_scores(value: object) -> bool:
    """Whether this is what stages write: an object of objects."""
    return isinstance(value, dict) and all(isinstance(scores, dict) for scores in value.values())


def _free(key: str, meta: Mapping[str, Any]) -> str:
    """``key`` with as many underscores behind it as make it new."""
    while True:
        key += "_"
        if key not in meta:
            return key
