"""The gate: what was measured against what the profile allows.

A `Limit` names a metric and one bound; `judge` answers for every limit with the measured value, its interval
and pass or fail. What was measured on a sample is judged at the pessimistic end of its interval (of the value, of the
paired difference or of the paired ratio), so that a lucky sample does not pass; exact figures such as bytes are judged
as they are. Knows nothing of how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluators.bootstrap import Interval

# kind -> (what it bounds, whether the measured value must stay at or under the bound)
KINDS = {
    "min": ("the value", False),
    "max": ("the value", True),
    "max_drop": ("how much lower than the teacher's", True),
    "max_rise": ("how much higher than the teacher's", True),
    "min_ratio": ("teacher / shipped", False),
    "max_ratio": ("shipped / teacher", True),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One line of a profile's gate: ``metric``, a ``kind`` of `KINDS`, and the ``bound``."""

    metric: str
    kind: str
    bound: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"gate limit on {self.metric}: got {self.kind!r}; expected one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a metric: the shipped artifact's value, the teacher's, and how the two compare row by row.

    ``difference`` and ``ratio`` are the intervals of ``shipped - teacher`` and ``shipped / teacher`` over the same
    rows, where rows exist. A metric without ``interval`` is an exact figure.
    """

    value: float
    teacher: float | None = None
    interval: Interval | None = None
    difference: Interval | None = None
    ratio: Interval | None = None


@dataclass(frozen=True, slots=True)
class LimitResult:
    """The answer for one limit; ``judged`` is the figure that was held against the bound."""

    metric: str
    kind: str
    bound: float
    passed: bool
    judged: float | None
    value: float | None
    interval: Interval | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All answers; passes when every limit does. No limit at all passes and says so in the report."""

    passed: bool
    results: tuple[LimitResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"passed": self.passed, "results": [r.as_dict() for r in self.results]}


def turned(interval: Interval) -> Interval:
    """The interval of the reciprocal of what ``interval`` is of; its ends must be above 0."""
    return replace(interval, mean=1 / interval.mean, low=1 / interval.high, high=1 / interval.low)


def compared(limit: Limit, seen: Measured) -> Interval | float | None:
    """What ``limit`` bounds: its interval, a plain figure where the metric is exact, None where it cannot be told."""
    if limit.kind in ("min", "max"):
        return seen.value if seen.interval is None else seen.interval
    if seen.teacher is None:
        return None
    return _difference(limit, seen) if limit.kind in ("max_drop", "max_rise") else _ratio(limit, seen)


def _difference(limit: Limit, seen: Measured) -> Interval | float | None:
    sign = -1.0 if limit.kind == "max_drop" else 1.0
    if seen.difference is not None:
        return seen.difference.signed(sign)
    return sign * (seen.value - seen.teacher) + 0.0 if seen.interval is None and seen.teacher is not None else None


def _ratio(limit: Limit, seen: Measured) -> Interval | float | None:
    if seen.ratio is not None:
        if limit.kind == "max_ratio":
            return seen.ratio
        return turned(seen.ratio) if seen.ratio.low > 0 else None
    top, bottom = (seen.teacher, seen.value) if limit.kind == "min_ratio" else (seen.value, seen.teacher)
    return top / bottom if seen.interval is None and top is not None and bottom else None


def judge_one(limit: Limit, measured: Mapping[str, Measured]) -> LimitResult:
    """Answer one limit; a metric that was not measured fails, it is never skipped."""
    seen = measured.get(limit.metric)
    if seen is None:
        known = ", ".join(sorted(measured)) or "nothing"
        reason = f"{limit.metric} was not measured; measured: {known}"
        return LimitResult(limit.metric, limit.kind, limit.bound, False, None, None, None, reason)
    what, upper = KINDS[limit.kind]
    found = compared(limit, seen)
    if found is None:
        why = "there is no teacher's figure to compare with"
        if seen.teacher is not None:
            why = f"{what} cannot be told: not measured on the teacher's rows, or a division by 0"
        return LimitResult(
            limit.metric, limit.kind, limit.bound, False, None, seen.value, None, f"{limit.metric}: {why}"
        )
    interval = found if isinstance(found, Interval) else None
    judged = found if not isinstance(found, Interval) else found.high if upper else found.low
    passed = math.isfinite(judged) and (judged <= limit.bound if upper else judged >= limit.bound)
    sign = "<=" if upper else ">="
    reason = f"{limit.metric}: {what} is {told(found, upper=upper)}, allowed {sign} {limit.bound:zg}"
    shown = judged if math.isfinite(judged) else None
    return LimitResult(limit.metric, limit.kind, limit.bound, passed, shown, seen.value, interval, reason)


def told(found: Interval | float, *, upper: bool) -> str:
    """The measured mean, its interval, and the end of it that counts, in words; an exact figure stands alone."""
    if not isinstance(found, Interval):
        return f"{found:z.4g}"
    if found.method == "none":
        return f"{found.mean:z.4g}, and how far that is by chance cannot be told: {found.note}"
    end, judged = ("upper", found.high) if upper else ("lower", found.low)
    ends = f"interval {found.low:z.4g} to {found.high:z.4g}, {found.rows} rows"
    note = f" ({found.note})" if found.note else ""
    return f"{found.mean:z.4g} ({ends}), judged at its {end} end {judged:z.4g}{note}"


def judge(limits: Sequence[Limit], measured: Mapping[str, Measured]) -> Verdict:
    """Hold every limit against what was measured."""
    results = tuple(judge_one(limit, measured) for limit in limits)
    return Verdict(all(r.passed for r in results), results)
