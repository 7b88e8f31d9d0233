"""What a student wrote before: `Replay`, a bounded store of its answers, and `Health`, whether they are still text.

Both give and take their state, so that a resumed run draws and judges as an unbroken one. Knows nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import TrainingError
from compress.model.distillation.packing import Indices
from compress.model.distillation.rollouts import Rollout

logger = logging.getLogger(__name__)

SMOOTHING = 0.7
ROUNDS_BEFORE_STOP = 3  # a single odd round is no collapse


def packed(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Answers as flat tensors, for a checkpoint."""
    return {
        "ids": torch.tensor([token for made in rollouts for token in made.ids], dtype=torch.int32),
        "logprobs": torch.tensor([value for made in rollouts for value in made.logprobs], dtype=torch.float64),
        "facts": torch.tensor(
            [(made.row, len(made.ids), made.start, made.finished, made.own) for made in rollouts], dtype=torch.int64
        ).reshape(len(rollouts), 5),
    }


def unpacked(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """The answers that `packed` laid out."""
    found, ids, logprobs = [], tensors["ids"].tolist(), tensors["logprobs"].tolist()
    at = drawn = 0
    for row, length, start, finished, own in tensors["facts"].tolist():
        new = length - start
        values = tuple(logprobs[drawn : drawn + new])
        found.append(Rollout(row, tuple(ids[at : at + length]), start, values, bool(finished), own))
        at, drawn = at + length, drawn + new
    return found


class Replay:
    """The last ``size`` answers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[Rollout] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, made: Iterable[Rollout]) -> None:
        """Put answers in; the oldest leave."""
        self.rows.extend(made)
        del self.rows[: max(0, len(self.rows) - self.size)]

    def draw(self, generator: np.random.Generator, tokens: int) -> list[Rollout]:
        """Different answers in random order, of at most ``tokens`` tokens in all, but at least one."""
        order: Indices = generator.permutation(len(self.rows))
        ends = np.cumsum([len(self.rows[i].ids) for i in order])
        return [self.rows[i] for i in order[: max(1, int(np.searchsorted(ends, tokens, side="right")))]]


def health(answers: Iterable[Sequence[int]], stops: Iterable[int]) -> dict[str, float]:
    """What tells text from its collapse, as shares.

    ``empty``: answers of a stop token alone. ``endless``: answers that no stop token ends. ``repeated``: pairs of
    neighbouring tokens that stood in the same answer before (seq-rep-2 of Welleck et al. 2020, section 6).
    """
    ends, count, empty, endless, pairs, again = frozenset(stops), 0, 0, 0, 0, 0
    for answer in answers:
        count += 1
        ended = bool(answer) and answer[-1] in ends
        empty += ended and len(answer) == 1
        endless += not ended
        own = list(pairwise(answer))
        pairs += len(own)
        again += len(own) - len(set(own))
    return {"empty": empty / max(1, count), "endless": endless / max(1, count), "repeated": again / max(1, pairs)}


WORDS = {
    "empty": "of its answers are empty",
    "endless": "of its answers run into the limit of tokens",
    "repeated": "of the token pairs in its answers stood there before",
}


class Health:
    """Watches the student's answers for collapse: a share beyond half way from that of the rows given to all of them.

    ``stop``: raise once it has lasted `ROUNDS_BEFORE_STOP` rounds; else it is told once in the log and in a note.
    """

    def __init__(self, usual: Mapping[str, float], *, where: str, stop: bool) -> None:
        self.usual, self.where, self.stop = dict(usual), where, stop
        self.shares: dict[str, float] = {}
        self.since: dict[str, int] = {}  # the step at which a share became bad
        self.rounds: dict[str, int] = {}

    def see(self, step: int, found: Mapping[str, float]) -> None:
        """Judge a round of answers.

        Raises:
            TrainingError: collapsed, and ``stop``.
        """
        for name, value in found.items():
            before = self.shares.get(name, value)
            self.shares[name] = SMOOTHING * before + (1.0 - SMOOTHING) * value
            if self.shares[name] <= (1.0 + self.usual[name]) / 2:
                self.since.pop(name, None)
                self.rounds.pop(name, None)
                continue
            self.rounds[name] = self.rounds.get(name, 0) + 1
            if name not in self.since:
                self.since[name] = step
                logger.warning("%s: %s", self.where, self._text(name))
            if self.stop and self.rounds[name] >= ROUNDS_BEFORE_STOP:
                raise TrainingError(
                    f"{self.where}: step {step}",
                    self._text(name),
                    do="Lower learning_rate or on_policy_share, or start from a better student",
                )

    def _text(self, name: str) -> str:
        return (
            f"the student's text degenerates: since step {self.since[name]} {self.shares[name]:.0%} {WORDS[name]}, "
            f"against {self.usual[name]:.0%} in the rows given"
        )

    def notes(self) -> list[str]:
        """What is bad now."""
        return [self._text(name) for name in self.since]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"shares": self.shares, "since": self.since, "rounds": self.rounds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.shares, self.since, self.rounds = dict(state["shares"]), dict(state["since"]), dict(state["rounds"])
