"""Words and hashed embeddings: marks, scripts without spaces, and distances that make sense."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data.embeddings import hashed, ngrams, normalised
from compress.data.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dim the LIGHTS, ok?", ["dim", "the", "lights", "ok"]),
        ("l'été à 7:30", ["l", "été", "à", "7", "30"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("明日の天気 ok", ["明", "日", "の", "天", "気", "ok"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(max_size=30))
def test_words_of_ascii_and_of_other_texts_agree(text: str) -> None:
    ascii_part = text.encode("ascii", errors="ignore").decode()
    assert words(f"{ascii_part} é") == [*words(ascii_part), "é"]


def test_ngrams_by_hand() -> None:
    assert ngrams("a b a") == {
        "a": 2, "b": 1, "a b": 1, "b a": 1, "# a ": 2, "#a b": 1, "# b ": 1, "#b a": 1,
    }  # fmt: skip


def test_embedding_is_of_length_one_and_the_same_every_time() -> None:
    texts = ["dim the lights", "", "play some jazz"] * 1500  # more than one chunk
    points = hashed(texts, dims=64)
    assert points.dtype == np.float32
    assert np.allclose(np.linalg.norm(points, axis=1), [1.0, 0.0, 1.0] * 1500)
    assert np.array_equal(points, hashed(texts, dims=64))
    assert np.array_equal(points[:3], points[-3:])
    assert hashed([], dims=16).shape == (0, 16)


def test_similar_requests_are_near() -> None:
    texts = ["dim the kitchen lights", "dim the kitchen lights please", "play some jazz in the attic"]
    points = hashed(texts, dims=4096)
    assert points[0] @ points[1] > 0.6 > 0.2 > points[0] @ points[2]


def test_normalised_keeps_zeros() -> None:
    assert normalised(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
