"""The gate: every kind of limit at, under and over its bound, and metrics that were not measured."""

import pytest

from evaluators.bootstrap import Interval
from evaluators.gate import Limit, Measured, judge


def drop(low, high):
    """A shipped-minus-teacher interval."""
    return Measured(0.96, 0.97, difference=Interval((low + high) / 2, low, high, 500))


def ratio(low, high):
    """A shipped-over-teacher interval of a sampled metric."""
    mean = (low + high) / 2
    return Measured(mean * 4, 4.0, Interval(mean * 4, 1, 9, 500), ratio=Interval(mean, low, high, 500))


@pytest.mark.parametrize(
    ("kind", "bound", "seen", "passed"),
    [
        ("max_drop", 0.02, drop(-0.02, 0.01), True),
        ("max_drop", 0.02, drop(-0.021, 0.01), False),  # the mean is fine, the far end is not
        ("max_rise", 0.02, drop(-0.5, 0.02), True),
        ("max_rise", 0.02, drop(-0.5, 0.021), False),
        ("min", 0.9, Measured(0.95, interval=Interval(0.95, 0.9, 0.97, 10)), True),
        ("min", 0.91, Measured(0.95, interval=Interval(0.95, 0.9, 0.97, 10)), False),
        ("max", 1.0, Measured(1.0), True),
        ("max", 0.99, Measured(1.0), False),
        ("min_ratio", 6, Measured(1_000_000, 6_000_000), True),
        ("min_ratio", 6.01, Measured(1_000_000, 6_000_000), False),
        ("max_ratio", 0.5, Measured(2.0, 4.0), True),
        ("max_ratio", 0.49, Measured(2.0, 4.0), False),
        ("max_drop", 0.02, Measured(0.95, 0.97 - 1e-12), True),  # no rows: plain difference
        ("max_drop", 0.02, Measured(0.95), False),  # no teacher's figure: never a silent pass
        ("min_ratio", 1, Measured(0.0, 5.0), False),
        ("max_ratio", 1.3, ratio(1.1, 1.3), True),
        ("max_ratio", 1.29, ratio(1.1, 1.3), False),  # the point, 1.2, is fine, the far end is not
        ("min_ratio", 0.77, ratio(0.5, 1 / 0.77), True),
        ("min_ratio", 0.78, ratio(0.5, 1 / 0.77), False),  # teacher / shipped: its lower end counts
        ("min_ratio", 0.1, ratio(0.0, 1.0), False),  # the shipped figure may be 0: no ratio to it
        ("max_ratio", 9, Measured(2.0, 2.0, interval=Interval(2.0, 1.9, 2.1, 9)), False),  # sampled, but not paired
        ("max_drop", 9, Measured(2.0, 2.0, interval=Interval(2.0, 1.9, 2.1, 9)), False),
    ],
)
def test_limits(kind, bound, seen, passed):
    verdict = judge([Limit("m", kind, bound)], {"m": seen})
    assert verdict.passed is passed
    assert verdict.results[0].reason


def test_a_metric_that_was_not_measured_fails_and_is_named():
    verdict = judge([Limit("exact_match", "min", 0.5)], {"kl": Measured(0.1)})
    assert not verdict.passed
    assert "exact_match was not measured; measured: kl" in verdict.results[0].reason


def test_one_failed_limit_fails_the_whole_gate():
    verdict = judge([Limit("a", "min", 1), Limit("a", "min", 3)], {"a": Measured(2.0)})
    assert [r.passed for r in verdict.results] == [True, False]
    assert not verdict.passed
    assert verdict.as_dict()["results"][1]["judged"] == 2.0


def test_reason_tells_the_mean_the_interval_and_the_end_that_counts():
    (answer,) = judge([Limit("m", "max_drop", 0.02)], {"m": drop(-0.03, 0.01)}).results
    told = "m: how much lower than the teacher's is 0.01 (interval -0.01 to 0.03, 500 rows)"
    assert answer.reason == f"{told}, judged at its upper end 0.03, allowed <= 0.02"
    (answer,) = judge([Limit("m", "min_ratio", 6)], {"m": Measured(1.0, 5.0)}).results
    assert answer.reason == "m: teacher / shipped is 5, allowed >= 6"


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="expected one of min, max"):
        Limit("a", "below", 1)
