"""Zero-padding of attention heads, for runtimes whose attention takes head sizes of certain multiples only.

A head of size d becomes one of size D: rotary embedding turns the pairs (i, i + d/2), so each half is padded on its
own and the pairs stay pairs. Zeros add nothing to query times key; the softmax scale stays that of the original d;
the padded part of the output is never read. `norm_gain` and `norm_epsilon` keep a per-head RMS norm exact. Index
arithmetic alone; knows nothing of weights and graphs.
"""

from __future__ import annotations

import math

import numpy as np

from deploy.export.codes import PAD, Array, Index

MULTIPLE = 16  # GroupQueryAttention on CPU: "head_size shall be a multiple of 16" (onnxruntime 1.32)


def padded_size(size: int) -> int:
    """Return the smallest head size from ``size`` up that the runtime takes."""
    return -(-size // MULTIPLE) * MULTIPLE


def places(size: int, padded: int) -> Index:
    """Return the place of each of a head's ``size`` channels within its ``padded`` ones, (size,)."""
    half = np.arange(size // 2)
    return np.asarray(np.concatenate([half, padded // 2 + half]), dtype=np.int64)


def row_order(heads: int, size: int, padded: int) -> Index:
    """Return the order of rows of q, k or v that pads every head, (heads * padded,), `PAD` for zero rows."""
    order = np.full((heads, padded), PAD, np.int64)
    order[:, places(size, padded)] = np.arange(heads * size).reshape(heads, size)
    return order.reshape(-1)


def column_places(heads: int, size: int, padded: int) -> Index:
    """Return where each of the attention's original output channels lies in its padded output, (heads * size,)."""
    starts = np.arange(heads)[:, None] * padded
    return np.asarray((starts + places(size, padded)[None]).reshape(-1), dtype=np.int64)


def norm_gain(gain: Array, padded: int) -> Array:
    """Return the gain (padded,) of an RMS norm over a padded head that gives what ``gain`` (size,) gave.

    The mean of squares runs over ``padded`` instead of ``size`` channels, so it is smaller by size / padded; with the
    epsilon smaller by the same factor, the norm comes out larger by sqrt(padded / size), which the gain takes back.
    """
    size = len(gain)
    wide = np.zeros(padded, np.float32)
    wide[places(size, padded)] = gain * np.float32(math.sqrt(size / padded))
    return wide


def norm_epsilon(epsilon: float, size: int, padded: int) -> float:
    """Return the epsilon that belongs to `norm_gain`."""
    return epsilon * size / padded


def frequencies(inverse: Array, padded: int) -> Array:
    """Return rotary frequencies (padded / 2,): the given ones (size / 2,), then zeros, which turn nothing."""
    wide = np.zeros(padded // 2, np.float32)
    wide[: len(inverse)] = inverse
    return wide
