"""A chat template in a form that the device renders as transformers does.

transformers trims the blocks of a template and has all of Jinja; the runtime does neither, and some of what it takes
means something else there. `runtime_form` rewrites a template that needs nothing but what is known to be alike, with
every blank explicit; `tree` writes any other one down as lists that ``run.py`` walks. Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from compress.errors import ModelError
from deploy.bundle_runner.run import ARITHMETIC, FILTERS, METHODS, TESTS, Template

_MORE_FILTERS = ("map", "select", "reject", "selectattr", "rejectattr")
_JINJA_GLOBALS = ("cycler", "joiner", "lipsum")
_GIVEN = (
    "tools",
    "documents",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_TOKENS = {"bos_token", "eos_token"}  # that the runtime gives a template too
_METHODS = frozenset(name for names in METHODS.values() for name in names) | {"cycle"}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "lteq": "<=", "gt": ">", "gteq": ">="}
_SAME_TESTS = ("defined", "none", "string", "mapping")
_SAME_METHODS = ("strip", "lstrip", "rstrip", "startswith", "endswith", "split")
_LOOP = ("index", "index0", "first", "last", "length")
_DO = "Correct the template in the model folder (chat_template.jinja), or leave the chat template out of it"


class NotAlike(Exception):
    """Something that the runtime renders otherwise, or may; the text says what."""


class _Generation(Extension):
    """``{% generation %}`` marks what is learned in training and changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


def _environment(*, trimmed: bool) -> ImmutableSandboxedEnvironment:
    extensions = [_Generation, loopcontrols]
    return ImmutableSandboxedEnvironment(trim_blocks=trimmed, lstrip_blocks=trimmed, extensions=extensions)


def parse(template: str, where: str) -> nodes.Template:
    """The template as transformers reads it; ModelError where it is no Jinja."""
    try:
        return _environment(trimmed=True).parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise ModelError(where, f"is no Jinja template ({error})", "one that transformers renders", _DO) from error


def tree(template: str, where: str) -> list[Any]:
    """The template as lists of a node's kind and its parts, for ``run.py``.

    Raises ModelError for what ``run.py`` does not know, naming it.
    """
    parsed = parse(template, where)
    last = {id(part) for output in parsed.find_all(nodes.Output) for part in output.nodes}
    for node in parsed.find_all(nodes.Node):
        reason = _unknown(node)
        if isinstance(node, nodes.Filter) and node.name == "safe" and id(node) not in last:
            reason = "the filter safe before others"  # Jinja escapes what is joined to it
        if reason:
            raise ModelError(where, f"uses {reason}, which the device cannot render", "plain Jinja", _DO)
    found: list[Any] = _written(parsed)
    return found


def _unknown(node: nodes.Node) -> str:
    """What ``run.py`` does not know in ``node``; empty for nothing."""
    kind, found = type(node).__name__, ""
    if isinstance(node, nodes.Filter):
        found = _unknown_filter(node)
    elif isinstance(node, nodes.Test):
        found = "" if node.name in TESTS else f"the test {node.name}"
    elif isinstance(node, nodes.Name):
        found = node.name if node.name in _JINJA_GLOBALS else ""
    elif isinstance(node, nodes.For):
        found = "a recursive loop" if node.recursive else ""
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        found = "" if node.node.attr in _METHODS else f"the method {node.node.attr}"
    elif isinstance(node, nodes.Const):
        found = "" if isinstance(node.value, str | int | float | bool | None) else f"the value {node.value!r}"
    if isinstance(node, nodes.Call | nodes.Filter | nodes.Test) and (node.dyn_args or node.dyn_kwargs):
        found = "arguments given as a list (*)"
    known = {nodes.Template, nodes.Operand, nodes.Pair, nodes.Keyword, nodes.NSRef}
    known |= {getattr(nodes, name) for name in ARITHMETIC}
    there = type(node) in known or hasattr(Template, f"do_{kind}") or hasattr(Template, f"of_{kind}")
    return found or ("" if there else f"{kind} (line {node.lineno})")


def _unknown_filter(node: nodes.Filter) -> str:
    if node.name == "map" and node.args:
        name = node.args[0].value if isinstance(node.args[0], nodes.Const) else None
        return "" if name in FILTERS else f"map by {name!r}"
    return "" if node.name in FILTERS or node.name in _MORE_FILTERS else f"the filter {node.name}"


def _written(value: Any) -> Any:
    """A node, a list of nodes or a plain value as JSON."""
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    if not isinstance(value, nodes.Node):
        return value
    left_out = ("ctx", "dyn_args", "dyn_kwargs")
    return [type(value).__name__, *(_written(getattr(value, name)) for name in value.fields if name not in left_out)]


def needs_no_trimming(template: str) -> bool:
    """Whether trimming the template's blocks changes nothing, and its texts hold no escapes that are read otherwise."""
    trimmed, plain = (_environment(trimmed=flag).parse(template) for flag in (True, False))
    return trimmed == plain and "\\u" not in template and "\\x" not in template


def runtime_form(template: str, variables: Collection[str], where: str) -> str:
    """The template with every blank explicit, of what the runtime is known to render as transformers does.

    ``variables`` are the special tokens that a template may name. Raises NotAlike where it needs more, ModelError where
    it is no template.
    """
    parsed = parse(template, where)
    return _RuntimeForm(parsed, frozenset(variables)).block(parsed.body)


class _RuntimeForm:
    """Writes a parsed template in Jinja again; NotAlike for all that is not known to mean the same in the runtime."""

    def __init__(self, parsed: nodes.Template, variables: Collection[str]) -> None:
        self.targets = {node.target.name for node in parsed.find_all(nodes.For) if isinstance(node.target, nodes.Name)}
        assigned = {node.target.name for node in parsed.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)}
        self.known = {"messages", "add_generation_prompt", "loop", *(_TOKENS & set(variables)), *assigned}
        self.lists = {"messages"}
        self.active: list[str] = []  # what the loops around run over
        self.bodies: list[list[nodes.Node]] = []  # and what they hold

    def block(self, body: Sequence[nodes.Node]) -> str:
        """Statements one after the other."""
        return "".join(self.statement(node, body[:at]) for at, node in enumerate(body))

    def statement(self, node: nodes.Node, before: Sequence[nodes.Node]) -> str:
        """One statement; those ``before`` it stand in the same body."""
        if isinstance(node, nodes.Output):
            return "".join(f"{{{{- {self.value(part)} -}}}}" for part in node.nodes)
        if isinstance(node, nodes.If):
            first = f"{{%- if {self.condition(node.test)} -%}}{self.block(node.body)}"
            others = [f"{{%- elif {self.condition(one.test)} -%}}{self.block(one.body)}" for one in node.elif_]
            last = f"{{%- else -%}}{self.block(node.else_)}" if node.else_ else ""
            return f"{first}{''.join(others)}{last}{{%- endif -%}}"
        if isinstance(node, nodes.For):
            return self.loop(node)
        if isinstance(node, nodes.Assign):
            return f"{{%- set {self.target(node, before)} = {self.value(node.node)} -%}}"
        raise NotAlike(type(node).__name__.lower())

    def loop(self, node: nodes.For) -> str:
        """A loop over values by one name."""
        if node.recursive or node.else_ or not isinstance(node.target, nodes.Name):
            raise NotAlike("a loop with else, of several names, or recursive")
        values = self.value(node.iter)
        self.active.append(node.target.name)
        self.bodies.append(node.body)
        test = "" if node.test is None else f" if {self.condition(node.test)}"
        body = self.block(node.body)
        self.active.pop()
        self.bodies.pop()
        return f"{{%- for {node.target.name} in {values}{test} -%}}{body}{{%- endfor -%}}"

    def target(self, node: nodes.Assign, before: Sequence[nodes.Node]) -> str:
        """What is set. In a loop the runtime keeps the value for the next turn, so that nothing may read it before."""
        if isinstance(node.target, nodes.NSRef):
            return f"{node.target.name}.{node.target.attr}"
        if not isinstance(node.target, nodes.Name) or node.target.name in self.targets:
            raise NotAlike("several names set at once")
        name = node.target.name
        if self.active:
            used = {one.name for part in (*before, node.node) for one in part.find_all(nodes.Name)}
            if not any(one is node for one in self.bodies[-1]) or name in used or _is_name(node.node, name):
                raise NotAlike("a name that is set in a loop under a condition")
        if _is_list(node.node, self.lists):
            self.lists.add(name)
        return name

    def condition(self, node: nodes.Node) -> str:
        """An expression of which only the truth counts: the runtime gives true where Jinja gives a value."""
        if isinstance(node, nodes.And | nodes.Or):
            word = "and" if isinstance(node, nodes.And) else "or"
            return f"({self.condition(node.left)} {word} {self.condition(node.right)})"
        if isinstance(node, nodes.Not):
            return f"(not {self.condition(node.node)})"
        return self.value(node)

    def value(self, node: nodes.Node) -> str:
        """An expression."""
        write = getattr(self, f"of_{type(node).__name__}", None)
        if write is None:
            raise NotAlike(type(node).__name__.lower())
        return str(write(node))

    def of_TemplateData(self, node: nodes.TemplateData) -> str:
        return json.dumps(node.data, ensure_ascii=False)

    def of_Const(self, node: nodes.Const) -> str:
        value = node.value
        if isinstance(value, str) and not any(ord(char) < 32 and char not in "\n\t\r" for char in value):
            return json.dumps(value, ensure_ascii=False)
        if value is None or isinstance(value, bool):
            return "none" if value is None else str(value).lower()
        if isinstance(value, int):
            return str(value)
        raise NotAlike(f"the value {value!r}")

    def of_Name(self, node: nodes.Name) -> str:
        outside = node.name in self.targets and node.name not in self.active
        if outside or (node.name not in self.known and node.name not in self.active):
            raise NotAlike(node.name)
        return str(node.name)

    def of_Not(self, node: nodes.Not) -> str:
        return self.condition(node)

    def of_Compare(self, node: nodes.Compare) -> str:
        if len(node.ops) > 1 or node.ops[0].op not in _COMPARED:
            raise NotAlike(
                "the test in" if {one.op for one in node.ops} & {"in", "notin"} else "a chain of comparisons"
            )
        return f"({self.value(node.expr)} {_COMPARED[node.ops[0].op]} {self.value(node.ops[0].expr)})"

    def of_Add(self, node: nodes.Add) -> str:
        return f"({self.value(node.left)} + {self.value(node.right)})"

    def of_Sub(self, node: nodes.Sub) -> str:
        return f"({self.value(node.left)} - {self.value(node.right)})"

    def of_Mod(self, node: nodes.Mod) -> str:
        counted = isinstance(node.left, nodes.Getattr) and _is_name(node.left.node, "loop")
        if not counted:  # of a text it is a format, and the runtime takes another sign
            raise NotAlike("a remainder")
        return f"({self.value(node.left)} % {self.value(node.right)})"

    def of_Concat(self, node: nodes.Concat) -> str:
        return f"({' ~ '.join(self.value(one) for one in node.nodes)})"

    def of_CondExpr(self, node: nodes.CondExpr) -> str:
        if node.expr2 is None:
            raise NotAlike("a choice without else")
        return f"({self.value(node.expr1)} if {self.condition(node.test)} else {self.value(node.expr2)})"

    def of_Getattr(self, node: nodes.Getattr) -> str:
        if _is_name(node.node, "loop") and node.attr not in _LOOP:
            raise NotAlike(f"loop.{node.attr}")
        return f"{self.value(node.node)}.{node.attr}"

    def of_Getitem(self, node: nodes.Getitem) -> str:
        """An entry by name, or of a list by its place; texts are not cut, since the runtime counts their bytes."""
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return f"{self.value(node.node)}[{self.of_Const(node.arg)}]"
        if not (isinstance(node.node, nodes.Name) and node.node.name in self.lists):
            raise NotAlike("a place in what may be a text")
        if isinstance(node.arg, nodes.Slice) and node.arg.step is None:
            parts = ["" if part is None else self.value(part) for part in (node.arg.start, node.arg.stop)]
            return f"{self.value(node.node)}[{':'.join(parts)}]"
        return f"{self.value(node.node)}[{self.value(node.arg)}]"

    def of_Neg(self, node: nodes.Neg) -> str:
        return f"-{self.value(node.node)}"

    def of_Filter(self, node: nodes.Filter) -> str:
        counted = node.name == "length" and isinstance(node.node, nodes.Name) and node.node.name in self.lists
        if node.node is None or node.args or node.kwargs or not (node.name == "trim" or counted):
            raise NotAlike(f"the filter {node.name}")
        return f"({self.value(node.node)} | {node.name})"

    def of_Test(self, node: nodes.Test) -> str:
        if node.name in ("defined", "undefined") and isinstance(node.node, nodes.Name):
            if node.node.name in (*self.known, *self.targets, *_GIVEN):
                raise NotAlike(f"{node.node.name} is {node.name}")
            return "false" if node.name == "defined" else "true"  # nothing else is ever given
        if node.name not in _SAME_TESTS:
            raise NotAlike(f"the test {node.name}")
        return f"({self.value(node.node)} is {node.name})"

    def of_Call(self, node: nodes.Call) -> str:
        called, given = node.node, ", ".join(self.value(one) for one in node.args)
        if isinstance(called, nodes.Getattr) and called.attr in _SAME_METHODS and not node.kwargs:
            if len(node.args) == 1 or (called.attr.endswith("strip") and not node.args):
                return f"{self.value(called.node)}.{called.attr}({given})"
        elif isinstance(called, nodes.Name) and called.name == "raise_exception":
            return f"raise_exception({given})"
        elif isinstance(called, nodes.Name) and called.name == "namespace" and not node.args:
            named = ", ".join(f"{one.key}={self.value(one.value)}" for one in node.kwargs)
            return f"namespace({named})"
        raise NotAlike(f"{getattr(called, 'attr', None) or getattr(called, 'name', 'a call')}()")


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _is_list(node: nodes.Node, lists: Collection[str]) -> bool:
    """Whether ``node`` is surely a list of messages."""
    sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    inner = node.node if sliced else node  # type: ignore[attr-defined]
    return isinstance(inner, nodes.Name) and inner.name in lists
