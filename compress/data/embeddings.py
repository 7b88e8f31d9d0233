"""Rows as points: TF-IDF of hashed n-grams, without a model.

`hashed` is the cheap embedding where no teacher is at hand or its hidden states are too slow to get. Pure numpy,
the same on every run. Knows nothing of stages or files.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.data.words import words

CHUNK = 4096  # texts counted at a time; bounds the memory for n-grams


def ngrams(text: str) -> Counter[str]:
    """Words, word pairs and character trigrams of ``text`` in lower case, with counts."""
    found = words(text)
    pairs = (f"{a} {b}" for a, b in pairwise(found))
    padded = f" {' '.join(found)} "
    trigrams = (f"#{padded[i : i + 3]}" for i in range(len(padded) - 2))  # marked: a word is no trigram
    return Counter([*found, *pairs, *trigrams])


def hashed(texts: Sequence[str], *, dims: int) -> NDArray[np.float32]:
    """TF-IDF over hashed n-grams, rows of length 1: (texts, dims) float32; an empty text gives zeros.

    Feature hashing with a sign bit (Weinberger et al. 2009), so that collisions cancel on average; weight of an
    n-gram is (1 + ln count) * (ln((1 + n) / (1 + documents)) + 1), n the number of texts.
    """
    out = np.zeros((len(texts), dims), dtype=np.float32)
    for start in range(0, len(texts), CHUNK):
        _count(texts[start : start + CHUNK], out[start : start + CHUNK])
    documents = np.count_nonzero(out, axis=0)
    out *= (np.log((1 + len(texts)) / (1 + documents)) + 1).astype(np.float32)
    return normalised(out)


def _count(texts: Sequence[str], out: NDArray[np.float32]) -> None:
    """Add the signed logarithmic counts of every text to its row of ``out``."""
    rows: list[int] = []
    columns: list[int] = []
    weights: list[float] = []
    for row, text in enumerate(texts):
        for gram, count in ngrams(text).items():
            code = zlib.crc32(gram.encode())
            rows.append(row)
            columns.append((code >> 1) % out.shape[1])
            weights.append((1.0 + math.log(count)) * (1.0 if code & 1 else -1.0))
    np.add.at(out, (np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)), np.array(weights, np.float32))


def normalised(points: NDArray[Any]) -> NDArray[np.float32]:
    """Every row divided by its length, float32; rows of zeros stay zeros."""
    points = np.asarray(points, dtype=np.float32)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)
