"""The divergences of distillation, each one function over buckets, and the literal table of them.

A divergence is a sum over buckets of d(p, q): p the teacher's probability, q the student's. A bucket is a token, or all
tokens that sparse targets leave out, taken together. So a function gives d and its derivative by log q, element by
element, and `losses` makes loss and gradient of any of them for dense and sparse targets alike. To add one: a function
here, a line in `DIVERGENCES`, a name in ``params.DivergenceName``. Knows nothing of logits, targets or chunks.

Shapes: n positions, b buckets. Units: nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Buckets:
    """``log_p`` and ``log_q`` (n, b) of teacher and student, and their exponentials; all finite."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    tiny: float

    @classmethod
    def of(cls, log_p: Tensor, log_q: Tensor, q: Tensor) -> Buckets:
        """From the logarithms and ``q``.

        A teacher's probability below the smallest number, 0 among them, counts as that number: too little for any sum
        to show it, and no logarithm is infinite.
        """
        tiny = torch.finfo(log_q.dtype).tiny
        log_p = log_p.to(log_q.dtype).clamp_min(math.log(tiny))
        return cls(log_p, log_q, log_p.exp(), q, tiny)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a divergence is told beside the distributions.

    Attributes:
        number: its own number (``beta``, ``skew`` or ``reverse_share``); (n, 1) where it differs by position.
        own: (n, 1) bool, true in text that the student wrote; ``None``: nowhere.
        student_weight: b of the pair's weights 2 - b and b.
    """

    number: float | Tensor = 0.0
    own: Tensor | None = None
    student_weight: float = 1.0

    def narrow(self, start: int, stop: int) -> Numbers:
        """Those of positions ``start`` to ``stop``."""
        number = self.number[start:stop] if isinstance(self.number, Tensor) else self.number
        return Numbers(number, None if self.own is None else self.own[start:stop], self.student_weight)


Rule = Callable[[Buckets, Numbers], Pair]


def forward_terms(at: Buckets, _: Numbers) -> Pair:
    """KL(teacher || student) = sum p log(p / q)."""
    return at.p * (at.log_p - at.log_q), -at.p


def reverse_terms(at: Buckets, _: Numbers) -> Pair:
    """KL(student || teacher) = sum q log(q / p)."""
    terms = at.q * (at.log_q - at.log_p)
    return terms, terms + at.q


def cakld_terms(at: Buckets, numbers: Numbers) -> Pair:
    """(1 - c) KL(teacher || student) + c KL(student || teacher), c = ``reverse_share``.

    With the teacher's mean confidence as c it is the CAKLD of Du et al. 2024 (BitDistiller, arXiv:2402.10631).
    """
    share = numbers.number
    gap, ahead, back = at.log_p - at.log_q, (1.0 - share) * at.p, share * at.q
    terms = (ahead - back).mul_(gap)
    return terms, gap.sub_(1.0).mul_(back).add_(ahead).neg_()


def jsd_terms(at: Buckets, numbers: Numbers) -> Pair:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Agarwal et al. 2024 (GKD, arXiv:2306.13649, section 3). Convention: JSD / beta tends to KL(teacher || student) for
    beta to 0, JSD / (1 - beta) to KL(student || teacher) for beta to 1, and at 0 and 1 themselves it is these KLs (the
    formula would give 0). Between them it is at most ln 2.
    """
    beta = numbers.number
    log_m = (beta * at.p + (1.0 - beta) * at.q).clamp_min_(at.tiny).log_()
    back = (1.0 - beta) * (at.q * (at.log_q - log_m))
    return beta * (at.p * (at.log_p - log_m)) + back, back


def skew_terms(at: Buckets, numbers: Numbers) -> Pair:
    """KL(teacher || a teacher + (1 - a) student), a = ``skew``.

    Ko et al. 2024 (DistiLLM, arXiv:2402.03898, section 3.1): bounded by -log a where the plain KL has no bound.
    """
    skew = numbers.number
    mixed = (skew * at.p + (1.0 - skew) * at.q).clamp_min_(at.tiny)
    slope = (at.p * at.q).mul_(skew - 1.0).div_(mixed)
    return at.p * (at.log_p - mixed.log_()), slope


def skew_reverse_terms(at: Buckets, numbers: Numbers) -> Pair:
    """KL(student || (1 - a) teacher + a student), a = ``skew`` (DistiLLM, section 3.1), bounded by -log a.

    The gradient is the whole one; the published code of DistiLLM-2 holds the student in the mixture fixed.
    """
    skew = numbers.number
    mixed = ((1.0 - skew) * at.p + skew * at.q).clamp_min_(at.tiny)
    pull = (at.p * at.q).mul_(1.0 - skew).div_(mixed)
    terms = at.q * (at.log_q - mixed.log_())
    return terms, pull.add_(terms)


def skew_pair_terms(at: Buckets, numbers: Numbers) -> Pair:
    """(2 - b) skewed KL in text of the teacher, b skewed reverse KL in text of the student, b = ``student_weight``.

    Ko et al. 2025 (DistiLLM-2, arXiv:2503.07067, section 3).
    """
    ahead = skew_terms(at, numbers)
    weight = 2.0 - numbers.student_weight
    if weight != 1.0:
        ahead = ahead[0] * weight, ahead[1] * weight
    if numbers.own is None:
        return ahead
    back = skew_reverse_terms(at, numbers)
    one, other = (
        torch.where(numbers.own, second * numbers.student_weight, first)
        for first, second in zip(ahead, back, strict=True)
    )
    return one, other


@dataclass(frozen=True, slots=True)
class Divergence:
    """One line of the table: its terms, and which divergence of the table it is at which number, bit for bit."""

    terms: Rule
    ends: Mapping[float, str] = field(default_factory=dict)


PLAIN = "forward_kl"  # has a way of its own in `losses`, with fewer passes
DIVERGENCES: dict[str, Divergence] = {
    PLAIN: Divergence(forward_terms),
    "reverse_kl": Divergence(reverse_terms),
    "cakld": Divergence(cakld_terms, {0.0: PLAIN, 1.0: "reverse_kl"}),
    "jsd": Divergence(jsd_terms, {0.0: PLAIN, 1.0: "reverse_kl"}),
    "skew_kl": Divergence(skew_terms, {0.0: PLAIN}),
    "skew_reverse_kl": Divergence(skew_reverse_terms, {0.0: "reverse_kl"}),
    "skew_pair": Divergence(skew_pair_terms),
}


def rule_of(name: str, number: float) -> Rule | None:
    """The terms of divergence ``name`` at ``number``; ``None`` where that is the plain forward KL."""
    line = DIVERGENCES[name]
    name = line.ends.get(number, name)
    return None if name == PLAIN else DIVERGENCES[name].terms


def adaptive_skew(
    log_p: Tensor, log_q: Tensor, counts: Tensor, own: Tensor | None, *, skew: float, floor: float = 0.01
) -> Tensor:
    """A skew for every row by how far apart teacher and student are on its tokens: (N,), from ``floor`` to ``skew``.

    ``log_p`` and ``log_q`` (N,) are the log-probabilities that teacher and student give the labels, ``counts`` (B,)
    the positions of each row, ``own`` (B,) bool which rows the student wrote. With g = the geometric mean probability
    under the teacher less that under the student (the other way round in the student's text) and m the mean of g over
    the rows of one kind, it is 1 - (1 - skew) m / g, clipped: the larger the gap, the more skew (DistiLLM-2, section
    3.2). m is that of the batch, so that it needs no state.
    """
    rows = torch.repeat_interleave(torch.arange(len(counts), device=log_p.device), counts)
    mean = log_p.new_zeros(2, len(counts)).index_add_(1, rows, torch.stack([log_p, log_q])) / counts.clamp_min(1)
    p, q = mean.exp().unbind()
    flags = torch.zeros_like(counts, dtype=torch.bool) if own is None else own
    gap = torch.where(flags, q - p, p - q)
    anchor = torch.empty_like(gap)
    for kind in (True, False):
        here = flags == kind
        anchor[here] = gap[here].mean() if bool(here.any()) else 0.0
    ratio = anchor / torch.where(gap.abs() < 1e-5, torch.full_like(gap, 1e-5), gap)
    return (1.0 - (1.0 - skew) * ratio).clamp(min(floor, skew), skew)[rows]
