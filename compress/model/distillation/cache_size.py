"""How large a teacher's cache becomes, from numbers alone: bytes of a position, and tokens that a training reaches.

Imports nothing heavy, so that a plan can tell it.
"""

from __future__ import annotations


def entry_bytes(vocab: int, samples: int) -> int:
    """Bytes of one distinct token that was drawn: 2 for 512 tokens and 12 draws, 3 up to 1.39 million tokens."""
    return ((vocab * samples - 1).bit_length() + 7) // 8


def position_bytes(vocab: int, *, top_k: int = 0, samples: int = 0) -> int:
    """Bytes of one target position, keys not counted; with ``samples`` draws instead of ``top_k`` entries, at most."""
    if samples:
        return min(samples, vocab) * entry_bytes(vocab, samples)
    return min(top_k, vocab) * ((2 if vocab <= 1 << 16 else 4) + 2) + 2


def reached_tokens(
    pool: float, rows: float, *, steps: float, batch_tokens: float, validation_share: float, validation_rows: float
) -> float:
    """Tokens that the teacher reads for a training of ``steps``: those drawn, each once, and those held out."""
    held = pool * min(validation_share, validation_rows / max(rows, 1.0))
    return min(pool, steps * batch_tokens + held)
