"""Parameters of the selection stages; imports only pydantic, so that a profile is checked without torch.

Defaults suit short requests as well as documents. Where a paper names a value for web documents, the description
gives it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.context import Params


class DedupParams(Params):
    """Exact and near duplicates."""

    near: bool = Field(default=True, description="also drop near duplicates; false: exact ones only")
    threshold: float = Field(
        default=0.8, ge=0.05, le=1.0, description="Jaccard similarity of shingles from which a row is a near duplicate"
    )
    compare: Literal["all", "prompt", "joined"] = Field(
        default="all",
        description="all: rows with differing answers are never duplicates; prompt: answers are not looked at; "
        "joined: prompt and answer are one text, for answers in free words",
    )
    same_numbers: bool = Field(
        default=True, description="near duplicates must hold the same numbers in the same order; false for web pages"
    )
    unit: Literal["auto", "chars", "words"] = Field(
        default="auto", description="what a shingle is made of; auto: characters for chats, words for texts"
    )
    shingle: int | None = Field(
        default=None, ge=1, le=20, description="units per shingle; empty: 3 characters or 5 words"
    )
    num_perm: int = Field(default=128, ge=16, le=1024, description="MinHash permutations")
    recall: float = Field(
        default=0.99,
        ge=0.5,
        lt=1.0,
        description="share of pairs at the threshold that LSH must bring up for comparison; sets bands and rows",
    )
    keep: Literal["first", "longest", "score"] = Field(
        default="first", description="which of several duplicates stays: the first, the longest, or the best by score"
    )
    score: str = Field(
        default="",
        description="for keep: score, which one, as STAGE.KEY such as data.selection.ifd.ratio; highest wins",
    )


class HeuristicsParams(Params):
    """Limits on single rows. Chats: every check looks at the user's turns, the length checks at the answer too."""

    min_chars: int = Field(default=2, ge=0, description="shortest text in characters")
    max_chars: int = Field(default=100_000, ge=1, description="longest text in characters")
    min_words: int = Field(default=1, ge=0, description="fewest words (Gopher: 50)")
    max_words: int = Field(default=100_000, ge=1, description="most words (Gopher: 100000)")
    min_answer_chars: int = Field(default=1, ge=0, description="shortest answer of a chat")
    max_answer_chars: int = Field(default=100_000, ge=1, description="longest answer of a chat")
    answer_format: Literal["any", "json"] = Field(
        default="any", description="json: drop chats whose answer does not parse as a JSON object or list"
    )
    max_unreadable_share: float = Field(
        default=0.0, ge=0.0, le=1.0, description="control, private and replacement characters, and broken encodings"
    )
    max_symbol_share: float = Field(
        default=0.25, ge=0.0, le=1.0, description="characters that are no letter, digit, space or common punctuation"
    )
    scripts: tuple[str, ...] = Field(
        default=(), strict=False, description="Unicode scripts that letters may belong to, such as LATIN; empty: any"
    )
    max_foreign_share: float = Field(
        default=0.1, ge=0.0, le=1.0, description="letters outside of scripts, where scripts is given"
    )
    min_alpha_word_share: float = Field(
        default=0.4, ge=0.0, le=1.0, description="words with at least one letter (Gopher: 0.8)"
    )
    min_mean_word: float = Field(default=1.5, ge=0.0, description="mean word length, from five words on (Gopher: 3)")
    max_mean_word: float = Field(default=15.0, ge=1.0, description="mean word length (Gopher: 10)")
    max_odd_word_share: float = Field(
        default=0.34,
        ge=0.0,
        le=1.0,
        description="words of no likely shape: no vowel, five consonants in a row, signs or digits inside",
    )
    max_word_run: int = Field(default=3, ge=1, description="the same word that many times in a row")
    max_char_run: int = Field(default=5, ge=1, description="the same letter or sign that many times in a row")
    repetition_from_words: int = Field(
        default=40, ge=5, description="the repetition shares below look at texts from this many words on"
    )
    max_line_repeat_share: float = Field(
        default=0.3, ge=0.0, le=1.0, description="lines that stood before (Gopher: 0.3)"
    )
    max_top_gram_share: float = Field(
        default=0.2, ge=0.0, le=1.0, description="characters in the most frequent word pair (Gopher: 0.2)"
    )
    max_gram_repeat_share: float = Field(
        default=0.15, ge=0.0, le=1.0, description="characters in five-word sequences that stood before (Gopher: 0.15)"
    )
    max_bullet_share: float = Field(
        default=0.9, ge=0.0, le=1.0, description="lines that begin with a bullet, from three lines on (Gopher: 0.9)"
    )
    max_ellipsis_share: float = Field(
        default=0.3, ge=0.0, le=1.0, description="lines that end with an ellipsis, from three lines on (Gopher: 0.3)"
    )
    min_stop_words: int = Field(
        default=0, ge=0, description="different English stop words that a text must have (Gopher: 2)"
    )
    forbidden: tuple[str, ...] = Field(
        default=("lorem ipsum",), strict=False, description="phrases that no row may hold (C4), any letter case"
    )
    tone: tuple[str, ...] = Field(
        default=(), strict=False, description="words and phrases of an abusive tone, matched as whole words"
    )
    max_tone_words: int = Field(default=0, ge=0, description="how many of the tone words a row may hold")


class IfdParams(Params):
    """Instruction-following difficulty (Cherry LLM; Superfiltering)."""

    definition: Literal["loss", "perplexity"] = Field(
        default="loss",
        description="loss: ratio of mean token losses (Cherry); perplexity: of their exponentials (Superfiltering). "
        "Limits do not transfer from one to the other",
    )
    max_ratio: float = Field(
        default=1.0, gt=0.0, description="drop rows whose prompt makes the answer less likely than this allows"
    )
    keep: float = Field(
        default=0.9, gt=0.0, le=1.0, description="share of the scored rows to keep at most, the hardest first"
    )
    by_label: bool = Field(
        default=False, description="take that share within every label, or function called, so that none vanishes"
    )
    scorer: Literal["teacher", "student"] = Field(
        default="teacher", description="which model scores; student: the model made by an earlier step"
    )
    alone: Literal["empty_turn", "bare"] = Field(
        default="empty_turn",
        description="the answer without its prompt: after an empty user turn, or after the first token only",
    )
    max_tokens: int = Field(default=512, ge=8, description="longer rows are cut for scoring")
