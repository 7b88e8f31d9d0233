"""YAML 1.2 (core schema) into plain values, with the file and line of every one of them.

`read_yaml` reads text, `read_yaml_file` a file; both give a `Document`. PyYAML scans, parses and composes; what a
plain scalar means is decided here, because PyYAML's own resolver follows YAML 1.1, where ``no`` is false, ``2:4`` is
124 and ``1e-5`` a string. Tags, duplicate keys and keys that are not strings are problems; nesting, size and the
number of values after aliases are bounded. Nothing in a file can name code. Knows nothing of profiles or pydantic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from compress.errors import ProfileError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 20_000  # after aliases are followed, so that nine lines cannot stand for a billion values
MAX_DIGITS = 100

KeyPath = tuple[str | int, ...]

# YAML 1.2.2, section 10.3.2, tag resolution of the core schema.
_NAMED: dict[str, bool | float | None] = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{f"{sign}.{name}": float(f"{sign}inf") for sign in ("", "+", "-") for name in ("inf", "Inf", "INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INTEGERS = (
    (re.compile(r"[-+]?[0-9]+"), 10),
    (re.compile(r"0o[0-7]+"), 8),
    (re.compile(r"0x[0-9a-fA-F]+"), 16),
)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NUMBERS = (*(form for form, _ in _INTEGERS), _FLOAT)

_PLAIN, _QUOTED, _COLLECTION = "plain", "quoted", "collection"  # what the resolver gives instead of tags


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: ``origin`` is ``FILE:LINE`` or the text of an override; ``raw`` a scalar as written."""

    origin: str
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, at which dotted key, what was got, what is expected, what to do."""

    origin: str
    key: str
    got: str
    allowed: str = ""
    do: str = ""

    @property
    def where(self) -> str:
        """``FILE:LINE: dotted.key``."""
        return f"{self.origin}: {self.key}" if self.key else self.origin

    def __str__(self) -> str:
        return str(ProfileError(self.where, self.got, self.allowed, self.do))


@dataclass
class Document:
    """A value made of dicts, lists and scalars, the place of each part by its path, and what was wrong with it."""

    source: str
    value: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Place of the value at ``path``, or of the nearest thing around it when there is none."""
        for length in range(len(path), -1, -1):
            found = self.places.get(path[:length])
            if found is not None:
                return found if length == len(path) else Place(found.origin)
        return Place(self.source)

    def complain(self, path: KeyPath, got: str, allowed: str = "", do: str = "") -> None:
        """Note that the value at ``path`` is wrong."""
        self.problems.append(Problem(self.place(path).origin, dotted(path), got, allowed, do))

    def graft(self, path: KeyPath, other: Document) -> None:
        """Put ``other``'s value at ``path``; mappings on the way are made, the rest of the way must exist."""
        for old in [known for known in self.places if known[: len(path)] == path]:
            del self.places[old]
        parent = self.value
        for at, key in enumerate(path[:-1]):
            if isinstance(parent, dict) and parent.get(key) is None:
                parent[key] = {}
                self.places[path[: at + 1]] = other.place(())
            parent = parent[key]
        parent[path[-1]] = other.value
        self.places.update({path + tail: place for tail, place in other.places.items()})


def dotted(path: KeyPath) -> str:
    """``("steps", 3, "model.pruning", "heads")`` as ``steps[3].model.pruning.heads``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def raise_problems(problems: Sequence[Problem], source: str) -> None:
    """Raise one `ProfileError` that lists every problem; do nothing when there is none."""
    unique = sorted(dict.fromkeys(problems), key=_line)
    if not unique:
        return
    if len(unique) == 1:
        only = unique[0]
        raise ProfileError(only.where, only.got, only.allowed, only.do)
    lines = "\n".join(f"  {problem}" for problem in unique)
    raise ProfileError(source, f"{len(unique)} problems\n{lines}")


def _line(problem: Problem) -> int:
    """Line number of a problem in the file; those of overrides come last."""
    line = problem.origin.rpartition(":")[2]
    return int(line) if line.isdecimal() and not problem.origin.startswith("--set") else MAX_BYTES


def plain_scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar stands for in the core schema; all else is a string."""
    if text in _NAMED:
        return _NAMED[text]
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(text):
            return int(text if base == 10 else text[2:], base)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the node tree; untagged nodes get one of three marks instead of a resolved tag."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.nesting = 0

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:  # noqa: ARG002 - PyYAML's signature
        if kind is not ScalarNode:
            return _COLLECTION
        return _PLAIN if implicit[0] else _QUOTED

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node: Node | None = super().compose_node(parent, index)
        self.nesting -= 1
        return node


class _Builder:
    """Turns the node tree into values and places; counts what it makes."""

    def __init__(self, document: Document, origin: str | None) -> None:
        self.document, self.origin = document, origin
        self.made = 0
        self.open: set[int] = set()  # nodes being built, to notice an alias inside its own anchor

    def place(self, node: Node, raw: str = "") -> Place:
        line = node.start_mark.line + 1
        return Place(self.origin if self.origin is not None else f"{self.document.source}:{line}", raw)

    def build(self, node: Node, path: KeyPath) -> Any:
        self.made += 1
        self.document.places[path] = self.place(node, node.value if isinstance(node, ScalarNode) else "")
        if self.made > MAX_VALUES:
            raise _TooMuch
        if node.tag not in (_PLAIN, _QUOTED, _COLLECTION):
            self.document.complain(path, f"got the tag {_tag(node)}", "plain YAML without tags")
            return None
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            self.document.complain(path, "got an alias to something that contains it", "a tree")
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, at)) for at, item in enumerate(node.value)]
            return self.mapping(node, path) if isinstance(node, MappingNode) else None
        finally:
            self.open.discard(id(node))

    def scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        if node.tag == _QUOTED:
            return node.value
        if len(node.value) > MAX_DIGITS and any(form.fullmatch(node.value) for form in _NUMBERS):
            self.document.complain(path, f"got a number of {len(node.value)} digits", f"at most {MAX_DIGITS} digits")
            return 0
        return plain_scalar(node.value)

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node, path)
            if key is None:
                continue
            if key in result:
                first = self.document.places[(*path, key)].origin.replace(f"{self.document.source}:", "on line ")
                problem = Problem(
                    self.place(key_node).origin, dotted((*path, key)), f"the key is given twice, first {first}"
                )
                self.document.problems.append(problem)
                continue
            result[key] = self.build(value_node, (*path, key))
            # An error in a value is looked for at the key: the value of a long mapping begins a line below it.
            raw = self.document.places[(*path, key)].raw
            self.document.places[(*path, key)] = self.place(key_node, raw)
        return result

    def key(self, node: Node, path: KeyPath) -> str | None:
        origin = self.place(node).origin
        tagged = node.tag not in (_PLAIN, _QUOTED)
        if not isinstance(node, ScalarNode) or tagged:
            what = f"the tag {_tag(node)}" if isinstance(node, ScalarNode) else "a list or mapping as a key"
            self.document.problems.append(Problem(origin, dotted(path), f"got {what}", "a plain name as key"))
            return None
        value = plain_scalar(node.value) if node.tag == _PLAIN and len(node.value) <= MAX_DIGITS else node.value
        if not isinstance(value, str):
            hint = f'Quote it: "{node.value}".' if node.value else ""
            got = f"got the key {node.value}, which is no string" if node.value else "got an empty key"
            self.document.problems.append(Problem(origin, dotted(path), got, "a name as key", hint))
            return None
        return value


def _tag(node: Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


class _TooMuch(Exception):
    """More values than allowed."""


def read_yaml(text: str, source: str, *, origin: str | None = None) -> Document:
    """Read one YAML document.

    Args:
        source: name of the file, for messages.
        origin: what to give as the place of every value instead of ``source:LINE``, for an override.

    Returns:
        The document; ``problems`` holds what can be listed together (duplicate keys, tags). An empty text gives
        ``None``.

    Raises:
        ProfileError: not YAML, more than one document, too large, too deep, or too many values behind aliases.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ProfileError(source, "too large", f"at most {MAX_BYTES // 1024} KiB")
    document = Document(source)
    builder = _Builder(document, origin)
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            document.value = builder.build(node, ())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, source, origin) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        got = f"a character that YAML does not allow (U+{ord(text[error.position]):04X})"
        raise ProfileError(origin or f"{source}:{line}", got, "printable UTF-8 text") from error
    except _TooMuch as error:
        raise ProfileError(
            origin or source, f"more than {MAX_VALUES} values after its aliases are followed", "a small file"
        ) from error
    return document


def _syntax_error(error: yaml.MarkedYAMLError, source: str, origin: str | None) -> ProfileError:
    """PyYAML's message as ours: ``FILE:LINE: not YAML: ...``."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    said = " ".join(part for part in (error.context, error.problem) if part)
    do = ""
    if "found character '\\t'" in said:
        do = "Indent with spaces, not tabs."
    elif "mapping values are not allowed here" in said:
        do = "Quote a text that holds a colon and a space."
    return ProfileError(origin or f"{source}:{line}", f"not YAML: {said}", do=do)


def read_yaml_file(path: Path, source: str | None = None) -> Document:
    """Read a YAML file; ``source`` is its name in messages, the path as given when left out.

    Raises:
        ProfileError: missing, not readable, not UTF-8, or anything that `read_yaml` refuses.
    """
    name = source or str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(name, error.strerror or str(error), "a readable YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ProfileError(name, "too large", f"at most {MAX_BYTES // 1024} KiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ProfileError(f"{name}:{line}", f"the byte 0x{raw[error.start]:02x} is not UTF-8", "UTF-8 text") from error
    return read_yaml(text, name)
