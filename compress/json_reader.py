"""JSON that came from outside this process: bounded in bytes, depth and digits, and checked by type before it is used.

`parse_json` reads a text, `read_json` a file, `read_table` a file that must hold an object; `required` takes one entry
of a table by its type and range, `checked` holds a whole value against a declared type.
Python's own reader ends in a RecursionError on deep nesting, takes numbers that no later step can print, and takes NaN,
Infinity and half a surrogate pair, which no file can hold. Errors are of the caller's class. Knows nothing of what is
read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from compress.errors import EdgestillError

MAX_BYTES = 128 << 20  # the largest tokenizer.json in use has 33 MB
MAX_DEPTH = 100
MAX_DIGITS = 100  # Python refuses to print integers of more than 4,300
MAX_WHOLE = 1 << 62  # what every library behind takes as a 64-bit integer
_SHOWN = 60  # characters of a value in a message

T = TypeVar("T")


class JsonFault(ValueError):
    """A text is no JSON that is read here; the message says why, without the place."""


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Read one JSON value.

    Args:
        constants: take NaN and Infinity, which our own logs may hold.

    Raises:
        JsonFault: not JSON, larger than `MAX_BYTES`, nested deeper than `MAX_DEPTH`, a number of more than `MAX_DIGITS`
            digits or beyond a double, or half a surrogate pair.
    """
    if len(text) > MAX_BYTES:
        raise JsonFault(f"{len(text)} bytes, more than {MAX_BYTES}")
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            plain,
            parse_int=_integer,
            parse_float=float if constants else _finite,
            parse_constant=None if constants else _no_constant,
        )
    except RecursionError:
        raise JsonFault(f"nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise JsonFault(f"the byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonFault(str(error)) from None
    if plain.count("[") + plain.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise JsonFault(f"nested deeper than {MAX_DEPTH} levels")
    if "\\ud" in plain or "\\uD" in plain:
        _check_pairs(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonFault(f"a number of {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonFault(f"the number {digits[:20]} is beyond what a double holds")
    return value


def _no_constant(name: str) -> None:
    raise JsonFault(f"{name} is no JSON")


def _depth_exceeds(value: Any, most: int) -> bool:
    """Level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _check_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonFault(f"half a surrogate pair (\\u{ord(error.object[error.start]):04x})") from None


def read_json(path: Path, error: type[EdgestillError], *, allowed: str = "", do: str = "") -> Any:
    """Read a JSON file; ``error`` says where, what was got, and ``allowed`` and ``do``.

    Raises:
        EdgestillError: of class ``error``: no such file, no plain file, not readable, or as `parse_json`.
    """
    try:
        if not path.is_file():
            got = "not a plain file" if path.exists() else "no such file"
            raise error(str(path), got, allowed, do)
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        return parse_json(content)
    except JsonFault as fault:
        raise error(str(path), f"cannot be read as JSON: {fault}", allowed, do) from fault
    except OSError as fault:
        raise error(str(path), f"cannot be read: {fault.strerror or fault}", allowed, do) from fault


def read_table(path: Path, error: type[EdgestillError], *, allowed: str = "", do: str = "") -> dict[str, Any]:
    """Read a file that holds a JSON object; raises as `read_json`, and for any other value."""
    value = read_json(path, error, allowed=allowed, do=do)
    if not isinstance(value, dict):
        raise error(str(path), f"a JSON {kind_of(value)}", allowed or "a JSON object", do)
    return value


def required(
    table: Mapping[str, Any],
    key: str,
    kind: type[T],
    where: str,
    error: type[EdgestillError],
    *,
    least: int | None = None,
    most: int = MAX_WHOLE,
    do: str = "",
) -> T:
    """The entry ``key`` of ``table``, which must be a ``kind`` (an int is no bool) and, a number, in range.

    Raises:
        EdgestillError: of class ``error``: it is missing, of another type, or out of range.
    """
    value = table.get(key)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if isinstance(value, int | float) and fits:
        fits = (least is None or value >= least) and value <= most
    if fits:
        return value  # type: ignore[return-value] # isinstance was asked
    names: dict[Any, str] = {str: "a text", dict: "an object", list: "a list", int: "a whole number", float: "a number"}
    allowed = names.get(kind) or str(getattr(kind, "__name__", kind))
    if kind in (int, float) and least is not None:
        allowed += f" of at least {least}" if most == MAX_WHOLE else f" from {least} to {most}"
    got = f"no {key}" if key not in table else f"{key} is {shown(value)}"
    raise error(where, got, allowed, do)


def checked(kind: Any, value: Any, where: str, error: type[EdgestillError], *, do: str = "") -> None:
    """Hold ``value`` against the type ``kind`` (a TypedDict, a dataclass), as strictly as JSON has types.

    Raises:
        EdgestillError: of class ``error``, with the dotted key of the first value that does not fit.
    """
    from pydantic import ValidationError  # takes a tenth of a second

    try:
        if isinstance(kind, type) and is_dataclass(kind):  # of Python values only an instance would do
            _adapter(kind).validate_json(json.dumps(value), strict=True)
        else:
            _adapter(kind).validate_python(value, strict=True)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        missing = first["type"] == "missing"
        got = f"no {key}" if missing else f"{key} is {shown(first['input'])}" if key else shown(first["input"])
        allowed = "this key" if missing else str(first["msg"]).removeprefix("Input should be ")
        raise error(where, got, allowed, do) from None


@lru_cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def shown(value: Any) -> str:
    """``value`` for a message: its beginning, whatever its size."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * MAX_DIGITS:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def kind_of(value: Any) -> str:
    """The JSON type of ``value`` in words."""
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
