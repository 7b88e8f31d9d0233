"""MiniLLM: the gradient of the reverse KL of whole answers, as a policy gradient.

Source: Gu et al. 2024 (arXiv:2306.08543). `returns` is the reward of what follows each token, `policy_loss` the loss
from hidden states, in chunks of positions like ``losses.fused_loss``. Pure functions: tensors in, sums and gradients
out. Knows nothing of models or of how answers were made.

Shapes: B answers, N positions in all of them, V vocabulary, H width. Units: nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from compress.model.distillation.divergences import Numbers, reverse_terms
from compress.model.distillation.kernels import low
from compress.model.distillation.logit_map import IDENTITY, LogitMap
from compress.model.distillation.losses import CHUNK_ELEMENTS, Dense, LossParts, Targets, cross_entropy, divergence


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """How the gradient is estimated.

    Attributes:
        discount: of rewards further on, per token; 1: none.
        normalize: divide the reward of what follows by its (discounted) number of tokens (equation 6), else the long
            answers, which have more to lose, are unlearned and answers grow short.
        largest_weight: importance weights are cut off here (Ionides 2008).
    """

    discount: float = 0.95
    normalize: bool = True
    largest_weight: float = 2.0


def returns(reward: Tensor, counts: Tensor, *, discount: float, normalize: bool) -> Tensor:
    """R after each token: sum over later tokens s of the same answer of discount^(s - t - 1) * reward_s, (N,).

    ``reward`` (N,), answer after answer, ``counts`` (B,) tokens of each. The last token of an answer has none.
    """
    lengths = counts.tolist()
    padded = torch.nn.utils.rnn.pad_sequence(list(torch.split(reward, lengths)), batch_first=True)  # (B, T)
    real = torch.arange(padded.shape[1], device=reward.device) < counts.to(reward.device)[:, None]
    found, weight = torch.zeros_like(padded), torch.zeros_like(padded)
    for place in range(padded.shape[1] - 2, -1, -1):
        found[:, place] = padded[:, place + 1] + discount * found[:, place + 1]
        weight[:, place] = real[:, place + 1] + discount * weight[:, place + 1]
    if normalize:
        found /= weight.clamp_min(1.0)
    return found[real]


class _Policy(torch.autograd.Function):
    """Loss from hidden states; the gradients are made on the way forward and kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature is autograd's
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        targets: Targets,
        counts: Tensor,
        drawn: Tensor,
        settings: PolicySettings,
        dtype: torch.dtype | None,
        chunk: int,
        mapped: LogitMap,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chunks = list(_chunks(hidden.shape[0], chunk))
        found = [_chances(mapped((hidden[cut] @ head.T).to(kind)), labels[cut], targets, cut) for cut in chunks]
        own, given = (torch.cat(part) for part in zip(*found, strict=True))  # (N,) each: log q, log p of the tokens
        after = returns(given - own, counts, discount=settings.discount, normalize=settings.normalize)
        weights = (own - drawn.to(own)).exp_().clamp_(max=settings.largest_weight)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)  # loss, ce, kl
        with_grad, short = dtype is not None, head if dtype is None else head.to(dtype)
        d_hidden, d_head = torch.zeros_like(hidden), torch.zeros_like(head)
        for cut in chunks:
            part = hidden[cut]
            logits = mapped((part @ head.T).to(kind))
            aim = targets.narrow(cut.start, cut.stop)
            single, kl, _, grad = divergence(logits, aim, reverse_terms, Numbers())  # of the next token alone, exact
            ce, push = cross_entropy(logits, labels[cut])  # the gradient of -log q
            weight = weights[cut]
            sums += torch.stack([value.sum(dtype=torch.float64) for value in (weight * single, ce, kl)])
            if with_grad:
                grad = cast(Tensor, grad).add_(push * after[cut][:, None]).mul_(weight[:, None])
                grad = low(mapped.back(grad, logits), short.dtype)
                d_hidden[cut] = (grad @ short)[: len(part)]
                d_head += grad.T @ low(part, short.dtype)
        ctx.save_for_backward(d_hidden, d_head)
        loss, ce, kl = sums.to(kind).unbind()
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * outer[0], d_head * outer[0], *(None,) * 8


def policy_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: Targets,
    *,
    counts: Tensor,
    drawn: Tensor,
    settings: PolicySettings,
    dtype: torch.dtype | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    logits: LogitMap = IDENTITY,
) -> LossParts:
    """Sum of w * KL(student || teacher) over the positions of B answers, with the gradient of whole answers' KL.

    The gradient is that of equations 3, 5 and 6 of the paper,
    sum over t of w_t * (grad KL(q_t || p_t) - R_t * grad log q_t(y_t)), with the reward log p / q of a token, R_t as in
    `returns`, and w_t = q_t(y_t) over what y_t was drawn from: the mixture with the teacher, or the student of some
    steps ago. Neither R nor w is differentiated.

    ``hidden`` (N, H), ``head`` (V, H), ``labels`` (N,) the tokens drawn, ``counts`` (B,) of each answer, ``drawn`` (N,)
    their log-probability under what they were drawn from. ``targets`` at temperature 1. ``logits`` is what the student
    does to the product of both.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    products = (dtype if dtype == torch.bfloat16 else hidden.dtype) if with_grad else None
    apply = cast(Any, _Policy.apply)
    chunk = max(1, chunk_elements // head.shape[0])
    return LossParts(*apply(hidden, head, labels, targets, counts, drawn, settings, products, chunk, logits))


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _chances(logits: Tensor, labels: Tensor, targets: Targets, cut: slice) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``labels``, the student's and the teacher's."""
    teacher = targets.narrow(cut.start, cut.stop)
    assert isinstance(teacher, Dense), "answers are scored by a running teacher"
    own = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]
    given = teacher.logprobs.gather(1, labels[:, None])[:, 0].clamp_min(torch.finfo(logits.dtype).min)
    return own, given
