"""Depth: take whole decoder layers out of a model.

`choose_layers` keeps the blocks that change the residual stream most, `cut_layers` removes the others in place
and keeps the numbering and the config true. Knows nothing of how blocks are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.model.layers import attention, decoder_layers
from compress.model.pruning.importance import strongest


def choose_layers(blocks: Sequence[float], count: int) -> list[int]:
    """Return the ``count`` layers of the highest block importance, in their old order."""
    return strongest(torch.tensor(list(blocks), dtype=torch.float64), count)


def cut_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Keep the layers ``keep`` (ascending). ``layer_idx`` is renumbered, or the KV cache would have holes."""
    layers = decoder_layers(model)
    if list(keep) == list(range(len(layers))):
        return
    kept: Any = [layers[index] for index in keep]
    whole: Any = model
    whole.model.layers = nn.ModuleList(kept)
    for index, layer in enumerate(kept):
        block: Any = attention(layer)
        block.layer_idx = index
    config: Any = model.config
    config.num_hidden_layers = len(kept)
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[index] for index in keep]
