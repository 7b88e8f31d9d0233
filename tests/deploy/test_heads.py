"""Padded heads compute what the heads computed: rotation, products, norms."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.export import heads
from deploy.export.codes import PAD


def rotate(vector: np.ndarray, frequencies: np.ndarray, position: int) -> np.ndarray:
    """Rotary embedding of half-split pairs (i, i + d/2), written plainly."""
    half = len(vector) // 2
    turned = vector.copy()
    for i in range(half):
        cos, sin = np.cos(position * frequencies[i]), np.sin(position * frequencies[i])
        turned[i] = vector[i] * cos - vector[i + half] * sin
        turned[i + half] = vector[i + half] * cos + vector[i] * sin
    return turned


def pad(vector: np.ndarray, padded: int) -> np.ndarray:
    """A head's vector with its channels at their places."""
    wide = np.zeros(padded, vector.dtype)
    wide[heads.places(len(vector), padded)] = vector
    return wide


@pytest.mark.parametrize(("size", "padded"), [(8, 16), (24, 32), (2, 16), (16, 16), (20, 32), (40, 48)])
def test_padding_rotates_and_multiplies_as_the_head_did(size: int, padded: int) -> None:
    assert heads.padded_size(size) == padded
    draw = np.random.default_rng(size)
    query, key = draw.standard_normal((2, size))
    frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
    wide = heads.frequencies(frequencies.astype(np.float32), padded)
    for position in (0, 1, 7, 300):
        small = rotate(query, frequencies.astype(np.float32), position)
        assert np.allclose(rotate(pad(query, padded), wide, position), pad(small, padded), atol=1e-12)
        product = rotate(pad(query, padded), wide, position) @ rotate(pad(key, padded), wide, 3)
        assert product == pytest.approx(small @ rotate(key, frequencies.astype(np.float32), 3), abs=1e-9)


def test_rows_and_columns_of_padded_heads_are_each_others_inverse() -> None:
    order = heads.row_order(3, 8, 16)
    assert len(order) == 48
    assert (order == PAD).sum() == 24
    assert np.array_equal(order[heads.column_places(3, 8, 16)], np.arange(24))


def test_no_padding_leaves_everything_as_it_is() -> None:
    assert np.array_equal(heads.row_order(4, 32, 32), np.arange(128))
    assert np.array_equal(heads.column_places(4, 32, 32), np.arange(128))


@pytest.mark.parametrize(("size", "padded"), [(8, 16), (24, 32)])
def test_the_norm_over_a_padded_head_is_exact(size: int, padded: int) -> None:
    draw = np.random.default_rng(1)
    vector = draw.standard_normal(size) * 1e-3  # small, so that the epsilon counts
    gain = draw.standard_normal(size).astype(np.float32)
    epsilon = 1e-6

    def norm(values: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return values / np.sqrt((values**2).mean() + eps) * weight

    wide = norm(pad(vector, padded), heads.norm_gain(gain, padded), heads.norm_epsilon(epsilon, size, padded))
    assert np.allclose(wide, pad(norm(vector, gain, epsilon), padded), rtol=1e-6)
    naive = norm(pad(vector, padded), pad(gain, padded), epsilon)
    assert not np.allclose(naive, pad(norm(vector, gain, epsilon), padded), rtol=1e-2)  # why it is needed
