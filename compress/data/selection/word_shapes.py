"""Tells words from what only looks like one: no vowel, impossible runs of consonants, signs or digits inside.

Only Latin letters without accents are judged for their sounds, other scripts have their own rules. A run of consonants
is fair when it may end a syllable and begin the next one in English, German, Dutch, Czech, Polish or the like:
"Angstschweiß" holds eight, ng-st-schw. The lists were written by hand; of random runs of five letters they let one
in fifty pass. Pure functions of one word. Knows nothing of rows.
"""

from __future__ import annotations

import re

from compress.data.characters import is_digit, kind
from compress.data.words import UNSPACED

CONSONANT = "[bcdfghjklmnpqrstvwxz]"
VOWELLESS = re.compile(f"{CONSONANT}{{4,}}")
LONG_RUN = re.compile(f"{CONSONANT}{{5,}}")
SONORANT = r"(?:h?[lmnr]|r[lmn]|ng|nk|w[ln]?)?"
END = (
    r"(?:[bcpf]st|[ck]k?st|chst|chtst|chts?|chs?|ck[st]?|ct|fths?|fts?|ghths?|ff?s?|ghts?|ghs?|gst|gs|gd|kts?|ks|mpfs?|pfs?|pft|ph|"
    r"pts?|ps|schs?|scht|shs?|sk|sp|sts?|ss|tsch|tch|ths?|ts|tt|tz[st]?|zts?|xt?|b[st]?|dths?|d[st]|dd?|szcz|cz|sz|rz|zd|"
    r"f|g|k|p|s|t|v|z|lls?)?"
)
BEGINNING = (
    r"(?:[vwz]{0,2}s?(?:sch[lmnrw]?|ch[lr]?|shr?|t[hjrwv]?|th[rw]|d[rwv]?|p[lrn]?|ph[lr]?|pf[lr]?|b[lr]?|k[lrnv]?|"
    r"c[lrtv]?|ctv|g[lrn]?|f[lr]?|v[lr]?|wr?|wh|z[wmnvbdl]?|[ln]j|[hjlmnrqx]|rh|kh|gh|sz|cz|[tpkbdg]rz|chrz)|ts|ps|dz|s)"
)
BETWEEN = re.compile(f"{SONORANT}{END}s?(?:{BEGINNING})?")
# l and r as the middle of a syllable, as in Czech "zmrzlina" and "prst"; the second one where no vowel follows.
SYLLABIC = re.compile(f"{BEGINNING}[lr]{SONORANT}{END}(?:{BEGINNING})?")
SYLLABIC_WORD = re.compile(f"{BEGINNING}[lr]{SONORANT}{END}[lr]?")
WELSH_WORD = re.compile(f"{BEGINNING}w{SONORANT}{END}")  # w is a vowel there: "drws", "bwrdd"
INNER_SIGN = re.compile(r"[^\W_][!\"#$()*;<=>?\[\\\]^_`{|}~]+[^\W_]")
LETTER_DIGIT = re.compile(r"[a-z]\d+[a-z]|\d[a-z]+\d")
TIME = re.compile(r"\d{1,2}[ghu]\d{2}(?:min|m)?")  # 7h30
BOTH_GENDERS = re.compile(r"[*_](?=in(?:nen)?$)")  # German "Lehrer*innen"
ADDRESS = re.compile(r"^www\.|://|@")


def is_odd_word(word: str) -> bool:
    """Whether a bare lower-case word has a shape that words do not have; addresses are let through.

    In scripts without spaces a "word" is a sentence, in which signs and digits stand between words.
    """
    if word.isascii():
        return _is_odd(word)
    return any(_is_odd(_shape(piece)) for piece in UNSPACED.split(word))


def _is_odd(word: str) -> bool:
    """``word`` holds ASCII characters and the stand-ins of `_shape`."""
    if word.isdigit() or ADDRESS.search(word) or TIME.fullmatch(word):
        return False
    word = BOTH_GENDERS.sub("", word)
    if VOWELLESS.fullmatch(word):
        return not _is_syllable(word)
    if any(not _is_fair_run(run, word) for run in LONG_RUN.findall(word)):
        return True
    return INNER_SIGN.search(word) is not None or LETTER_DIGIT.search(word) is not None


def _is_syllable(word: str) -> bool:
    """Whether a word without vowels can be spoken: by r or l, or in Welsh by w."""
    if not re.search("[qwx]", word) and SYLLABIC_WORD.fullmatch(word):
        return True
    return not re.search("[jkqvxz]", word) and WELSH_WORD.fullmatch(word) is not None


def _is_fair_run(run: str, word: str) -> bool:
    """Whether languages put the consonants of ``run`` together inside ``word``."""
    if BETWEEN.fullmatch(run):
        return True
    return not re.search("[qwx]", word) and SYLLABIC.fullmatch(run) is not None


def _shape(word: str) -> str:
    """``word`` with one stand-in for all letters beyond ASCII, one for digits and one for signs."""
    return "".join(char if char.isascii() else _stand_in(char) for char in word)


def _stand_in(char: str) -> str:
    if is_digit(char):
        return "0"
    return "ä" if kind(char) in ("letter", "mark", "number") else "·"
