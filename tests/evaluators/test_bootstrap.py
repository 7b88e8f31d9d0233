"""Bootstrap intervals: exact cases, coverage on simulated data, and pairing."""

import numpy as np
import pytest

from evaluators.bootstrap import interval, paired_difference, ratio


def test_constant_rows_give_a_point():
    result = interval(np.full(50, 0.25))
    assert (result.mean, result.low, result.high, result.rows) == (0.25, 0.25, 0.25, 50)


def test_equal_columns_have_no_difference():
    values = np.random.default_rng(0).random(200)
    result = paired_difference(values, values)
    assert (result.mean, result.low, result.high) == (0.0, 0.0, 0.0)


def test_interval_matches_the_normal_approximation():
    values = np.random.default_rng(1).random(1000) < 0.9
    result = interval(values.astype(float), seed=3)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert result.low == pytest.approx(values.mean() - half, abs=0.003)
    assert result.high == pytest.approx(values.mean() + half, abs=0.003)


def test_coverage_is_near_the_level():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        sample = interval(rng.random(80) < 0.7, seed=trial, samples=500)
        hits += sample.low <= 0.7 <= sample.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_is_narrower_than_ignoring_the_pairs():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=300)
    left, right = shared + 0.05 * rng.normal(size=300), shared + 0.05 * rng.normal(size=300)
    paired = paired_difference(left, right)
    broken = paired_difference(left, rng.permutation(right))
    assert (paired.high - paired.low) < 0.2 * (broken.high - broken.low)


def test_same_seed_same_interval_and_another_seed_another():
    values = np.random.default_rng(4).random(100)
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_ratio_weights_rows_by_their_tokens():
    result = ratio([10.0, 1.0], [10, 1])
    assert (result.mean, result.low, result.high) == (1.0, 1.0, 1.0)
    assert ratio([30.0, 1.0], [10, 1]).mean == pytest.approx(31 / 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "expected one value per row"),
        (lambda: interval([[1.0]]), "expected one value per row"),
        (lambda: interval([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: interval([1.0, 2.0], level=95), "expected a share between 0 and 1"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: ratio([1.0], [0.0]), "expected counts"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
