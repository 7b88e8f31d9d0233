"""Slow, plain versions of scoring, generation, mixes and novelty: one row at a time, float64, no cache, no batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def token_scores(model: Any, ids: Sequence[int], answer: Sequence[int]) -> list[tuple[float, float, bool]]:
    """(log probability, best log probability, is argmax) of every target, from one row's full logits."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double().numpy()
    found = []
    for at, target in enumerate(answer):
        if target:
            line = logits[at - 1]
            total = math.log(sum(math.exp(x - line.max()) for x in line)) + line.max()
            found.append((line[ids[at]] - total, line.max() - total, int(line.argmax()) == ids[at]))
    return found


def mean_state(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Mean of the last hidden states without the first token, divided by its length."""
    import torch

    with torch.inference_mode():
        states = model.base_model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].double().numpy()
    kept = states[1:] if len(states) > 1 else states
    mean = sum(kept) / len(kept)
    return np.asarray(mean / math.sqrt(sum(x * x for x in mean)))


def sample(
    model: Any,
    prompt: Sequence[int],
    uniforms: Sequence[float],
    *,
    temperature: float,
    top_p: float,
    stop: Collection[int],
) -> tuple[list[int], list[float]]:
    """Tokens by the inverse of the cumulative distribution over ids, and their log probabilities at temperature 1."""
    import torch

    ids: list[int] = []
    logprobs = []
    for draw in uniforms:
        with torch.inference_mode():
            line = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].double().numpy()
        plain = np.exp(line - line.max()) / np.exp(line - line.max()).sum()
        hot = np.exp((line - line.max()) / temperature)
        hot /= hot.sum()
        mass, allowed = 0.0, set()
        for token in sorted(range(len(hot)), key=lambda t: -hot[t]):
            if mass >= top_p:
                break
            allowed.add(token)
            mass += hot[token]
        goal, running, chosen = draw * mass, 0.0, -1
        for token in range(len(hot)):
            if token in allowed:
                running += hot[token]
                chosen = token
                if running > goal:
                    break
        logprobs.append(math.log(plain[chosen]))
        if chosen in stop:
            break
        ids.append(chosen)
    return ids, logprobs


def kl(taken: Sequence[float], wanted: Sequence[float]) -> float:
    """Sum of q ln(q / p)."""
    total = sum(taken)
    return sum(t / total * math.log(t / total / w) for t, w in zip(taken, wanted, strict=True) if t)


def best_allocation(counts: Mapping[str, int], wanted: Mapping[str, float], total: int, max_repeat: int) -> float:
    """The least KL of any whole-number allocation of ``total`` rows within the limits, by trying them all."""
    names = sorted(counts)
    best = math.inf
    for taken in itertools.product(*(range(counts[name] * max_repeat + 1) for name in names)):
        if sum(taken) == total and all(wanted[n] > 0 or not t for n, t in zip(names, taken, strict=True)):
            best = min(best, kl(taken, [wanted[n] or 1.0 for n in names]))
    return best


def is_near(text: str, known: Sequence[str], limit: float) -> bool:
    """Compared with every known text: Jaccard of letter trigrams, among texts with the same numbers."""
    from compress.data.selection.near_duplicates import NUMBER

    def grams(words: str) -> set[str]:
        padded = f" {words} "
        return {padded[i : i + 3] for i in range(len(padded) - 2)}

    for other in known:
        a, b = grams(text), grams(other)
        if NUMBER.findall(text) == NUMBER.findall(other) and len(a & b) / len(a | b) >= limit:
            return True
    return False
