"""Width: cut FFN channels, attention heads with their key-value groups, and hidden channels out of a model.

`cut_ffn` goes through torch-pruning's dependency graph of one feed-forward block, `cut_heads` through its plain
slice functions (its whole-model pruner does not end on rotary attention), `cut_hidden` through every tensor on
the residual stream. Each works in place, the same width in every layer, and keeps the config true. Which ones
to keep is decided elsewhere: `choose_heads` and `importance.strongest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from transformers import PreTrainedModel

from compress.model.layers import (
    attention,
    decoder_layers,
    embedding,
    is_tied,
    linears,
    mlp,
    output_head,
    residual_norms,
)
from compress.model.pruning.importance import kv_group_scores, strongest

HIDDEN_OUT = ("o_proj", "down_proj")  # they write the residual stream; the other five read it


def choose_heads(scores: torch.Tensor, *, kv_heads: int, keep_heads: int, keep_kv: int) -> tuple[list[int], list[int]]:
    """Return (query heads, key-value heads) to keep of one layer, both ascending; ``scores`` is (H,).

    The strongest ``keep_kv`` groups stay, and in each of them its strongest ``keep_heads / keep_kv`` query heads:
    a query head must stay with the key-value head it was trained with.
    """
    per_group, keep_per_group = len(scores) // kv_heads, keep_heads // keep_kv
    groups = strongest(kv_group_scores(scores, kv_heads), keep_kv)
    heads = [
        group * per_group + head
        for group in groups
        for head in strongest(scores[group * per_group : (group + 1) * per_group], keep_per_group)
    ]
    return heads, groups


def cut_ffn(model: PreTrainedModel, keep: Sequence[Sequence[int]]) -> None:
    """Keep the FFN channels ``keep[layer]`` of each layer, all of one length."""
    for layer, kept in zip(decoder_layers(model), keep, strict=True):
        block, gate = mlp(layer), linears(layer)["gate_proj"]
        drop = _others(kept, gate.out_features)
        if drop:
            # Traced block by block: the graph of the whole model holds the rotary cycle and does not end.
            group = _block_graph(block, gate).get_pruning_group(gate, tp.prune_linear_out_channels, drop)
            group.prune()
            block.intermediate_size = len(kept)  # type: ignore[assignment]
    model.config.intermediate_size = len(keep[0])


def _block_graph(block: nn.Module, gate: nn.Linear) -> tp.DependencyGraph:
    """Trace one feed-forward block; autograd must see it even when the weights are frozen."""
    example = torch.zeros(2, gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device)
    with torch.enable_grad():  # in a list: a bare tensor would be unpacked into its rows
        return tp.DependencyGraph().build_dependency(block, example_inputs=[example.requires_grad_()])


def cut_heads(model: PreTrainedModel, keep: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Keep the (query heads, key-value heads) ``keep[layer]`` of each layer; biases go along.

    The head size stays, so the attention scale, the rotary angles and Qwen3's q/k norms stay too.
    """
    for layer, (heads, groups) in zip(decoder_layers(model), keep, strict=True):
        block: Any = attention(layer)
        size, parts = int(block.head_dim), linears(layer)
        drop_heads = _rows(_others(heads, parts["q_proj"].out_features // size), size)
        drop_groups = _rows(_others(groups, parts["k_proj"].out_features // size), size)
        if drop_heads:
            tp.prune_linear_out_channels(parts["q_proj"], drop_heads)
            tp.prune_linear_in_channels(parts["o_proj"], drop_heads)
        if drop_groups:
            tp.prune_linear_out_channels(parts["k_proj"], drop_groups)
            tp.prune_linear_out_channels(parts["v_proj"], drop_groups)
        block.num_key_value_groups = len(heads) // len(groups)
        model.config.head_dim = size
    model.config.num_attention_heads, model.config.num_key_value_heads = len(keep[0][0]), len(keep[0][1])


def _others(kept: Sequence[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(kept))


def _rows(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + row for head in heads for row in range(size)]


@torch.no_grad()
def cut_hidden(model: PreTrainedModel, keep: Sequence[int], *, moments: Mapping[str, torch.Tensor] | None) -> None:
    """Keep the hidden channels ``keep`` in the embedding, all norms, all linears and the head; tied stays tied.

    A norm divides by the root mean square over its channels, which changes when channels go. With ``moments``
    (norm name -> mean square per channel, (D,)) each gain is scaled by rms(kept) / rms(all), so that what is kept
    leaves the norm at its old size; exact when the dropped channels are zero. ``None`` leaves the gains.
    """
    index = torch.tensor(list(keep), device=model.device)
    tied, table, head = is_tied(model), embedding(model), output_head(model)
    for name, norm in residual_norms(model).items():
        gain: Any = norm.weight
        scale = 1.0 if moments is None else _rms_ratio(moments[name], keep)
        norm.weight = _parameter(gain, gain.index_select(0, index) * scale)
    for layer in decoder_layers(model):
        for name, linear in linears(layer).items():
            _slice_linear(linear, index, dim=0 if name in HIDDEN_OUT else 1)
        mlp(layer).hidden_size = len(keep)  # type: ignore[assignment]
    for block in decoder_layers(model):
        if hasattr(block, "hidden_size"):
            block.hidden_size = len(keep)  # type: ignore[assignment]
    table.weight = _parameter(table.weight, table.weight.index_select(1, index))
    table.embedding_dim = len(keep)
    if tied:
        head.weight, head.in_features = table.weight, len(keep)
    else:
        _slice_linear(head, index, dim=1)
    model.config.hidden_size = len(keep)


def _rms_ratio(moments: torch.Tensor, keep: Sequence[int]) -> float:
    """Return rms over the kept channels divided by rms over all; 1 when nothing flows."""
    whole, kept = float(moments.mean()), float(moments[list(keep)].mean())
    return math.sqrt(kept / whole) if whole > 0 and kept > 0 else 1.0


def _slice_linear(linear: nn.Linear, index: torch.Tensor, *, dim: int) -> None:
    linear.weight = _parameter(linear.weight, linear.weight.index_select(dim, index))
    if dim == 1:
        linear.in_features = len(index)
        return
    linear.out_features = len(index)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.bias.index_select(0, index))


def _parameter(old: torch.Tensor, new: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone().contiguous(), requires_grad=old.requires_grad)
