"""Scores, continuations and embeddings from a torch model, in batches: the maths behind `compress.teachers`.

`score_rows` gives the log probability of every target token, `generate` samples or decodes greedily with a KV cache,
`embed_rows` gives mean hidden states. Rows of like length share a batch; the output head runs only at positions that
are needed; rows that are done leave the generation batch. What comes out does not depend on the batch size, but for
rounding. Works on token ids: knows nothing of tokenizers, text or stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from compress.answers import Generation, TokenScores
from compress.encoding import TokenRow
from compress.errors import DataError
from compress.model.distillation.forward import kept_states
from compress.progress import Bar

BATCH_TOKENS = 8192  # padded tokens of a scoring batch
HEAD_ENTRIES = 1 << 24  # logits held at once: 64 MiB in fp32, whatever the vocabulary
COMPACT_BELOW = 0.875  # share of running rows at which a batch is compacted: copying the cache costs as well
STEADY = 1.0 - 1e-12  # keeps a uniform draw inside the last token's interval


def context_size(model: PreTrainedModel) -> int:
    """Most tokens that one row may have."""
    return int(model.config.max_position_embeddings)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the shortest first; padded, a batch has at most ``batch_tokens`` tokens.

    A row longer than that is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # stable
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows as one (B, longest) tensor. No mask is needed: under causal attention no token sees the padding after it."""
    width = max(len(row) for row in rows)
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded).to(device)


def _check_lengths(rows: Sequence[TokenRow], limit: int) -> None:
    for row in rows:
        if not 0 < len(row.ids) <= limit:
            raise DataError(
                f"row {row.id}",
                f"has {len(row.ids)} tokens",
                f"1 to {limit}, which is what the teacher can read",
                "Lower max_tokens, or drop long rows by data.selection heuristics",
            )
        if row.answer[0]:
            raise DataError(f"row {row.id}", "its first token is a target, but nothing stands before it", "a prompt")


# ---------------------------------------------------------------------------------- scores


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    bar: Bar | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype = torch.float32,
) -> list[TokenScores]:
    """One `TokenScores` per row, in their order; empty arrays for a row without a target. ``dtype``: of the products.

    Raises:
        DataError: a row is empty, longer than the model's context, or has its first token as a target.
    """
    _check_lengths(rows, context_size(model))
    results: list[TokenScores | None] = [None] * len(rows)
    for batch in length_batches([len(row.ids) for row in rows], batch_tokens):
        for index, scores in zip(batch, _score_batch(model, [rows[i] for i in batch], dtype), strict=True):
            results[index] = scores
        if bar is not None:
            bar.advance(len(batch))
    return [scores for scores in results if scores is not None]


def _score_batch(model: PreTrainedModel, rows: Sequence[TokenRow], dtype: torch.dtype) -> list[TokenScores]:
    places = [np.flatnonzero(np.asarray(row.answer)) for row in rows]  # positions of targets, per row
    counts = [len(place) for place in places]
    if not sum(counts):
        return [TokenScores.empty() for _ in rows]
    ids = right_padded([row.ids for row in rows], model.device)
    row = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(model.device)
    column = torch.from_numpy(np.concatenate(places)).to(model.device)
    given = ids[row, column]  # (N,)
    before = row * (ids.shape[1] - 1) + column - 1  # the place in the flattened (B, T - 1) that predicts the token
    picked = kept_states(model, ids[:, :-1], before, dtype=dtype)  # (N, H)
    parts = [_head_scores(model, picked[cut], given[cut]) for cut in _slices(len(picked), model)]
    logprob, best, argmax = (np.concatenate([part[k] for part in parts]) for k in range(3))
    ends = np.cumsum(counts)[:-1]
    split = zip(np.split(logprob, ends), np.split(best, ends), np.split(argmax, ends), strict=True)
    return [TokenScores(logprob=a, best_logprob=b, is_argmax=c) for a, b, c in split]


def _head_scores(
    model: PreTrainedModel, hidden: torch.Tensor, given: torch.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Log probability of the given and of the best token, and whether they are the same one; each (N,)."""
    logits = model.get_output_embeddings()(hidden).float()  # (N, V)
    total = logits.logsumexp(dim=-1)
    top, arg = logits.max(dim=-1)
    own = logits.gather(1, given[:, None])[:, 0]
    return (own - total).cpu().numpy(), (top - total).cpu().numpy(), (arg == given).cpu().numpy()


def _slices(count: int, model: PreTrainedModel) -> Iterator[slice]:
    step = max(1, HEAD_ENTRIES // int(model.config.vocab_size))
    return (slice(start, start + step) for start in range(0, count, step))


# ---------------------------------------------------------------------------------- embeddings


@torch.inference_mode()
def embed_rows(
    model: PreTrainedModel, rows: Sequence[TokenRow], *, bar: Bar | None = None, batch_tokens: int = BATCH_TOKENS
) -> NDArray[np.float32]:
    """Mean of the last hidden states over a row's tokens, scaled to length 1: (rows, hidden) float32.

    The first token is left out where there are others: it sees nothing, and in many models its state is so large
    that it would drown the rest.
    """
    _check_lengths(rows, context_size(model))
    found = np.zeros((len(rows), int(model.config.hidden_size)), dtype=np.float32)
    base: Any = model.base_model
    for batch in length_batches([len(row.ids) for row in rows], batch_tokens):
        ids = right_padded([rows[i].ids for i in batch], model.device)
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state.float()  # (B, T, H)
        lengths = torch.tensor([len(rows[i].ids) for i in batch], device=model.device)[:, None]
        at = torch.arange(ids.shape[1], device=model.device)[None]
        counted = (at < lengths) & ((at > 0) | (lengths == 1))  # (B, T)
        mean = (hidden * counted[..., None]).sum(dim=1) / counted.sum(dim=1, keepdim=True)
        found[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        if bar is not None:
            bar.advance(len(batch))
    return found


# ---------------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: ``temperature`` 0 is greedy, ``top_p`` keeps the likeliest tokens of that mass."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class _Running:
    """A row that is being continued."""

    index: int
    prompt: Sequence[int]
    uniforms: NDArray[np.float64]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    over: bool = False

    def take(self, token: int, logprob: float, sampling: Sampling, context: int) -> None:
        """Note the chosen token; the stop token counts for the confidence and is not part of the text."""
        self.logprobs.append(logprob)
        if token in sampling.stop_ids:
            self.finished = self.over = True
            return
        self.ids.append(token)
        full = len(self.prompt) + len(self.ids) >= context
        self.over = full or len(self.ids) >= sampling.max_new_tokens


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 64,
    bar: Bar | None = None,
) -> list[Generation]:
    """Continue every prompt, in order; a row ends at a stop token, at ``max_new_tokens`` or when the context is full.

    Row i draws from a generator of its own, seeded by (seed, i): the batch that it lands in changes nothing but
    rounding, of about 1e-6 in a probability.

    Raises:
        DataError: a prompt is empty or leaves no room in the model's context.
    """
    context = context_size(model)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise DataError(f"prompt {index}", f"has {len(prompt)} tokens", f"1 to {context - 1}", "Shorten the prompt")
    results: list[Generation | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        rows = [_Running(i, prompts[i], _uniforms(sampling, i)) for i in picked]
        _generate_batch(model, rows, sampling)
        for row in rows:
            mean = float(np.mean(row.logprobs)) if row.logprobs else 0.0
            results[row.index] = Generation(tuple(row.ids), mean, row.finished)
        if bar is not None:
            bar.advance(len(rows))
    return [result for result in results if result is not None]


def _uniforms(sampling: Sampling, row: int) -> NDArray[np.float64]:
    """One uniform draw per step, from a counter-based generator keyed by (seed, row)."""
    if sampling.temperature == 0.0:
        return np.zeros(0)
    key = np.array([sampling.seed % (1 << 64), row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(sampling.max_new_tokens)


@torch.inference_mode()
def _generate_batch(model: PreTrainedModel, rows: list[_Running], sampling: Sampling) -> None:
    ids, mask = _left_padded([row.prompt for row in rows], model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T); a pad's position is never read
    cache = DynamicCache(config=model.config)
    network: Any = model
    running = rows
    for step in range(sampling.max_new_tokens):
        output = network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()  # (B, V)
        chosen = _choose(logits, sampling, [row.uniforms for row in running], step)  # (B,)
        logprob = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        for row, token, value in zip(running, chosen.tolist(), logprob.tolist(), strict=True):
            if not row.over:
                row.take(token, value, sampling, context_size(model))
        alive = [place for place, row in enumerate(running) if not row.over]
        if not alive:
            return
        if len(alive) < COMPACT_BELOW * len(running):
            keep = torch.tensor(alive, device=model.device)
            cache.batch_select_indices(keep)
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
            running = [running[place] for place in alive]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        # rows that are over stay until the next compaction, and must not run past the last position
        positions = (positions[:, -1:] + 1).clamp(max=context_size(model) - 1)


def _choose(
    logits: torch.Tensor, sampling: Sampling, uniforms: Sequence[NDArray[np.float64]], step: int
) -> torch.Tensor:
    """Next token of every row, (B,): the argmax, or the inverse of the cumulative distribution at a uniform draw."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    probability = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:  # Holtzman et al. 2020: the smallest set of likeliest tokens whose mass reaches top_p
        ordered, token = probability.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probability = torch.zeros_like(probability).scatter(1, token, ordered.masked_fill(outside, 0.0))
    cumulative = probability.cumsum(dim=-1)
    draw = torch.from_numpy(np.array([row[step] for row in uniforms])).to(logits.device)
    goal = (draw * STEADY)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, longest); padding stands left, so that the last column predicts every next token."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for at, prompt in enumerate(prompts):
        ids[at, width - len(prompt) :] = prompt
        mask[at, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
