"""Tells a reply's answer from the thoughts that reasoning models write in front of it.

`split_thoughts` takes both apart: pairs of tags such as ``<think>`` at the start, on a line of their own, or with the
opening tag in the prompt; the channels of gpt-oss; the sentences of Granite. Thoughts that never end leave no answer.
Tags in the midst of a line, in a code fence or in quotes are text. `ends_open` says whether a prompt opens thoughts.
Knows neither tokens nor servers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = ("seed:think", "thinking", "think", "thoughts", "thought", "reasoning", "reflection", "scratchpad")
_PIPES = {  # name between <| and |>: family, and whether it closes
    "begin_of_thought": ("thought_tokens", False),
    "end_of_thought": ("thought_tokens", True),
    "start_thinking": ("thinking_tokens", False),
    "end_thinking": ("thinking_tokens", True),
    "inner_prefix": ("inner", False),
    "inner_suffix": ("inner", True),
    "think": ("piped", False),
    "/think": ("piped", True),
    "thinking": ("piped", False),
    "/thinking": ("piped", True),
}
_TAG = re.compile(
    rf"<(?P<end>/?)(?P<name>{'|'.join(_NAMES)})(?:\s[^<>]{{0,80}})?>"
    r"|\[(?P<square>/?)(?-i:THINK)\]"
    r"|◁(?P<triangle>/?)think▷"
    rf"|<\|(?P<pipe>{'|'.join(sorted(_PIPES, key=len, reverse=True))})\|>"
    r"|(?P<channel><\|channel>thought|<channel\|>)",
    re.IGNORECASE,
)
# These words are common in texts of other kinds: they open thoughts at the start of a reply alone.
_WORDS = frozenset({"thought", "thoughts", "reasoning", "reflection", "scratchpad"})
_LEAD = re.compile(
    r"(?:\s|<s>|<bos>|<\|(?:im_start|begin_of_text|startoftext|start_header_id|end_header_id)\|>|assistant)*"
)
_HARMONY = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
_FINAL = re.compile(
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
_BARE_HARMONY = re.compile(r"\s*analysis(?=[A-Z])")  # without its special tokens: analysisThe user ... assistantfinal
_GRANITE = re.compile(r"\s*Here(?:'s| is) my thought process:")
_GRANITE_END = re.compile(r"Here(?:'s| is) my response:")
_WRAPPED = re.compile(
    r"\s*(?:<answer>(.*)</answer>|<\|begin_of_solution\|>(.*)<\|end_of_solution\|>"
    r"|<\|START_RESPONSE\|>(.*)<\|END_RESPONSE\|>)\s*",
    re.DOTALL,
)
_QUOTES = "\"'`"
_INDENT = 80  # blanks that may stand before a tag on a line of its own


@dataclass(frozen=True, slots=True)
class Split:
    """A reply without its thoughts.

    Attributes:
        answer: what was said to the user; the reply as it was where it holds no thoughts.
        thoughts: whether there were any.
        whole: whether there is an answer: thoughts that do not end, or behind which nothing stands, leave none.
    """

    answer: str
    thoughts: bool
    whole: bool


NOTHING = Split("", thoughts=True, whole=False)


def split_thoughts(text: str, *, opened: bool = False) -> Split:
    """Take the thoughts out of ``text``; ``opened``: the prompt ended in an opening tag. Linear in the text."""
    for marked, split in ((_HARMONY, _channels), (_BARE_HARMONY, _bare_channels), (_GRANITE, _sentences)):
        if marked.match(text):
            return split(text)
    scan = _Scan(text)
    if not scan.run() or (opened and not scan.found):
        return NOTHING
    if not scan.found:
        return Split(text, thoughts=False, whole=True)
    return _answer(scan.rest())


def ends_open(prompt: str) -> bool:
    """Whether ``prompt`` ends in a tag that opens thoughts, so that the reply begins inside them."""
    tags = list(_TAG.finditer(prompt, max(0, len(prompt) - 200)))
    return bool(tags) and not _kind(tags[-1])[1] and not prompt[tags[-1].end() :].strip()


def is_marker(token: str) -> bool:
    """Whether a special token marks thoughts or channels, so that a text without it could not be taken apart."""
    return _TAG.fullmatch(token) is not None or token in (
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>",
        "<|channel>", "<channel|>",
    )  # fmt: skip


def _answer(text: str) -> Split:
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is not None:
        text = next(part for part in wrapped.groups() if part is not None)
    text = text.strip()
    return Split(text, thoughts=True, whole=True) if text else NOTHING


def _channels(text: str) -> Split:
    finals = _FINAL.findall(text)
    return _answer(finals[-1]) if finals else NOTHING


def _bare_channels(text: str) -> Split:
    _, found, answer = text.partition("assistantfinal")
    return _answer(answer) if found else NOTHING


def _sentences(text: str) -> Split:
    found = _GRANITE_END.search(text)
    return _answer(text[found.end() :]) if found else NOTHING


def _kind(tag: re.Match[str]) -> tuple[str, bool]:
    """Which tags belong together, and whether this one closes."""
    if tag["name"] is not None:
        return tag["name"].lower(), bool(tag["end"])
    if tag["square"] is not None:
        return "square", bool(tag["square"])
    if tag["triangle"] is not None:
        return "triangle", bool(tag["triangle"])
    if tag["pipe"] is not None:
        return _PIPES[tag["pipe"].lower()]
    return "channel", tag["channel"].startswith("<c")


class _Scan:
    """One walk over the tags of a text; `rest` is what stands outside of thoughts."""

    def __init__(self, text: str) -> None:
        self.text, self.found = text, False
        self._kept: list[str] = []
        self._from = self._seen = 0  # where the text that is kept begins, and up to where it was looked at
        self._said, self._fences = False, 0  # whether anything stands before, and how many code fences
        self._inner: dict[str, int] = {}  # opening tags that are text and wait for their closing ones

    def rest(self) -> str:
        """What is no thought."""
        return "".join([*self._kept, self.text[self._from :]])

    def run(self) -> bool:
        """Walk; False when thoughts do not end."""
        at = 0
        while tag := _TAG.search(self.text, at):
            at = tag.end()
            if self._quoted(tag):
                continue
            family, closes = _kind(tag)
            self._look(tag.start())
            if closes and self._inner.get(family, 0):
                self._inner[family] -= 1
            elif closes:  # the template has written the opening tag: all before it was thought
                self._kept = []
                self._cut(tag.end())
            elif self._opens(tag, family):
                end = self._end(family, tag.end())
                if end is None:
                    return False
                self._kept.append(self.text[self._from : tag.start()] if self._said else "")
                said = self._said
                self._cut(end)
                self._said, at = said, end
            else:
                self._inner[family] = self._inner.get(family, 0) + 1
        return True

    def _opens(self, tag: re.Match[str], family: str) -> bool:
        if not self._said:
            return True
        before = self.text[max(self._from, tag.start() - _INDENT) : tag.start()].rstrip(" \t")
        return before.endswith("\n") and family not in _WORDS and self._fences % 2 == 0

    def _look(self, end: int) -> None:
        part = self.text[self._seen : end]
        self._fences += part.count("```")
        self._said = self._said or not _LEAD.fullmatch(part)
        self._seen = end

    def _cut(self, end: int) -> None:
        self._from = self._seen = end
        self._said, self._fences, self.found = False, 0, True
        self._inner.clear()

    def _end(self, family: str, start: int) -> int | None:
        for tag in _TAG.finditer(self.text, start):
            if _kind(tag) == (family, True) and not self._quoted(tag):
                return tag.end()
        return None

    def _quoted(self, tag: re.Match[str]) -> bool:
        before, behind = self.text[tag.start() - 1 : tag.start()], self.text[tag.end() : tag.end() + 1]
        return bool(before) and before == behind and before in _QUOTES
