"""Losses of distillation, as pure functions: tensors in, loss per position and gradient out.

`cross_entropy`, `forward_kl` and `reverse_kl` take logits and return (loss, d loss / d logits) in closed form;
`fused_loss` takes hidden states at the kept positions and the output head, and runs them in chunks of positions, so
that the matrix positions x vocabulary never exists whole. A teacher's target is `Dense` (all log-probabilities),
`Sparse` (top k and the mass of the rest), `Sampled` (a few draws) or `States` (its hidden states, turned into `Dense`
chunk by chunk). Knows nothing of models, rows, caches or optimizers.

Shapes: N kept positions, V vocabulary that the tokenizer can produce, K cached entries, H width. Units: nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.model.distillation.kernels import low
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
    """The teacher's hidden states (N, H) and output head (V, H); the distribution is made chunk by chunk."""

    hidden: Tensor
    head: Tensor
    temperature: float

    def narrow(self, start: int, stop: int) -> Dense:
        """Positions ``start`` to ``stop``, as `Dense`."""
        return Dense(log_softmax_at(self.hidden[start:stop] @ self.head.T, self.temperature))


@dataclass(frozen=True, slots=True)
class LossWeights:
    """loss = (1 - kd_weight) * cross-entropy + kd_weight * temperature^2 * divergence of student and teacher.

    The divergence is (1 - reverse_share) * KL(teacher || student) + reverse_share * KL(student || teacher). With the
    teacher's mean confidence as share it is the CAKLD of Du et al. 2024 (BitDistiller, arXiv:2402.10631).
    The square keeps the size of the KL gradient independent of the temperature (Hinton et al. 2015, section 2).
    """

    kd_weight: float = 0.5
    temperature: float = 1.0
    label_smoothing: float = 0.0
    reverse_share: float = 0.0


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the positions: ``loss`` carries the gradient; ``ce`` and ``kl`` do not.

    ``kl`` is KL(teacher || student) without any factor, whatever the loss is made of.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of ``logits`` (N, V) at ``temperature``, in fp32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


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
    if isinstance(targets, Sampled):
        loss, grad = kl_at(scaled, torch.logsumexp(scaled, dim=-1, keepdim=True), targets, 1.0)
    else:
        loss, grad = _kl_dense(scaled, targets) if isinstance(targets, Dense) else _kl_sparse(scaled, targets)
    return loss, grad if temperature == 1.0 else grad / temperature


def _kl_dense(logits: Tensor, targets: Dense) -> tuple[Tensor, Tensor]:
    student = torch.log_softmax(logits, dim=-1)
    teacher = targets.logprobs.exp()
    # a probability of zero contributes zero, though its logarithm is -inf; NaN stays NaN
    terms = torch.where(teacher == 0, 0.0, teacher * (targets.logprobs - student))
    return terms.sum(dim=-1), student.exp_().sub_(teacher)


def _kl_sparse(logits: Tensor, targets: Sparse) -> tuple[Tensor, Tensor]:
    """The K tokens and one bucket for all others: the KL between the two coarsened distributions.

    Only the student's log-sum-exp, its K gathered logits and the mass of its rest are needed. The gradient is
    q_i - p_i at the K tokens and q_j * (1 - p_tail / q_tail) elsewhere. The rest is summed, not taken as one minus
    the K, which would lose it to cancellation wherever the student is sure.
    """
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)  # (N, 1)
    top = logits.gather(1, targets.ids) - lse  # (N, K), log q_i
    probabilities = targets.logprobs.exp()
    rest = (logits - lse).exp_().scatter_(1, targets.ids, 0.0)  # (N, V), q_j of the others
    tiny = torch.finfo(logits.dtype).tiny
    mass = rest.sum(dim=-1).clamp_min_(tiny)
    tail = targets.log_tail.exp()
    kl = torch.where(probabilities == 0, 0.0, probabilities * (targets.logprobs - top)).sum(dim=-1)
    kl = kl + torch.where(tail == 0, 0.0, tail * (targets.log_tail - mass.log()))
    rest *= (1.0 - tail / mass)[:, None]
    return kl, rest.scatter_(1, targets.ids, top.exp_() - probabilities)


def reverse_kl(logits: Tensor, targets: Dense | Sparse, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(student at ``temperature`` || teacher): loss (N,), gradient with respect to ``logits`` (N, V).

    With q the student's probability and D = log q - log p, of a token or of the bucket that it is in, the gradient is
    q * (D - KL). A teacher's probability below the smallest number counts as that, where the divergence has no bound.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    lowest = math.log(torch.finfo(logits.dtype).tiny)
    log_q = torch.log_softmax(scaled, dim=-1)
    q = log_q.exp()
    if isinstance(targets, Dense):
        gap = log_q.sub_(targets.logprobs.clamp_min(lowest))  # (N, V)
    else:
        top = log_q.gather(1, targets.ids) - targets.logprobs.clamp_min(lowest)  # (N, K)
        mass = q.scatter(1, targets.ids, 0.0).sum(dim=-1)  # of the others; summed, see `_kl_sparse`
        tail = mass.clamp_min(math.exp(lowest)).log_() - targets.log_tail.clamp_min(lowest)
        gap = tail[:, None].expand_as(q).scatter(1, targets.ids, top)
    loss = (q * gap).sum(dim=-1)
    grad = q.mul_(gap.sub_(loss[:, None]))
    return loss, grad if temperature == 1.0 else grad / temperature


def mixed_kl(
    logits: Tensor, targets: Dense | Sparse | Sampled, *, reverse_share: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of `LossWeights` (N,), KL(teacher || student) (N,), and the divergence's gradient (N, V).

    At the shares 0 and 1 it is one of the two alone, bit for bit.

    Raises:
        ModelError: any but KL(teacher || student) towards draws: it is not linear in the teacher's probabilities, so
            its mean over draws is something else, and without bound where a token was not drawn.
    """
    kl, grad = forward_kl(logits, targets, temperature=temperature)
    if reverse_share == 0.0:
        return kl, kl, grad
    if isinstance(targets, Sampled):
        raise ModelError("codec", "sample, with KL(student || teacher)", "KL(teacher || student)", "Set codec: topk")
    back, back_grad = reverse_kl(logits, targets, temperature=temperature)
    if reverse_share == 1.0:
        return back, kl, back_grad
    mixed = torch.lerp(kl, back, reverse_share)
    return mixed, kl, grad.lerp_(back_grad, reverse_share)


def combined(
    logits: Tensor,
    labels: Tensor,
    targets: Dense | Sparse | Sampled | None,
    weights: LossWeights,
    *,
    with_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The mix of `LossWeights`: (loss, ce, kl), each (N,), and the gradient (N, V), ``None`` when not asked for."""
    if targets is None or weights.kd_weight == 0.0:
        ce, grad = cross_entropy(logits, labels, label_smoothing=weights.label_smoothing)
        return ce, ce, torch.zeros_like(ce), grad if with_grad else None
    if weights.temperature == 1.0 and weights.reverse_share == 0.0:
        loss, ce, kl, whole = _combined_at_one(logits, labels, targets, weights)
        return loss, ce, kl, whole if with_grad else None
    share = weights.kd_weight
    ce, grad = cross_entropy(logits, labels, label_smoothing=weights.label_smoothing)
    divergence, kl, kl_grad = mixed_kl(
        logits, targets, reverse_share=weights.reverse_share, temperature=weights.temperature
    )
    squared = share * weights.temperature**2
    loss = (1.0 - share) * ce + squared * divergence
    if not with_grad:
        return loss, ce, kl, None
    return loss, ce, kl, grad.mul_(1.0 - share).add_(kl_grad, alpha=squared)


def _combined_at_one(
    logits: Tensor, labels: Tensor, targets: Dense | Sparse | Sampled, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`combined` at temperature 1, where both losses share one softmax: half the passes over the logits.

    The gradient is q - kd_weight * p - (1 - kd_weight) * smoothed label, with p the teacher's distribution; see
    `_kl_sparse` for its tail.
    """
    share, smoothing, given = weights.kd_weight, weights.label_smoothing, labels[:, None]
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)  # (N, 1)
    ce = lse[:, 0] - (1.0 - smoothing) * logits.gather(1, given)[:, 0]
    if smoothing:
        ce = ce - smoothing * logits.mean(dim=-1)
    if isinstance(targets, Dense):
        teacher = targets.logprobs.exp()
        # a probability of zero contributes zero, though its logarithm is -inf
        finite = targets.logprobs.clamp_min(torch.finfo(logits.dtype).min)
        kl = (teacher * (finite - (logits - lse))).sum(dim=-1)
        grad = (logits - lse).exp_().sub_(teacher, alpha=share)
    elif isinstance(targets, Sampled):
        kl, grad = kl_at(logits, lse, targets, share)
    else:
        kl, grad = _sparse_at_one(logits, lse, targets, share)
    step = (1.0 - share) * (1.0 - smoothing)
    grad.scatter_add_(1, given, grad.new_full((1, 1), -step).expand_as(given))
    if smoothing:
        grad -= (1.0 - share) * smoothing / logits.shape[1]
    return (1.0 - share) * ce + share * kl, ce, kl, grad


def _sparse_at_one(logits: Tensor, lse: Tensor, targets: Sparse, share: float) -> tuple[Tensor, Tensor]:
    """KL of `_kl_sparse`, and q - share * p with the tail's p spread over the others as the student spreads it."""
    top = logits.gather(1, targets.ids) - lse  # (N, K), log q_i
    probabilities, tail = targets.logprobs.exp(), targets.log_tail.exp()
    grad = (logits - lse).exp_().scatter_(1, targets.ids, 0.0)  # (N, V), q_j of the others
    mass = grad.sum(dim=-1).clamp_min_(torch.finfo(logits.dtype).tiny)
    kl = torch.where(probabilities == 0, 0.0, probabilities * (targets.logprobs - top)).sum(dim=-1)
    kl = kl + torch.where(tail == 0, 0.0, tail * (targets.log_tail - mass.log()))
    grad *= (1.0 - share * tail / mass)[:, None]
    return kl, grad.scatter_(1, targets.ids, top.exp_().sub_(probabilities, alpha=share))


class _Fused(torch.autograd.Function):
    """Loss from hidden states; the gradients are made on the way forward, chunk by chunk, and kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        targets: Targets | None,
        weights: LossWeights,
        chunk: int,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_grad, short = dtype is not None, head if dtype is None else head.to(dtype)
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)  # loss, ce, kl
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_head = torch.zeros_like(head) if with_grad and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            part = hidden[start:stop]
            logits = (part @ head.T).to(kind)  # (n, V)
            aim = None if targets is None else targets.narrow(start, stop)
            *losses, grad = combined(logits, labels[start:stop], aim, weights, with_grad=with_grad)
            sums += torch.stack([loss.sum(dtype=torch.float64) for loss in losses])
            if grad is not None and d_hidden is not None:
                grad = low(grad, short.dtype)
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
        return d_hidden * scale, None if d_head is None else d_head * scale, None, None, None, None, None


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: Targets | None,
    weights: LossWeights,
    *,
    dtype: torch.dtype | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LossParts:
    """Sum of the mixed loss over N positions, from ``hidden`` (N, H) and ``head`` (V, H), ``labels`` (N,) int64.

    ``head`` holds only the rows that the tokenizer can produce, so that padded rows of the vocabulary take no
    probability. At most ``chunk_elements`` logits exist at a time. Differentiable once in ``hidden`` and ``head``.
    ``dtype`` is the number format of the two products behind the loss; the logits themselves are never rounded to bf16.
    """
    chunk = max(1, chunk_elements // head.shape[0])
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    products = (dtype if dtype == torch.bfloat16 else hidden.dtype) if with_grad else None
    apply = cast(Any, _Fused.apply)
    return LossParts(*apply(hidden, head, labels, targets, weights, chunk, products))
