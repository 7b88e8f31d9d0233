"""The search for the fastest settings: coordinate descent by duels, within a budget of time.

A `Setting` is one choice for every knob. `search` takes the knobs in turn, lets each other value duel with the best
setting so far, pair by pair in one stretch of time so that a busy moment hits both, and takes over what wins by more
than a margin; passes repeat until nothing wins or the budget is spent. How a setting is measured, and whether it keeps
the quality, are functions that it is given: the same measurements give the same result. Knows no runtime.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_LOST = 1.1  # median ratio of times from which no further round can help
_FEWEST = 3  # pairs before a duel is decided early


@dataclass(frozen=True)
class Setting:
    """How a bundle is run. Entries of the runtime's session, of its search, and of this process."""

    threads: int
    spinning: bool = True  # threads wait busily for the next operator instead of sleeping
    pinned: bool = False  # each further thread on a core of its own
    share_buffer: bool = True  # the KV cache grows in place instead of being copied
    prefill_chunk: int | None = None  # tokens of a prompt that are read at once; None: all
    accuracy_level: int = 4  # of MatMulNBits: 4 rounds activations to 8 bits, 1 computes in fp32


KNOBS = tuple(field.name for field in fields(Setting))
Values = Mapping[str, Sequence[Any]]  # per knob what may be tried


@dataclass(frozen=True)
class Timing:
    """One measured request: seconds until the first token, and seconds for each token after it."""

    prefill_s: float
    decode_s: float

    def total(self, new_tokens: int) -> float:
        """Seconds of a request with so many new tokens."""
        return self.prefill_s + (new_tokens - 1) * self.decode_s


class NotMeasurable(Exception):
    """``setting`` does not run here, with the reason."""

    def __init__(self, setting: Setting, reason: str) -> None:
        super().__init__(reason)
        self.setting = setting


@dataclass
class Trial:
    """A duel: ``value`` of ``knob`` against what was best then."""

    knob: str
    value: Any
    ratio: float | None = None  # median time over that of the best so far; below 1 is faster
    pairs: int = 0
    verdict: str = "not tried"
    prefill_s: float | None = None
    decode_s: float | None = None

    def facts(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Rules:
    """When a duel is won and when it ends: ``margin`` is the share of time that must be saved."""

    new_tokens: int
    rounds: int = 5
    margin: float = 0.02


@dataclass(frozen=True)
class Judges:
    """What the search is given: ``measure`` a setting once, ``refuse`` it with a reason or ""; is the time ``over``."""

    measure: Callable[[Setting], Timing]
    refuse: Callable[[Setting], str]
    over: Callable[[], bool]


def search(start: Setting, values: Values, rules: Rules, judges: Judges) -> tuple[Setting, list[Trial]]:
    """Return the fastest setting found from ``start`` on, and every duel in order."""
    best, trials = start, []
    tried: set[tuple[Setting, Setting]] = set()
    changed = True
    while changed and not judges.over():
        changed = False
        for knob in (name for name in KNOBS if name in values):
            for value in values[knob]:
                rival = replace(best, **{knob: value})
                if rival == best or (best, rival) in tried or judges.over():
                    continue
                tried.add((best, rival))
                trial = Trial(knob, value)
                trials.append(trial)
                if _duel(best, rival, trial, rules, judges):
                    best, changed = rival, True
    return best, trials


def _duel(best: Setting, rival: Setting, trial: Trial, rules: Rules, judges: Judges) -> bool:
    """Whether ``rival`` wins; fills in ``trial``."""
    refused = judges.refuse(rival)
    if refused:
        trial.verdict = f"refused: {refused}"
        return False
    ratios, timings = [], []
    try:
        for round_ in range(rules.rounds):
            order = (best, rival) if round_ % 2 == 0 else (rival, best)
            seen = {setting: judges.measure(setting) for setting in order}
            timings.append(seen[rival])
            ratios.append(seen[rival].total(rules.new_tokens) / seen[best].total(rules.new_tokens))
            if judges.over() or (len(ratios) >= _FEWEST and statistics.median(ratios) > _LOST):
                break
    except NotMeasurable as error:
        whose = "the best so far died" if error.setting == best else "does not run"
        trial.verdict = f"{whose}: {error}"
        return False
    trial.ratio, trial.pairs = statistics.median(ratios), len(ratios)
    trial.prefill_s = statistics.median(timing.prefill_s for timing in timings)
    trial.decode_s = statistics.median(timing.decode_s for timing in timings)
    decided = len(ratios) >= min(_FEWEST, rules.rounds)
    won = decided and trial.ratio < 1 - rules.margin
    trial.verdict = "taken" if won else "slower or the same" if decided else "the time was up"
    return won
