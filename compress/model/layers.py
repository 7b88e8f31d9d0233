"""The parts of a decoder model by name: its layers, their seven linears, the norms on the residual stream.

Written for the supported architectures (Llama, Qwen2, Qwen3), which share these names.
Knows nothing of files, of pruning or of quantization.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers in the order in which they run."""
    return list(cast(Any, model).model.layers)


def attention(layer: nn.Module) -> nn.Module:
    """Return the self-attention block of a decoder layer."""
    return cast(nn.Module, layer.self_attn)


def mlp(layer: nn.Module) -> nn.Module:
    """Return the feed-forward block of a decoder layer."""
    return cast(nn.Module, layer.mlp)


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the seven linears of a decoder layer, in the order of `LINEARS`."""
    parts = {name: getattr(attention(layer), name) for name in ATTENTION}
    return parts | {name: getattr(mlp(layer), name) for name in MLP}


def linear_path(index: int, name: str) -> str:
    """Return the checkpoint's name of a linear without ``.weight``, e.g. ``model.layers.0.mlp.up_proj``."""
    return f"model.layers.{index}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def residual_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return every norm that reads the residual stream, by its checkpoint name; the final norm comes last.

    Qwen3's q_norm and k_norm work within a head and are not among them.
    """
    norms: dict[str, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model)):
        norms[f"model.layers.{index}.input_layernorm"] = cast(nn.Module, layer.input_layernorm)
        norms[f"model.layers.{index}.post_attention_layernorm"] = cast(nn.Module, layer.post_attention_layernorm)
    return norms | {"model.norm": cast(nn.Module, cast(Any, model).model.norm)}


def embedding(model: nn.Module) -> nn.Embedding:
    """Return the input embedding."""
    return cast(nn.Embedding, cast(Any, model).model.embed_tokens)


def output_head(model: nn.Module) -> nn.Linear:
    """Return the output projection; when tied, its weight is the embedding's very parameter."""
    return cast(nn.Linear, model.lm_head)


def is_tied(model: nn.Module) -> bool:
    """Tell whether input embedding and output projection are one parameter."""
    return output_head(model).weight is embedding(model).weight
