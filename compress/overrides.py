"""``--set a.b=c``: puts single values into a profile that was read, before it is validated.

`apply` takes a text ``KEY=VALUE``; VALUE is YAML. A step is named by its index or by what it does:
``steps[3].model.pruning.heads=4`` and ``steps[model.pruning].heads=4`` are the same when there is one such step.
Mappings on the way are made when missing; lists and steps must be there. Knows keys only, not what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import ProfileError
from compress.names import nearest
from compress.validation import shown
from compress.yaml_reader import Document, KeyPath, Problem, dotted, read_yaml

_KEY = re.compile(r"[^.\[\]=\s]+(\.[^.\[\]=\s]+|\[[^\[\]=\s]+\])*")
_DIGITS = 9  # of an index
_SHOWN = 200  # characters of an override in a message
_TOKEN = re.compile(r"\[([^\]]+)\]|([^.\[\]]+)")
FORM = "KEY=VALUE such as seed=7 or steps[2].model.pruning.heads=4"


@dataclass(frozen=True, slots=True)
class Override:
    """One parsed override: the path as tokens (an index in brackets has ``bracket``), and its value."""

    text: str
    tokens: tuple[tuple[str, bool], ...]  # (name, written in brackets)
    value: Document

    @property
    def origin(self) -> str:
        """What messages give as the place."""
        return _origin(self.text)


class _Wrong(Exception):
    """An override that fits nowhere; carries the parts of the message."""

    def __init__(self, got: str, allowed: str = "", do: str = "") -> None:
        super().__init__(got)
        self.got, self.allowed, self.do = got, allowed, do


def _origin(text: str) -> str:
    """What messages give as the place: the override, or the beginning of a long one."""
    return f"--set {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def parse(text: str) -> Override:
    """Split ``KEY=VALUE`` and read VALUE as YAML.

    Raises:
        ProfileError: no ``=``, a key that is none, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    origin = _origin(text)
    if not equals or not _KEY.fullmatch(key):
        raise ProfileError(origin, f"got {text[:_SHOWN]!r}", FORM)
    tokens = tuple((match[1] or match[2], bool(match[1])) for match in _TOKEN.finditer(key))
    return Override(text, tokens, read_yaml(value, origin, origin=origin))


def apply(document: Document, text: str) -> list[KeyPath]:
    """Put the override ``text`` into ``document``; give back the path that was set, in a list.

    What is wrong with it is added to ``document.problems``, and the list is empty.
    """
    try:
        override = parse(text)
    except ProfileError as error:
        document.problems.append(Problem(error.where, "", error.got, error.allowed, error.do))
        return []
    document.problems.extend(override.value.problems)
    try:
        path = _locate(document.value, override.tokens)
    except _Wrong as error:
        key = override.text.partition("=")[0]
        document.problems.append(Problem(override.origin, key, error.got, error.allowed, error.do))
        return []
    document.graft(path, override.value)
    return [path]


def _locate(value: Any, tokens: Sequence[tuple[str, bool]]) -> KeyPath:
    """The path that ``tokens`` name in ``value``; its end may not exist yet."""
    path: list[str | int] = []
    at = 0
    while at < len(tokens):
        name, bracket = tokens[at]
        if bracket:
            steps = _entry(value, name, tuple(path))
            at += 1
        elif value is None or isinstance(value, dict):
            steps, used = _keys(value or {}, tokens[at:], tuple(path))
            at += used
        else:
            raise _Wrong(f"{dotted(tuple(path))} is {shown(value)}", "a mapping there")
        for step in steps:
            value = value.get(step) if isinstance(value, dict) else None if value is None else value[step]
            path.append(step)
    return tuple(path)


def _entry(value: Any, name: str, path: KeyPath) -> list[str | int]:
    """The list entry ``[name]``: an index, or a stage or stage.method that occurs once in a list of steps."""
    where = dotted(path)
    if not isinstance(value, list):
        raise _Wrong(f"{where} is {shown(value) if value is not None else 'not there'}", "a list there")
    if name.isdecimal():
        if len(name) > _DIGITS or int(name) >= len(value):
            raise _Wrong(f"{where} has {len(value)} entries", f"an index from 0 to {len(value) - 1}")
        return [int(name)]
    names = [_names(entry) for entry in value]
    found = [index for index, entry in enumerate(names) if name in entry]
    if len(found) == 1:
        return [found[0], names[found[0]][0]]
    if found:
        several = ", ".join(f"{where}[{index}]" for index in found)
        raise _Wrong(f"{name} is {several}", "the index of one of them")
    known = [word for entry in names for word in entry]
    raise _Wrong(f"{where} has no {name!r}", "one of " + ", ".join(known), nearest(name, known))


def _names(step: Any) -> list[str]:
    """``model.pruning`` and ``model.pruning.structured`` for such a step; nothing for what is no step."""
    if not isinstance(step, dict) or len(step) != 1:
        return []
    ((stage, params),) = step.items()
    method = params.get("method") if isinstance(params, dict) else None
    return [stage, f"{stage}.{method}"] if isinstance(method, str) else [stage]


def _keys(value: dict[str, Any], tokens: Sequence[tuple[str, bool]], path: KeyPath) -> tuple[list[str | int], int]:
    """The key that the next tokens name, and how many tokens it took: a stage's name is one key with a dot in it."""
    run = 0
    while run < len(tokens) and not tokens[run][1]:
        run += 1
    for length in range(run, 0, -1):
        key = ".".join(name for name, _ in tokens[:length])
        if key in value:
            return [key], length
    if len(path) == 2 and path[0] == "steps":
        asked = ".".join(name for name, _ in tokens[:2])
        raise _Wrong(f"{dotted(path)} is {next(iter(value), 'empty')}, not {asked}", do="See: edgestill plan PROFILE")
    if run < len(tokens):
        missing = ".".join(name for name, _ in tokens[:run])
        raise _Wrong(f"{dotted((*path, missing))} is not there", "a list there")
    return [tokens[0][0]], 1
