"""Finds the messages or the text in one JSON object, whatever its columns are called.

`parse_record` knows the shapes that data sets come in: ``messages`` (role/content), ``conversations``
(from/value, ShareGPT), ``prompt``+``response``, ``instruction``(+``input``)+``output`` (Alpaca), ``text``, and
the columns of edgestill's own ``rows.parquet``. Everything it does not understand is kept under ``meta``.
It raises `RecordError` with plain words; who calls it adds file and line. Knows nothing of files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from compress.names import closest, nearest

ACCEPTED = (
    "one of the column sets: messages | conversations | prompt + response | question + answer | "
    "prompt + completion | instruction (+ input) + output | text"
)
# What a profile may rename by `columns: {prompt: question}`; the left-hand names.
CANONICAL = (
    "messages", "prompt", "response", "instruction", "input", "output", "system", "text", "label", "source", "meta",
)  # fmt: skip
PROMPTS = ("prompt", "question", "query")
ANSWERS = ("response", "answer", "completion", "output")
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip

Message = dict[str, str]


class RecordError(ValueError):
    """A record cannot become a row: what was found, what is accepted, what to do."""

    def __init__(self, got: str, allowed: str = "", do: str = "") -> None:
        super().__init__(got)
        self.got, self.allowed, self.do = got, allowed, do


class Parsed(NamedTuple):
    """The parts of a row; exactly one of ``messages`` and ``text`` is filled by a well-formed record."""

    messages: tuple[Message, ...]
    text: str
    label: str | None
    source: str
    meta: dict[str, Any]


def parse_record(record: object, columns: Mapping[str, str]) -> Parsed:
    """Read one JSON object; ``columns`` maps a canonical name to the name in this file."""
    if not isinstance(record, dict):
        raise RecordError(f"a JSON {_kind(record)}", "a JSON object per row", "Write each row as {...}")
    fields = _rename(record, columns)
    messages, text = _content(fields, record)
    meta = _meta(fields.pop("meta", None))
    label = _label(fields.pop("label", None))
    source = fields.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise RecordError(f"source is a {_kind(source)}", "a string")
    for name, value in fields.items():
        if value is not None:
            meta[name] = plain_json(value)
    _check_unicode(messages, text)
    return Parsed(messages, text, label, source or "", meta)


def _rename(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A copy of ``record`` in which the mapped columns have their canonical names."""
    fields = dict(record)
    for canonical, found in columns.items():
        if found not in record:
            hint = nearest(found, record) or "Correct the columns setting"
            raise RecordError(f"no column {found!r} (mapped to {canonical}); found {_names(record)}", "", hint)
        fields.pop(found, None)
    for canonical, found in columns.items():
        fields[canonical] = record[found]
    return fields


def _content(fields: dict[str, Any], record: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    """Take the columns that hold the content out of ``fields``."""
    messages = fields.get("messages")
    if isinstance(messages, str):  # edgestill's own parquet, and others that store JSON in a string column
        messages = _json_list(messages)
    if messages:
        text = fields.get("text")
        if text:
            raise RecordError("both messages and text are filled", "one of the two per row", "Remove one column")
        fields.pop("messages"), fields.pop("text", None)
        return _messages(messages), ""
    if fields.get("conversations"):
        return _system(fields) + _messages(fields.pop("conversations")), ""
    prompt = _first(fields, PROMPTS)
    if prompt is not None:
        answer = _first(fields, ANSWERS)
        if answer is not None:
            parts = _turn(fields.pop(prompt), "user", prompt) + _turn(fields.pop(answer), "assistant", answer)
            return _system(fields) + parts, ""
    if "instruction" in fields:
        answer = _first(fields, ("output", "response", "answer", "completion"))
        if answer is not None:
            return _alpaca(fields, answer), ""
    if fields.get("text") is not None:
        fields.pop("messages", None)
        return (), _string(fields.pop("text"), "text")
    raise _wrong_columns(record)


def _alpaca(fields: dict[str, Any], answer: str) -> tuple[Message, ...]:
    question = _string(fields.pop("instruction"), "instruction")
    extra = fields.pop("input", None)
    if extra:
        question += "\n\n" + _string(extra, "input")
    reply = _string(fields.pop(answer), answer)
    return (*_system(fields), {"role": "user", "content": question}, {"role": "assistant", "content": reply})


def _system(fields: dict[str, Any]) -> tuple[Message, ...]:
    system = fields.pop("system", None)
    return ({"role": "system", "content": _string(system, "system")},) if system else ()


def _turn(value: object, role: str, name: str) -> tuple[Message, ...]:
    """A prompt or response: a string, or a list of messages as some trainers write it."""
    if isinstance(value, list):
        return _messages(value)
    return ({"role": role, "content": _string(value, name)},)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"messages is {_kind(value)}", "a list of {role, content}, at least one")
    return tuple(_message(item, i) for i, item in enumerate(value))


def _message(item: object, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise RecordError(f"{where} is a {_kind(item)}", "an object with role and content")
    role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
    if role_key not in item or content_key not in item:
        raise RecordError(f"{where} has the keys {_names(item)}", "role and content (or from and value)")
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"{where}.{role_key} is {role!r}", "one of " + ", ".join(sorted(ROLES)))
    if not isinstance(content, str):
        raise RecordError(f"{where}.{content_key} is a {_kind(content)}", "text")
    message = {"role": ROLES[role], "content": content}
    for key, value in item.items():
        if key in (role_key, content_key) or value is None or value == []:
            continue
        if not isinstance(value, str):
            raise RecordError(f"{where}.{key} is a {_kind(value)}", "only text beside role and content")
        message[key] = value
    return message


def _wrong_columns(record: dict[str, Any]) -> RecordError:
    filled = {k: v for k, v in record.items() if v is not None}
    known = (*PROMPTS, *ANSWERS, "messages", "conversations", "instruction", "text")
    hints = [
        f"{name!r} looks like {near!r}"
        for name in filled
        if name not in known and (near := closest(name, known, cutoff=0.75))
    ]
    do = "Rename the columns, or name them in the profile, such as columns: {prompt: QUESTION, response: REPLY}"
    return RecordError(f"the columns are {_names(filled)}", ACCEPTED, "; ".join([*hints, do]))


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in fields), None)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} is a {_kind(value)}", "text")
    return value


def _label(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(plain_json(value))
    raise RecordError(f"label is a {_kind(value)}", "text or a number")


def _meta(value: object) -> dict[str, Any]:
    if isinstance(value, str):  # edgestill's own parquet
        value = _parse(value, "meta")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError(f"meta is a {_kind(value)}", "an object")
    return {str(key): plain_json(item) for key, item in value.items()}


def _json_list(text: str) -> list[Any] | None:
    value = _parse(text, "messages") if text.strip() else None
    if value is not None and not isinstance(value, list):
        raise RecordError(f"messages is a {_kind(value)}", "a list of {role, content}")
    return value


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is a string that is not JSON", "JSON") from None


def plain_json(value: Any) -> Any:
    """``value`` with only JSON types: dates and bytes become text, NaN and infinities ``None``."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value)


def _check_unicode(messages: tuple[Message, ...], text: str) -> None:
    """A JSON escape such as ``\\ud800`` makes a string that no file can hold."""
    for part in (text, *(value for message in messages for value in message.values())):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                f"half a surrogate pair (\\u{ord(part[error.start]):04x}) at character {error.start}",
                "whole Unicode characters",
                "Write the character itself or both halves of the pair",
            ) from None


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))) or "none"


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
