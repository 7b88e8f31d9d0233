"""Checks values that were read from YAML against pydantic models, in the user's words.

`check` validates one part of a `Document` and notes every error of pydantic as a `Problem`: file and line, dotted
key, what was got, what is expected, and for a misspelt name the nearest one. Values are checked as JSON, so that a
list fits a tuple and nothing else is coerced. Knows nothing of profiles or stages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.names import nearest
from compress.yaml_reader import Document, KeyPath, Problem, dotted, plain_scalar

M = TypeVar("M", bound=BaseModel)

# pydantic's error types -> what is expected there; {name} stands for an entry of the error's context.
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a value for this key",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "multiple_of": "a multiple of {multiple_of}",
    "path_type": "a path",
    "set_type": "a list",
    "string_pattern_mismatch": "text like {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "a string",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": "a list",
}
YAML_1_1_BOOLEANS = frozenset({"yes", "no", "on", "off", "y", "n"})
LONGEST = 60  # characters of a value that a message shows


def check(
    model: type[M],
    document: Document,
    path: KeyPath,
    value: Any,
    *,
    names: Sequence[str] | None = None,
    given: Any = None,
) -> M | None:
    """Validate ``value``, which stands at ``path`` of ``document``; None when it is wrong.

    Every error is added to ``document.problems``.

    Args:
        names: keys to list for an unknown key at the top, when they are not just the model's.
        given: what stands in the file, when ``value`` wraps it in keys that the file does not have.
    """
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        details = error.errors(include_url=False)
    tree = value if given is None else given
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in details:
        grouped.setdefault(_real_path(detail["loc"], tree, detail["type"]), []).append(detail)
    for tail, group in grouped.items():
        known = names if names is not None and len(tail) == 1 else _names_at(model, group[0]["loc"][:-1])
        document.problems.append(_problem(document, path + tail, group, known))
    return None


def shown(value: Any, raw: str = "") -> str:
    """A value for a message: short, in YAML's words, and as it was written where that looks different."""
    if isinstance(value, dict):
        return f"a mapping of {len(value)}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else value[:LONGEST] + "...")
    if value is None:
        return "nothing (null)"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{text} (written {raw})" if raw and raw != text else text


def _real_path(loc: Sequence[int | str], value: Any, kind: str) -> KeyPath:
    """pydantic's location without the names of union branches, which are no keys of the file."""
    path: list[int | str] = []
    for at, part in enumerate(loc):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
            path.append(part)
        elif kind == "missing" and at == len(loc) - 1:
            path.append(part)
    return tuple(path)


def _problem(document: Document, path: KeyPath, group: Sequence[ErrorDetails], known: Sequence[str]) -> Problem:
    """One problem for all errors at one place (a union gives one for each branch); ``known`` are the keys there."""
    place, key, first = document.place(path), dotted(path), group[0]
    value = first["input"]
    if first["type"] == "extra_forbidden":
        unknown = str(path[-1])
        return Problem(place.origin, key, "unknown key", "one of " + ", ".join(known), nearest(unknown, known))
    if first["type"] == "missing":
        return Problem(place.origin, key, "missing", EXPECTED["missing"])
    if first["type"] == "value_error" and isinstance(value, (dict, list)):
        return Problem(place.origin, key, _expected(first))
    expected = list(dict.fromkeys(_expected(detail) for detail in group))
    return Problem(
        place.origin, key, f"got {shown(value, place.raw)}", " or ".join(expected), _advice(value, place.raw, group)
    )


def _expected(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "value_error" and "error" in context:
        return str(context["error"])
    template = EXPECTED.get(detail["type"])
    if template is None:
        return detail["msg"][:1].lower() + detail["msg"][1:]
    return template.format(**{name: _short(value) for name, value in context.items()})


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _advice(value: Any, raw: str, group: Sequence[ErrorDetails]) -> str:
    """What to do about the traps of YAML, and the nearest of the allowed words."""
    types = {detail["type"] for detail in group}
    if isinstance(value, str):
        if "bool_type" in types and value.lower() in YAML_1_1_BOOLEANS:
            return f"In YAML 1.2 {value} is a string: write true or false."
        if types & {"int_type", "float_type"} and isinstance(plain_scalar(value), (int, float)):
            return "Remove the quotes."
        words = [word for detail in group for word in _words(detail)]
        return nearest(value, words)
    if "string_type" in types and value is not None and not isinstance(value, (dict, list)):
        return f'Quote it: "{raw or value}".'
    return ""


def _words(detail: ErrorDetails) -> list[str]:
    """The allowed words of a Literal, from pydantic's ``'a', 'b' or 'c'``."""
    if detail["type"] != "literal_error":
        return []
    return [word.strip(" '") for word in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _names_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the keys that are allowed at pydantic's ``loc`` inside ``model``."""
    models = [model]
    for part in loc:
        fields = [inner.model_fields[part] for inner in models if isinstance(part, str) and part in inner.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return list(dict.fromkeys(name for inner in models for name in inner.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that occur in an annotation such as ``list[X] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in _models_in(argument)]
