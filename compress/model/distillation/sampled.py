"""Sampled targets: a few tokens drawn from the teacher's distribution, with counts, instead of the distribution.

`draw` takes log-probabilities to `Drawn`, the packed form of the cache, `unpack` reads it back, `kl_at` is the loss
against the shares of the draws. The mean over draws of a share is the teacher's probability, so the mean of the
gradient is the gradient of the whole distribution (Anshumann et al. 2025, "Sparse Logit Sampling", its random
sampling): nothing is cut off and no bucket for a rest is needed. Knows nothing of models, rows or files.

Shapes: N positions, V vocabulary, S draws per position, K distinct tokens at most, E entries of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.model.distillation.cache_size import entry_bytes


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens drawn from the teacher: ``ids`` (N, K) int64 and their ``shares`` (N, K) of the draws, which add up to 1.

    Entries with share 0 are padding; the others are different in a row.
    """

    ids: Tensor
    shares: Tensor

    def narrow(self, start: int, stop: int) -> Sampled:
        """Positions ``start`` to ``stop``."""
        return Sampled(self.ids[start:stop], self.shares[start:stop])


@dataclass(frozen=True, slots=True)
class Drawn:
    """Draws as stored: ``codes`` (E, W) uint8, one entry per distinct token, position after position.

    An entry is (count - 1) * V + id as W bytes, lowest first. The counts of a position add up to S, which is how one
    knows where the next begins: no offset is stored.
    """

    codes: Tensor


def draw(logprobs: Tensor, offsets: Tensor, samples: int) -> Drawn:
    """Draw ``samples`` tokens at each position of ``logprobs`` (N, V); ``offsets`` (N,) are uniform in [0, 1).

    Systematic sampling: the draws lie evenly spaced on the cumulative distribution, shifted by the offset. The mean of
    a token's count is S times its probability, as with independent draws, and the count itself is that product rounded
    up or down, so that tokens of probability 1 / S or more are never missed and the variance is smaller.
    """
    vocab = logprobs.shape[1]
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    steps = torch.arange(samples, dtype=torch.float64, device=logprobs.device)
    places = (steps + offsets.to(steps)[:, None]) / samples * total  # (N, S), rising
    places = torch.minimum(places, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach the end
    ids = torch.searchsorted(cumulative, places, right=True)  # a token of probability 0 has no place
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = torch.nonzero(fresh.flatten())[:, 0]
    counts = torch.diff(first, append=first.new_tensor([ids.numel()]))
    code = (counts - 1) * vocab + ids[fresh]
    places_of_bytes = 8 * torch.arange(entry_bytes(vocab, samples), device=code.device)
    return Drawn(((code[:, None] >> places_of_bytes) & 0xFF).to(torch.uint8))


def unpack(codes: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """The ids and counts, int64, of entries ``codes`` (..., W)."""
    weights = 256 ** torch.arange(codes.shape[-1], device=codes.device)
    code = (codes.long() * weights).sum(dim=-1)
    return code % vocab, code // vocab + 1


class DrawnShard:
    """Draws with the places where each position begins, for reading any position."""

    def __init__(self, drawn: Drawn, *, vocab: int, samples: int) -> None:
        self.codes, self.vocab = drawn.codes, vocab
        position = (torch.cumsum(unpack(drawn.codes, vocab)[1], 0) - 1) // samples  # of each entry
        lengths = torch.bincount(position) if len(position) else position
        self.starts = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)]).to(torch.int32)

    def read(self, positions: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The ids and counts (N, S), int64, at ``positions`` (N,); places beyond the distinct tokens count 0."""
        starts, ends = self.starts[positions].long(), self.starts[positions + 1].long()
        places = starts[:, None] + torch.arange(samples)
        real = places < ends[:, None]
        ids, counts = unpack(self.codes[torch.where(real, places, starts[:, None])], self.vocab)
        return ids, torch.where(real, counts, 0)


def shares_of(ids: Tensor, counts: Tensor, samples: int) -> Sampled:
    """What `DrawnShard.read` gave as targets; columns that no position uses are left off."""
    width = max(1, int((counts > 0).sum(dim=-1).max())) if len(counts) else 1
    return Sampled(ids[:, :width], counts[:, :width].float() / samples)


def kl_at(logits: Tensor, lse: Tensor, targets: Sampled, weight: float) -> tuple[Tensor, Tensor]:
    """KL(shares || student) (N,), and q - weight * shares (N, V), the gradient where ``weight`` is 1.

    ``lse`` (N, 1) is the log-sum-exp of ``logits`` (N, V). Only that and the gathered logits are needed for the loss.
    It is 0 or more; its mean over draws is KL(teacher || student) and a constant that no student can lower: the entropy
    that the draws lack against the teacher.
    """
    shares = targets.shares.to(logits.dtype)
    kl = (torch.xlogy(shares, shares) - shares * (logits.gather(1, targets.ids) - lse)).sum(dim=-1)
    grad = (logits - lse).exp_()
    return kl, grad.scatter_add_(1, targets.ids, shares * -weight)
