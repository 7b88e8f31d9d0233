"""KL, first-choice agreement and token loss against a plain reference in Python floats."""

import math

import numpy as np
import pytest

from evaluators.agreement import compare, log_softmax, nll


def slow_kl(left, right):
    """KL of two rows of logits, one exponential at a time."""
    p = [math.exp(x) for x in left]
    q = [math.exp(x) for x in right]
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


def test_known_answer_against_plain_loops():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 11)), rng.normal(size=(7, 11))
    result = compare(left, right)
    assert result.kl == pytest.approx([slow_kl(a, b) for a, b in zip(left, right, strict=True)], abs=1e-12)
    assert list(result.top1) == [float(a.argmax() == b.argmax()) for a, b in zip(left, right, strict=True)]


def test_the_same_model_and_a_shifted_copy_agree_fully():
    logits = np.random.default_rng(1).normal(size=(5, 9))
    result = compare(logits, logits + 100.0)
    assert result.kl == pytest.approx(np.zeros(5), abs=1e-12)
    assert result.top1.min() == 1.0


def test_padding_columns_of_one_model_are_left_out():
    logits = np.random.default_rng(2).normal(size=(4, 6))
    padded = np.concatenate([logits, np.full((4, 2), 50.0)], axis=1)
    assert compare(logits, padded).kl == pytest.approx(np.zeros(4), abs=1e-12)


def test_loss_is_minus_log_softmax_and_survives_large_logits():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    assert nll(logits, [0, 0]) == pytest.approx([0.0, 1000.0])
    assert np.exp(log_softmax(logits)).sum(axis=1) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(np.zeros((2, 3)), np.zeros((3, 3))), "same number of tokens"),
        (lambda: nll(np.zeros((2, 3)), [0]), r"expected \(2,\)"),
        (lambda: log_softmax(np.array([[np.nan, 0.0]])), "NaN"),
        (lambda: log_softmax(np.zeros(3)), "expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
