"""Watching a training run: the log of its curve, and the guard that stops it when it runs away.

`TrainLog` averages losses between lines and writes them as JSON lines; `DivergenceGuard` raises on NaN and on a loss
that climbs far above where it was, `check_learned` on one that stays above its start. The first two give and take their
state as JSON values, so that a resumed run logs and judges as an unbroken one. Knows nothing of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import TrainingError
from compress.files import json_text, write_whole
from compress.json_reader import parse_json

TRAINING_LOG = "training.jsonl"  # of a stage, in its work folder and in its artifact
TIMED_REPORT = ("seconds", "tokens_per_s", "resumed_from")  # of a report: not the same in every run, so in no artifact
TIMED = "tokens_per_s"  # the one figure of a line that is not the same in every run


class TrainLog:
    """JSON lines: step, loss, ce, kl (nats per target token), learning_rate, tokens_per_s, at times validation_*."""

    def __init__(self, path: Path | None, *, step: int, state: Mapping[str, float] | None = None) -> None:
        """Begin, or go on after ``step`` with the ``state`` of the checkpoint; later lines are cut off.

        Without a ``path``, as in a process beside the first, it counts and writes nothing.
        """
        self.path = path
        self.sums = {"loss": 0.0, "ce": 0.0, "kl": 0.0, "positions": 0.0} | dict(state or {})
        self.seconds, self.tokens = 0.0, 0  # of this process since the last line
        self.total_seconds, self.total_tokens = 0.0, 0
        if path is None:
            return
        kept = [line for line in _lines(path) if line["step"] <= step] if step else []
        write_whole(path, "".join(json_text(line) + "\n" for line in kept))

    def add(self, *, loss: float, ce: float, kl: float, positions: int, tokens: int, seconds: float) -> None:
        """Count one step: sums over its ``positions``, its ``tokens`` and how long it took."""
        for name, value in (("loss", loss), ("ce", ce), ("kl", kl), ("positions", positions)):
            self.sums[name] += value
        self.seconds += seconds
        self.tokens += tokens
        self.total_seconds += seconds
        self.total_tokens += tokens

    def line(self, step: int, **extra: float) -> None:
        """Write the averages since the last line, and ``extra``."""
        entry: dict[str, float] = {"step": step, **extra}
        positions = self.sums["positions"]
        if positions:
            entry |= {name: self.sums[name] / positions for name in ("loss", "ce", "kl")}
        if self.seconds > 0:
            entry[TIMED] = round(self.tokens / self.seconds, 1)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(entry) + "\n")
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.seconds, self.tokens = 0.0, 0


def copy_log(source: Path, target: Path) -> None:
    """Copy a log into an artifact, without its times: the same run gives the same bytes."""
    lines = [{name: value for name, value in line.items() if name != TIMED} for line in _lines(source)]
    write_whole(target, "".join(json_text(line) + "\n" for line in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log; a kill may have cut the last one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [parse_json(line, constants=True) for line in lines if line.endswith("}")]


class DivergenceGuard:
    """Stops a run whose loss is NaN, or whose smoothed loss climbs to ``factor`` times its lowest plus ``slack``."""

    def __init__(self, where: str, *, factor: float = 1.5, slack: float = 0.5, smoothing: float = 0.9) -> None:
        self.where, self.factor, self.slack, self.smoothing = where, factor, slack, smoothing
        self.smooth = self.lowest = self.first = 0.0
        self.seen = 0

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"smooth": self.smooth, "lowest": self.lowest, "first": self.first, "seen": self.seen}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.smooth, self.lowest, self.seen = state["smooth"], state["lowest"], int(state["seen"])
        self.first = state.get("first", state["smooth"])  # older checkpoints lack it

    def check(self, step: int, loss: float, gradient: float, advice: str) -> None:
        """Judge a step by its loss per position and the norm of its gradient; ``advice`` ends the message.

        Raises:
            TrainingError: not finite, or diverged.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {gradient}"
            raise TrainingError(f"{self.where}: step {step}", what, do=advice)
        if not self.seen:
            self.first = self.smooth = self.lowest = loss
        else:
            self.smooth = self.smoothing * self.smooth + (1 - self.smoothing) * loss
            self.lowest = min(self.lowest, self.smooth)
        self.seen += 1
        if self.smooth > self.factor * self.lowest + self.slack:
            raise TrainingError(
                f"{self.where}: step {step}",
                f"the loss has climbed to {self.smooth:.3f} from {self.lowest:.3f}: the run diverges",
                do=advice,
            )


def check_learned(where: str, *, loss: float, start: float, guards: Iterable[DivergenceGuard], advice: str) -> None:
    """Judge a held-out loss that, half of the run done, was never below the ``start``; ``advice`` ends the message.

    Well above it (by a fifth and 0.25 nats) while the training loss, too, is above its first value: such a run destroys
    its student, however flat its curve is by then. Where the training loss has fallen, it learns the rows by heart.

    Raises:
        TrainingError: as said.
    """
    if loss > 1.2 * start + 0.25 and all(guard.smooth > guard.first for guard in guards):
        what = f"the held-out loss is {loss:.4f}, and never was below the {start:.4f} of the start: nothing is learned"
        raise TrainingError(where, what, do=advice)


class Clock:
    """Seconds since the last question."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        return passed
