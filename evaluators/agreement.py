"""How far one model's next-token distributions are from another's, token by token.

`compare` gives KL(reference || candidate) in nats and whether both put the same token first; `nll` the loss
on the given tokens. All in float64 from logits (tokens, vocabulary). Knows nothing of how logits were made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def log_softmax(logits: ArrayLike) -> Array:
    """Log-probabilities (tokens, vocabulary); ValueError where a logit is NaN or +inf."""
    array = np.asarray(logits, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"logits: got shape {array.shape}; expected (tokens, vocabulary)")
    if np.isnan(array).any() or np.isposinf(array).any():
        raise ValueError("logits: NaN or infinite values")
    shifted = array - array.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Per token: ``kl`` in nats (>= 0) and ``top1`` (1.0 where the first choice is the same)."""

    kl: Array
    top1: Array


def compare(reference: ArrayLike, candidate: ArrayLike) -> Agreement:
    """Compare logits (tokens, vocabulary); columns that only one model has (padding rows) are left out."""
    left, right = np.asarray(reference), np.asarray(candidate)
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
        raise ValueError(f"logits: got shapes {left.shape} and {right.shape}; expected the same number of tokens")
    shared = min(left.shape[1], right.shape[1])
    log_p, log_q = log_softmax(left[:, :shared]), log_softmax(right[:, :shared])
    p = np.exp(log_p)
    # 0 * -inf is 0 here: a token that the reference never gives costs nothing
    kl = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=1)
    top1 = (left[:, :shared].argmax(axis=1) == right[:, :shared].argmax(axis=1)).astype(np.float64)
    return Agreement(np.maximum(kl, 0.0), top1)


def nll(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Loss in nats of each target token (tokens,) under logits (tokens, vocabulary)."""
    chosen = np.asarray(targets, dtype=np.int64)
    logs = log_softmax(logits)
    if chosen.shape != (len(logs),):
        raise ValueError(f"targets: got shape {chosen.shape}; expected ({len(logs)},)")
    loss: Array = -logs[np.arange(len(chosen)), chosen]
    return loss
