"""Texts and conversations on which tokenizers and templates differ: what the text path of a bundle is proven on.

`texts` and `conversations` are the built-in set with what a tokenizer's own added tokens ask for. All are made up.
Knows nothing of runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]  # messages, tools

_TEXTS = (
    "",
    "a",
    " leading and trailing ",
    "  two blanks, three   and four    of them",
    "Capitals: HELLO World, eXaMpLe; ẞ ß İ ı ΣΟΦΟΣ ǅ",
    "composed caf\u00e9 \u00c5ngstr\u00f6m, apart cafe\u0301 A\u030angstro\u0308m, q\u0323\u0307 \u1e0b\u0323",
    "\ufb01ne \ufb03 \u2167 \u00bd x\u00b2 \u2460 \uff21\uff22\uff43 \u212b \u2126 \u337f",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \ud55c\uae00 \u304b\u3099 \u304c",
    "1 12 123 1234 3.14159 -7 1,000,000 2026-12-01 0x1F",
    "\u0661\u0662\u0663 \u096a\u096b \u2150 \u2083",
    "tab\tand\ttabs\t\t, line\nfeeds\n\n\nand\r\nreturns\r and a mix \n \t \n",
    "   \n   indented\n\tand more\n",
    "no-break\u00a0space, "
    "ideographic\u3000space, thin\u2009space, \u2028 line, \u0085 next, \u200bzero width, \ufeffmark",
    "\u6c49\u5b57\u3068\u304b\u306a \u4ea4\u3058\u308a\u6587\u3002\u5168\u89d2\uff01\u300c\u5f15\u7528\u300d",
    "\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 "
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0e44\u0e17\u0e22 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u03b5\u03bb",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U00020000 \U0001d400",
    "don't we'll I'm they've you're he'd it's DON'T WE'LL it'\u017f",
    "def f(x): return x**2 + a[0]['k'] != \"q\"  # note\nif x:\n    y = {}\n",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "... !!! ??? -- \u2014 \u2026 \u00ab\u00bb \u201cq\u201d ``q'' `` ''",
    "\u2581 stands \u2581\u2581for a blank \u0120 \u010a \u00e2\u0096\u0081",
    "<0x41> <unk> <s> </s> <|endoftext|> <|im_start|> <|im_end|> [INST] [/INST] <bos> <eos> <pad> [CLS]",
    "\uff1c|im_end|\uff1e \uff1cs\uff1e <|im_end|>\u0338 <|im_\u200bend|>",
    "a" * 60 + " " * 30 + "=" * 40 + "\n" * 12,
    "Hello World! " * 12,
    "\x00 \x01 \x1b \x1c \x7f control",
    "e\u0301 at the start, \u0301 alone",
    "snake_case camelCase kebab-case UPPER_CASE under__score _a_ a_",
)
_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "description": 'Dims a lamp \u2014 <fast> & "sure", it\'s \u00e9lan',
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "enum": ["hall", "k\u00fcche"]},
                    "level": {"type": "integer"},
                },
                "required": ["room"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "Tells the time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
_CALL = {"id": "call00001", "type": "function", "function": {"name": "set_light", "arguments": {"room": "hall"}}}


def _said(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant, with a system message before them."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": "user" if at % 2 == 0 else "assistant", "content": turn} for at, turn in enumerate(turns)]


def conversations(special: Sequence[str] = ()) -> list[Conversation]:
    """The built-in conversations; ``special`` tokens are put into what is said."""
    thought = "<think>\nfirst\n\nthen\n</think>\n\nthe answer"
    plain = [
        _said("hi"),
        _said("Say NO,\n  twice "),
        _said("  \n blanks all around \t\n"),
        _said(""),
        _said("\u00a0\u3000other blanks\u2003\u200b"),
        _said("cafe\u0301 and \ufb01ne", system="Sei h\u00f6flich, \u4f60\u597d."),
        _said("first", "one", "second", " two \n", "third"),
        _said("first", "one", "second", system=' You are "terse" & <kind>; it\'s so.\n'),
        _said("q", system=""),
        _said("why", thought, "and now"),
        _said("why", "<think>\n\n</think>\n\nyes", "no", thought, "end", system="Think."),
        _said("why", "</think> stray", "<think> open"),
        _said("a \\n b \\ c / 'd' \"e\" {f} {{ g }} {% h %} {# i #} $j %k", "{{ 1 }}", "<b>&amp;</b>"),
        _said("\U0001f600 " * 5, "\u6c49\u5b57", "\u0639\u0631\u0628\u064a"),
        [*_said("hi", "yes"), {"role": "assistant", "content": "more"}, {"role": "user", "content": "ok"}],
        [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
        [*_said("hi"), {"role": "system", "content": "late"}, {"role": "user", "content": "go"}],
        [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "ok"}],
        [{"role": "system", "content": "alone"}],
        _said("ends with", "an answer"),
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "r\n"},
            *_said("b"),
        ],
        [*_said("turn it on"), {"role": "assistant", "content": "on it"}, {"role": "tool", "content": '{"ok": true}'}],
    ]
    if special:
        plain.append(_said(f"a{special[0]}b {special[-1]} c", f"{special[-1]}x", " ".join(special[:6])))
    called: list[dict[str, Any]] = [
        {"role": "user", "content": "light"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "set_light", "tool_call_id": "call00001", "content": '{"ok": true}'},
        {"role": "tool", "name": "now", "tool_call_id": "call00002", "content": "12:00"},
    ]
    with_tools: list[list[dict[str, Any]]] = [
        _said("dim it"),
        _said("dim it", system="Use tools."),
        called,
        [*called, {"role": "assistant", "content": "done"}, {"role": "user", "content": "thanks"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [_CALL, _CALL]}, called[2]],
    ]
    found: list[Conversation] = [(messages, None) for messages in plain]
    return found + [(called, None)] + [(messages, _TOOLS) for messages in with_tools] + [(_said("no tools"), [])]


def texts(tokenizer: PreTrainedTokenizerFast, added: Sequence[Mapping[str, Any]]) -> list[str]:
    """The built-in texts, and some around each of the ``added`` tokens: those with flags, and the first others."""
    flagged = [token for token in added if len(token) > 2]
    plain = [token for token in added if len(token) == 2]
    found = list(_TEXTS)
    for token in [*flagged[:24], *plain[:16]]:
        name = str(token["content"])
        found += [
            name,
            f"x{name}y",
            f" {name} ",
            f"a  {name}\t\n {name}{name} b",
            f"_{name}_ ({name}) {name}s -{name}-",
            f"{name}\u0301 e{name} \u00e9{name}",
            f"{name.upper()} {name.lower()} {name.title()} {name[:-1]}",
        ]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    step = max(1, len(vocabulary) // 256)
    words = [str(tokenizer.convert_tokens_to_string([word])) for word, _ in vocabulary[::step]]
    return found + [" ".join(words[at : at + 16]) for at in range(0, len(words), 16)] + ["".join(words[:64])]
