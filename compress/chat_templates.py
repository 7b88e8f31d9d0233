"""Chat templates rendered with bounds: a template is a program that came with a model.

`render` gives what transformers' ``apply_chat_template`` gives, with its own environment of filters and functions, and
ends in `TemplateFault` where the template fails, takes longer than `MAX_SECONDS` of processor time, or makes a text or
a list larger than `MAX_SIZE`. The template's tree is changed before it is compiled: what a loop goes over, what is
joined by ``~`` and what is compared is counted first; operators, calls and filters are looked at by the sandbox. Knows
nothing of tokens.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE = 256 << 10  # characters of a template
MAX_SECONDS = 3.0  # of processor time for one conversation, which takes milliseconds
MAX_SIZE = 4 << 20  # characters of a text; an entry of a list counts as `ENTRY` of them
ENTRY = 8
MAX_COUNT = 1 << 20  # of what a number may ask for: a width, a repetition
MAX_BITS = 4096  # of a number; Python refuses to print larger ones
_WIDTH = re.compile(r"[%:{][^%{}a-zA-Z]*(?:\d{5}|\*)|\{[^{}]*\{")


class TemplateFault(ValueError):
    """A template that cannot be rendered, with the reason."""


def render(template: str, messages: Sequence[Mapping[str, Any]], *, generation: bool, tokens: Mapping[str, Any]) -> str:
    """The text of ``messages``; with ``generation`` the beginning of an answer behind it.

    ``tokens`` are the tokenizer's special tokens by name, as its ``special_tokens_map``.

    Raises:
        TemplateFault: the template refuses the messages, fails, or goes beyond a bound.
    """
    try:
        compiled = _compiled(template)
        environment: Any = compiled.environment
        environment.clock.ends = time.thread_time() + MAX_SECONDS
        values = dict(tokens) | {"messages": _with_thoughts(messages), "add_generation_prompt": generation}
        pieces, size = [], 0
        for piece in compiled.generate(values | {"tools": None, "documents": None}):
            size += len(piece)
            _limit(size)
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # half a surrogate pair is no text
        return text
    except (MemoryError, RecursionError) as error:
        raise TemplateFault(f"{type(error).__name__}: it takes too much memory or nesting") from error
    except Exception as error:
        raise TemplateFault((str(error).splitlines() or [type(error).__name__])[0][:300]) from error


def _with_thoughts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of ``messages``, with the names for thoughts that transformers makes one of the other."""
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

    found: list[dict[str, Any]] = _alias_reasoning_fields(_plain_template_data([dict(one) for one in messages]))
    return found


@lru_cache(maxsize=8)
def _compiled(text: str) -> Template:
    """``text`` compiled in transformers' environment, with bounds put in."""
    if len(text) > MAX_TEMPLATE:
        raise TemplateFault(f"the template has {len(text)} characters, more than {MAX_TEMPLATE}")
    environment = _bounded_environment()
    tree = environment.parse(text)
    _bound(tree)
    found: Template = environment.from_string(tree)
    return found


def _bounded_environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class Bounded(ImmutableSandboxedEnvironment):
        """The sandbox, which also counts."""

        intercepted_binops = frozenset(("*", "**", "+", "%"))
        clock = threading.local()  # ``ends``: when this thread must be done, in its processor time

        def tick(self) -> None:
            """Raise TemplateFault when the time is over."""
            if time.thread_time() > self.clock.ends:
                raise TemplateFault(f"not rendered after {MAX_SECONDS:g} s of processor time")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """An operator, when its result is bounded."""
            self.tick()
            _check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            """A call, when its arguments are bounded; so is what it gives."""
            __self.tick()
            method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
            _check_call(getattr(__obj, "__name__", ""), (getattr(method, "__self__", None), *args), kwargs)
            return __self.checked(super().call(__context, __obj, *args, **kwargs))

        def checked(self, value: Any) -> Any:
            """``value``, when its size is bounded."""
            _limit(_size(value))
            return value

    own = _compile_jinja_template("").environment
    kinds = [type(extension) for extension in own.extensions.values()]
    found = Bounded(trim_blocks=own.trim_blocks, lstrip_blocks=own.lstrip_blocks, extensions=kinds, optimized=False)
    found.finalize = found.checked
    found.globals.update({name: value for name, value in own.globals.items() if name != "lipsum"})
    found.globals.pop("lipsum", None)  # makes up text of any length in one call
    for mine, theirs in ((found.filters, own.filters), (found.tests, own.tests)):
        for name, function in theirs.items():
            mine[name] = _guarded(found, name, function)
    found.filters["_counted"] = lambda value: _Counted(found, value)
    found.filters["_sized"] = found.checked
    return found


class _Counted:
    """What a loop goes over; each step looks at the clock."""

    def __init__(self, environment: Any, value: Any) -> None:
        self.environment, self.value = environment, value
        iter(value)  # what cannot be gone over fails here, as it would have
        if hasattr(value, "__len__"):
            self.__class__ = _CountedSized

    def __iter__(self) -> Iterator[Any]:
        for one in self.value:
            self.environment.tick()
            yield one


class _CountedSized(_Counted):
    """The same of what has a length, which ``loop.length`` asks for."""

    def __len__(self) -> int:
        return len(self.value)


def _guarded(environment: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that looks at its arguments first, and at what it made."""

    @wraps(function)  # the marks by which jinja2 passes a context along are attributes of the function
    def guarded(*args: Any, **kwargs: Any) -> Any:
        environment.tick()
        _check_call(name, args, kwargs)
        return environment.checked(function(*args, **kwargs))

    return guarded


def _bound(tree: Any) -> None:
    """Let everything that a loop goes over, ``~`` joins or a comparison looks at pass through a filter of ours."""
    from jinja2 import nodes

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    for node in list(tree.find_all((nodes.For, nodes.Concat, nodes.Compare, nodes.Operand))):
        if isinstance(node, nodes.For):
            node.iter = through("_counted", node.iter)
        elif isinstance(node, nodes.Concat):
            node.nodes = [through("join", nodes.List(node.nodes, lineno=node.lineno))]
        else:
            node.expr = through("_sized", node.expr)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateFault for a result that is too large."""
    numbers = [value for value in (left, right) if isinstance(value, int)]
    long = [value for value in (left, right) if isinstance(value, str | list | tuple | bytes)]
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        _limit(left.bit_length() * max(right, 0), MAX_BITS)
    elif operator == "*" and long and numbers:
        _limit(_size(long[0]) * max(numbers[0], 0))
    elif operator == "+" and long:
        _limit(_size(left) + _size(right))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_call("%", (left, right), {})
    for number in numbers:
        _limit(number.bit_length(), MAX_BITS // 2)


def _check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TemplateFault for arguments by which a builtin could make something huge in one step."""
    values = (*args, *kwargs.values())
    sizes = [_size(value) for value in values]
    _limit(sum(sizes))
    texts = [len(value) for value in values if isinstance(value, str)]
    asked = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if asked and name not in ("namespace", "dict"):
        _limit(max(map(abs, asked)), MAX_COUNT if name not in _NUMERIC else 1 << MAX_BITS)
    if name in ("replace", "join", "indent", "expandtabs", "translate", "wordwrap"):
        _limit((sum(sizes) + 1) * (max(texts, default=0) + max(asked, default=0) + 1), MAX_SIZE * 1024)
        _limit(_amplified(name, args, kwargs, sizes))
    if name in ("format", "%", "format_map") and any(isinstance(v, str) and _WIDTH.search(v) for v in values[:1]):
        raise TemplateFault("formats with a computed or a very large width")
    if name == "sum" and any(isinstance(value, str | list | tuple | dict) for value in values[-1:]) and len(values) > 1:
        _limit(sizes[0] * sizes[0], MAX_SIZE * 64)


_NUMERIC = ("abs", "int", "float", "round", "string", "tojson", "eq", "ne", "lt", "gt", "le", "ge", "equalto", "format")


def _amplified(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: list[int]) -> int:
    """The most that replacing or joining can make."""
    texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    if name == "replace" and len(texts) >= 3:
        return len(texts[0]) + texts[0].count(texts[1]) * len(texts[2])
    if name == "join":
        return sum(sizes) + max(sizes, default=0) * max((len(text) for text in texts), default=0)
    return sum(sizes)


def _size(value: Any) -> int:
    """Characters and entries of a value with all that is in it; counting stops beyond `MAX_SIZE`."""
    found, open_ = 0, [value]
    while open_ and found <= MAX_SIZE:
        one = open_.pop()
        if isinstance(one, str | bytes):
            found += len(one)
        elif isinstance(one, dict):
            found += ENTRY * len(one)
            open_ += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            found += ENTRY * len(one)
            open_ += one
        elif isinstance(one, int):
            found += one.bit_length() // 4
    return found


def _limit(value: int, most: int = MAX_SIZE) -> None:
    if value > most:
        raise TemplateFault("makes a text, a list or a number beyond all bounds")
