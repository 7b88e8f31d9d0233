"""What a teacher gives back for token rows: `TokenScores` of given answers and `Generation`, a continuation.

Plain values, shared by the teachers, by the torch code that makes them and by the stages that read them. Imports
nothing of ours; knows neither torch nor text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a teacher thinks of the target tokens of one row; three arrays of one entry per target.

    Attributes:
        logprob: natural log probability of the given token.
        best_logprob: of the token that the teacher finds likeliest.
        is_argmax: whether they are the same token.
    """

    logprob: NDArray[np.float32]
    best_logprob: NDArray[np.float32]
    is_argmax: NDArray[np.bool_]

    @property
    def agrees(self) -> bool:
        """Whether greedy decoding from this prompt would write exactly this answer."""
        return bool(self.is_argmax.all())

    @staticmethod
    def empty() -> TokenScores:
        """Of a row without targets."""
        return TokenScores(np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation: ids without the stop token, mean log probability (nats) of its tokens and the stop token.

    The log probabilities are those of the model itself, at temperature 1, however the tokens were sampled.
    ``finished``: a stop token ended it.
    """

    ids: tuple[int, ...]
    mean_logprob: float
    finished: bool
