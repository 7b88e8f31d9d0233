"""What the tokens of a tokenizer spell: each id as a tuple of symbols, so that two tokenizers can be compared.

A symbol below 256 is a byte of the text in UTF-8. `END` stands for every token that ends an answer, whatever it is
called on either side; `UNKNOWN` for a token whose text is lost, which equals nothing. Other special tokens spell their
own names, since that is what the chat template wrote. `vocabulary` reads them off a fast tokenizer, `common_tokens`
says which ids of two of them spell the same. Knows nothing of rows, models or losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress.encoding import end_of_turn, special_ids, stop_ids
from compress.errors import ModelError

Symbols = tuple[int, ...]

END, UNKNOWN = 256, 257
BOUNDARY = frozenset(b" \t\n\r")  # no token of the common tokenizers goes on behind a word with one of these
_METASPACE = "\u2581"  # SentencePiece's sign for a space
_UNREADABLE = ("WordPiece", "BPEDecoder", "CTC")  # their decoders make up spaces that no token holds


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        symbols: what each token id spells; empty for ids that are not in use.
        boundary: whether a token begins a new word or ends the answer, by id.
        plain: whether a token is the usual one for what it spells: no byte fallback, and of several tokens that end
            an answer the template's own.
        special: whether a token is special: no part of the text.
    """

    symbols: tuple[Symbols, ...]
    boundary: tuple[bool, ...]
    plain: tuple[bool, ...]
    special: tuple[bool, ...]

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.symbols)

    @property
    def end(self) -> bool:
        """Whether any token ends an answer."""
        return (END,) in self.symbols


def vocabulary(tokenizer: Any, *, where: str) -> Vocabulary:
    """What every token of a fast ``tokenizer`` spells.

    Raises:
        ModelError: its tokens do not hold the spaces of the text (WordPiece and its like).
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = set(_kinds(rules.get("decoder"))) | set(_kinds(rules.get("pre_tokenizer")))
    unreadable = sorted(kinds & set(_UNREADABLE))
    if unreadable:
        raise ModelError(
            where,
            f"the tokens of its tokenizer ({unreadable[0]}) do not say where the spaces of the text are",
            "a byte-level or SentencePiece tokenizer",
            "Choose another student or teacher: between these two no text can be aligned byte by byte",
        )
    ends, specials = set(stop_ids(tokenizer)), special_ids(tokenizer)
    usual_end = end_of_turn(tokenizer, "assistant") if tokenizer.chat_template else None
    usual_end = tokenizer.eos_token_id if usual_end is None else usual_end
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    fallback = "ByteFallback" in kinds or bool(rules["model"].get("byte_fallback"))
    size = max(tokenizer.get_vocab().values()) + 1
    symbols, boundary, plain = [], [], []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
        spelled: Symbols
        usual = True
        if index in ends:
            spelled, usual = (END,), index == usual_end
        elif index == tokenizer.unk_token_id:
            spelled = (UNKNOWN,)
        elif index in added:
            spelled = tuple(added[index].encode())
        else:
            spelled, usual = _spelled(token, byte_level="ByteLevel" in kinds, fallback=fallback)
        symbols.append(spelled)
        boundary.append(index in specials or bool(spelled and spelled[0] in BOUNDARY))
        plain.append(usual)
    special = tuple(index in specials for index in range(size))
    return Vocabulary(tuple(symbols), tuple(boundary), tuple(plain), special)


def common_tokens(teacher: Vocabulary, student: Vocabulary) -> list[tuple[int, int]]:
    """Pairs (teacher's id, student's id) of tokens that spell the same, each id once, by rising teacher's id."""
    theirs = usual_tokens(student)
    return [(index, theirs[spelled]) for spelled, index in usual_tokens(teacher).items() if spelled in theirs]


def usual_tokens(side: Vocabulary) -> dict[Symbols, int]:
    """What is spelled -> the usual token for it, by rising id."""
    found: dict[Symbols, int] = {}
    for index, spelled in enumerate(side.symbols):
        if spelled and UNKNOWN not in spelled and (spelled not in found or not side.plain[found[spelled]]):
            found[spelled] = index
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _spelled(token: str | None, *, byte_level: bool, fallback: bool) -> tuple[Symbols, bool]:
    """Bytes of an ordinary token, and whether it is the usual one for them."""
    if token is None:  # an id that no token has
        return (), False
    if byte_level:
        if all(letter in _BYTES for letter in token):
            return tuple(_BYTES[letter] for letter in token), True
        return tuple(token.encode()), True
    if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return (int(token[3:5], 16),), False
    return tuple(token.replace(_METASPACE, " ").encode()), True


def _kinds(part: Any) -> Iterator[str]:
    """Names of all steps in a part of ``tokenizer.json``."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list):
        for value in part:
            yield from _kinds(value)


def _byte_letters() -> dict[str, int]:
    """The letters by which GPT-2 and all byte-level tokenizers after it write bytes: printable ones as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + at): value for at, value in enumerate(others)}


_BYTES = _byte_letters()
