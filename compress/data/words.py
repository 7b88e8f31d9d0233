"""Splits text into words in any script, for everything that counts or compares words.

`words` keeps combining marks with their letters, which ``\\w`` does not, and takes one character as one word in
scripts that are written without spaces. `count_words` tells how many words a reader would count there. The same under
every Python. Knows nothing of rows.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import ceil

from compress.data.characters import fold, kind, normal

ASCII_WORD = re.compile(r"[0-9A-Za-z_]+")
HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"
# Thai, Lao, Tibetan, Myanmar, Khmer, New Tai Lue, Tai Tham, Javanese.
SYLLABLES = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua980-\ua9ff\uaa60-\uaadf"
# Written without spaces.
UNSPACED = re.compile(f"[{HAN}{KANA}{SYLLABLES}]")
# Characters per word of running text, roughly.
PER_WORD = ((re.compile(f"[{HAN}]"), 1.5), (re.compile(f"[{KANA}]"), 2.5), (re.compile(f"[{SYLLABLES}]"), 4.0))
JOINED = "\0"  # stands before a mark: no space between it and its letter


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks in lower case; punctuation parts them and is gone."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    parts = "".join(map(_part, fold(normal(text))))
    return parts.replace(f" {JOINED}", "").replace(JOINED, "").split()


def count_words(token: str) -> int:
    """How many words a token without spaces stands for: 1, or more in scripts that are written without spaces."""
    if token.isascii():
        return 1
    unspaced = UNSPACED.findall(token)
    if not unspaced:
        return 1
    found = ceil(sum(len(script.findall(token)) / size for script, size in PER_WORD))
    rest = UNSPACED.sub("", token)
    return found + any(kind(char) in ("letter", "number") for char in rest)


@lru_cache(maxsize=65_536)
def _part(char: str) -> str:
    """The character as it goes into the joined text: itself, with spaces around it, or a space."""
    found = kind(char)
    if found == "letter" and UNSPACED.match(char):
        return f" {char} "
    if found == "mark":
        return JOINED + char
    return char if found in ("letter", "number") or char == "_" else " "
