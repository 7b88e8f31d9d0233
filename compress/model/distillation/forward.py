"""The forward pass that training needs and no more: hidden states at the kept positions of a batch.

`kept_states` computes what the library's model computes for Llama, Qwen2 and Qwen3 (a test holds them equal, values
and gradients), with less work: query, key and value in one product, gate and up in another, norm and rotation with
closed-form gradients in half the memory passes, and the last layer's output projection and feed-forward part at kept
positions only. A model with anything beyond that (sliding windows, attention dropout, another class) goes through
the library's own forward. Knows nothing of losses.

Shapes: B rows, T tokens, N kept positions, H width, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.model.distillation.packing import Batch
from compress.model.layers import linears
from compress.model.shapes import SUPPORTED


def kept_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states (N, H) of ``batch``, whose rows are padded on the right (no mask is needed, see `packing`)."""
    decoder = cast(Any, model).model
    if is_plain(model):
        return _decoder(decoder, batch)
    states: Tensor = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, batch.keep)


def is_plain(model: nn.Module) -> bool:
    """Whether the short way computes what the library would."""
    config = cast(Any, model).config
    decoder = cast(Any, model).model
    plain: bool = (
        type(model).__name__ in SUPPORTED
        and config._attn_implementation == "sdpa"
        and not getattr(config, "attention_dropout", 0.0)
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and not getattr(decoder, "gradient_checkpointing", False)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
        and all(
            type(linear) is nn.Linear for layer in decoder.layers for linear in linears(layer).values()
        )  # no adapters
    )
    return plain


def _decoder(decoder: Any, batch: Batch) -> Tensor:
    table = decoder.embed_tokens
    states = functional.embedding(batch.input_ids, table.weight, padding_idx=table.padding_idx)  # (B, T, H)
    places = torch.arange(states.shape[1], device=states.device)[None]
    cos, sin = decoder.rotary_emb(states, places)  # (1, T, D), both halves alike
    half = cos.shape[-1] // 2
    rotation = cos[:, :, None, :half], sin[:, :, None, :half]  # (1, T, 1, D / 2)
    last = len(decoder.layers) - 1
    for index, layer in enumerate(decoder.layers):
        mixed = _attention(layer.self_attn, _norm(layer.input_layernorm, states), rotation)  # (B, T, heads * D)
        if index == last:
            mixed = mixed.reshape(-1, mixed.shape[-1]).index_select(0, batch.keep)
            states = states.reshape(-1, states.shape[-1]).index_select(0, batch.keep)
        states = states + layer.self_attn.o_proj(mixed)
        states = states + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, states))
    return _norm(decoder.norm, states)


def _attention(block: Any, states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    size = block.head_dim
    joint = _joint(states, block.q_proj, block.k_proj, block.v_proj)
    joint = joint.view(*states.shape[:2], -1, size)  # (B, T, heads + 2 kv, D)
    kv = block.k_proj.out_features // size
    heads = joint.shape[2] - 2 * kv
    if hasattr(block, "q_norm"):  # Qwen3 normalises each head
        query, key = _norm(block.q_norm, joint[:, :, :heads]), _norm(block.k_norm, joint[:, :, heads:-kv])
        turned = cast(Tensor, _Rotate.apply(torch.cat([query, key], dim=2), *rotation))  # type: ignore[no-untyped-call]
    else:
        turned = cast(Tensor, _Rotate.apply(joint[:, :, :-kv].to(rotation[0].dtype), *rotation))  # type: ignore[no-untyped-call]
    query, key = torch.split(turned.transpose(1, 2), [heads, kv], dim=1)  # (B, heads, T, D)
    value = joint[:, :, -kv:].to(turned.dtype).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=block.scaling, enable_gqa=heads != kv
    )
    return mixed.transpose(1, 2).flatten(2)


def _feed_forward(block: Any, states: Tensor) -> Tensor:
    gate, up = _joint(states, block.gate_proj, block.up_proj).chunk(2, dim=-1)
    return cast(Tensor, block.down_proj(block.act_fn(gate) * up))


def _joint(states: Tensor, *parts: nn.Linear) -> Tensor:
    """Several linears as one product."""
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return functional.linear(states, torch.cat([part.weight for part in parts]), bias)


def _norm(norm: Any, states: Tensor) -> Tensor:
    return cast(Tensor, _RootMeanSquare.apply(states.float(), norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]


class _RootMeanSquare(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = states.shape[-1]
        inverse = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(size).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        scaled: Tensor = states * inverse
        return scaled.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, inverse = ctx.saved_tensors
        unit = states * inverse
        product = outer[0] * unit
        along = (product @ weight).div_(states.shape[-1])[..., None]  # mean of gradient times unit, per position
        inner = (outer[0] * weight).sub_(unit.mul_(along)).mul_(inverse)
        return inner, product.flatten(0, -2).sum(0), None


class _Rotate(torch.autograd.Function):
    """Rotary position embedding, halves layout: the gradient is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(outer[0], cos, -sin), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    (first, second), (left, right) = states.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left)
    left.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right)
    right.addcmul_(first, sin)
    return turned
