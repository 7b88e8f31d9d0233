"""Mutations of valid inputs, all drawn from one seed: JSON by its structure, YAML by its lines, anything by its bytes.

Nothing that brings another program down is stored: every input is made from a valid one and a number.
"""

# ruff: noqa: E501 - long tables of what goes wrong
from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

RAW = "@@RAW%d@@"  # stands in a value for text that no JSON writer makes
RAW_TEXTS = (
    "9" * 5000,
    "-" + "9" * 5000,
    "1e999",
    "NaN",
    "-Infinity",
    "[" * 120 + "]" * 120,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 300 + "1" + "}" * 300,
    '"\\ud800"',
    '"a\\udfff\\ud83d"',
    "1.0e5",
    "0." + "3" * 4000,
    "tru",
    "'x'",
    '{"a": 1, "a": 2}',
)
HUGE = "[" * 100_000
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**12, 10**40, -(10**12), 0.0, -0.5, 0.1, 1e308, 1e-300,
    "", " ", "x", "0", "-1", "a" * 300, "a" * 100_000, "\x00", "\x1b[31mred\x07", "\u202e", "../../x", "/etc/passwd", "a/b", ".", "..",
    "C:\\x", "\U0001f600" * 20, "%s%n{}{{", "http://[::1", [], [1], ["a", "b"], [[]], [None] * 50, {}, {"a": 1}, {"": {}},
    {"type": "Nope"}, [{"a": []}], list(range(200)), {"\x00": 0},
)  # fmt: skip


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in ``value``; of a long list or table a few entries only."""
    found = [at]
    if isinstance(value, dict):
        for key in list(value)[:60]:
            found += paths_of(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 6)):
            found += paths_of(value[index], (*at, index))
    return found


def changed(value: Any, draw: random.Random) -> Any:
    """One structural change somewhere in ``value``."""
    path = draw.choice(paths_of(value))
    if not path:
        return draw.choice(JUNK) if draw.random() < 0.3 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = draw.randrange(9)
    if kind <= 2:
        parent[key] = draw.choice(JUNK)
    elif kind == 3:
        parent[key] = RAW % draw.randrange(len(RAW_TEXTS))
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        parent[key] = {"x": old} if draw.random() < 0.5 else [old] * draw.choice((1, 2, 40))
    elif kind == 6 and isinstance(parent, dict):
        parent[draw.choice(("", "\x00", "zzz", "bits", "files", "a" * 1000, "\u0130"))] = old
    elif kind == 7 and isinstance(old, int) and not isinstance(old, bool):
        parent[key] = draw.choice((old + 1, old - 1, -old, old * 1000, old * 10**9, float(old), str(old), 0))
    elif isinstance(old, str):
        parent[key] = draw.choice((old + "\x00", old * 1000, old[:-1], old.upper(), old + "\n", "\ufeff" + old))
    else:
        parent[key] = draw.choice(JUNK)
    return value


def json_bytes(seed: bytes, draw: random.Random) -> bytes:
    """A JSON text with one to three changes of its structure, or a few of its bytes."""
    kind = draw.random()
    if kind < 0.03:
        return draw.choice(
            (b"", b"[]", b"null", b"5", b'"x"', HUGE.encode(), b"\xef\xbb\xbf" + seed, seed + seed, b"\xff\xfe")
        )
    if kind < 0.15:
        return some_bytes(seed, draw)
    value = json.loads(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = changed(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    for number, raw in enumerate(RAW_TEXTS):
        text = text.replace(json.dumps(RAW % number), raw)
    return text.encode("utf-8", "surrogatepass")


def some_bytes(seed: bytes, draw: random.Random) -> bytes:
    """A few bytes flipped, cut, put in, repeated or zeroed."""
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(data) + 1)
        if draw.random() < 0.5:
            at = min(at, draw.randrange(300))  # headers
        kind, size = draw.randrange(6), draw.choice((1, 2, 8, 100))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(size))
        elif kind == 3:
            data[at:at] = data[at : at + size] * draw.choice((1, 3, 50))
        elif kind == 4:
            data[at : at + size] = draw.choice((b"\0", b"\xff", b"\x80")) * size
        else:
            del data[at : at + size]
    return bytes(data)


def safetensors_bytes(seed: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose length, header or data is changed."""
    length = struct.unpack("<Q", seed[:8])[0]
    header, data = seed[8 : 8 + length], seed[8 + length :]
    kind = draw.randrange(4)
    if kind == 0:
        return (
            struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1)))
            + header
            + data
        )
    if kind == 1:
        return some_bytes(seed, draw)
    value = json.loads(header)
    name = draw.choice([name for name in value if name != "__metadata__"])
    facts = value[name]
    if kind == 2:
        change: Callable[[], None] = draw.choice((
            lambda: facts.update(shape=draw.choice(([], [0], [-1], [2**63], [2**40, 2**40], ["x"], 5, [1] * 200, [32, 64, 1], None))),
            lambda: facts.update(dtype=draw.choice(("F8_E4M3", "F4", "I64", "U64", "BOOL", "C64", "", 5, None, "F16", "I8", "x" * 999))),
            lambda: facts.update(data_offsets=draw.choice(([0, 0], [4, 0], [0, 2**62], [-1, 5], [0], "x", None, [0, 4], [1, 2, 3]))),
            lambda: value.update({draw.choice(("", "a\x00b", "x" * 5000, "__metadata__")): facts}),
            lambda: value.update(__metadata__=draw.choice((None, 5, {"a": 5}, {"a": {"b": 1}}, {"format": "tf"}, {"a": "x" * 9999}))),
            lambda: value.pop(name),
        ))  # fmt: skip
        change()
        header = json.dumps(value).encode()
    else:
        header = json_bytes(header, draw)
    return struct.pack("<Q", len(header)) + header + data


YAML_LINES = (
    "x: 0x" + "f" * 4500, "x: " + "9" * 4500, "x: 1e999999", "x: ." + "3" * 4000, "a: &a [*a, *a]", "a: &a [1, 2]\nb: [*a, *a, *nope]", "<<: {a: 1}",
    "? [1, 2]\n: x", "!!python/object/apply:os.system [id]", "x: !!binary YQ==", "\tx: 1", "x: |\n  text", "x: >-\n  a\n   b", "- a", "x: [" + "[" * 60,
    "x: {" * 50, "x: 'open", 'x: "\\ud800"', 'x: "\\x00"', "x: \u0085y", "x: \x07", "%YAML 9.9\n---", "---\na: 1\n---\nb: 2", "...", "seed: .nan", "seed: -.inf",
    "seed: 0o17", "seed: 1_000", "1: 2", "null: 3", "'': 4", "x: *nope", "x: &" + "a" * 1000 + " 1", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n"
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d]", "k" * 2000 + ": 1", "#" * 100_000, "- " * 500 + "x",
    "x: " + "a " * 60_000, "? " * 200, "[" * 3000, "\ufeffx: 1", "x: !<tag:yaml.org,2002:int> 5", "!x y: z",
)  # fmt: skip


def yaml_bytes(seed: bytes, draw: random.Random) -> bytes:
    """A YAML text with lines put in, taken out or changed, or values of its structure changed."""
    kind = draw.random()
    if kind < 0.1:
        return some_bytes(seed, draw)
    if kind < 0.5:
        import yaml

        value = yaml.safe_load(seed)
        for _ in range(draw.choice((1, 1, 2, 3))):
            value = changed(value, draw)
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5)  # JSON is YAML
        for number, raw in enumerate(RAW_TEXTS):
            text = text.replace(json.dumps(RAW % number), raw)
        return text.encode("utf-8", "surrogatepass")
    lines = seed.decode().splitlines()
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(lines) + 1)
        indent = draw.choice(("", "  ", "    "))
        lines[at:at] = [indent + line for line in draw.choice(YAML_LINES).split("\n")]
        if draw.random() < 0.3 and lines:
            lines.pop(draw.randrange(len(lines)))
        if draw.random() < 0.3 and lines:
            at = draw.randrange(len(lines))
            head, mark, _ = lines[at].partition(":")
            lines[at] = (
                head
                + mark
                + " "
                + draw.choice(
                    ("0x" + "f" * 4500, "[]", "{}", "null", "-1", "1e400", "'", "&a *a", "x: y", "10000000000000")
                )
            )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def json_lines(seed: bytes, draw: random.Random) -> bytes:
    """JSON lines of which one is changed; sometimes with other line separators inside."""
    lines = seed.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = (
        json_bytes(lines[at], draw) if lines[at].strip() else draw.choice((b"\x00", b"[]", b"{}", b"\xe2\x80\xa8"))
    )
    return b"\n".join(lines)


# Each only a little beyond the bounds, so that a renderer without any still ends in seconds and megabytes.
TEMPLATES = (
    "{{ 1/0 }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ 'x' * 5000000 }}",
    "{% for i in range(200000) %}x{% endfor %}", "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
    "{% set r = range(5000)|list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='abcdefgh') %}{% for i in range(20) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['a']) %}{% for i in range(13) %}{% set n.x = [n.x, n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "{{ 'x'|center(5000000) }}", "{{ 'x'.ljust(5000000) }}", "{{ '%5000000d' % 1 }}", "{{ '{:5000000}'.format(1) }}", "{{ 10**5000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[0].__class__.__mro__ }}", "{{ raise_exception('no') }}",
    "{{ nothing.x.y }}", "{{ messages[99].content }}", "{% if %}", "{{", "{% for %}", "{{ " + "(" * 5000, "{{ " + "-" * 5000 + "1 }}",
    "{{ lipsum(100) }}", "{{ '\\ud800' }}", "{{ messages|map(attribute='content')|join }}", "{{ messages|tojson }}", "{{ bos_token }}", "",
    "{{ (['x' * 5000] * 5000)|join }}", "{{ ('x' * 5000).replace('x', 'y' * 5000) }}", "{{ range(10)|batch(5000000, 'x')|list }}",
    "{{ 'x'|indent(5000000) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages|sort(attribute='content') }}", "{{ messages[0] + 1 }}", "{{ messages.append(1) }}",
    "{{ strftime_now('%Y' * 1000) }}", "{{ self }}", "{{ dict(a=1) }}", "{{ cycler(1, 2).next() }}", "{{ tools|length }}", "\x00", "{{ '\x00' }}", "{# " * 1000, "{% raw %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{% generation %}x{% endgeneration %}", "{% break %}", "{{ messages[0].content.x() }}", "{{ 'a' in 5 }}", "{{ [] > {} }}",
)  # fmt: skip


def template_text(seed: str, draw: random.Random) -> str:
    """A fragment alone, within the template, or a template with a few bytes changed."""
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(TEMPLATES)
    if kind < 0.8:
        at = draw.randrange(len(seed) + 1)
        return seed[:at] + draw.choice(TEMPLATES) + seed[at:]
    return some_bytes(seed.encode(), draw).decode("utf-8", "replace")
