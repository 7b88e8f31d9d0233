"""The loss of a row's answer under a scorer, measured once: how one stage leaves it and a later one takes it over.

`mark` names what a loss was measured on: the scorer, the very content of the row and the cut. `known` finds a loss
under that mark, whichever stage left it. A teacher's forward pass over the pool is the dearest part of the data steps.
Knows nothing of models.
"""

from __future__ import annotations

from compress.data.rows import Row


def mark(scorer: str, row: Row, max_tokens: int) -> str:
    """Key of the loss of ``row`` (its id is a hash of its content) under the scorer with identity ``scorer``."""
    return f"{scorer[:16]}:{row.id}:{max_tokens}"


def known(scorer: str, row: Row, max_tokens: int) -> float | None:
    """Mean loss in nats per answer token that an earlier stage left, or ``None``."""
    wanted = mark(scorer, row, max_tokens)
    for scores in row.meta.get("scores", {}).values():
        if scores.get("scored") == wanted and isinstance(scores.get("mean_logprob"), float):
            return -float(scores["mean_logprob"])
    return None
