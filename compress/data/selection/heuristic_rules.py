"""Rules that look at one text alone and say why it should go: length, characters, word shapes, repetition, tone.

`judge` runs them over a row in a fixed order and gives the first objection with the measured value. In the spirit of
Gopher (Rae et al. 2021, appendix A.1.1, table A1) and C4 (Raffel et al. 2020, section 2.2); every limit is a
parameter, since those papers filter web documents and a request to an assistant is five words long. Pure
functions of one row. Knows nothing of stages or files.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

from compress.data.rows import Row
from compress.data.selection.params import HeuristicsParams
from compress.data.words import UNSPACED

ODD_BYTES = re.compile(r"[^\t\n\r\x20-\x7e]")
# Text in UTF-8 that was once read as Latin-1 or Windows-1252.
MOJIBAKE = re.compile(r"[ÂÃ][\x80-\xbf]|â€|ï¿½")
SYMBOL = re.compile(r"[^\w\s.,;:!?'\"()\-%/&$€£°…–—’‘“”´`]|_")
EDGES = string.punctuation + "…–—’‘“”«»„¿¡。，、！？"
VOWELLESS = re.compile(r"^[bcdfghjklmnpqrstvwxz]{4,}$")
CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5,}")
INNER_SIGN = re.compile(r"[^\W_][!\"#$()*;<=>?\[\\\]^_`{|}~]+[^\W_]")
LETTER_DIGIT = re.compile(r"[^\W\d_]\d+[^\W\d_]|\d[^\W\d_]+\d")
ADDRESS = re.compile(r"^www\.|://|@")
BULLET = re.compile(r"^\s*(?:[•‣◦·*\-–—]|\d+[.)])\s")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher's eight


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a row goes: a phrase to count by, and the measured value beside its limit."""

    reason: str
    detail: str


class Text:
    """One text and what the rules need of it, each worked out once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def bare(self) -> list[str]:
        """Words in lower case without the punctuation around them."""
        return [word for raw in self.words if (word := raw.casefold().strip(EDGES))]

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]


Rule = Callable[[Text, HeuristicsParams], Objection | None]


def judge_all(rows: Sequence[Row], params: HeuristicsParams) -> list[Objection | None]:
    """`judge` of every row: the function of a shard."""
    return [judge(row, params) for row in rows]


def judge(row: Row, params: HeuristicsParams) -> Objection | None:
    """The first objection to this row, or None when it may stay."""
    if row.is_chat:
        asked = "\n".join(m["content"] for m in row.messages if m["role"] == "user")
        objection = _answer(row.answer, params) or _phrases(Text(row.answer), params)
        return judge_text(asked, params) or objection
    return judge_text(row.text, params)


def judge_text(text: str, params: HeuristicsParams) -> Objection | None:
    """The first objection to a text."""
    subject = Text(text)
    return next((found for rule in RULES if (found := rule(subject, params)) is not None), None)


def _answer(answer: str, p: HeuristicsParams) -> Objection | None:
    length = len(answer.strip())
    if length < p.min_answer_chars:
        return Objection("answer too short", f"{length} characters, at least {p.min_answer_chars}")
    if length > p.max_answer_chars:
        return Objection("answer too long", f"{length} characters, at most {p.max_answer_chars}")
    if p.answer_format == "json":
        try:
            if not isinstance(json.loads(answer), (dict, list)):
                return Objection("answer is not JSON", "neither an object nor a list")
        except (ValueError, RecursionError):
            return Objection("answer is not JSON", f"begins with {answer[:20]!r}")
    if (found := _unreadable(Text(answer), p)) is not None:
        return Objection("answer has unreadable characters", found.detail)
    return None


def _length(t: Text, p: HeuristicsParams) -> Objection | None:
    chars, words = len(t.text.strip()), len(t.words)
    if chars < p.min_chars:
        return Objection("too short", f"{chars} characters, at least {p.min_chars}")
    if words < p.min_words:
        return Objection("too short", f"{words} words, at least {p.min_words}")
    if chars > p.max_chars:
        return Objection("too long", f"{chars} characters, at most {p.max_chars}")
    if words > p.max_words:
        return Objection("too long", f"{words} words, at most {p.max_words}")
    return None


def _unreadable(t: Text, p: HeuristicsParams) -> Objection | None:
    odd = ODD_BYTES.findall(t.text)
    bad = sum(_is_unreadable(char) for char in odd) + len(MOJIBAKE.findall(t.text)) if odd else 0
    return _above("unreadable characters", bad, len(t.text), p.max_unreadable_share)


def _foreign(t: Text, p: HeuristicsParams) -> Objection | None:
    if not p.scripts:
        return None
    wanted = {script.upper() for script in p.scripts}
    letters = [char for char in t.text if char.isalpha()]
    foreign = sum(_script(char) not in wanted for char in letters)
    return _above("letters of other scripts", foreign, len(letters), p.max_foreign_share)


def _phrases(t: Text, p: HeuristicsParams) -> Objection | None:
    """Forbidden phrases and words of an abusive tone."""
    folded = t.text.casefold()
    for phrase in p.forbidden:
        if phrase.casefold() in folded:
            return Objection("forbidden phrase", repr(phrase))
    if p.tone:
        hits = tone_pattern(p.tone).findall(_squeeze(" ".join(t.bare)))
        if len(hits) > p.max_tone_words:
            return Objection("abusive tone", f"{len(hits)} words, at most {p.max_tone_words}: {', '.join(hits[:5])}")
    return None


def _symbols(t: Text, p: HeuristicsParams) -> Objection | None:
    found = sum(char.isascii() or not unicodedata.category(char).startswith("M") for char in SYMBOL.findall(t.text))
    return _above("too many symbols", found, len(t.text), p.max_symbol_share)


def _alpha_words(t: Text, p: HeuristicsParams) -> Objection | None:
    found = sum(any(char.isalpha() for char in word) for word in t.words)
    return _below("too few words with letters", found, len(t.words), p.min_alpha_word_share)


def _word_length(t: Text, p: HeuristicsParams) -> Objection | None:
    spaced = [word for word in t.bare if not ADDRESS.search(word) and not UNSPACED.search(word)]
    if not spaced:
        return None
    mean = sum(map(len, spaced)) / len(spaced)
    if len(spaced) >= 5 and mean < p.min_mean_word:
        return Objection("words too short", f"{mean:.1f} letters on average, at least {p.min_mean_word:g}")
    if mean > p.max_mean_word:
        return Objection("words too long", f"{mean:.1f} letters on average, at most {p.max_mean_word:g}")
    return None


def _word_shapes(t: Text, p: HeuristicsParams) -> Objection | None:
    odd = [word for word in t.bare if is_odd_word(word)]
    objection = _above("odd words", len(odd), len(t.bare), p.max_odd_word_share)
    return objection and Objection(objection.reason, f"{objection.detail}, such as {odd[0]!r}")


def _runs(t: Text, p: HeuristicsParams) -> Objection | None:
    run, word = max(((len(list(same)), word) for word, same in groupby(t.bare)), default=(0, ""))
    if run > p.max_word_run and not word.isdigit():  # 1 1 1 1 may be a number read aloud
        return Objection("repeated word", f"{word!r} {run} times in a row, at most {p.max_word_run}")
    longest = re.search(rf"([^\s\d])\1{{{p.max_char_run},}}", t.text)
    if longest:
        found = longest.group()
        return Objection("repeated character", f"{found[0]!r} {len(found)} times in a row, at most {p.max_char_run}")
    return None


def _repetition(t: Text, p: HeuristicsParams) -> Objection | None:
    """Gopher's repetition shares: lines that stood before, the top word pair, five-word sequences."""
    if len(t.bare) < p.repetition_from_words:
        return None
    if len(t.lines) >= 3:
        repeated = len(t.lines) - len(set(t.lines))
        if objection := _above("repeated lines", repeated, len(t.lines), p.max_line_repeat_share):
            return objection
    chars = sum(map(len, t.bare))
    pair, count = Counter(zip(t.bare, t.bare[1:], strict=False)).most_common(1)[0]
    covered = count * (len(pair[0]) + len(pair[1])) if count > 1 else 0
    if objection := _above("one word pair everywhere", covered, chars, p.max_top_gram_share):
        return Objection(objection.reason, f"{objection.detail}, {' '.join(pair)!r}")
    return _above("repeated passages", repeated_chars(t.bare, 5), chars, p.max_gram_repeat_share)


def _line_shapes(t: Text, p: HeuristicsParams) -> Objection | None:
    if len(t.lines) < 3:
        return None
    bullets = sum(BULLET.match(line) is not None for line in t.lines)
    ellipses = sum(line.endswith(("...", "…")) for line in t.lines)
    return _above("mostly bullet lines", bullets, len(t.lines), p.max_bullet_share) or _above(
        "mostly ellipsis lines", ellipses, len(t.lines), p.max_ellipsis_share
    )


def _stop_words(t: Text, p: HeuristicsParams) -> Objection | None:
    found = len(STOP_WORDS.intersection(t.bare)) if p.min_stop_words else 0
    if found < p.min_stop_words:
        return Objection("too few stop words", f"{found} different ones, at least {p.min_stop_words}")
    return None


# The order decides which reason a row with several faults is counted under: what is plainest first.
RULES: tuple[Rule, ...] = (
    _length, _unreadable, _foreign, _phrases, _symbols, _alpha_words, _word_length, _word_shapes, _runs, _repetition,
    _line_shapes, _stop_words,
)  # fmt: skip


# ---------------------------------------------------------------------------------- measures


def is_odd_word(word: str) -> bool:
    """Whether a bare lower-case word has a shape that words do not have; addresses are let through.

    Only Latin letters without accents are judged for vowels: other scripts have their own rules.
    """
    if word.isdigit() or ADDRESS.search(word):
        return False
    shape = VOWELLESS.match(word) or CONSONANTS.search(word)
    return shape is not None or INNER_SIGN.search(word) is not None or LETTER_DIGIT.search(word) is not None


def repeated_chars(words: list[str], size: int) -> int:
    """Characters in sequences of ``size`` words that stood before; sequences are counted without overlap."""
    seen: set[tuple[str, ...]] = set()
    covered = index = 0
    while index + size <= len(words):
        gram = tuple(words[index : index + size])
        if gram in seen:
            covered += sum(map(len, gram))
            index += size
        else:
            seen.add(gram)
            index += 1
    return covered


@lru_cache(maxsize=64)
def tone_pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of the phrases as whole words, letters stretched or not ("stuuupid")."""
    parts = sorted((re.escape(_squeeze(" ".join(p.casefold().split()))) for p in phrases), key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(parts) + r")(?!\w)")


def _squeeze(text: str) -> str:
    """Runs of one letter written once, in text and list alike."""
    return re.sub(r"(\w)\1+", r"\1", text)


@lru_cache(maxsize=65_536)
def _is_unreadable(char: str) -> bool:
    return char == "\ufffd" or unicodedata.category(char) in ("Cc", "Co", "Cn", "Cs")


@lru_cache(maxsize=65_536)
def _script(char: str) -> str:
    """First word of the Unicode name, which for letters is the script: LATIN, CYRILLIC, CJK."""
    return unicodedata.name(char, "UNKNOWN").split()[0]


def _above(reason: str, part: int, whole: int, limit: float) -> Objection | None:
    share = part / whole if whole else 0.0
    return Objection(reason, f"share {share:.2f}, at most {limit:g}") if share > limit else None


def _below(reason: str, part: int, whole: int, limit: float) -> Objection | None:
    share = part / whole if whole else 1.0
    return Objection(reason, f"share {share:.2f}, at least {limit:g}") if share < limit else None
