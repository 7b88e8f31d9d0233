"""Calibration batches: a seeded sample of token rows, padded on the right, as tensors.

`batches` draws rows up to a token budget, `mean_loss` takes a model's loss on them. Importances and quantization
read the same batches.
Knows nothing of files or tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import DataError
from compress.model.distillation.forward import kept_states
from compress.model.layers import output_head

HEAD_ENTRIES = 1 << 24  # logits held at once: 64 MiB in fp32, whatever the vocabulary


class TokenIds(Protocol):
    """What is needed of `compress.encoding.TokenRow`."""

    @property
    def ids(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...


class Batch(NamedTuple):
    """Right-padded rows. All three are int64 of shape (B, T); the masks are 1 where a token is real / a target."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer: torch.Tensor


def batches(rows: Sequence[TokenIds], *, tokens: int, batch_size: int, seed: int, pad_id: int) -> list[Batch]:
    """Return batches of whole rows drawn without repetition until at least ``tokens`` tokens are in them.

    Rows of similar length share a batch, so that little is padding. Raises DataError when there is no row.
    """
    drawn = sample(rows, tokens=tokens, seed=seed)
    if not drawn:
        raise DataError("calibration", "no rows", "at least one row with two tokens")
    drawn.sort(key=lambda row: len(row.ids))  # stable: equal lengths keep the drawn order
    return [padded(drawn[i : i + batch_size], pad_id=pad_id) for i in range(0, len(drawn), batch_size)]


def sample(rows: Sequence[TokenIds], *, tokens: int, seed: int) -> list[TokenIds]:
    """Return rows in a seeded random order until at least ``tokens`` tokens are drawn; one-token rows are left out."""
    order = [row for row in rows if len(row.ids) > 1]  # one token predicts nothing
    random.Random(seed).shuffle(order)  # noqa: S311 - sampling, not secrets
    drawn: list[TokenIds] = []
    total = 0
    for row in order:
        if total >= tokens:
            break
        drawn.append(row)
        total += len(row.ids)
    return drawn


def padded(rows: Sequence[TokenIds], *, pad_id: int) -> Batch:
    """Return one right-padded batch of ``rows``."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    answer = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        answer[i, : len(row.ids)] = torch.tensor(row.answer)
    return Batch(ids, mask, answer)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, given: Sequence[Batch]) -> float:
    """Return the mean negative log-likelihood (nats) of the target tokens of ``given``; no target at all gives 0.

    Logits exist a slice at a time: those of a batch may take more memory than the model.
    """
    model.eval()
    head = output_head(model)
    step = max(1, HEAD_ENTRIES // head.weight.shape[0])
    total, count = 0.0, 0
    for batch in given:
        ids = batch.input_ids.to(model.device)
        targets = batch.answer[:, 1:].bool().to(model.device)  # (B, T - 1): what stands at t is predicted at t - 1
        keep = nn.functional.pad(targets, (0, 1)).flatten().nonzero()[:, 0]
        states, wanted = kept_states(model, ids, keep), ids[:, 1:][targets]
        for at in range(0, len(wanted), step):
            logprobs = head(states[at : at + step]).float().log_softmax(dim=-1)  # (positions, V)
            total -= float(logprobs.gather(1, wanted[at : at + step].unsqueeze(1)).double().sum())
        count += len(wanted)
    return total / max(count, 1)
