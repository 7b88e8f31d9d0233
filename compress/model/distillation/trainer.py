"""The training loop of distillation, reused for the recovery of pruned models.

`train` takes a student, a callable that gives the teacher's targets, rows and `TrainSettings`, trains the student in
place and returns a `TrainReport`. It checkpoints into the stage's work folder and, killed and called again, goes on
and ends with the very bits of an unbroken run: batches and learning rate are pure functions of the step, and weights,
optimizer, random state and running sums are in the checkpoint. A loss that is NaN or runs away stops it; with
``patience`` it ends once the held-out loss no longer falls. A `BatchSource` may say what each step trains on.
Knows nothing of teachers, caches or profiles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from compress.errors import ModelError, TrainingError
from compress.model.distillation.features import (
    PROJECTIONS,
    FeatureStates,
    Projections,
    feature_loss,
    read_features,
)
from compress.model.distillation.filling import layout
from compress.model.distillation.forward import is_plain, kept_states
from compress.model.distillation.logit_map import logit_map
from compress.model.distillation.losses import LossParts, LossWeights, Marks, Targets, fused_loss
from compress.model.distillation.monitoring import Clock, DivergenceGuard, TrainLog, check_learned
from compress.model.distillation.optimizers import make_optimizer
from compress.model.distillation.packing import Batch, RowTable, TokenIds, cut
from compress.model.distillation.parallel import OWN_TEXT, Team, assembled, told
from compress.model.distillation.settings import TrainSettings, choose_bf16, learning_rate
from compress.model.distillation.sharding import Shards, check_hardware, check_team, parts, skeleton, whole
from compress.model.distillation.snapshots import Snapshots
from compress.model.distillation.sources import BatchSource, LossFn, Piece, RowSource
from compress.model.distillation.targets import TargetFn
from compress.model.layers import decoder_layers, output_head
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.context import StageContext

logger = logging.getLogger(__name__)

EVALUATION_TOKENS = 8192  # padded tokens of one held-out batch
# (student, bf16) -> module whose call takes a batch and what the target function gave, and returns `LossParts`
LossModule = Callable[[nn.Module, bool], nn.Module]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What came of a run. Losses are nats per target token; ``validation_*`` are ``None`` without held-out rows.

    ``seconds`` and ``tokens_per_s`` (real tokens, padding not counted) are of this process alone.
    """

    steps: int
    tokens: int
    train_rows: int
    validation_rows: int
    start_loss: float | None
    validation_loss: float | None
    validation_ce: float | None
    validation_kl: float | None
    kept_step: int
    resumed_from: int
    precision: str
    seconds: float
    tokens_per_s: float
    notes: list[str] = field(default_factory=list)


class DistillationModel(nn.Module):
    """A student with its loss, one module, so that a data-parallel wrapper sees every use of its weights."""

    def __init__(
        self, student: nn.Module, weights: LossWeights, vocab: int, *, bf16: bool = False, recompute: bool = False
    ) -> None:
        super().__init__()
        self.student, self.weights, self.vocab, self.recompute = student, weights, vocab, recompute
        self.dtype, self.logits = torch.bfloat16 if bf16 else torch.float32, logit_map(student)

    def forward(self, batch: Batch, targets: Targets | None, loss: LossFn | None = None) -> LossParts:
        """Sums of the losses over the kept positions of ``batch``; ``loss`` stands in for the run's own."""
        extra: Tensor | None = None
        if loss is None and self.weights.wants_features:
            hidden, extra = self._features(batch, targets)
        else:
            hidden = kept_states(self.student, batch.input_ids, batch.keep, dtype=self.dtype, recompute=self.recompute)
        head = output_head(self.student).weight[: self.vocab]  # padded rows of the vocabulary take no probability
        if loss is not None:
            return loss(hidden, head, batch, targets, self.dtype, self.logits)
        parts = fused_loss(
            hidden.to(head.dtype),
            head,
            batch.labels,
            targets,
            self.weights,
            dtype=self.dtype,
            logits=self.logits,
            marks=Marks(batch.counts, batch.own),
        )
        return parts if extra is None else LossParts(parts.loss + extra.to(parts.loss.dtype), parts.ce, parts.kl)

    def _features(self, batch: Batch, targets: Targets | None) -> tuple[Tensor, Tensor]:
        """Last hidden states, and the loss on what lies before them; see `features`."""
        projections: Projections | None = getattr(self.student, PROJECTIONS, None)
        if projections is None or not isinstance(targets, FeatureStates):
            raise ModelError("distillation", "feature losses without projections or a teacher that tells its features")
        count = len(decoder_layers(self.student))
        layers = [1 + index for index in range(count)] if self.weights.feature_layers == "all" else [count]
        hidden, own = read_features(self.student, batch, layers, self.weights, dtype=self.dtype)
        return hidden, feature_loss(own, targets.features, projections, self.weights)


@dataclass(slots=True)
class _Position:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    start_loss: float | None = None
    last: dict[str, float] = field(default_factory=dict)  # figures of the last validation
    stale: int = 0  # validations since the best
    bf16: bool = False


def train(  # noqa: PLR0917 - six things, each of its own type
    student: nn.Module,
    target_fn: TargetFn | None,
    rows: Sequence[TokenIds] | RowTable,
    settings: TrainSettings,
    ctx: StageContext,
    log_path: Path,
    *,
    vocab: int | None = None,
    name: str = "training",
    source: BatchSource | None = None,
    loss_module: LossModule | None = None,
) -> TrainReport:
    """Train ``student`` in place on ``rows`` towards ``target_fn`` and return what came of it.

    ``target_fn`` may be ``None`` when ``settings.loss.kd_weight`` is 0. A `RowTable` is needed (instead of rows) by
    targets that look rows up. ``vocab`` is the number of token ids in use (default: all of the student's). ``name``
    tells several runs of one stage apart; checkpoints are ``ctx.work / name.*``. ``source`` says what each step trains
    on (default: the rows, each in its turn); the held-out rows are judged by ``target_fn`` in any case. ``loss_module``
    makes, of student and number format, what stands in the place of `DistillationModel`. The student is in eval mode
    after.

    Raises:
        UserError: several processes, or parts of weights, for what they cannot do.
        DataError: no rows, or a row without an answer token.
        ModelError: a token id outside the vocabulary.
        TrainingError: the loss is NaN or diverges; the best weights so far stay in ``ctx.work``.
        StoreError: a checkpoint cannot be written.
    """
    if target_fn is None and settings.loss.wants_teacher:
        raise ModelError(ctx.name, f"kd_weight {settings.loss.kd_weight} without a teacher", "a teacher, or 0")
    other = OWN_TEXT if source is not None else "a loss of its own kind" if loss_module is not None else ""
    check_hardware(ctx, settings, student=student, other=other)
    vocab = _ids_in_use(student, vocab, where=ctx.name)
    table = rows if isinstance(rows, RowTable) else RowTable(rows, vocab=vocab, where=ctx.name)
    with assembled(ctx.processes, ctx.name) as team:
        if ctx.sharding == "full":
            check_team(team)
        alone = replace(ctx, threads=max(1, ctx.threads // team.size))
        job = _Job(student, target_fn, table, settings, alone, vocab, name)
        if team.size > 1:
            told(team, (_follow, job.to_send()), ctx.name)
        with _as_told(alone, settings):
            return _Run(job, team, log_path, source=source, loss_module=loss_module).finish()


@dataclass(frozen=True, slots=True)
class _Job:
    """What is trained on what, with the arguments of `train`: all that another process must know."""

    student: nn.Module
    target_fn: TargetFn | None
    table: RowTable
    settings: TrainSettings
    ctx: StageContext
    vocab: int
    name: str

    @property
    def sharded(self) -> bool:
        """Whether each process holds its part of the student."""
        return self.ctx.sharding == "full"

    def to_send(self) -> _Job:
        """The job without what stays here: a stream, teachers, and the weights where they are cut up."""
        ctx = replace(self.ctx, progress=cast(Any, None), teacher=None, teachers={}, target=None)
        return replace(self, student=skeleton(self.student) if self.sharded else self.student, ctx=ctx)


def _ids_in_use(student: nn.Module, vocab: int | None, *, where: str) -> int:
    """``vocab``, or all of the student's; raises ModelError where the student has fewer."""
    size = int(output_head(student).weight.shape[0])
    if vocab is not None and vocab > size:
        raise ModelError(where, f"the student's vocabulary has {size} entries", f"at least {vocab}, the teacher's")
    return size if vocab is None else vocab


def _follow(team: Team, job: _Job) -> None:
    """`train` in a process beside the first, which writes nothing."""
    job = replace(job, ctx=replace(job.ctx, progress=Progress(quiet=True)))
    with _as_told(job.ctx, job.settings):
        _Run(job, team, None).finish()


@contextmanager
def _as_told(ctx: StageContext, settings: TrainSettings) -> Iterator[None]:
    with threads(ctx.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` threads of the CPU; as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One run of `train`."""

    def __init__(
        self,
        job: _Job,
        team: Team,
        log_path: Path | None,
        *,
        source: BatchSource | None = None,
        loss_module: LossModule | None = None,
    ) -> None:
        self.job, self.team, self.loss_module = job, team, loss_module
        self.student, self.table, self.settings, self.ctx = job.student, job.table, job.settings, job.ctx
        # the teacher need not run for what is not looked at
        self.target_fn = job.target_fn if job.settings.loss.wants_teacher else None
        self.source = source or RowSource(job.table, self.target_fn, parts=job.settings.accumulate)
        self._lay_out()
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ModelError(
                self.ctx.name, "no weight of the student is trainable", do="Call student.requires_grad_() first"
            )
        fingerprint = self._fingerprint(job.vocab) if team.first else ""
        self.snapshots = Snapshots(self.ctx.work, job.name, team, fingerprint)
        self.guards: dict[str, DivergenceGuard] = {}  # one for each kind of step
        saved = self.snapshots.open()
        self.at = _Position(**saved[1]["position"]) if saved else _Position(bf16=team.share(self._bf16()))
        self._prepare()
        self.average = [p.detach().clone() for p in self.named.values()] if self.settings.average_decay else None
        if saved:
            self._restore(*saved)
        self.resumed_from = self.at.step
        self.log = TrainLog(log_path, step=self.at.step, state=saved[1]["log"] if saved else None)

    def _lay_out(self) -> None:
        found = layout(self.table, self.settings)
        self.training, self.held, self.order, self.total = found.training, found.held, found.order, found.steps

    def _bf16(self) -> bool:
        head = output_head(self.student).weight
        return choose_bf16(self.settings.precision, width=int(head.shape[1]))

    def _prepare(self) -> None:
        # accelerate keeps its settings in a process-wide singleton and refuses a second one with other values; the
        # number format is the forward pass's own affair, since autocast costs more than it wins at these sizes
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(mixed_precision="no")
        settings, trained = self.settings, self.student
        if self.job.sharded and self.team.first:
            trained = skeleton(self.student)
        model: nn.Module = DistillationModel(
            trained, settings.loss, self.job.vocab, bf16=self.at.bf16, recompute=settings.activation_checkpointing
        )
        if self.loss_module is not None:
            model = self.loss_module(trained, self.at.bf16)
        self.shards: Shards | None = None
        if self.job.sharded:
            self.shards = Shards(model, trained, self.student if self.team.first else None, self.team)
            self.model: nn.Module = self.shards.model
        else:
            # in evaluation mode it wraps nothing: the gradients are summed here
            self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if settings.activation_checkpointing and not is_plain(trained):
            cast(Any, trained).activation_checkpointing_enable({"use_reentrant": False})
        self.named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(
            trained,
            settings.optimizer,
            learning_rate=settings.learning_rate,
            decay=settings.weight_decay,
            betas=settings.betas,
            bf16=self.at.bf16,
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

    # -- the loop ------------------------------------------------------------------------------------------------

    def finish(self) -> TrainReport:
        """Run what is left, load the weights to keep and report."""
        start = time.monotonic()
        due = self._validation_steps()
        self.model.train()
        if self.at.step == 0:
            self._validate(0)
        saved_at, clock = time.monotonic(), Clock()
        with self.ctx.progress.bar("distillation", self.total) as bar:
            bar.resume(self.at.step)
            while self.at.step < self.total and not self._stalled():
                loss = self._step(clock)
                extra = self._validate(self.at.step) if self.at.step in due else {}
                self._log_line(extra)
                if self._checkpoint_due(saved_at):
                    self._save()
                    saved_at = time.monotonic()
                clock.lap()
                bar.advance(note=f"loss {loss:.3f}")
        if self.resumed_from < self.total:
            self._save()  # a kill between here and the stage's own saving then costs nothing
        report = self._report(time.monotonic() - start, self._keep())
        if self.shards is not None:
            self.optimizer.state.clear()  # room for the whole student
            self.shards.hand_back()
        self.student.eval()
        return report

    def _step(self, clock: Clock) -> float:
        """One optimizer step; returns its loss per position."""
        work = self.source.work(self.at.step, self.order)
        positions, tokens = work.positions, work.tokens
        sums: npt.NDArray[np.float64] = np.zeros(3)
        for piece in work.pieces:
            rows, share = self.team.part(piece.rows)
            losses = self._losses(piece if self.team.size == 1 else replace(piece, rows=rows))
            self.accelerator.backward(losses.loss * (share / positions) if share != 1.0 else losses.loss / positions)
            sums += _figures(losses, share)
        sums = self.team.sum(sums)
        if self.shards is None:
            self.team.sum_gradients(list(self.named.values()))
        norm = float(whole(self.accelerator.clip_grad_norm_(list(self.named.values()), self.settings.grad_clip)))
        guard = self.guards.setdefault(work.kind, DivergenceGuard(self.ctx.name))
        guard.check(self.at.step + 1, float(sums[0]) / positions, norm, self._advice())
        rate = learning_rate(self.at.step, self.total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            # the decay rises from 0, so that the random start is soon forgotten
            decay = min(self.settings.average_decay, (1 + self.at.step) / (10 + self.at.step))
            torch._foreach_lerp_(parts(self.average), parts(self.named.values()), 1 - decay)
        self.at.step += 1
        self.at.tokens += tokens
        loss, ce, kl = sums.tolist()
        self.log.add(loss=loss, ce=ce, kl=kl, positions=positions, tokens=tokens, seconds=clock.lap())
        return float(loss / positions)

    def _losses(self, piece: Piece) -> LossParts:
        batch = piece.table.batch(piece.rows).to(self.accelerator.device)
        targets = None if piece.target_fn is None else piece.target_fn(batch)
        other = () if piece.loss is None else (piece.loss,)
        parts: LossParts = self.model(batch, targets, *other)
        return parts

    def _log_line(self, extra: dict[str, float]) -> None:
        every = self.settings.log_every or max(1, self.total // 100)
        if extra or self.at.step % every == 0 or self.at.step == self.total:
            rate = learning_rate(self.at.step - 1, self.total, self.settings)
            self.log.line(self.at.step, learning_rate=rate, **extra, **self.source.figures())

    # -- held-out rows -------------------------------------------------------------------------------------------

    def _validation_steps(self) -> set[int]:
        if not len(self.held):
            return set()
        count = max(1, min(self.settings.validations, self.total))
        return {round(self.total * (i + 1) / count) for i in range(count)}

    def _validate(self, step: int) -> dict[str, float]:
        """Loss on the held-out rows; the best weights are written when it is the lowest so far."""
        if not len(self.held):
            return {}
        with self._averaged():
            figures = self._measure()
            loss = figures["validation_loss"]
            if not np.isfinite(loss):
                raise TrainingError(f"{self.ctx.name}: step {step}", f"the held-out loss is {loss}", do=self._advice())
            self.at.stale += 1
            if self.at.best_loss is None or loss < self.at.best_loss:
                self.at.best_loss, self.at.best_step, self.at.stale = loss, step, 0
                self.snapshots.save_best(self.named, step)
        self.at.last = figures
        self.source.validated(loss)
        if step == 0:
            self.at.start_loss = loss
            self.log.line(0, **figures)
        elif 2 * step >= self.total and self.at.best_step == 0 and self.at.start_loss is not None:
            where, start, guards = f"{self.ctx.name}: step {step}", self.at.start_loss, self.guards.values()
            check_learned(where, loss=loss, start=start, guards=guards, advice=self._advice())
        return figures

    def _stalled(self) -> bool:
        return 0 < self.settings.patience <= self.at.stale

    def _measure(self) -> dict[str, float]:
        rows = self.held[np.argsort(self.table.lengths[self.held], kind="stable")]
        sums: npt.NDArray[np.float64] = np.zeros(3)
        self.model.eval()
        with torch.no_grad():
            for piece in cut(rows, self.table.lengths, EVALUATION_TOKENS):
                mine, share = self.team.part(piece)
                sums += _figures(self._losses(Piece(self.table, mine, self.target_fn)), share)
        self.model.train()
        if self.shards is not None:
            self.shards.settle()
        sums = self.team.sum(sums)
        sums /= int(self.table.counts[rows].sum())
        return dict(zip(("validation_loss", "validation_ce", "validation_kl"), sums.tolist(), strict=True))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where they are kept."""
        if self.average is None:
            yield
            return
        current = [p.detach().clone() for p in self.named.values()]
        self._load(self.average)
        try:
            yield
        finally:
            self._load(current)

    def _load(self, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(parts(self.named.values()), parts(tensors))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _fingerprint(self, vocab: int) -> str:
        """What a checkpoint must agree on: settings, rows, and the student as it was handed over."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        digest.update(f"{vocab} {self.table.fingerprint()}{self.source.fingerprint}".encode())
        for name, parameter in self.student.named_parameters():  # frozen ones too: adapters stand on them
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def _checkpoint_due(self, saved_at: float) -> bool:
        steps = self.settings.checkpoint_every_steps
        if steps is not None:
            return self.at.step % steps == 0
        return self.team.agreed(time.monotonic() - saved_at >= self.settings.checkpoint_every_s)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.named.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        if self.average is not None:
            tensors |= {f"average.{i}": value for i, value in enumerate(self.average)}
        tensors["random"] = torch.get_rng_state()
        made, source = self.source.state()
        tensors |= {f"source.{name}": value for name, value in made.items()}
        values = {
            "position": asdict(self.at),
            "log": self.log.sums,
            "guards": {kind: guard.state() for kind, guard in self.guards.items()},
            "source": source,
        }
        self.snapshots.save(tensors, values)

    def _restore(self, outlines: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        into: dict[str, Tensor] = {f"model.{name}": p for name, p in self.named.items()}
        if self.average is not None:
            into |= {f"average.{i}": value for i, value in enumerate(self.average)}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, outline in outlines.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                like = parameters[int(index)]
                into[name] = torch.zeros_like(like if outline.shape == like.shape else outline, device=like.device)
                state.setdefault(int(index), {})[key] = into[name]
            elif name not in into:
                into[name] = torch.zeros_like(outline, device="cpu")
        self.snapshots.load(into)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for kind, guard in values["guards"].items():
            self.guards[kind] = DivergenceGuard(self.ctx.name)
            self.guards[kind].restore(guard)
        made = {name.removeprefix("source."): value for name, value in into.items() if name.startswith("source.")}
        self.source.restore(made, values["source"])
        torch.set_rng_state(into["random"])

    # -- the end -------------------------------------------------------------------------------------------------

    def _keep(self) -> list[str]:
        """Put the weights to keep into the student; returns notes for the user."""
        notes: list[str] = []
        if self.settings.keep == "best" and len(self.held):
            self.snapshots.load_best(self.named, self.at.best_step)
        elif self.average is not None:
            self._load(self.average)
        if self.settings.keep == "best" and not len(self.held):
            notes.append("no rows are held out, so the last weights were kept, not the best")
        if self._stalled():
            notes.append(
                f"stopped at step {self.at.step} of {self.total}: the held-out loss did not fall in "
                f"{self.at.stale} validations; its lowest is {self.at.best_loss:.4f}, at step {self.at.best_step}"
            )
        if self.at.start_loss is not None and self.at.last["validation_loss"] > self.at.start_loss:
            notes.append(
                f"training made the held-out loss worse: {self.at.start_loss:.4f} at the start, "
                f"{self.at.last['validation_loss']:.4f} at the end"
            )
        return notes

    def _report(self, seconds: float, notes: list[str]) -> TrainReport:
        kept_best = self.settings.keep == "best" and len(self.held) > 0
        figures = self._measure() if len(self.held) else {}
        return TrainReport(
            steps=self.at.step,
            tokens=self.at.tokens,
            train_rows=len(self.training),
            validation_rows=len(self.held),
            start_loss=self.at.start_loss,
            validation_loss=figures.get("validation_loss"),
            validation_ce=figures.get("validation_ce"),
            validation_kl=figures.get("validation_kl"),
            kept_step=self.at.best_step if kept_best else self.at.step,
            resumed_from=self.resumed_from,
            precision="bf16" if self.at.bf16 else "fp32",
            seconds=seconds,
            tokens_per_s=self.log.total_tokens / self.log.total_seconds if self.log.total_seconds else 0.0,
            notes=notes,
        )

    def _advice(self) -> str:
        advice = f"Lower learning_rate (now {self.settings.learning_rate:g})"
        if self.snapshots.best_path.is_file() and self.at.best_loss is not None:
            advice += (
                f"; the best weights, of step {self.at.best_step} with held-out loss {self.at.best_loss:.4f}, "
                f"are kept in {self.snapshots.best_path}"
            )
        return advice


def _figures(losses: LossParts, share: float) -> list[float]:
    """Sums of loss, cross-entropy and divergence; nothing where ``share`` is 0."""
    return [share * float(part.detach()) for part in (losses.loss, losses.ce, losses.kl)]
