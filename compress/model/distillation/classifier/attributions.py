"""Which tokens a class score comes from: integrated gradients, and the distance between two such explanations.

`integrated_gradients` is Sundararajan, Taly, Yan 2017 (section 3), `attribution_distance` the third term of the loss
of DiXtill (Cambria et al. 2025). Pure functions of tensors; knows nothing of models, rows and training.

Shapes: B questions, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def quadrature(points: int, bend: int = 1) -> list[tuple[float, float]]:
    """(place, weight) of an integral over 0..1 by Gauss and Legendre; exact for polynomials below degree 2 * points.

    With ``bend`` the points lie at their places to that power, closer to 0, and no longer exact for all of these.
    """
    places, weights = np.polynomial.legendre.leggauss(points)
    u = (places + 1.0) / 2.0
    return [
        (float(one**bend), float(weight / 2.0 * bend * one ** (bend - 1)))
        for one, weight in zip(u, weights, strict=True)
    ]


def integrated_gradients(
    score: Callable[[Tensor], Tensor], inputs: Tensor, baseline: Tensor, *, points: int, bend: int = 1
) -> Tensor:
    """(B, T): (inputs - baseline) times the mean gradient of ``score`` on the line between, summed over H.

    ``score`` maps (B, T, H) to (B,), row by row. By completeness the sum over T is score(inputs) - score(baseline), up
    to the error of the integral, which falls with ``points``; ``bend`` as in `quadrature`.
    """
    step = (inputs - baseline).detach()
    total = torch.zeros_like(step)
    for place, weight in quadrature(points, bend):
        at = (baseline.detach() + place * step).requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(score(at).sum(), at)
        total += weight * grad
    return (total * step).sum(-1)


def log_odds(scores: Tensor, chosen: Tensor) -> Tensor:
    """(B,): log of the odds of class ``chosen`` (B,) against all others, from ``scores`` (B, K)."""
    own = scores.gather(1, chosen[:, None])[:, 0]
    others = scores.scatter(1, chosen[:, None], -torch.inf)
    return own - torch.logsumexp(others, dim=1)


def attribution_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """(B,): (1 - cosine) / 2 of two attributions (B, T) over the tokens in ``mask``, in 0..1.

    0 for a row without a token in ``mask`` or where a side is zero all over: it has nothing to compare.
    """
    ours, theirs = student.masked_fill(~mask, 0.0), teacher.to(student.dtype).masked_fill(~mask, 0.0)
    # the largest entry is taken out first, so that squares neither vanish nor overflow
    scales = [side.detach().abs().amax(dim=1, keepdim=True) for side in (ours, theirs)]
    there = (scales[0] > 0)[:, 0] & (scales[1] > 0)[:, 0]
    ours, theirs = (
        torch.where(there[:, None], side / scale, 1.0) for side, scale in zip((ours, theirs), scales, strict=True)
    )
    cosine = (ours * theirs).sum(1) / (ours.square().sum(1) * theirs.square().sum(1)).sqrt()
    return torch.where(there, (1.0 - cosine) / 2.0, 0.0)
