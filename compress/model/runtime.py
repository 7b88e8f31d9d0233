"""A torch model as a runtime: greedy generation in batches with a KV cache, and logits of one sequence.

The same two calls exist for an exported bundle, so that one evaluation reads both. Works on token ids alone:
knows nothing of tokenizers, rows or files.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from compress.errors import DataError
from compress.model.distillation.forward import kept_states
from compress.model.distillation.packing import cut
from compress.model.layers import output_head

FORESEEN_TOKENS = 8192  # padded tokens of a batch of `would_write`
HEAD_ENTRIES = 1 << 24  # logits held at once: 64 MiB in fp32, whatever the vocabulary


class TorchRuntime:
    """Greedy decoding and logits of ``model`` on its own device, ``batch_size`` prompts at a time."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int | None = None, batch_size: int = 128) -> None:
        self.model = model.eval()
        config_pad = getattr(model.config, "pad_token_id", None)
        # Padded positions are masked out, so any valid id serves where the model names none.
        self.pad_id = next((i for i in (pad_id, config_pad) if i is not None), 0)
        self.batch_size = batch_size

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[list[int]]:
        """Return the greedy continuation of each prompt, in order, without the stop token.

        A continuation ends before a token of ``stop_ids``, after ``max_new_tokens``, or when the context is full.
        Raises DataError for an empty prompt or one that fills the context.
        """
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.context:
                raise DataError(f"prompt {index}", f"{len(prompt)} tokens", f"1 to {self.context - 1}")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            answers = self._generate([prompts[i] for i in picked], max_new_tokens, frozenset(stop_ids))
            for index, answer in zip(picked, answers, strict=True):
                results[index] = answer
        return results

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        ids, mask = _left_padded(prompts, self.pad_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T); a pad's position is never read
        cache = DynamicCache(config=self.model.config)
        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            output: Any = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = output.logits[:, -1].argmax(dim=-1)  # (B,)
            keep: list[int] = []
            for place, token in enumerate(chosen.tolist()):
                row = running[place]
                if token in stop_ids:
                    continue
                answers[row].append(token)
                if len(prompts[row]) + len(answers[row]) < self.context:
                    keep.append(place)
            if not keep:
                break
            if len(keep) < len(running):  # rows that are done cost nothing more
                picked = torch.tensor(keep, device=mask.device)
                cache.batch_select_indices(picked)
                chosen, mask, positions = chosen[picked], mask[picked], positions[picked]
                running = [running[place] for place in keep]
            ids = chosen.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return answers

    @torch.inference_mode()
    def would_write(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], stop_ids: frozenset[int]
    ) -> list[bool]:
        """Whether `generate` would give exactly these answers, each from one forward pass instead of a generation.

        Greedy decoding writes an answer exactly when each of its tokens is the first choice behind the prompt and the
        tokens before it, and then a stop token is. Rounding could tell otherwise only where two first choices tie.
        """
        rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
        verdicts = [False] * len(rows)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        for picked in cut(order[lengths[order] < self.context], lengths, FORESEEN_TOKENS):
            told = self._first_choices([rows[i] for i in picked], [len(prompts[i]) - 1 for i in picked])
            for index, line in zip(picked, told, strict=True):
                same = line[:-1] == list(answers[index]) and not stop_ids.intersection(line[:-1])
                verdicts[index] = same and line[-1] in stop_ids
        return verdicts

    def _first_choices(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """The likeliest token behind each position of a row from its start on; logits exist a slice at a time."""
        width = len(rows[-1])  # sorted by length
        ids = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows], device=self.model.device)
        places = [range(at * width + first, at * width + len(rows[at])) for at, first in enumerate(starts)]
        keep = torch.tensor([place for piece in places for place in piece], device=self.model.device)
        hidden = kept_states(self.model, ids, keep)  # (N, H)
        head = output_head(self.model)
        step = max(1, HEAD_ENTRIES // head.weight.shape[0])
        chosen = [int(t) for i in range(0, len(hidden), step) for t in head(hidden[i : i + step]).argmax(dim=-1)]
        ends = list(accumulate(len(piece) for piece in places))
        return [chosen[end - len(piece) : end] for end, piece in zip(ends, places, strict=True)]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the fp32 logits (T, vocabulary) after each of the ``ids``; DataError when they exceed the context."""
        if not 0 < len(ids) <= self.context:
            raise DataError("logits", f"{len(ids)} tokens", f"1 to {self.context}")
        output: Any = self.model(input_ids=torch.tensor([list(ids)], device=self.model.device), use_cache=False)
        return np.asarray(output.logits[0].float().cpu().numpy())


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (B, longest); padding stands left, so that every next token is the last column's."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
