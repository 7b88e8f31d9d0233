"""Rules that look at one text alone and say why it should go: length, characters, word shapes, repetition, tone.

`judge` runs them over a row in a fixed order and gives the first objection with the measured value. In the spirit of
Gopher (Rae et al. 2021, appendix A.1.1, table A1) and C4 (Raffel et al. 2020, section 2.2); every limit is a
parameter, since those papers filter web documents and a request to an assistant is five words long. All scripts are
judged alike, and alike under every Python: a character of Chinese counts for what it takes in English. Pure functions
of one row. Knows nothing of stages or files.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise

from compress.data.characters import fold, is_digit, kind, normal, quoted, script
from compress.data.rows import Row
from compress.data.selection.params import HeuristicsParams
from compress.data.selection.word_shapes import ADDRESS, is_odd_word
from compress.data.words import HAN, KANA, UNSPACED, count_words

# \v and \f part lines and pages as \n does.
ODD_BYTES = re.compile(r"[^\t-\r\x20-\x7e]")
# Text in UTF-8 that was once read as Latin-1 or Windows-1252; in capitals, a quotation mark may follow a real Ã.
MOJIBAKE = re.compile(r"(?<![A-ZÀ-ÖØ-Þ])[ÂÃ][\x80-\xbf]|â€|ï¿½")
ASCII_SYMBOL = re.compile(r"[#*+<=>@\[\\\]^_{|}~\x00-\x08\x0e-\x1b\x7f]")
# What one character tells: a word or half of it in Han, a syllable of two letters or three in kana and Hangul.
HAN_CHARACTER = re.compile(f"[{HAN}]")
SYLLABLE = re.compile(f"[{KANA}\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")
BULLET = re.compile(r"^\s*(?:[•‣◦·・*\-–—]\s|\d+(?:[.)]\s|[、．）]))")
ELLIPSES = ("...", "…", "。。。")
GRAM, UNSPACED_GRAM = 5, 8  # words, and characters of scripts without spaces, in a passage that may be repeated
FEW_WORDS = 5  # a mean of fewer words says little
LONG_WORD = 2.5  # how much longer they may be then: a compound stands where others write three words
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher's eight


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a row goes: a phrase to count by, and the measured value beside its limit."""

    reason: str
    detail: str


class Text:
    """One text and what the rules need of it, each worked out once."""

    def __init__(self, text: str) -> None:
        self.text = normal(text)

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def bare(self) -> list[str]:
        """Words in lower case without the punctuation around them."""
        return [word for raw in self.words if (word := _bare(raw))]

    @cached_property
    def units(self) -> list[str]:
        """`bare` with the characters of scripts that are written without spaces apart."""
        if self.text.isascii():
            return self.bare
        return [unit for word in self.bare for unit in UNSPACED.sub(r" \g<0> ", word).split()]

    @cached_property
    def word_count(self) -> int:
        """Words that a reader would count."""
        return sum(map(count_words, self.words))

    @cached_property
    def size(self) -> int:
        """Characters as Latin letters would be needed: a syllable counts for two, a character of Han for three."""
        text = self.text.strip()
        if text.isascii():
            return len(text)
        return len(text) + len(SYLLABLE.findall(text)) + 2 * len(HAN_CHARACTER.findall(text))

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
    text = Text(answer)
    length = len(answer.strip())
    if text.size < p.min_answer_chars:
        return Objection("answer too short", f"{length} characters, at least {p.min_answer_chars}")
    if length > p.max_answer_chars:
        return Objection("answer too long", f"{length} characters, at most {p.max_answer_chars}")
    if p.answer_format == "json":
        try:
            if not isinstance(json.loads(answer), (dict, list)):
                return Objection("answer is not JSON", "neither an object nor a list")
        except (ValueError, RecursionError):
            return Objection("answer is not JSON", f"begins with {quoted(answer[:20])}")
    if (found := _unreadable(text, p)) is not None:
        return Objection("answer has unreadable characters", found.detail)
    return None


def _length(t: Text, p: HeuristicsParams) -> Objection | None:
    chars, words = len(t.text.strip()), t.word_count
    if t.size < p.min_chars:
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
    bad = sum(kind(char) == "unreadable" for char in odd) + len(MOJIBAKE.findall(t.text)) if odd else 0
    return _above("unreadable characters", bad, len(t.text), p.max_unreadable_share)


def _foreign(t: Text, p: HeuristicsParams) -> Objection | None:
    if not p.scripts:
        return None
    wanted = {name.upper() for name in p.scripts}
    letters = [char for char in t.text if kind(char) == "letter"]
    foreign = sum(script(char) not in wanted for char in letters)
    return _above("letters of other scripts", foreign, len(letters), p.max_foreign_share)


def _phrases(t: Text, p: HeuristicsParams) -> Objection | None:
    """Forbidden phrases and words of an abusive tone."""
    folded = fold(t.text)
    for phrase in p.forbidden:
        if fold(normal(phrase)) in folded:
            return Objection("forbidden phrase", quoted(phrase))
    if p.tone:
        hits = tone_hits(" ".join(t.bare), p.tone)
        if len(hits) > p.max_tone_words:
            return Objection("abusive tone", f"{len(hits)} words, at most {p.max_tone_words}: {', '.join(hits[:5])}")
    return None


def _symbols(t: Text, p: HeuristicsParams) -> Objection | None:
    found = len(ASCII_SYMBOL.findall(t.text))
    if not t.text.isascii():
        found += sum(kind(char) == "symbol" for char in t.text if not char.isascii())
    blank = len(t.text) - len(t.text.strip())
    return _above("too many symbols", found, t.size + blank, p.max_symbol_share)


def _alpha_words(t: Text, p: HeuristicsParams) -> Objection | None:
    found = sum(count_words(word) for word in t.words if any(kind(char) == "letter" for char in word))
    return _below("too few words with letters", found, t.word_count, p.min_alpha_word_share)


def _word_length(t: Text, p: HeuristicsParams) -> Objection | None:
    spaced = [word for word in t.bare if not ADDRESS.search(word) and not UNSPACED.search(word)]
    if not spaced:
        return None
    mean = sum(map(_letters, spaced)) / len(spaced)
    many = len(spaced) >= FEW_WORDS
    if many and mean < p.min_mean_word:
        return Objection("words too short", f"{mean:.1f} letters on average, at least {p.min_mean_word:g}")
    if mean > p.max_mean_word * (1 if many else LONG_WORD):
        return Objection("words too long", f"{mean:.1f} letters on average, at most {p.max_mean_word:g}")
    return None


def _word_shapes(t: Text, p: HeuristicsParams) -> Objection | None:
    odd = [word for word in t.bare if is_odd_word(word)]
    objection = _above("odd words", len(odd), len(t.bare), p.max_odd_word_share)
    return objection and Objection(objection.reason, f"{objection.detail}, such as {quoted(odd[0])}")


def _runs(t: Text, p: HeuristicsParams) -> Objection | None:
    run, word = max(((len(list(same)), word) for word, same in groupby(t.bare)), default=(0, ""))
    if run > p.max_word_run and not all(map(is_digit, word)):  # 1 1 1 1 may be a number read aloud
        return Objection("repeated word", f"{quoted(word)} {run} times in a row, at most {p.max_word_run}")
    for match in re.finditer(rf"(.)\1{{{p.max_char_run},}}", t.text):
        char, length = match[1], len(match[0])
        most = p.max_char_run * (2 if HAN_CHARACTER.match(char) or SYLLABLE.match(char) else 1)  # "haha"
        if length > most and not (char.isspace() or is_digit(char)):
            return Objection("repeated character", f"{quoted(char)} {length} times in a row, at most {most}")
    return None


def _repetition(t: Text, p: HeuristicsParams) -> Objection | None:
    """Gopher's repetition shares: lines that stood before, the top word pair, five-word sequences."""
    units = t.units
    if len(units) < p.repetition_from_words:
        return None
    if len(t.lines) >= 3:
        repeated = len(t.lines) - len(set(t.lines))
        if objection := _above("repeated lines", repeated, len(t.lines), p.max_line_repeat_share):
            return objection
    chars = sum(map(len, units))
    unspaced = len(units) > 2 * len(t.bare)
    if not unspaced:  # two characters are no pair of words
        pair, count = Counter(pairwise(units)).most_common(1)[0]
        covered = count * (len(pair[0]) + len(pair[1])) if count > 1 else 0
        if objection := _above("one word pair everywhere", covered, chars, p.max_top_gram_share):
            return Objection(objection.reason, f"{objection.detail}, {quoted(' '.join(pair))}")
    size = UNSPACED_GRAM if unspaced else GRAM
    return _above("repeated passages", repeated_chars(units, size), chars, p.max_gram_repeat_share)


def _line_shapes(t: Text, p: HeuristicsParams) -> Objection | None:
    if len(t.lines) < 3:
        return None
    bullets = sum(BULLET.match(line) is not None for line in t.lines)
    ellipses = sum(line.endswith(ELLIPSES) for line in t.lines)
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


def tone_hits(text: str, phrases: tuple[str, ...]) -> list[str]:
    """The phrases in ``text`` as whole words, letters stretched or not ("stuuupid").

    In scripts without spaces a phrase may stand anywhere.
    """
    squeezed, (pattern, wanted) = _squeeze(text), tone_pattern(phrases)
    hits, at = [], 0
    while (match := pattern.search(squeezed, at)) is not None:
        start = match.start()
        ends = (start + len(phrase) for phrase in wanted if squeezed.startswith(phrase, start))
        end = next((end for end in ends if _parts(squeezed, start) and _parts(squeezed, end)), None)
        if end is not None:
            hits.append(squeezed[start:end])
        at = start + 1 if end is None else end
    return hits


def _parts(text: str, at: int) -> bool:
    """Whether a word may end and another begin in front of the character ``at``."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    inside = kind(after) == "mark" or (_is_word(before) and _is_word(after))
    return not inside or (kind(after) != "mark" and bool(UNSPACED.match(before) or UNSPACED.match(after)))


def _is_word(char: str) -> bool:
    return char == "_" or kind(char) in ("letter", "number", "mark")


@lru_cache(maxsize=64)
def tone_pattern(phrases: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """What finds any of the phrases, and the phrases as they are compared, the longest first."""
    folded = {_squeeze(" ".join(fold(normal(phrase)).split())) for phrase in phrases} - {""}
    wanted = sorted(folded, key=lambda phrase: (-len(phrase), phrase))
    return re.compile("|".join(map(re.escape, wanted)) or "(?!)"), wanted


def _squeeze(text: str) -> str:
    """Runs of one letter written once, in text and list alike."""
    return re.sub(r"(.)\1+", lambda run: run[1] if _is_word(run[1]) else run[0], text)


def _bare(word: str) -> str:
    """``word`` in lower case without the punctuation around it."""
    word = fold(word).strip(string.punctuation)
    if word.isascii():
        return word
    first, last = 0, len(word)
    while first < last and _is_edge(word[first]):
        first += 1
    while first < last and _is_edge(word[last - 1]):
        last -= 1
    return word[first:last]


def _is_edge(char: str) -> bool:
    return char in string.punctuation or kind(char) in ("punctuation", "format")


def _letters(word: str) -> int:
    """Characters of a word; marks belong to their letters, and a syllable of Hangul is two letters or three."""
    if word.isascii():
        return len(word)
    return sum(kind(char) != "mark" for char in word) + len(SYLLABLE.findall(word))


def _above(reason: str, part: int, whole: int, limit: float) -> Objection | None:
    share = part / whole if whole else 0.0
    return Objection(reason, f"share {share:.2f}, at most {limit:g}") if share > limit else None


def _below(reason: str, part: int, whole: int, limit: float) -> Objection | None:
    share = part / whole if whole else 1.0
    return Objection(reason, f"share {share:.2f}, at least {limit:g}") if share < limit else None
