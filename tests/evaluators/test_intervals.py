"""Intervals of shares: slow references, coverage by enumeration, and what few rows can never prove."""

import itertools
import math

import numpy as np
import pytest

from evaluators.intervals import effective_rows, paired_difference, paired_ratio, proportion, wilson

Z = 1.959963984540054


def binomial(k, n, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_known_answers_at_the_border():
    assert proportion(30, 30) == pytest.approx((0.8843, 1.0), abs=1e-4)
    assert proportion(0, 30) == pytest.approx((0.0, 0.1157), abs=1e-4)
    assert proportion(0, 1000)[1] == pytest.approx(1 - 0.025 ** (1 / 1000))  # the rule of three, two-sided
    assert proportion(81, 263) == pytest.approx((0.2527, 0.3676), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # likewise
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(("up", "down", "rows"), [(0, 0, 30), (1, 0, 50), (12, 3, 60), (3, 40, 90), (6, 20, 600)])
def test_the_difference_is_the_score_interval_of_a_slow_search(up, down, rows):
    """The likelihood's maximum under each difference by a grid, not by the quadratic."""

    def score(difference):
        p = np.linspace(max(0.0, -difference), min(1.0, (1 - difference) / 2), 400_001)[1:-1]  # of `down`
        rest = 1 - 2 * p - difference
        with np.errstate(divide="ignore"):
            logs = [c * np.log(q) if c else 0.0 for c, q in ((up, p + difference), (down, p), (rows - up - down, rest))]
        best = p[np.argmax(sum(logs))]
        return (up - down - rows * difference) / math.sqrt(rows * (2 * best + difference * (1 - difference)))

    low, high = paired_difference(up, down, rows)
    if up and down:  # else the exact bound may reach further
        assert score(low) == pytest.approx(Z, abs=2e-3)
        assert score(high) == pytest.approx(-Z, abs=2e-3)
    else:
        assert score(low) >= Z - 2e-3
        assert score(high) <= -Z + 2e-3


@pytest.mark.parametrize(("up", "down", "both", "rows"), [(4, 9, 30, 60), (12, 3, 20, 60), (3, 40, 30, 90)])
def test_the_ratio_is_the_score_interval_of_a_slow_search(up, down, both, rows):
    """H0: p(after) = ratio * p(before); the maximum over (both, down) on a grid, refined once."""

    def score(ratio):
        lows, highs = np.array([0.0, 0.0]), np.array([1.0, 1.0])
        for _ in range(12):
            axes = [np.linspace(a, b, 63)[1:-1] for a, b in zip(lows, highs, strict=True)]
            p11, p01 = np.meshgrid(*axes, indexing="ij")
            p10 = ratio * (p11 + p01) - p11
            p00 = 1 - p11 - p01 - p10
            fine = (p10 > 0) & (p00 > 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                neither = rows - up - down - both
                logs = both * np.log(p11) + down * np.log(p01) + up * np.log(p10) + neither * np.log(p00)
            at = np.unravel_index(np.argmax(np.where(fine, logs, -np.inf)), logs.shape)
            centre, reach = np.array([axes[0][at[0]], axes[1][at[1]]]), (highs - lows) / 12
            lows, highs = np.maximum(0, centre - reach), np.minimum(1, centre + reach)
        p11, p01 = centre
        before = p11 + p01
        spread = rows * (ratio * before + ratio * ratio * before - 2 * ratio * p11)
        return (both + up - ratio * (both + down)) / math.sqrt(spread)

    low, high = paired_ratio(up, down, both, rows)
    assert score(low) == pytest.approx(Z, abs=5e-3)
    assert score(high) == pytest.approx(-Z, abs=5e-3)


def test_turning_the_pair_round_turns_the_interval_round():
    for up, down, both, rows in ((0, 0, 5, 5), (4, 9, 30, 60), (0, 3, 20, 30), (7, 0, 20, 30)):
        low, high = paired_difference(up, down, rows)
        assert paired_difference(down, up, rows) == pytest.approx((-high, -low), abs=1e-9)
        low, high = paired_ratio(up, down, both, rows)
        assert paired_ratio(down, up, both, rows) == pytest.approx((1 / high, 1 / low), rel=1e-6)


@pytest.mark.parametrize("rows", [5, 20, 60])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.98])
def test_exact_intervals_cover_at_the_level_or_more(rows, share):
    """By enumeration of every outcome, where resampling covers 0.33 of the time at 20 rows of 0.98."""
    covered = sum(
        binomial(k, rows, share) for k in range(rows + 1) if proportion(k, rows)[0] <= share <= proportion(k, rows)[1]
    )
    assert covered >= 0.95


@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize(("p_up", "p_down"), [(0.0, 0.05), (0.01, 0.01), (0.02, 0.1), (0.2, 0.3), (0.0, 0.003)])
def test_paired_intervals_cover_near_the_level(rows, p_up, p_down):
    covered = missed_worse = 0.0
    for up, down in itertools.product(range(rows + 1), repeat=2):
        if up + down > rows or (up and not p_up):
            continue
        chance = math.comb(rows, up) * math.comb(rows - up, down) * p_up**up * p_down**down
        chance *= (1 - p_up - p_down) ** (rows - up - down)
        if chance < 1e-9:
            continue
        low, high = paired_difference(up, down, rows)
        covered += chance * (low <= p_up - p_down <= high)
        missed_worse += chance * (p_up - p_down < low)
    assert covered >= 0.945
    assert missed_worse <= 0.035, "a drop that is larger than the interval says"


def test_what_few_rows_cannot_prove():
    assert paired_difference(0, 0, 5)[0] < -0.5  # 5 of 5 the same: up to half of the rows may be lost
    widths = [paired_difference(0, 0, rows)[1] for rows in (5, 30, 100, 1000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[3] == pytest.approx(3.83e-3, rel=0.01)  # about 4 / n
    assert paired_ratio(0, 0, 5, 5)[0] < 0.5


def test_the_quickstarts_gate_still_passes_by_calculation():
    """A drop of 2.3 points on 600 or 1,000 rows stays under its limit of 10 at the upper end, however it came about."""
    for rows, lost in ((600, 14), (1000, 23)):
        for gained in (0, 5, 50):
            assert -paired_difference(gained, gained + lost, rows)[0] < 0.1


def test_wilson_is_wide_enough_for_any_values_between_0_and_1():
    rng = np.random.default_rng(0)
    for draw in (lambda: rng.random(25), lambda: rng.beta(0.2, 0.05, 25), lambda: (rng.random(25) < 0.95) * 1.0):
        truth = np.mean([draw().mean() for _ in range(4000)])
        hits = 0
        for _ in range(1000):
            low, high = wilson(float(draw().mean()), 25)
            hits += low <= truth <= high
        assert hits >= 930


def test_rows_of_unequal_weight_say_less():
    assert effective_rows(np.ones(7)) == pytest.approx(7)
    assert effective_rows(np.array([100.0, 1.0, 1.0])) == pytest.approx(1.04, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(4, 3), "expected 0 <= successes <= rows"),
        (lambda: proportion(0, 0), "at least one row"),
        (lambda: proportion(1, 3, 95), "expected a share between 0 and 1"),
        (lambda: paired_difference(3, 3, 5), "expected counts within the rows"),
        (lambda: paired_ratio(3, 0, 0, 5), "no row was right before"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
