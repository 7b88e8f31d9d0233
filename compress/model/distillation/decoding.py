"""Decoding with the keys and values of what was read: several tokens at once, each row at its own place, and back.

`Decoder` reads tokens of B rows and gives their hidden states. A row's place can be set back, so that tokens which
were only proposed are forgotten without a copy, and rows that are done can be dropped. It runs the model's own
weights for Llama, Qwen2 and Qwen3, sliding windows and adapters included; a library cache has one place for all rows.
Knows nothing of sampling, of losses or of rows.

Shapes: B rows, t new tokens, S slots, H width, D head size. Inference only.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.model.distillation.logit_map import logit_map
from compress.model.layers import decoder_layers, linears, output_head
from compress.model.lora import effective_weight, is_product


class Decoder:
    """A model and the keys and values of B rows, each read up to its own place ``at`` (B,)."""

    def __init__(self, model: nn.Module, *, rows: int, slots: int, vocab: int) -> None:
        """Room for ``slots`` tokens in each of ``rows`` rows; ``vocab`` is the number of token ids in use."""
        body = cast(Any, model).model
        self.layers = [_Layer(layer, cast(Any, model).config, i) for i, layer in enumerate(decoder_layers(model))]
        self.embedding, self.norm = body.embed_tokens, body.norm
        self.head = output_head(model).weight[:vocab]  # padded rows of the vocabulary take no probability
        self.mapped = logit_map(model)
        device, dtype = self.head.device, self.head.dtype
        first = self.layers[0]
        self.kv, self.group, self.slots = first.kv, first.heads // first.kv, slots
        self.cache = torch.zeros((len(self.layers), 2, rows, first.kv, slots, first.size), device=device, dtype=dtype)
        self.at = torch.zeros(rows, dtype=torch.int64, device=device)
        self.places = torch.arange(slots, device=device)
        cos, sin = body.rotary_emb(self.cache, self.places[None])  # (1, S, D), both halves alike
        self.rotation = cos[0].to(dtype), sin[0].to(dtype)

    def read(self, ids: Tensor) -> Tensor:
        """Read ``ids`` (B, t) behind what was read before; returns their last hidden states (B, t, H)."""
        rows, count = ids.shape
        # rows that are over are still read until they are dropped, and must not run past the last slot
        position = (self.at[:, None] + torch.arange(count, device=ids.device)).clamp_(max=self.slots - 1)  # (B, t)
        end = min(self.slots, int(self.at.max()) + count)
        heads = torch.arange(rows * self.kv, device=ids.device).view(rows, 1, self.kv)
        flat = (heads * self.slots + position[..., None]).flatten()  # where the cache of a layer takes what is new
        cos, sin = (table[position][:, :, None] for table in self.rotation)  # (B, t, 1, D)
        masks: dict[int | None, Tensor] = {}
        states = self.embedding(ids)
        for layer, cache in zip(self.layers, self.cache.unbind(), strict=True):
            if layer.window not in masks:
                masks[layer.window] = self._mask(position, end, layer.window)
            states = layer(states, (cos, sin), cache, flat, masks[layer.window])
        self.at += count
        return cast(Tensor, self.norm(states))

    def _mask(self, position: Tensor, end: int, window: int | None) -> Tensor:
        """What is added to the attention scores, (B * kv, group * t, end): 0 at slots that are seen, else -inf."""
        rows = position.shape[0]
        slot = self.places[:end]
        hidden = slot > position[..., None]  # (B, t, end)
        if window is not None:
            hidden |= slot <= position[..., None] - window
        added = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=slot.device).masked_fill_(hidden, -math.inf)
        return added[:, None, None].expand(-1, self.kv, self.group, -1, -1).reshape(rows * self.kv, -1, end)

    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H), fp32 at least."""
        logits = states @ self.head.T
        return self.mapped(logits if logits.dtype == torch.float64 else logits.float())

    def start(self, prompts: Tensor, lengths: Tensor) -> None:
        """Read ``prompts`` (B, T), padded on the right, of ``lengths`` (B,), each but for its last token."""
        if prompts.shape[1] > 1:
            self.read(prompts[:, :-1])
        self.at = lengths - 1  # what was written beyond is overwritten before it is ever seen

    def select(self, rows: Tensor) -> None:
        """Keep only ``rows`` (indices)."""
        self.cache, self.at = self.cache[:, :, rows], self.at[rows]


class _Layer:
    """One decoder layer, with query, key and value as one product where they are plain linears."""

    def __init__(self, layer: nn.Module, config: Any, index: int) -> None:
        block = cast(Any, layer).self_attn
        self.layer, self.block = cast(Any, layer), block
        self.size, self.scale = int(block.head_dim), float(block.scaling)
        self.heads, self.kv = (part.out_features // self.size for part in (block.q_proj, block.k_proj))
        kinds = getattr(config, "layer_types", None)
        sliding = kinds is not None and kinds[index] == "sliding_attention"
        self.window = int(config.sliding_window) if sliding else None
        plain = all(is_product(part) for part in linears(layer).values())
        self.joint = _joined(block.q_proj, block.k_proj, block.v_proj) if plain else None
        self.gates = _joined(self.layer.mlp.gate_proj, self.layer.mlp.up_proj) if plain else None

    def __call__(
        self, states: Tensor, rotation: tuple[Tensor, Tensor], cache: Tensor, flat: Tensor, mask: Tensor
    ) -> Tensor:
        """``states`` (B, t, H) through the layer; ``cache`` (2, B, kv, S, D) gets what is new at ``flat`` (B*t*kv,)."""
        entering = _normed(self.layer.input_layernorm, states)
        states = states + self._attention(entering, rotation, cache, flat, mask)
        entering, mlp = _normed(self.layer.post_attention_layernorm, states), self.layer.mlp
        if self.gates is not None:
            gate, up = functional.linear(entering, *self.gates).chunk(2, dim=-1)
        else:  # adapters that are not ours
            gate, up = mlp.gate_proj(entering), mlp.up_proj(entering)
        return states + cast(Tensor, mlp.down_proj(mlp.act_fn(gate) * up))

    def _attention(
        self, entering: Tensor, rotation: tuple[Tensor, Tensor], cache: Tensor, flat: Tensor, mask: Tensor
    ) -> Tensor:
        rows, count, _ = entering.shape
        block, size = self.block, self.size
        if self.joint is not None:
            mixed = functional.linear(entering, *self.joint)
        else:
            mixed = torch.cat([part(entering) for part in (block.q_proj, block.k_proj, block.v_proj)], dim=-1)
        mixed = mixed.view(rows, count, -1, size)
        both, value = mixed[:, :, : -self.kv], mixed[:, :, -self.kv :]
        if hasattr(block, "q_norm"):  # Qwen3 normalises each head
            query, key = both[:, :, : self.heads], both[:, :, self.heads :]
            both = torch.cat([block.q_norm(query), block.k_norm(key)], dim=2)
        turned = _rotated(both, *rotation)
        cache[0].view(-1, size).index_copy_(0, flat, turned[:, :, self.heads :].reshape(-1, size))
        cache[1].view(-1, size).index_copy_(0, flat, value.reshape(-1, size))
        keys, values = (part.flatten(0, 1)[:, : mask.shape[-1]] for part in cache.unbind())  # (B * kv, end, D)
        asked = turned[:, :, : self.heads].view(rows, count, self.kv, -1, size)  # (B, t, kv, group, D)
        asked = asked.permute(0, 2, 3, 1, 4).reshape(rows * self.kv, -1, size)  # (B * kv, group * t, D)
        scores = torch.baddbmm(mask, asked, keys.mT, alpha=self.scale)
        found = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values
        found = found.view(rows, self.kv, -1, count, size).permute(0, 3, 1, 2, 4).reshape(rows, count, -1)
        return cast(Tensor, block.o_proj(found))


def _normed(norm: Any, states: Tensor) -> Tensor:
    return functional.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _joined(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return torch.cat([effective_weight(part) for part in parts]), bias


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in the layout of two halves."""
    low, high = states.chunk(2, dim=-1)
    return torch.addcmul(states * cos, torch.cat([-high, low], dim=-1), sin)
