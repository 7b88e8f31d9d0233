"""How sure a teacher is of the target tokens: the share of the reverse KL in CAKLD, for distillation and for low bits.

Knows nothing of stages and losses.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.model.distillation.packing import RowTable, cut
from compress.model.distillation.targets import OnlineTargets

CONFIDENCE_TOKENS = 16_384  # padded tokens on which the teacher's confidence is taken


@torch.no_grad()
def confidence(teacher: nn.Module, table: RowTable, seed: int) -> float:
    """Return the mean probability that ``teacher`` gives the target tokens of some rows (BitDistiller, section 3.2).

    Over targets alone, each counted once; padding and prompts take no part.
    """
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).numpy()
    online = OnlineTargets(teacher, vocab=table.vocab)
    total, count, tokens = 0.0, 0, 0
    for rows in cut(order, table.lengths, CONFIDENCE_TOKENS // 8):
        batch = table.batch(rows).to(online.head.device)
        logprobs = online(batch).narrow(0, len(batch.labels)).logprobs
        total += float(logprobs.gather(1, batch.labels[:, None]).exp().double().sum())
        count += len(batch.labels)
        tokens += batch.input_ids.numel()
        if tokens >= CONFIDENCE_TOKENS:
            break
    return total / count
