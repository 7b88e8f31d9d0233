"""A model seen one decoder layer at a time: weights are read when their layer's turn comes.

`BlockStream` opens a checkpoint folder without loading it, gives the embedding, each decoder layer with fp32
weights, and the final norm, and runs hidden states through them. Peak memory is what the caller keeps.
Knows nothing of quantization, rows or stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.model.checkpoint import quiet_transformers, weight_files
from compress.model.layers import decoder_layers

Inputs = Iterator[torch.Tensor]
HELD_BYTES = 1 << 29  # of the widest inputs of a layer, kept rather than made twice
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class BlockStream:
    """A plain (not quantized) checkpoint, read layer by layer.

    ``ffn`` larger than the model's pads the feed-forward part with zero channels; the outputs stay the same.
    Hidden states are (B, T, hidden) fp32. Rows must be padded on the right: what stands behind the last real token
    then changes nothing before it, and needs no mask.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, ffn: int | None = None) -> None:
        self.folder, self.config = folder, config
        self.own_ffn = int(self.config["intermediate_size"])
        self.ffn = self.own_ffn if ffn is None else ffn
        self.count = int(self.config["num_hidden_layers"])
        self.files = tensor_files(folder)
        own = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        own.intermediate_size = self.ffn
        self.skeleton = _skeleton(own)
        rotary = cast(Any, self.skeleton).model.rotary_emb
        self.rotary = cast(nn.Module, type(rotary)(config=own))  # its frequencies are computed, not stored

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as fp32."""
        return read_tensor(self.files[name], name).float()

    def layer(self, index: int) -> nn.Module:
        """Return decoder layer ``index`` with its weights, in eval mode; the skeleton keeps none of them."""
        prefix = f"model.layers.{index}."
        state = {name.removeprefix(prefix): self.tensor(name) for name in self.files if name.startswith(prefix)}
        with torch.device("meta"):
            shell = decoder_layers(self.skeleton)[index]
            fresh = type(shell)(self.skeleton.config, index)
        fresh.load_state_dict(self._padded(state), assign=True)
        return fresh.float().eval().requires_grad_(False)

    def _padded(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        extra = self.ffn - self.own_ffn
        if not extra:
            return dict(state)
        pads = {"gate_proj": (0, extra), "up_proj": (0, extra), "down_proj": (extra, 0)}  # (inputs, outputs)
        padded = {}
        for name, tensor in state.items():
            part, _, kind = name.removeprefix("mlp.").partition(".")
            columns, rows = pads.get(part, (0, 0)) if name.startswith("mlp.") else (0, 0)
            sides = (0, rows) if kind == "bias" else (0, columns, 0, rows)
            padded[name] = nn.functional.pad(tensor, sides) if columns or rows else tensor
        return padded

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: torch.Tensor, *, bf16: bool = False) -> torch.Tensor:
        """Return the hidden states after ``layer``; with ``bf16`` its products, though not its sums, are in bf16."""
        with _products(bf16):
            return self.forward(layer, hidden)

    def forward(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`run`, with gradients."""
        positions, embedded = self._positions(hidden)
        output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embedded)
        return cast(torch.Tensor, output)

    @torch.no_grad()
    def walk(
        self, layer: nn.Module, hidden: list[torch.Tensor], *, bf16: bool = False
    ) -> Iterator[tuple[tuple[str, ...], Inputs]]:
        """Take ``hidden`` (one entry per batch) through ``layer`` in four steps, in place.

        Each step yields the names of linears and what they are about to be given, one tensor per batch, made as it
        is asked for. The weights of these linears may be changed before the walk goes on: the next step sees it.
        The same operations in the same order as `run`, and attention only once; so too the feed-forward part where
        what goes into its last linear has at most `HELD_BYTES`.
        """
        parts = cast(Any, layer)
        yield ("q_proj", "k_proj", "v_proj"), (parts.input_layernorm(values) for values in hidden)
        heads = [self._heads(layer, values, bf16) for values in hidden]
        yield ("o_proj",), iter(heads)
        for i in range(len(hidden)):
            with _products(bf16):
                hidden[i] = hidden[i] + parts.self_attn.o_proj(heads[i])
            heads[i] = heads[i].new_empty(0)  # both lists are never held whole at once
        yield ("gate_proj", "up_proj"), (parts.post_attention_layernorm(values) for values in hidden)
        inner = [_into_down(parts, hidden[0], bf16)]
        if sum(len(values) * values.shape[1] for values in hidden) * inner[0][0, 0].nbytes <= HELD_BYTES:
            inner += [_into_down(parts, values, bf16) for values in hidden[1:]]
        rest = hidden[len(inner) :]
        yield ("down_proj",), itertools.chain(inner, (_into_down(parts, values, bf16) for values in rest))
        for i, values in enumerate(hidden):
            given = inner[i] if i < len(inner) else _into_down(parts, values, bf16)
            with _products(bf16):
                hidden[i] = values + parts.mlp.down_proj(given)

    def _heads(self, layer: nn.Module, hidden: torch.Tensor, bf16: bool) -> torch.Tensor:
        """Return what o_proj is given: the heads' outputs side by side (B, T, heads * head size)."""
        parts, found = cast(Any, layer), []
        hook = parts.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        try:
            positions, embedded = self._positions(hidden)
            with _products(bf16):
                parts.self_attn(
                    hidden_states=parts.input_layernorm(hidden),
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=embedded,
                )
        finally:
            hook.remove()
        return cast(torch.Tensor, found[0])

    def _positions(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        return positions, self.rotary(hidden, positions)

    def final_norm(self) -> nn.Module:
        """Return the norm before the output head."""
        norm = cast(nn.Module, type(cast(Any, self.skeleton).model.norm)(self.config["hidden_size"]))
        cast(Any, norm).variance_epsilon = float(self.skeleton.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.tensor(NORM)})
        return norm.eval().requires_grad_(False)

    def longest(self, wanted: int) -> int:
        """Return how many tokens a row may have: ``wanted``, the model's positions, and any sliding window."""
        limits = [wanted, int(self.skeleton.config.max_position_embeddings)]
        window = getattr(self.skeleton.config, "sliding_window", None)
        return min(limits + ([int(window)] if window else []))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor."""
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            found |= dict.fromkeys(sorted(file.keys()), path)
    return found


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor as it is stored."""
    with safe_open(str(path), framework="pt") as file:
        return cast(torch.Tensor, file.get_tensor(name))


def _into_down(parts: Any, hidden: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Return what down_proj is given."""
    normed = parts.post_attention_layernorm(hidden)
    with _products(bf16):
        return cast(torch.Tensor, parts.mlp.act_fn(parts.mlp.gate_proj(normed)) * parts.mlp.up_proj(normed))


def _products(bf16: bool) -> torch.autocast:
    """Return the context in which matrix products run in bf16, or in the format of what they are given."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


def _skeleton(config: Any) -> PreTrainedModel:
    """Return the model without storage."""
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return cast(PreTrainedModel, model)
