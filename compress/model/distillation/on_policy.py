"""Training on answers that are made on the way: the `BatchSource` behind GKD, speculative KD and MiniLLM.

`AnswerSource` decides, as a pure function of (seed, step) and its share, whether a step trains on the rows given or on
made answers, has them made for several steps at once, keeps them for use again, and watches that they stay text.
`prompts` takes the prompts out of rows, with room for an answer. Knows nothing of optimizers or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compress.encoding import TokenRow
from compress.errors import DataError
from compress.model.distillation.logit_map import LogitMap
from compress.model.distillation.losses import LossParts, LossWeights, Marks, Targets, fused_loss
from compress.model.distillation.packing import Batch, BatchOrder, RowTable, cut
from compress.model.distillation.policy import PolicySettings, policy_loss
from compress.model.distillation.replay import Health, Replay, health, packed, unpacked
from compress.model.distillation.resume import value_digest
from compress.model.distillation.rollouts import Ask, Rollout
from compress.model.distillation.sources import LossFn, Piece, State, Work, row_work
from compress.model.distillation.targets import TargetFn

ADAPTIVE_STEP = 0.1  # DistiLLM (Ko et al. 2024), section 3.2
LOOK_AHEAD = 512  # steps searched for those whose answers are made together

Prompt = tuple[tuple[int, ...], int]  # tokens, and the most new ones
Maker = Callable[[Sequence[Ask]], list[Rollout]]
MadeLoss = Callable[[Sequence[Rollout]], LossFn]


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How made answers come into the training.

    Attributes:
        share: of the steps that train on made answers.
        adaptive: raise the share whenever the held-out loss has risen.
        buffer_rows, replay_share: answers kept, and share of the steps on made answers that take them from there.
        rollout_steps: steps whose answers are made at once.
        batch_tokens: padded tokens of one piece of a step.
        accumulate: parts of a step on the rows given.
        stop: end the run when the answers collapse.
        seed: of every choice here.
        name: how the answers are made and judged; a checkpoint must agree on it.
    """

    share: float
    seed: int
    batch_tokens: int
    accumulate: int = 1
    adaptive: bool = False
    buffer_rows: int = 0
    replay_share: float = 0.0
    rollout_steps: int = 1
    stop: bool = False
    name: str = ""


def prompts(
    rows: Sequence[TokenRow],
    *,
    context: int,
    max_new_tokens: int | None,
    prompt_tokens: int | None,
    where: str,
) -> list[Prompt]:
    """The prompt of each row and the room for its answer, in tokens; ``context`` is the most that a row may have.

    Raises:
        DataError: a row has no prompt of ``prompt_tokens`` tokens, or its prompt leaves too little room.
    """
    found: list[Prompt] = []
    longest = max((len(row.ids) - len(row.prompt) for row in rows), default=0)
    for row in rows:
        prompt = row.prompt if prompt_tokens is None else row.ids[:prompt_tokens]
        if not prompt or (prompt_tokens is not None and len(prompt) < prompt_tokens):
            raise DataError(
                f"{where}: row {row.id}",
                f"has no prompt of {prompt_tokens or 1} tokens, only {len(prompt)} in all",
                "something to be answered",
                "Lower prompt_tokens, or drop short rows by data.selection heuristics",
            )
        room = context - len(prompt)
        if room < (max_new_tokens or 1):
            raise DataError(
                f"{where}: row {row.id}",
                f"its prompt of {len(prompt)} tokens leaves room for {max(0, room)} of {context}",
                f"room for an answer of {max_new_tokens or 1} tokens",
                "Lower max_new_tokens, raise max_tokens up to the model's context, or drop rows with long prompts",
            )
        found.append((prompt, min(room, max_new_tokens or longest)))
    return found


class AnswerSource:
    """Steps on the rows given and steps on made answers."""

    def __init__(
        self,
        table: RowTable,
        asked: Sequence[Prompt],
        settings: AnswerSettings,
        *,
        make: Maker,
        made_targets: TargetFn,
        made_loss: MadeLoss,
        watch: Health,
        stops: Sequence[int],
        target_fn: TargetFn | None = None,
    ) -> None:
        """``table``, ``target_fn``: the rows given; ``asked``: their prompts; ``make`` answers them.

        Made answers are learned by ``made_loss`` towards ``made_targets``.
        """
        self.table, self.target_fn, self.asked, self.settings = table, target_fn, asked, settings
        self.make, self.made_targets, self.made_loss = make, made_targets, made_loss
        self.watch, self.stops = watch, tuple(stops)
        self.share = settings.share
        self.replay = Replay(settings.buffer_rows)
        self.waiting: dict[int, list[Rollout]] = {}  # made ahead, by the step that they are for
        self.before: float | None = None  # the held-out loss before
        self.steps, self.made_steps, self.made, self.tokens, self.own = 0, 0, 0, 0, 0
        self.accepted = 1.0  # share of the newest answers' tokens that are the student's
        self.fingerprint = " " + value_digest([asdict(settings), list(asked), self.stops])

    # -- what a step trains on -----------------------------------------------------------------------------------

    def work(self, step: int, order: BatchOrder) -> Work:
        """The rows whose turn it is, or answers to their prompts."""
        self.steps += 1
        how = self._how(step)
        if how == "rows":
            return row_work(self.table, order[step], target_fn=self.target_fn, parts=self.settings.accumulate)
        self.made_steps += 1
        if how == "again":
            generator = np.random.Generator(np.random.PCG64([self.settings.seed, step, 1]))
            return self._made_work(self.replay.draw(generator, self.settings.batch_tokens))
        if step not in self.waiting:
            self._make(step, order)
        rollouts = self.waiting.pop(step)
        self.replay.add(rollouts)
        return self._made_work(rollouts)

    def _how(self, step: int) -> Literal["rows", "new", "again"]:
        kind, again = np.random.Generator(np.random.PCG64([self.settings.seed, step, 0])).random(2)
        if kind >= self.share:
            return "rows"
        return "again" if again < self.settings.replay_share and len(self.replay) else "new"

    def _make(self, step: int, order: BatchOrder) -> None:
        """Have the answers made of ``step`` and of those after it that need new ones, as far as that is known now."""
        self.waiting = {late: rows for late, rows in self.waiting.items() if late > step}
        steps = [step]
        for later in range(step + 1, step + LOOK_AHEAD):
            if len(steps) == self.settings.rollout_steps:
                break
            if later not in self.waiting and self._how(later) == "new":
                steps.append(later)
        asks = [Ask(self.asked[row][0], self.asked[row][1], turn, int(row)) for turn in steps for row in order[turn]]
        rollouts = self.make(asks)
        for ask, made in zip(asks, rollouts, strict=True):
            self.waiting.setdefault(ask.step, []).append(made)
        tokens, own = sum(len(made.logprobs) for made in rollouts), sum(made.own for made in rollouts)
        self.made, self.tokens, self.own = self.made + len(rollouts), self.tokens + tokens, self.own + own
        self.accepted = own / tokens
        self.watch.see(step + 1, health([made.ids[made.start :] for made in rollouts], self.stops))

    def _made_work(self, rollouts: Sequence[Rollout]) -> Work:
        rows = sorted(rollouts, key=lambda made: len(made.ids))
        table = RowTable(rows, vocab=self.table.vocab, where="made answers")
        pieces = cut(
            np.arange(len(rows)), table.lengths, max(1, self.settings.batch_tokens // self.settings.accumulate)
        )
        loss = self.made_loss(rows)
        return Work("made", [Piece(table, piece, self.made_targets, loss) for piece in pieces])

    # -- what it hears, and what it tells ------------------------------------------------------------------------

    def validated(self, loss: float) -> None:
        """Raise the share when the held-out loss has risen (DistiLLM)."""
        if self.settings.adaptive and self.before is not None and loss > self.before:
            self.share = min(1.0, self.share + ADAPTIVE_STEP)
        self.before = loss

    def figures(self) -> dict[str, float]:
        """For the log: the share, the student's part in the newest answers, and their health."""
        shares = {f"made_{name}": round(value, 4) for name, value in self.watch.shares.items()}
        return {"on_policy_share": round(self.share, 4), "own_tokens": round(self.accepted, 4)} | shares

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Figures over the whole run, and notes."""
        figures = self.figures() | {
            "made_steps": self.made_steps,
            "made_answers": self.made,
            "made_tokens": self.tokens,
            "own_tokens": round(self.own / self.tokens, 4) if self.tokens else 1.0,
        }
        return figures, self.watch.notes()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that the next steps depend on."""
        waiting = [(step, made) for step, rows in self.waiting.items() for made in rows]
        tensors = {f"replay.{name}": value for name, value in packed(self.replay.rows).items()}
        tensors |= {f"waiting.{name}": value for name, value in packed([made for _, made in waiting]).items()}
        tensors["waiting_steps"] = torch.tensor([step for step, _ in waiting], dtype=torch.int64)
        counts = [self.steps, self.made_steps, self.made, self.tokens, self.own]
        values = {"share": self.share, "before": self.before, "counts": counts, "accepted": self.accepted}
        return tensors, values | {"watch": self.watch.state()}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from `state`."""

        def part(name: str) -> list[Rollout]:
            return unpacked({key: tensors[f"{name}.{key}"] for key in ("ids", "logprobs", "facts")})

        self.replay.rows, self.waiting = part("replay"), {}
        for step, made in zip(tensors["waiting_steps"].tolist(), part("waiting"), strict=True):
            self.waiting.setdefault(step, []).append(made)
        self.share, self.before, self.accepted = values["share"], values["before"], values["accepted"]
        self.steps, self.made_steps, self.made, self.tokens, self.own = values["counts"]
        self.watch.restore(values["watch"])


def divergence(weights: LossWeights) -> MadeLoss:
    """GKD on made answers: the divergence of ``weights`` alone, since a made answer is no label."""
    alone = replace(weights, kd_weight=1.0, label_smoothing=0.0, hidden_weight=0.0, attention_weight=0.0)

    def loss(  # noqa: PLR0917 - as `LossFn`
        hidden: Tensor, head: Tensor, batch: Batch, targets: Targets | None, dtype: torch.dtype, logits: LogitMap
    ) -> LossParts:
        marks = Marks(batch.counts, torch.ones_like(batch.counts, dtype=torch.bool))  # the student wrote them
        return fused_loss(hidden, head, batch.labels, targets, alone, dtype=dtype, logits=logits, marks=marks)

    return lambda _: loss


def policy(settings: PolicySettings) -> MadeLoss:
    """MiniLLM on made answers."""

    def of(rows: Sequence[Rollout]) -> LossFn:
        def loss(  # noqa: PLR0917 - as `LossFn`
            hidden: Tensor, head: Tensor, batch: Batch, targets: Targets | None, dtype: torch.dtype, logits: LogitMap
        ) -> LossParts:
            assert targets is not None, "made answers are judged by the teacher"
            drawn = torch.tensor([value for row in batch.rows.tolist() for value in rows[row].logprobs])
            return policy_loss(
                hidden,
                head,
                batch.labels,
                targets,
                counts=batch.counts,
                drawn=drawn.to(hidden.device),
                settings=settings,
                dtype=dtype,
                logits=logits,
            )

        return loss

    return of
