"""Losses of distillation, as pure functions: tensors in, loss per position and gradient out.

`cross_entropy`, `forward_kl` and `divergence` (any of the table in ``divergences``) take logits and return loss and
gradient in closed form; `combined` mixes them; `fused_loss` takes hidden states at the kept positions and the output
head, and runs them in chunks of positions, so that the matrix positions x vocabulary never exists whole. A teacher's
target is `Dense` (all log-probabilities), `Sparse` (top k and the mass of the rest), `Sampled` (a few draws) or
`States` (its hidden states, turned into `Dense` chunk by chunk). Knows nothing of models, rows, caches or optimizers.

Shapes: N kept positions, V vocabulary that the tokenizer can produce, K cached entries, H width, B rows. Units: nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.model.distillation.divergences import (
    PLAIN,
    Buckets,
    Numbers,
    Rule,
    adaptive_skew,
    forward_terms,
    rule_of,
)
from compress.model.distillation.kernels import ROW_GRID, low
from compress.model.distillation.logit_map import IDENTITY, LogitMap
from compress.model.distillation.sampled import Sampled, kl_at

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in fp32, inside the cache of a server, small beside a model


class Targets(Protocol):
    """What the teacher says at N positions; `narrow` gives the part that a chunk of positions needs."""

    def narrow(self, start: int, stop: int) -> Dense | Sparse | Sampled: ...


@dataclass(frozen=True, slots=True)
class Dense:
    """The teacher's distribution at each position: ``logprobs`` (N, V), normalised over V."""

    logprobs: Tensor

    def narrow(self, start: int, stop: int) -> Dense:
        """Positions ``start`` to ``stop``."""
        return Dense(self.logprobs[start:stop])


@dataclass(frozen=True, slots=True)
class Sparse:
    """The K likeliest tokens of the teacher and the mass of all others.

    ``ids`` (N, K) int64 without repetition in a row, ``logprobs`` (N, K), ``log_tail`` (N,): the logarithm of
    1 - sum(exp(logprobs)), -inf where K = V. Leaving the tail out biases the student (Anshumann et al. 2025,
    "Sparse Logit Sampling", section 3): it learns the renormalised top K, too sure of itself.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor

    def narrow(self, start: int, stop: int) -> Sparse:
        """Positions ``start`` to ``stop``."""
        return Sparse(self.ids[start:stop], self.logprobs[start:stop], self.log_tail[start:stop])


@dataclass(frozen=True, slots=True)
class States:
    """The teacher's hidden states (N, H), output head (V, H) and map; the distribution is made chunk by chunk."""

    hidden: Tensor
    head: Tensor
    temperature: float
    logits: LogitMap = IDENTITY

    def narrow(self, start: int, stop: int) -> Dense:
        """Positions ``start`` to ``stop``, as `Dense`."""
        product = _wide(self.hidden[start:stop] @ self.head.T)
        return Dense(log_softmax_at(self.logits(product), self.temperature))


@dataclass(frozen=True, slots=True)
class LossWeights:
    """loss = (1 - kd_weight) * cross-entropy + kd_weight * temperature^2 * divergence + that of the features.

    The square keeps the size of the KL gradient independent of the temperature (Hinton et al. 2015, section 2).

    Attributes:
        kd_weight, temperature, label_smoothing: as in the formula; the smoothing is that of the cross-entropy.
        divergence: a name in `divergences.DIVERGENCES`.
        number: the divergence's own: beta of ``jsd``, skew of ``skew_*``, the reverse share of ``cakld``.
        adaptive: the skew of each row follows its gap, see `adaptive_skew`; ``number`` is then the largest.
        student_weight: of ``skew_pair`` in text of the student.
        hidden_weight, attention_weight, feature_layers: see ``features``; 0 switches them off.
    """

    kd_weight: float = 0.5
    temperature: float = 1.0
    label_smoothing: float = 0.0
    divergence: str = PLAIN
    number: float = 0.0
    adaptive: bool = False
    student_weight: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    feature_layers: str = "all"

    @property
    def rule(self) -> Rule | None:
        """The divergence's terms; ``None`` for the plain forward KL."""
        return rule_of(self.divergence, self.number)

    @property
    def wants_features(self) -> bool:
        """Whether hidden states or attention of teacher and student are compared."""
        return self.hidden_weight > 0 or self.attention_weight > 0

    @property
    def wants_teacher(self) -> bool:
        """Whether any part of the loss looks at the teacher."""
        return self.kd_weight != 0 or self.wants_features


@dataclass(frozen=True, slots=True)
class Marks:
    """Which row each position is of: ``counts`` (B,) add up to N; ``own`` (B,) bool: the student wrote the row."""

    counts: Tensor
    own: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the positions: ``loss`` carries the gradient; ``ce`` and ``kl`` do not.

    ``kl`` is KL(teacher || student) without any factor, whatever the loss is made of. Towards draws it is that of their
    shares, above the teacher's by what the draws lack of its entropy: the same for every student.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of ``logits`` (N, V) at ``temperature``, in fp32 at least."""
    logits = _wide(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy against (1 - e) one-hot + e / V (Szegedy et al. 2016, section 7): loss (N,), gradient (N, V)."""
    lse = torch.logsumexp(logits, dim=-1)  # (N,)
    given = labels[:, None]
    picked = logits.gather(1, given)[:, 0]
    loss = lse - (1.0 - label_smoothing) * picked
    grad = (logits - lse[:, None]).exp_()
    grad.scatter_add_(1, given, grad.new_full((1, 1), label_smoothing - 1.0).expand_as(given))
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(dim=-1)
        grad -= label_smoothing / logits.shape[1]
    return loss, grad


def forward_kl(logits: Tensor, targets: Dense | Sparse | Sampled, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(teacher || student at ``temperature``): loss (N,), gradient with respect to ``logits`` (N, V).

    The teacher's log-probabilities must have been taken at the same temperature.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    if isinstance(targets, Dense):
        loss, grad = _kl_dense(scaled, targets)
    elif isinstance(targets, Sampled):
        loss, grad = kl_at(scaled, torch.logsumexp(scaled, dim=-1, keepdim=True), targets, 1.0)
    else:
        loss, grad = _kl_sparse(scaled, torch.logsumexp(scaled, dim=-1, keepdim=True), targets, 1.0)
    return loss, grad if temperature == 1.0 else grad / temperature


def _kl_dense(logits: Tensor, targets: Dense) -> tuple[Tensor, Tensor]:
    student = torch.log_softmax(logits, dim=-1)
    teacher = targets.logprobs.exp()
    # a probability of zero contributes zero, though its logarithm is -inf; NaN stays NaN
    terms = torch.where(teacher == 0, 0.0, teacher * (targets.logprobs - student))
    return terms.sum(dim=-1), student.exp_().sub_(teacher)


def _kl_sparse(logits: Tensor, lse: Tensor, targets: Sparse, share: float) -> tuple[Tensor, Tensor]:
    """The K tokens and one bucket for all others: the KL between the two coarsened distributions (N,).

    Only the student's log-sum-exp ``lse`` (N, 1), its K gathered logits and the mass of its rest are needed. Beside the
    KL comes q - ``share`` * p, the tail's p spread over the others as the student spreads it: q_j * (1 - share * p_tail
    / q_tail). The rest is summed, not taken as one minus the K, which would lose it to cancellation wherever the
    student is sure.
    """
    top = logits.gather(1, targets.ids) - lse  # (N, K), log q_i
    probabilities, tail = targets.logprobs.exp(), targets.log_tail.exp()
    grad = (logits - lse).exp_().scatter_(1, targets.ids, 0.0)  # (N, V), q_j of the others
    mass = grad.sum(dim=-1).clamp_min_(torch.finfo(logits.dtype).tiny)
    kl = torch.where(probabilities == 0, 0.0, probabilities * (targets.logprobs - top)).sum(dim=-1)
    kl = kl + torch.where(tail == 0, 0.0, tail * (targets.log_tail - mass.log()))
    grad *= (1.0 - share * tail / mass)[:, None]
    return kl, grad.scatter_(1, targets.ids, top.exp_().sub_(probabilities, alpha=share))


def divergence(
    logits: Tensor,
    targets: Dense | Sparse | Sampled,
    rule: Rule,
    numbers: Numbers,
    *,
    temperature: float = 1.0,
    shares: tuple[float, float] = (0.0, 1.0),
    with_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The divergence of ``rule`` (N,), KL(teacher || student) (N,), the log-sum-exp (N, 1) and a gradient (N, V).

    With s_b the rule's derivative by log q_b and S their sum, the derivative by the logit of token j is s_j - q_j S,
    and q_j (s_tail / q_tail - S) within the bucket of the others (see `_kl_sparse`): one softmax, whatever the rule.
    With ``shares`` (a, c) the gradient is a q + c times that, so that a cross-entropy's softmax comes along. ``logits``
    are divided by ``temperature`` first and the gradient is by them as given; targets are of that temperature.

    Raises:
        ModelError: draws as target: no divergence but KL(teacher || student) is linear in the teacher's probabilities,
            so its mean over draws is something else.
    """
    if isinstance(targets, Sampled):
        raise _drawn()
    scaled = logits if temperature == 1.0 else logits / temperature
    base, share = shares
    lse = torch.logsumexp(scaled, dim=-1, keepdim=True)  # (N, 1)
    grad: Tensor | None = None
    if isinstance(targets, Dense):
        log_q = scaled - lse
        at = Buckets.of(targets.logprobs, log_q, log_q.exp())
        terms, slope = rule(at, numbers)
        if with_grad:
            factor = base - share * slope.sum(dim=-1, keepdim=True)
            grad = torch.addcmul(slope, at.q, factor) if share == 1.0 else slope.mul_(share).addcmul_(at.q, factor)
    else:
        rest = (scaled - lse).exp_().scatter_(1, targets.ids, 0.0)  # (N, V), q_j of the others
        mass = rest.sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(scaled.dtype).tiny)
        log_q = torch.cat([scaled.gather(1, targets.ids) - lse, mass.log()], dim=1)  # (N, K + 1)
        log_p = torch.cat([targets.logprobs, targets.log_tail[:, None]], dim=1)
        at = Buckets.of(log_p, log_q, log_q.exp())
        terms, slope = rule(at, numbers)
        if with_grad:
            factor = base - share * slope.sum(dim=-1, keepdim=True)
            rest *= factor + share * slope[:, -1:] / mass
            grad = rest.scatter_(1, targets.ids, at.q[:, :-1] * factor + share * slope[:, :-1])
    kl = forward_terms(at, numbers)[0].sum(dim=-1)
    return terms.sum(dim=-1), kl, lse, grad if grad is None or temperature == 1.0 else grad.div_(temperature)


def _drawn() -> ModelError:
    return ModelError("codec", "sample, with another divergence", "KL(teacher || student)", "Set codec: topk")


def combined(
    logits: Tensor,
    labels: Tensor,
    targets: Dense | Sparse | Sampled | None,
    weights: LossWeights,
    *,
    numbers: Numbers | None = None,
    with_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The mix of `LossWeights`: (loss, ce, kl), each (N,), and the gradient (N, V), ``None`` when not asked for.

    ``numbers`` where they differ by position; else those of ``weights``.
    """
    if targets is None or weights.kd_weight == 0.0:
        ce, grad = cross_entropy(logits, labels, label_smoothing=weights.label_smoothing)
        return ce, ce, torch.zeros_like(ce), grad if with_grad else None
    rule = weights.rule
    if numbers is None:
        numbers = Numbers(weights.number, None, weights.student_weight)
    if weights.temperature == 1.0:
        way = _plain_at_one if rule is None else _mixed_at_one
        loss, ce, kl, whole = way(logits, labels, targets, weights, rule or forward_terms, numbers)
        return loss, ce, kl, whole if with_grad else None
    share = weights.kd_weight
    ce, grad = cross_entropy(logits, labels, label_smoothing=weights.label_smoothing)
    if rule is None:
        kl, kl_grad = forward_kl(logits, targets, temperature=weights.temperature)
        value = kl
    else:
        value, kl, _, found = divergence(logits, targets, rule, numbers, temperature=weights.temperature)
        kl_grad = cast(Tensor, found)
    squared = share * weights.temperature**2
    loss = (1.0 - share) * ce + squared * value
    if not with_grad:
        return loss, ce, kl, None
    return loss, ce, kl, grad.mul_(1.0 - share).add_(kl_grad, alpha=squared)


def _plain_at_one(
    logits: Tensor, labels: Tensor, targets: Dense | Sparse | Sampled, weights: LossWeights, _: Rule, __: Numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`combined` with the forward KL at temperature 1: both losses share one softmax, in the fewest passes.

    The gradient is q - kd_weight * p - (1 - kd_weight) * smoothed label, with p the teacher's distribution; see
    `_kl_sparse` for its tail.
    """
    share = weights.kd_weight
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)  # (N, 1)
    if isinstance(targets, Dense):
        teacher = targets.logprobs.exp()
        # a probability of zero contributes zero, though its logarithm is -inf
        finite = targets.logprobs.clamp_min(torch.finfo(logits.dtype).min)
        kl = (teacher * (finite - (logits - lse))).sum(dim=-1)
        grad = (logits - lse).exp_().sub_(teacher, alpha=share)
    elif isinstance(targets, Sampled):
        kl, grad = kl_at(logits, lse, targets, share)
    else:
        kl, grad = _kl_sparse(logits, lse, targets, share)
    ce = _with_labels(logits, lse, labels, weights, grad)
    return (1.0 - share) * ce + share * kl, ce, kl, grad


def _mixed_at_one(  # noqa: PLR0917 - tensors, targets, weights, and the divergence's two
    logits: Tensor,
    labels: Tensor,
    targets: Dense | Sparse | Sampled,
    weights: LossWeights,
    rule: Rule,
    numbers: Numbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`combined` at temperature 1 with any divergence, whose softmax is the cross-entropy's too."""
    share = weights.kd_weight
    value, kl, lse, found = divergence(logits, targets, rule, numbers, shares=(1.0 - share, share))
    grad = cast(Tensor, found)
    ce = _with_labels(logits, lse, labels, weights, grad)
    return (1.0 - share) * ce + share * value, ce, kl, grad


def _with_labels(logits: Tensor, lse: Tensor, labels: Tensor, weights: LossWeights, grad: Tensor) -> Tensor:
    """The cross-entropy (N,); takes (1 - kd_weight) * smoothed label off ``grad`` (N, V), which has q in it already."""
    share, smoothing, given = weights.kd_weight, weights.label_smoothing, labels[:, None]
    ce = lse[:, 0] - (1.0 - smoothing) * logits.gather(1, given)[:, 0]
    if smoothing:
        ce = ce - smoothing * logits.mean(dim=-1)
    step = (1.0 - share) * (1.0 - smoothing)
    grad.scatter_add_(1, given, grad.new_full((1, 1), -step).expand_as(given))
    if smoothing:
        grad -= (1.0 - share) * smoothing / logits.shape[1]
    return ce


@dataclass(frozen=True, slots=True)
class _Task:
    """What `_Fused` is told beside tensors; ``dtype`` is that of the products behind the loss, ``None`` without any."""

    weights: LossWeights
    numbers: Numbers
    logits: LogitMap
    chunk: int
    dtype: torch.dtype | None


class _Fused(torch.autograd.Function):
    """Loss from hidden states; the gradients are made on the way forward, chunk by chunk, and kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, targets: Targets | None, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_grad, short = task.dtype is not None, head if task.dtype is None else head.to(task.dtype)
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)  # loss, ce, kl
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_head = torch.zeros_like(head) if with_grad and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], task.chunk):
            stop = min(start + task.chunk, hidden.shape[0])
            part = hidden[start:stop]
            logits = task.logits((part @ head.T).to(kind))  # (n, V)
            aim = None if targets is None else targets.narrow(start, stop)
            *losses, grad = combined(
                logits,
                labels[start:stop],
                aim,
                task.weights,
                numbers=task.numbers.narrow(start, stop),
                with_grad=with_grad,
            )
            sums += torch.stack([loss.sum(dtype=torch.float64) for loss in losses])
            if grad is not None and d_hidden is not None:
                grad = low(task.logits.back(grad, logits), short.dtype)
                d_hidden[start:stop] = (grad @ short)[: len(part)]
                if d_head is not None:
                    d_head += grad.T @ low(part, short.dtype)
        ctx.save_for_backward(d_hidden, d_head)
        loss, ce, kl = sums.to(kind).unbind()
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        scale = outer[0]
        return d_hidden * scale, None if d_head is None else d_head * scale, None, None, None


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: Targets | None,
    weights: LossWeights,
    *,
    dtype: torch.dtype | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    logits: LogitMap = IDENTITY,
    marks: Marks | None = None,
) -> LossParts:
    """Sum of the mixed loss over N positions, from ``hidden`` (N, H) and ``head`` (V, H), ``labels`` (N,) int64.

    ``head`` holds only the rows that the tokenizer can produce, so that padded rows of the vocabulary take no
    probability; ``logits`` is what the student does to their product. At most ``chunk_elements`` logits exist at a
    time, or those of `ROW_GRID` positions where bf16 products take as many. Differentiable once in ``hidden`` and
    ``head``. ``dtype`` is the number format of the two products behind the loss; the logits themselves are never
    rounded to bf16. ``marks`` say whose text a position is in, for ``skew_pair``, and which row, for an adaptive skew,
    which costs a second product with the head.
    """
    chunk = max(1, chunk_elements // head.shape[0])
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    products = (dtype if dtype == torch.bfloat16 else hidden.dtype) if with_grad else None
    if products == torch.bfloat16 and head.device.type == "cpu":
        chunk = max(chunk, ROW_GRID)  # fewer rows are padded up to that, so that most of the product is for nothing
    own = None
    if marks is not None and marks.own is not None:
        own = torch.repeat_interleave(marks.own, marks.counts)[:, None].to(hidden.device)
    number: float | Tensor = weights.number
    if weights.kd_weight == 0.0:
        targets = None  # so that states are not turned into distributions for nothing
    if weights.adaptive and targets is not None:
        assert marks is not None, "an adaptive skew is one per row: the marks say which positions are of one"
        number = _adapted(hidden.detach(), head.detach(), labels, targets, weights, logits, marks, chunk)
    task = _Task(weights, Numbers(number, own, weights.student_weight), logits, chunk, products)
    return LossParts(*cast(Any, _Fused.apply)(hidden, head, labels, targets, task))


def _adapted(  # noqa: PLR0917 - as `fused_loss`
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: Targets,
    weights: LossWeights,
    logits: LogitMap,
    marks: Marks,
    chunk: int,
) -> Tensor:
    """The skew at each position (N, 1); see `adaptive_skew`."""
    pairs = []
    for start in range(0, hidden.shape[0], chunk):
        stop = min(start + chunk, hidden.shape[0])
        given = labels[start:stop, None]
        found = log_softmax_at(logits(_wide(hidden[start:stop] @ head.T)), weights.temperature).gather(1, given)[:, 0]
        pairs.append((_label_logprobs(targets.narrow(start, stop), given, head.shape[0]).to(found.dtype), found))
    log_p, log_q = (torch.cat(column) for column in zip(*pairs, strict=True))
    counts, own = marks.counts.to(log_p.device), marks.own
    if weights.divergence == "skew_reverse_kl":
        own = torch.ones_like(counts, dtype=torch.bool)
    own = None if own is None else own.to(log_p.device)
    return adaptive_skew(log_p, log_q, counts, own, skew=weights.number)[:, None]


def _label_logprobs(targets: Dense | Sparse | Sampled, labels: Tensor, vocab: int) -> Tensor:
    """The teacher's log-probability of ``labels`` (n, 1), (n,); outside the top k an even share of the tail."""
    if isinstance(targets, Dense):
        return targets.logprobs.gather(1, labels)[:, 0]
    if isinstance(targets, Sampled):
        raise _drawn()
    here = targets.ids == labels  # (n, K), at most one per row
    inside = torch.where(here, targets.logprobs, -torch.inf).amax(dim=-1)
    outside = targets.log_tail - math.log(max(1, vocab - targets.ids.shape[1]))
    return torch.where(here.any(dim=-1), inside, outside).clamp_min(math.log(torch.finfo(torch.float32).tiny))
