"""What kind of character this is, the same under every Python, and texts in one normal form.

Python's own tables grow with each version (new emoji, letters, scripts), so that what is dropped would depend on who
runs it. `kind` asks the frozen tables of Unicode 3.2, which every Python carries, and takes what came later for
a symbol where blocks of symbols lie, else for a letter. `normal` composes accents and makes one character of one emoji,
so that two spellings of a text are judged alike. Knows nothing of words and rules.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from typing import Literal

Kind = Literal["letter", "mark", "number", "space", "punctuation", "symbol", "format", "unreadable"]

FROZEN = unicodedata.ucd_3_2_0
KINDS: dict[str, Kind] = {
    "L": "letter", "M": "mark", "N": "number", "Z": "space", "P": "punctuation", "S": "symbol", "Sc": "punctuation",
    "Cf": "format", "Cc": "unreadable", "Co": "unreadable", "Cs": "unreadable",
}  # fmt: skip
# Symbols that texts are written with as with punctuation: degree, accents as quotes, Japanese voicing marks and tilde.
COMMON_SYMBOLS = frozenset("°´`゛゜～")
# Blocks of symbols (first, last) for what is not in Unicode 3.2, and blocks of punctuation and currency.
SYMBOL_BLOCKS = ((0x2100, 0x2BFF), (0x4DC0, 0x4DFF), (0x10100, 0x101CF), (0x1D000, 0x1D37F), (0x1F000, 0x1FBFF))
PUNCTUATION_BLOCKS = ((0x2000, 0x20CF), (0x2E00, 0x2E7F), (0x3000, 0x303F), (0xFE10, 0xFE1F))
# First letters of ranges that Unicode 3.2 did not have and whose script has a common name; up to the next line.
LATER_SCRIPTS = (
    (0x0000, ""), (0x0180, "LATIN"), (0x0250, ""), (0x0500, "CYRILLIC"), (0x0530, ""), (0x0750, "ARABIC"), (0x0780, ""),
    (0x0860, ""), (0x0870, "ARABIC"), (0x0900, "DEVANAGARI"), (0x0980, ""), (0x1C80, "CYRILLIC"), (0x1C90, "GEORGIAN"),
    (0x1CC0, ""), (0x1D00, "LATIN"), (0x1DC0, ""), (0x1E00, "LATIN"), (0x1F00, "GREEK"), (0x2000, ""),
    (0x2C60, "LATIN"), (0x2C80, ""), (0x2D00, "GEORGIAN"), (0x2D30, ""), (0x2D80, "ETHIOPIC"), (0x2DE0, "CYRILLIC"),
    (0x2E00, ""), (0x3400, "CJK"), (0xA000, ""), (0xA640, "CYRILLIC"), (0xA6A0, ""), (0xA720, "LATIN"), (0xA800, ""),
    (0xA8E0, "DEVANAGARI"), (0xA900, ""), (0xA960, "HANGUL"), (0xA980, ""), (0xAB00, "ETHIOPIC"), (0xAB30, "LATIN"),
    (0xAB70, "CHEROKEE"), (0xABC0, ""), (0xAC00, "HANGUL"), (0xD800, ""), (0xF900, "CJK"), (0xFB00, ""),
    (0x1B000, "HIRAGANA"), (0x1B170, ""), (0x1DF00, "LATIN"), (0x1E000, ""), (0x1E030, "CYRILLIC"), (0x1E090, ""),
    (0x20000, "CJK"), (0x40000, ""),
)  # fmt: skip
# What emoji are put together with: variation selectors, skin tones, keycaps, tags, and what a joiner adds.
EMOJI_PARTS = re.compile(
    "[\ufe00-\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\U000e0100-\U000e01ef]"
    "|\u200d[\u2190-\u2bff\U0001f000-\U0001fbff]|(?<=[\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff]"
)


def normal(text: str) -> str:
    """Accents composed with their letters, and one character for an emoji of several parts."""
    return text if text.isascii() else EMOJI_PARTS.sub("", FROZEN.normalize("NFC", text))


def fold(text: str) -> str:
    """Lower case of letters that every Python knows."""
    return text.lower() if text.isascii() else "".join(map(_folded, text))


@lru_cache(maxsize=65_536)
def kind(char: str) -> Kind:
    """The kind of one character; currency counts as punctuation."""
    category = FROZEN.category(char)
    if char in COMMON_SYMBOLS:
        return "punctuation"
    if category != "Cn":
        return "unreadable" if char == "\ufffd" else KINDS.get(category) or KINDS[category[0]]
    return _later_kind(ord(char))


def _later_kind(code: int) -> Kind:
    """The kind of what is not in Unicode 3.2."""
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # never a character
        return "unreadable"
    if any(first <= code <= last for first, last in PUNCTUATION_BLOCKS):
        return "punctuation"
    if any(first <= code <= last for first, last in SYMBOL_BLOCKS):
        return "symbol"
    return "mark" if 0xE0100 <= code <= 0xE01EF else "letter"


def is_digit(char: str) -> bool:
    """Whether this is a decimal digit of any script of Unicode 3.2."""
    return "0" <= char <= "9" or (not char.isascii() and FROZEN.category(char) == "Nd")


def quoted(text: str) -> str:
    """``text`` in quotation marks for a reason that is stored; what cannot be seen is escaped."""
    if text.isascii():
        return repr(text)
    seen = ("letter", "mark", "number", "punctuation", "symbol")
    return "'" + "".join(c if c == " " or kind(c) in seen else f"\\u{ord(c):04x}" for c in text) + "'"


@lru_cache(maxsize=65_536)
def script(char: str) -> str:
    """The script of a letter in capitals, such as LATIN or CJK; UNKNOWN for scripts later than Unicode 3.2."""
    name: str = FROZEN.name(char, "")
    if not name:
        name = LATER_SCRIPTS[bisect_right(LATER_SCRIPTS, (ord(char), "\uffff")) - 1][1]
    return name.split()[0] if name else "UNKNOWN"


@lru_cache(maxsize=65_536)
def _folded(char: str) -> str:
    return char if FROZEN.category(char) == "Cn" else char.casefold()
