"""What a chat completion says: the answer without thoughts, its confidence, and whether it came to an end.

`read_reply` reads the body of a reply, `Reply` is the answer. Thoughts are taken out where they stand in the text
(``thoughts``) and never looked for where the server gives them apart. Knows nothing of connections.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import safe_to_show
from compress.thoughts import split_thoughts

# Reasons for which servers say that an answer is at its end: OpenAI, TGI, Anthropic, llama.cpp, Google
ENDED = frozenset({"stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "complete", "completed"})
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "thought")
THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning", "thought", "summary", "analysis"})
TEXT_PARTS = frozenset({"text", "output_text"})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as text, without the thoughts before it.

    Attributes:
        text: empty where the server gave thoughts alone, or nothing.
        mean_logprob: nats per token of the answer; NaN where the server gave none, or none of the answer alone.
        finished: whether the answer came to its end by itself.
        thoughts: whether there were thoughts before it, or in its place.
    """

    text: str
    mean_logprob: float
    finished: bool
    thoughts: bool = False


class Nonsense(Exception):
    """A reply that is not what the protocol says; becomes an `EdgestillError` when it is the last."""


def read_reply(content: bytes, limit: int) -> Reply:
    """The first choice of a chat completion that was asked for at most ``limit`` tokens.

    Raises:
        Nonsense: it is none.
    """
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        said, apart = _said(choice["message"])
        tokens = _tokens(choice.get("logprobs"))
        ended = _ended(choice.get("finish_reason"), reply.get("usage"), limit)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Nonsense(f"not a chat completion: {excerpt(content)}") from error
    split = split_thoughts(said)
    thoughts = split.thoughts or apart
    whole = split.whole and (bool(split.answer.strip()) or not thoughts)
    mean = _mean(tokens, split.answer, thoughts=thoughts)
    return Reply(split.answer, mean if whole else math.nan, ended and whole, thoughts)


def _said(message: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a message, and whether thoughts stand beside it.

    Raises:
        TypeError, KeyError: it is no message, or no text.
    """
    content = message["content"] if "content" in message or not _beside(message) else None
    if content is None:
        return "", _beside(message)  # servers give null for an answer without text
    if isinstance(content, str):
        return whole_characters(content), _beside(message)
    parts, apart = [], _beside(message)
    for part in content:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind in THOUGHT_PARTS:
            apart = True
        elif kind in TEXT_PARTS:
            parts.append(part if isinstance(part, str) else part["text"])
        else:
            raise TypeError(f"a part of type {kind!r}")
    return whole_characters("".join(parts)), apart


def _beside(message: Mapping[str, Any]) -> bool:
    return any(message.get(name) for name in THOUGHT_FIELDS)


def whole_characters(text: str) -> str:
    """``text`` with a mark in place of half characters, which a server may cut and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ended(reason: Any, usage: Any, limit: int) -> bool:
    """Whether the server says so; where it gives no reason, whether it wrote fewer tokens than it could."""
    if isinstance(reason, str) and reason:
        return reason.lower() in ENDED
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return isinstance(count, int) and 0 < count < limit


def _tokens(logprobs: Any) -> list[tuple[bytes | None, float]]:
    """Bytes and log-probability of each token; no bytes where they are not told."""
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for token in listed or []:
        raw = token.get("bytes")
        text = token.get("token")
        if isinstance(raw, list):
            spelled: bytes | None = bytes(raw)
        else:
            spelled = text.encode("utf-8", "replace") if isinstance(text, str) else None
        found.append((spelled, float(token["logprob"])))
    return found


def _mean(tokens: Sequence[tuple[bytes | None, float]], answer: str, *, thoughts: bool) -> float:
    """Mean over the tokens of ``answer``: over all where there were no ``thoughts``, else from where it begins."""
    values = [value for _, value in tokens]
    if thoughts:
        start = _start(tokens, answer.strip().encode())
        values = [] if start is None else values[start:]
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else math.nan


def _start(tokens: Sequence[tuple[bytes | None, float]], answer: bytes) -> int | None:
    """The token in which the answer begins; None where the tokens do not spell it at their end.

    Behind it, blanks and one token that ends the turn may stand.
    """
    spelled = [raw for raw, _ in tokens]
    if not answer or any(raw is None for raw in spelled):
        return None
    pieces = [raw for raw in spelled if raw is not None]
    for last in (len(pieces), len(pieces) - 1):
        text = b"".join(pieces[:last]).rstrip()
        if text.endswith(answer):
            at, reached = len(text) - len(answer), 0
            for number, piece in enumerate(pieces):
                reached += len(piece)
                if reached > at:
                    return number
    return None


def excerpt(content: bytes) -> str:
    """The beginning of a reply for a message, on one line, without secrets and control characters."""
    text = safe_to_show(" ".join(content[:4096].decode("utf-8", errors="replace").split()))
    return (text[:160] + " ...") if len(text) > 160 else (text or "(empty)")
