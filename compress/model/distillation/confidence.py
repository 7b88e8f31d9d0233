"""How sure a teacher is of the target tokens: the share of the reverse KL in CAKLD, for distillation and for low bits.

Knows nothing of stages and losses.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.model.distillation.losses import CHUNK_ELEMENTS
from compress.model.distillation.packing import RowTable, cut
from compress.model.distillation.targets import OnlineTargets

CONFIDENCE_TOKENS = 16_384  # tokens on which the teacher's confidence is taken


@torch.no_grad()
def confidence(teacher: nn.Module, table: RowTable, seed: int) -> float:
    """Return the mean probability that ``teacher`` gives the target tokens of some rows (BitDistiller, section 3.2).

    Over targets alone, each counted once; padding and prompts take no part.
    """
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).numpy()
    taken = order[: int(table.lengths[order].cumsum().searchsorted(CONFIDENCE_TOKENS)) + 1]
    rows = taken[table.lengths[taken].argsort(kind="stable")]
    online = OnlineTargets(teacher, vocab=table.vocab)
    total, count, step = 0.0, 0, max(1, CHUNK_ELEMENTS // table.vocab)
    for piece in cut(rows, table.lengths, CONFIDENCE_TOKENS // 8):
        batch = table.batch(piece).to(online.head.device)
        said = online(batch)
        for at in range(0, len(batch.labels), step):
            labels = batch.labels[at : at + step]
            found = said.narrow(at, at + len(labels)).logprobs.gather(1, labels[:, None])
            total += float(found.exp().double().sum())
        count += len(batch.labels)
    return total / count
