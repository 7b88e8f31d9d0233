"""Losses between models of different vocabularies, as pure functions, and the means to take them in slices.

`uld` compares sorted probabilities, `alm` the likelihoods of aligned chunks, `gold` the distributions at the start of
aligned chunks with the chunk itself as one outcome. `label_scores` gives the log-probabilities that chunks are summed
from (`chunk_sums`), `merged` joins chunks that end inside of a word. `sliced` runs any of them over hidden states so
that the matrix positions x vocabulary never exists whole. Gradients are autograd's. Knows nothing of rows,
tokenizers or models.

Shapes: N positions, C chunks, V the student's vocabulary, W the teacher's, K tokens common to both, H width. Units:
nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.model.distillation.losses import CHUNK_ELEMENTS, Targets


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities at N positions: of the ``labels`` (N,), and of any token that begins a word, ``edges`` (N,)."""

    labels: Tensor
    edges: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Common:
    """Tokens that spell the same: ids of the teacher (K,) and of the student (K,), int64, each once."""

    teacher: Tensor
    student: Tensor


# -- the three losses ------------------------------------------------------------------------------------------------


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Wasserstein-1 distance with equal costs of the sorted probabilities of ``student`` (C, V), ``teacher`` (C, W).

    Both are log-probabilities; the smaller vocabulary is filled up with zeros. Universal Logit Distillation (Boizard
    et al. 2024, arXiv:2402.12030, section 3.2): sum_i |q_(i) - p_(i)|, between 0 and 2. Which token is which does
    not matter to it.
    """
    q, p = student.exp(), teacher.exp()
    return sorted_distance(q, p)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """Sum of |q_(i) - p_(i)| over both sorted, zeros added to the narrower of ``q`` (C, V) and ``p`` (C, W)."""
    width = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (q, p))
    ordered = torch.sort(q, dim=1, descending=True).values - torch.sort(p, dim=1, descending=True).values
    return ordered.abs().sum(dim=1)


def alm(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """KL between "this chunk" and "another one" for both models, from log-likelihoods of chunks (C,) and (C,).

    Approximate Likelihood Matching (Minixhofer et al. 2025, arXiv:2503.20083): p = P(chunk)^(1 / temperature) and
    likewise q, then p log(p / q) + (1 - p) log((1 - p) / (1 - q)). Times the temperature, so that the gradient keeps
    its size: for large ones the loss tends to x log(x / y) - x + y with x and y the chunk's surprisals.
    """
    a, b = _below_one(teacher / temperature), _below_one(student / temperature)
    p = a.exp()
    loss = p * (a - b) + (1.0 - p) * (_other(a) - _other(b))
    return loss * temperature


def _below_one(logp: Tensor) -> Tensor:
    return logp.clamp(max=-torch.finfo(logp.dtype).tiny)  # a certain chunk has no "another one"


def _other(logp: Tensor) -> Tensor:
    """log(1 - exp(logp))."""
    return torch.log(-torch.expm1(logp))


@dataclass(frozen=True, slots=True)
class Spans:
    """One side of C chunks: the id of each first token ``first`` (C,), and log P of its other tokens, ``rest`` (C,)."""

    first: Tensor
    rest: Tensor


def gold(
    student: Tensor, teacher: Tensor, spans: Spans, teacher_spans: Spans, common: Common, *, unmatched: float = 1.0
) -> Tensor:
    """KL over the outcomes that both sides share, and ``unmatched`` times the sorted distance over all others: (C,).

    ``student`` (C, V) and ``teacher`` (C, W) are log-probabilities before the chunk. The tokens of a chunk are merged
    by the chain rule (GOLD, Patino et al. 2025, also ULD+): one outcome is the chunk itself, with the product of its
    tokens' probabilities, the others are the tokens that begin otherwise, and what begins alike and goes on otherwise.
    Shared are the chunk and the tokens of ``common``. Their part is sum p log(p / q) - p + q, which is >= 0 though
    they need not add up to one, and is the KL where they do: with equal vocabularies this is the token-wise KL.
    """
    q_first, p_first = student.gather(1, spans.first[:, None])[:, 0], teacher.gather(1, teacher_spans.first[:, None])
    log_q, log_p = q_first + spans.rest, p_first[:, 0] + teacher_spans.rest
    shared = (common.student[None] != spans.first[:, None]) & (common.teacher[None] != teacher_spans.first[:, None])
    matched = _divergence(teacher[:, common.teacher], student[:, common.student], shared)
    matched = matched.sum(dim=1) + _divergence(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool))
    others = [
        _others(side, span, ids, shared)
        for side, span, ids in ((student, spans, common.student), (teacher, teacher_spans, common.teacher))
    ]
    return matched + unmatched * sorted_distance(others[0], others[1])


def _divergence(log_p: Tensor, log_q: Tensor, where: Tensor) -> Tensor:
    """p log(p / q) - p + q where it is asked for, else 0."""
    p = log_p.exp()
    log_ratio = torch.where(p == 0, 0.0, log_p) - torch.where(p == 0, 0.0, log_q)
    return torch.where(where, p * log_ratio - p + log_q.exp(), 0.0)


def _others(logprobs: Tensor, span: Spans, ids: Tensor, shared: Tensor) -> Tensor:
    """Probabilities of the tokens that are neither shared nor the first of the chunk, and of "begins alike": V + 1."""
    left = torch.ones_like(logprobs)
    left[:, ids] = (~shared).to(left.dtype)
    left = left.scatter(1, span.first[:, None], 0.0)
    alike = logprobs.gather(1, span.first[:, None]).exp() * -torch.expm1(span.rest)[:, None]
    return torch.cat([logprobs.exp() * left, alike], dim=1)


# -- chunks ----------------------------------------------------------------------------------------------------------


def chunk_sums(values: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Sums of ``values`` (N,) over ranges ``starts`` (C,) to ``stops`` (C,) that do not overlap, in rising order."""
    lengths = stops - starts
    owner = torch.repeat_interleave(torch.arange(len(starts), device=values.device), lengths)
    before = torch.cumsum(lengths, 0) - lengths
    places = torch.arange(len(owner), device=values.device) + (starts - before)[owner]
    return values.new_zeros(len(starts)).index_add(0, owner, values[places])


def merged(edges: Tensor, joins: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Group C chunks so that each group ends where the teacher expects a new word: (group of each chunk (C,), ends).

    ``edges`` (C,) is the teacher's log-probability that a word begins behind the chunk, ``joins`` (C,) whether the next
    chunk follows at once (never behind the last). A group ends behind a chunk whose probability is at least
    ``threshold``; ``ends`` (G,) is that chunk's number. Chunks that meet a gap before such an end are in no group (-1).
    """
    closes = edges.exp() >= threshold
    stops = closes | ~joins  # a gap ends what came before, finished or not
    run = torch.cumsum(stops, 0) - stops.long()
    last = torch.nonzero(stops)[:, 0]
    good = closes[last]
    group = torch.where(good, torch.cumsum(good, 0) - 1, -1)
    return group[run], last[good]


# -- slices ----------------------------------------------------------------------------------------------------------


def sliced(
    function: Callable[[int, int], Tensor], count: int, vocab: int, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """``function(start, stop)`` (each (stop - start, ...)) over ``count`` positions, joined; at least one position.

    No slice holds more than ``chunk_elements`` entries of a matrix with ``vocab`` columns; what a slice computes is not
    kept for the backward pass but computed again.
    """
    step = max(1, chunk_elements // vocab)
    if count <= step or not torch.is_grad_enabled():
        parts = [function(at, min(at + step, count)) for at in range(0, count, step)]
    else:
        parts = [
            cast(
                Tensor,
                checkpoint(function, at, min(at + step, count), use_reentrant=False, preserve_rng_state=False),
            )
            for at in range(0, count, step)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """Log-softmax (N, V) of ``hidden`` (N, H) times ``head`` (V, H), in fp32 at least."""
    logits = hidden @ head.T
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def label_scores(
    hidden: Tensor, head: Tensor, labels: Tensor, edges: Tensor | None = None, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Scores:
    """`Scores` at N positions from ``hidden`` (N, H), ``head`` (V, H), ``labels`` (N,).

    ``edges`` (V,) bool: which tokens begin a word.
    """
    ids = None if edges is None else torch.nonzero(edges)[:, 0]

    def score(start: int, stop: int) -> Tensor:
        logprobs = log_probabilities(hidden[start:stop], head)
        columns = [logprobs.gather(1, labels[start:stop, None])]
        if ids is not None:
            columns.append(torch.logsumexp(logprobs[:, ids], dim=1, keepdim=True))
        return torch.cat(columns, dim=1)

    found = sliced(score, hidden.shape[0], head.shape[0], chunk_elements=chunk_elements)
    # rounding can lift a sum of probabilities above one
    return Scores(found[:, 0], None if ids is None else found[:, 1].clamp(max=0.0))


def distances(
    hidden: Tensor,
    head: Tensor,
    places: Tensor,
    teacher: Targets,
    measure: Callable[[Tensor, Tensor, int, int], Tensor],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """``measure(student's, teacher's log-probabilities, start, stop)`` at C ``places`` of the student, in slices: (C,).

    ``teacher`` holds the C positions that belong to them and must be dense.
    """

    def compare(start: int, stop: int) -> Tensor:
        with torch.no_grad():
            theirs = teacher.narrow(start, stop)
        assert hasattr(theirs, "logprobs"), "an online teacher gives all its log-probabilities"
        ours = log_probabilities(hidden.index_select(0, places[start:stop]), head)
        return measure(ours, theirs.logprobs.to(ours.dtype), start, stop)

    widest = max(head.shape[0], getattr(teacher, "head", head).shape[0])  # either side may have the larger vocabulary
    return sliced(compare, len(places), widest, chunk_elements=chunk_elements)
