"""Makes values that come along with a row safe to keep: plain JSON of bounded depth, text that a file can hold.

`plain_json` is for ``meta``: what no JSON file can hold is replaced, and the replacement is told. `check_text` refuses
half a surrogate pair where it would change what a model reads. `shown` is a user's name in a message. Raises
`RecordError`; who calls it adds file and line. Knows nothing of rows and columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

DEEPEST = 100  # levels of nesting in meta; each reader and writer behind it recurses
HALF_PAIR = "half a surrogate pair in a value that is only kept along became U+FFFD"
NOT_FINITE = "NaN or an infinity in meta became null"


class RecordError(ValueError):
    """A record cannot become a row: what was found, what is accepted, what to do."""

    def __init__(self, got: str, allowed: str = "", do: str = "") -> None:
        super().__init__(got)
        self.got, self.allowed, self.do = got, allowed, do


def plain_json(value: Any, said: list[str], depth: int = 0) -> Any:
    """``value`` with only JSON types: dates, decimals and bytes become text, NaN and infinities ``None``.

    Half a surrogate pair becomes U+FFFD. What was replaced is added to ``said``.

    Raises:
        RecordError: nested deeper than `DEEPEST`, or two keys are one after the replacement.
    """
    if depth > DEEPEST:
        raise RecordError(f"nested deeper than {DEEPEST} levels", f"at most {DEEPEST} levels", "Flatten the column")
    if isinstance(value, dict):
        plain = {plain_text(str(key), said): plain_json(item, said, depth + 1) for key, item in value.items()}
        if len(plain) < len(value):
            raise RecordError("two keys of one object are the same as text", "different keys")
        return plain
    if isinstance(value, (list, tuple)):
        return [plain_json(item, said, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        said.append(NOT_FINITE)
        return None
    if isinstance(value, (float, int)) or value is None:
        return value
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    return plain_text(text, said)


def plain_text(text: str, said: list[str]) -> str:
    """``text`` with U+FFFD in place of each half of a surrogate pair, which is added to ``said``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        said.append(HALF_PAIR)
        return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    return text


def check_text(parts: Iterable[str]) -> None:
    """A JSON escape such as ``\\ud800`` makes a string that no file can hold.

    Raises:
        RecordError: one of ``parts`` holds half a surrogate pair.
    """
    for part in parts:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                f"half a surrogate pair (\\u{ord(part[error.start]):04x}) at character {error.start}",
                "whole Unicode characters",
                "Write the character itself or both halves of the pair",
            ) from None


def parse_json(text: str, name: str) -> Any:
    """The JSON in a string column.

    Raises:
        RecordError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is a string that is not JSON", "JSON") from None


def shown(name: object, most: int = 60) -> str:
    """A user's name or value for a message: control characters and halves of pairs escaped, long ones cut."""
    text = str(name)
    if len(text) > most:
        text = text[:most] + "…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def names(record: Mapping[str, Any], most: int = 20) -> str:
    """The keys of ``record`` for a message."""
    found = sorted(map(str, record))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(map(shown, found[:most])) + more or "none"


def kind(value: object) -> str:
    """The JSON type of ``value`` in words."""
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
