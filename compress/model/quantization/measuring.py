"""What quantization cost: loss and divergence against the plain model, and bits per weight as stored.

`Check` lets a few rows run through the plain and the quantized layers side by side, so that both figures come out
of one stream without a second model in memory. Knows nothing of how codes are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from compress.model.calibration import Batch
from compress.model.quantization.blocks import BlockStream
from compress.model.quantization.layout import Layout
from compress.model.shapes import parameter_count

_HEAD_ENTRIES = 1 << 22  # logits held at once: 16 MiB in fp32, of which there are several copies
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "I32": 32, "U8": 8}  # of the types that the parts hold


class Check:
    """Hidden states of the check rows, once as the plain model has them and once as the quantized one does."""

    def __init__(self, stream: BlockStream, batches: Sequence[Batch]) -> None:
        self.stream, self.batches = stream, batches
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def begin(self, plain: torch.Tensor, quantized: torch.Tensor) -> None:
        """Look the tokens up in both embeddings (V, hidden)."""
        self.before = [nn.functional.embedding(batch.input_ids, plain) for batch in self.batches]
        self.after = [nn.functional.embedding(batch.input_ids, quantized) for batch in self.batches]

    def plain(self, layer: nn.Module) -> None:
        """Run the plain states through ``layer``, before it is quantized."""
        self.before = [self.stream.run(layer, values) for values in self.before]

    def quantized(self, layer: nn.Module) -> None:
        """Run the quantized states through ``layer``, after it was quantized."""
        self.after = [self.stream.run(layer, values) for values in self.after]

    @torch.no_grad()
    def end(self, plain: torch.Tensor, quantized: torch.Tensor, *, norm: torch.Tensor | None = None) -> dict[str, Any]:
        """Return loss_before, loss and kl (nats per target token) with both heads (V, hidden).

        ``norm`` (hidden,) are other gains of the final norm, for the quantized model.
        """
        own, other = self.stream.final_norm(), self.stream.final_norm()
        if norm is not None:
            other.load_state_dict({"weight": norm})
        states = (self.before, self.after)
        mean, count = _means(self.batches, states, norms=(own, other), heads=(plain, quantized))
        return {"loss_before": mean[0], "loss": mean[1], "kl": mean[2], "checked_tokens": count}


def mean_divergence(
    norm: nn.Module,
    given: Sequence[Batch],
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    head: torch.Tensor,
) -> float:
    """Return the mean KL (nats per target token) between two ways through the same layers, one ``head`` (V, hidden).

    ``before`` and ``after`` hold the last hidden states (B, T, hidden) of each batch.
    """
    mean, _ = _means(given, (before, after), norms=(norm, norm), heads=(head, head))
    return mean[2]


@torch.no_grad()
def _means(
    given: Sequence[Batch],
    states: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    *,
    norms: tuple[nn.Module, nn.Module],
    heads: tuple[torch.Tensor, torch.Tensor],
) -> tuple[list[float], int]:
    """Return both losses and the KL from the first to the second, means over the target tokens, and their number."""
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for batch, before, after in zip(given, *states, strict=True):
        targets = batch.answer[:, 1:].bool()  # what stands at t is predicted at t - 1
        wanted = batch.input_ids[:, 1:][targets]
        old, new = norms[0](before)[:, :-1][targets], norms[1](after)[:, :-1][targets]  # (targets, hidden)
        step = max(1, _HEAD_ENTRIES // len(heads[0]))
        for at in range(0, len(wanted), step):
            part = slice(at, at + step)
            p, q = (old[part] @ heads[0].T).log_softmax(-1), (new[part] @ heads[1].T).log_softmax(-1)
            ids = wanted[part].unsqueeze(1)
            divergence = (p.exp() * (p - q)).sum(dim=-1)
            losses = (-p.gather(1, ids), -q.gather(1, ids), divergence)
            sums += torch.stack([loss.double().sum() for loss in losses])
        count += len(wanted)
    return (sums / max(count, 1)).tolist(), count


def bits_per_weight(
    parts: Sequence[Path],
    codes: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    layout: Layout,
    *,
    sym: bool,
) -> dict[str, float]:
    """Return ``bits_per_weight`` of the linears and ``bits_per_weight_model`` over all parameters.

    Counted is what a runtime must keep: codes, scales, zero points where they are not all the same, the index of
    freely ordered groups; linears left alone as fp16; embedding and head as their codes and scales or fp16; norms and
    biases as stored. ``parts`` are the files of the checkpoint's tensors, ``codes`` those of embedding and head.
    """
    linear_bits = linear_weights = other_bits = 0
    outer = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    replaced = {name for prefix, name in outer.items() if f"{prefix}.codes" in codes}
    weights = {f"{path}.weight" for path in layout.linears}
    for part in parts:
        with safe_open(str(part), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file, not a mapping
                path, _, suffix = name.rpartition(".")
                whole = file.get_slice(name)
                size = math.prod(whole.get_shape()) * _BITS[whole.get_dtype()]
                if suffix in {"qweight", "qzeros", "scales", "g_idx"}:
                    dropped = (suffix == "qzeros" and sym) or (suffix == "g_idx" and _ordered(file.get_tensor(name)))
                    linear_bits += 0 if dropped else size
                    linear_weights += size // layout.linears[path].stored_bits if suffix == "qweight" else 0
                elif name in weights:
                    linear_bits, linear_weights = linear_bits + size, linear_weights + size // 16
                elif name not in replaced:
                    other_bits += size
    for name, tensor in codes.items():
        prefix, _, kind = name.partition(".")
        width = layout.embedding_bits if prefix == "embedding" else layout.lm_head_bits
        if kind in {"codes", "zero_points"}:
            other_bits += 0 if kind == "zero_points" and sym else tensor.numel() * width
        elif kind == "scales":
            other_bits += tensor.numel() * 16
    return {
        "bits_per_weight": linear_bits / max(linear_weights, 1),
        "bits_per_weight_model": (linear_bits + other_bits) / max(parameter_count(config), 1),
    }


def _ordered(g_idx: torch.Tensor) -> bool:
    return bool((g_idx[1:] >= g_idx[:-1]).all())
