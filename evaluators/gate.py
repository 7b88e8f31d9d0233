"""The gate: what was measured against what the profile allows.

A `Limit` names a metric and one bound; `judge` answers for every limit with the measured value, its interval
and pass or fail. A bound on a *difference to the teacher* is judged on the far end of the paired interval,
so that a lucky sample does not pass. Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """What is known of a metric: the shipped artifact's value, the teacher's, and the paired difference.

    ``difference`` is the interval of ``shipped - teacher`` over the same rows, where rows exist.
    """

    value: float
    teacher: float | None = None
    interval: Interval | None = None
    difference: Interval | None = None


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


def judged_value(limit: Limit, seen: Measured) -> tuple[float | None, Interval | None]:
    """The figure to hold against the bound, pessimistic where there is an interval, and that interval."""
    if limit.kind in ("min", "max"):
        if seen.interval is None:
            return seen.value, None
        return (seen.interval.low if limit.kind == "min" else seen.interval.high), seen.interval
    if limit.kind in ("max_drop", "max_rise"):
        sign = -1.0 if limit.kind == "max_drop" else 1.0
        if seen.difference is not None:
            ends = sorted((sign * seen.difference.low, sign * seen.difference.high))
            return ends[1], Interval(sign * seen.difference.mean, ends[0], ends[1], seen.difference.rows)
        return (None, None) if seen.teacher is None else (sign * (seen.value - seen.teacher), None)
    if seen.teacher is None:
        return None, None
    top, bottom = (seen.teacher, seen.value) if limit.kind == "min_ratio" else (seen.value, seen.teacher)
    return (None, None) if bottom == 0 else (top / bottom, None)


def judge_one(limit: Limit, measured: Mapping[str, Measured]) -> LimitResult:
    """Answer one limit; a metric that was not measured fails, it is never skipped."""
    seen = measured.get(limit.metric)
    if seen is None:
        known = ", ".join(sorted(measured)) or "nothing"
        reason = f"{limit.metric} was not measured; measured: {known}"
        return LimitResult(limit.metric, limit.kind, limit.bound, False, None, None, None, reason)
    judged, interval = judged_value(limit, seen)
    what, upper = KINDS[limit.kind]
    if judged is None:
        reason = f"{limit.metric}: there is no teacher's figure to compare with"
        return LimitResult(limit.metric, limit.kind, limit.bound, False, None, seen.value, None, reason)
    passed = judged <= limit.bound if upper else judged >= limit.bound
    span = f" (interval {interval.low:.4g} to {interval.high:.4g})" if interval else ""
    sign = "<=" if upper else ">="
    reason = f"{limit.metric}: {what} is {judged:.4g}{span}, allowed {sign} {limit.bound:g}"
    return LimitResult(limit.metric, limit.kind, limit.bound, passed, judged, seen.value, interval, reason)


def judge(limits: Sequence[Limit], measured: Mapping[str, Measured]) -> Verdict:
    """Hold every limit against what was measured."""
    results = tuple(judge_one(limit, measured) for limit in limits)
    return Verdict(all(r.passed for r in results), results)
