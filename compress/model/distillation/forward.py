"""The forward pass that training and scoring need and no more: hidden states at the kept positions of a batch.

`kept_states` computes what the library's model computes for Llama, Qwen2 and Qwen3 (a test holds them equal, values
and gradients), with less work: the operators of ``kernels``, query, key and value in one product, gate and up in
another, and the last layer's output projection and feed-forward part at kept positions only. Products run in the
number format that is asked for, the residual stream stays in fp32. A model with anything beyond that (sliding windows,
attention dropout, another class) goes through the library's own forward. Knows nothing of losses.

Shapes: B rows, T tokens, N kept positions, H width, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compress.model.distillation.kernels import (
    AddLinear,
    AttentionShape,
    CausalAttention,
    Gated,
    NormLinear,
    RootMeanSquare,
    rotated,
)
from compress.model.layers import linears
from compress.model.lora import effective_weight, is_product
from compress.model.shapes import SUPPORTED

# Up to here products in blocks beat the fused kernel on a CPU: twice for heads of 8, by a fifth for heads of 64.
SHORT = 1024


def kept_states(
    model: nn.Module, ids: Tensor, keep: Tensor, *, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> Tensor:
    """Last hidden states (N, H) of rows ``ids`` (B, T), padded on the right (no mask is needed, see `packing`).

    ``keep`` (N,) are places in the flattened (B * T), those of padding not among them. ``dtype`` is the number format
    of the matrix products: the weights' own, or bf16. ``recompute`` keeps only what enters each layer and computes the
    layer again on the way back; the library's own forward does so by its own switch.
    """
    decoder = cast(Any, model).model
    if is_plain(model):
        return _decoder(decoder, ids, keep, dtype, recompute=recompute and torch.is_grad_enabled())
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, keep)


def is_plain(model: nn.Module) -> bool:
    """Whether the short way computes what the library would."""
    config = cast(Any, model).config
    decoder = cast(Any, model).model
    plain: bool = (
        type(model).__name__ in SUPPORTED
        and config._attn_implementation == "sdpa"
        and not getattr(config, "attention_dropout", 0.0)
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and config.hidden_act in ("silu", "swish")
        and not getattr(decoder, "gradient_checkpointing", False)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
        and all(is_product(linear) for layer in decoder.layers for linear in linears(layer).values())
    )
    return plain


def _decoder(decoder: Any, ids: Tensor, keep: Tensor, dtype: torch.dtype, *, recompute: bool) -> Tensor:
    table = decoder.embed_tokens
    states = functional.embedding(ids, table.weight, padding_idx=table.padding_idx)  # (B, T, H)
    places = torch.arange(ids.shape[1], device=states.device)[None]
    cos, sin = decoder.rotary_emb(states, places)  # (1, T, D), both halves alike
    half = cos.shape[-1] // 2
    rotation = cos[:, :, None, :half], sin[:, :, None, :half]  # (1, T, 1, D / 2)
    states = states.flatten(0, 1)  # (B * T, H)
    number = dtype if dtype == torch.bfloat16 else states.dtype
    last = len(decoder.layers) - 1
    for index, layer in enumerate(decoder.layers):
        only = keep if index == last else None
        if recompute:
            states = checkpoint(_layer, layer, states, ids.shape, rotation, number, only, use_reentrant=False)
        else:
            states = _layer(layer, states, ids.shape, rotation, number, only)
    norm = decoder.norm
    return cast(Tensor, cast(Any, RootMeanSquare.apply)(states, norm.weight, norm.variance_epsilon))


def _layer(  # noqa: PLR0917 - a layer, what enters it, and what all layers share
    layer: Any, states: Tensor, shape: torch.Size, rotation: tuple[Tensor, Tensor], number: torch.dtype,
    keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """One layer on ``states`` (B * T, H) of rows of ``shape`` (B, T); at the places ``keep`` alone, where given."""
    block = layer.self_attn
    joint = _norm_linear(layer.input_layernorm, states, number, block.q_proj, block.k_proj, block.v_proj)
    mixed = _attention(block, joint.view(*shape, -1, block.head_dim), rotation)  # (B * T, heads * D)
    if keep is not None:
        mixed, states = mixed.index_select(0, keep), states.index_select(0, keep)
    states = _add_linear(states, mixed, block.o_proj, number)
    joint = _norm_linear(layer.post_attention_layernorm, states, number, layer.mlp.gate_proj, layer.mlp.up_proj)
    gated = cast(Any, Gated.apply)(joint)
    return _add_linear(states, gated, layer.mlp.down_proj, number)


def _norm_linear(norm: Any, states: Tensor, dtype: torch.dtype, *parts: nn.Linear) -> Tensor:
    """Several linears behind one norm, as one product: (M, all of their outputs) in ``dtype``."""
    weight = torch.cat([effective_weight(part) for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    apply = cast(Any, NormLinear.apply)
    return cast(Tensor, apply(states, norm.weight, weight, bias, norm.variance_epsilon, dtype))


def _add_linear(states: Tensor, inner: Tensor, part: nn.Linear, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, cast(Any, AddLinear.apply)(states, inner, effective_weight(part), part.bias, dtype))


def _attention(block: Any, joint: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention over ``joint`` (B, T, heads + 2 kv, D), query, key and value unrotated: (B * T, heads * D)."""
    kv = block.k_proj.out_features // block.head_dim
    shape = AttentionShape(heads=joint.shape[2] - 2 * kv, kv_heads=kv, scale=block.scaling)
    gains = None, None
    if hasattr(block, "q_norm"):  # Qwen3 normalises each head
        gains = block.q_norm.weight, block.k_norm.weight
        shape = AttentionShape(shape.heads, kv, block.scaling, epsilon=block.q_norm.variance_epsilon)
    if joint.shape[1] <= SHORT and joint.device.type == "cpu":
        mixed = cast(Any, CausalAttention.apply)(joint, *gains, *rotation, shape)
    else:
        mixed = _long_attention(joint, gains, rotation, shape)
    return cast(Tensor, mixed).flatten(0, 1)


def _long_attention(
    joint: Tensor, gains: tuple[Tensor | None, Tensor | None], rotation: tuple[Tensor, Tensor], shape: AttentionShape
) -> Tensor:
    """The same by the library's fused kernel, which never holds the matrix of attention weights."""
    heads, kv = shape.heads, shape.kv_heads
    query, key, value = torch.split(joint, [heads, kv, kv], dim=2)
    turned = []
    for part, gain in zip((query, key), gains, strict=True):
        wide = part.to(rotation[0].dtype)
        if gain is not None:
            wide = cast(Any, RootMeanSquare.apply)(wide, gain, shape.epsilon)
        turned.append(rotated(wide, *rotation).to(joint.dtype).transpose(1, 2))
    mixed = functional.scaled_dot_product_attention(
        turned[0], turned[1], value.transpose(1, 2), is_causal=True, scale=shape.scale, enable_gqa=heads != kv
    )
    return mixed.transpose(1, 2).flatten(2)
