"""Does the teacher contradict a row's answer, and how sure is it? The maths behind `stabilization.mislabel`.

Teacher-forced on the given answer, the teacher's first choice at every token equals that token exactly when greedy
decoding would write the same answer: so one forward pass, not a generation, tells agreement. `measure` turns token
scores into figures, `judge` figures into a verdict, `confident` is the gate for new answers.

Sources: RobustFT (Luo et al. 2024) detects noise by disagreement with the model's own predictions and keeps relabelled
rows whose "entropy" is below the median, where entropy means the mean negative log probability of the answer's tokens
and not the entropy of a distribution; the same here. CLEAR (Chen and Mueller 2024) changes a target only behind a
confidence gate. Both use a large model's reasoning for a second opinion, which a small teacher has not; what takes its
place is the margin: how much likelier another token is at the worst position.
Pure functions; knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.answers import TokenScores

Kind = Literal["agrees", "unsure", "contradicts", "unmeasured"]


class Figures(NamedTuple):
    """What the teacher thinks of one given answer.

    Attributes:
        agrees: 1 when greedy decoding would write exactly this answer, else 0.
        mean_logprob: of the answer's tokens and its end, nats; NaN where no token was measured.
        margin: nats between the likeliest and the given token where they are farthest apart.
        position: number of that token in the answer, from 0.
    """

    agrees: float
    mean_logprob: float
    margin: float
    position: float


def measure(scores: TokenScores) -> Figures:
    """Figures of one row."""
    if not len(scores.logprob):
        return Figures(0.0, np.nan, np.nan, np.nan)
    gap = scores.best_logprob.astype(np.float64) - scores.logprob
    worst = int(gap.argmax())
    mean = float(np.mean(scores.logprob, dtype=np.float64))
    return Figures(float(scores.agrees), mean, float(gap[worst]), float(worst))


def judge(figures: Figures, *, min_margin: float, max_mean_logprob: float) -> Kind:
    """``contradicts`` only where the teacher disagrees and is sure of it by both limits."""
    if np.isnan(figures.mean_logprob):
        return "unmeasured"
    if figures.agrees:
        return "agrees"
    sure = figures.margin >= min_margin and figures.mean_logprob <= max_mean_logprob
    return "contradicts" if sure else "unsure"


def confident(entropies: Sequence[float], *, gate: Literal["limit", "median"], max_entropy: float) -> NDArray[np.bool_]:
    """Which new answers to trust: mean negative log probability (nats per token) at most the limit or the median.

    An answer whose entropy is unknown (NaN) is never trusted.
    """
    values = np.asarray(entropies, dtype=np.float64)
    known = np.isfinite(values)
    if gate == "median":
        max_entropy = float(np.median(values[known])) if known.any() else 0.0
    return np.asarray(known & (np.where(known, values, np.inf) <= max_entropy))
