"""Splits text into words in any script, for everything that counts or compares words.

`words` keeps combining marks with their letters, which ``\\w`` does not, and takes one character as one word in
scripts that are written without spaces. Knows nothing of rows.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

ASCII_WORD = re.compile(r"[0-9A-Za-z_]+")
# Kana, Han, Thai, Lao, Myanmar, Khmer: written without spaces.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks in lower case; punctuation parts them and is gone."""
    folded = text.casefold()
    if folded.isascii():
        return ASCII_WORD.findall(folded)
    return "".join(map(_part, folded)).split()


@lru_cache(maxsize=65_536)
def _part(char: str) -> str:
    """The character as it goes into the joined text: itself, with spaces around it, or a space."""
    if UNSPACED.match(char) and char.isalpha():
        return f" {char} "
    return char if char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M" else " "
