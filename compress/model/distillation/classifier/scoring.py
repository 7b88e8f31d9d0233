"""What a causal model says of classes: the log-likelihood of each class's answer, all answers behind one prompt.

`class_scores` gives them from a `Tree`; `attention_scores` gives the student's own attribution: how its last layer,
where the answer is decided, looks at the prompt, before the softmax. Knows nothing of rows, of teachers and of losses.

Shapes: B questions, T tokens, K classes, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.model.distillation.classifier.rows import Tree
from compress.model.distillation.logit_map import logit_map
from compress.model.layers import attention, decoder_layers, embedding, output_head


@dataclass(frozen=True, slots=True)
class Heard:
    """Sums of log-probabilities of the answers (B, K), and the states that enter the last layer (B, T, H)."""

    scores: Tensor
    inner: Tensor | None


def tree_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), added to the attention: 0 where a token sees, the lowest number elsewhere."""
    size = segments.shape[1]
    past = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    seen = past & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None]


def class_scores(
    model: nn.Module,
    tree: Tree,
    *,
    vocab: int,
    embeds: Tensor | None = None,
    inner: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Heard:
    """Score all answers; ``embeds`` (B, T, H) stand in for the tokens' embeddings, ``inner`` keeps the states."""
    decoder = cast(Any, model).model
    given = embedding(model)(tree.ids) if embeds is None else embeds
    with torch.autocast(given.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = decoder(
            inputs_embeds=given,
            attention_mask=tree_mask(tree.segments, torch.bfloat16 if dtype == torch.bfloat16 else given.dtype),
            position_ids=tree.positions,
            use_cache=False,
            output_hidden_states=inner,
        )
    row, place = torch.nonzero(tree.segments > 0, as_tuple=True)
    size = tree.ids.shape[1]
    # the first tokens of all answers are predicted by one state: the head is applied to it once
    wanted, which = torch.unique(row * size + tree.before[row, place], return_inverse=True)
    states = out.last_hidden_state.flatten(0, 1)[wanted]
    head = output_head(model).weight[:vocab]
    spread = torch.log_softmax(logit_map(model)(states.to(head.dtype) @ head.T), dim=-1)
    told = spread[which, tree.ids[row, place]]
    sums = told.new_zeros(len(tree.ids) * tree.classes)
    sums = sums.index_add(0, row * tree.classes + tree.segments[row, place] - 1, told)
    return Heard(sums.view(-1, tree.classes), out.hidden_states[-2].to(head.dtype) if inner else None)


def answer_lengths(tree: Tree) -> Tensor:
    """Tokens of each answer (B, K)."""
    return torch.stack([(tree.segments == index + 1).sum(1) for index in range(tree.classes)], dim=1)


def attention_scores(model: nn.Module, inner: Tensor, tree: Tree) -> Tensor:
    """(B, T): scaled products of the last layer's query at the prompt's end and its keys, mean over heads.

    They are what this layer weighs the prompt's tokens by, before the softmax; ``inner`` (B, T, H) enters the layer.
    """
    layer = cast(Any, decoder_layers(model)[-1])
    block = cast(Any, attention(layer))
    states = layer.input_layernorm(inner)
    rows = torch.arange(len(states), device=states.device)
    query = block.q_proj(states[rows, tree.end])[:, None].unflatten(-1, (-1, block.head_dim))  # (B, 1, heads, D)
    key = block.k_proj(states).unflatten(-1, (-1, block.head_dim))  # (B, T, kv, D)
    if hasattr(block, "q_norm"):  # Qwen3 normalises each head
        query, key = block.q_norm(query), block.k_norm(key)
    cos, sin = cast(Any, model).model.rotary_emb(states, tree.positions)  # (B, T, D)
    key = _turned(key, cos, sin)
    query = _turned(query, cos[rows, tree.end][:, None], sin[rows, tree.end][:, None])
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return cast(Tensor, (query * key).sum(-1).mean(-1) * block.scaling)


def _turned(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, T, heads, D)."""
    low, high = part.chunk(2, dim=-1)
    return part * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]
