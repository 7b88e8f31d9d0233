"""What is quantized how: the group size that fits a model, zero-padding of its feed-forward width, what it weighs.

`choose` reads a config and the parameters and gives a `Layout`; `quantization_config` is what it writes into the
checkpoint. Works on the dict of ``config.json``; knows nothing of weights and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import ModelError
from compress.model.quantization.params import GROUP_SIZES, GptqParams, RtnParams
from compress.model.shapes import head_size


@dataclass(frozen=True)
class Layout:
    """How one model is quantized.

    Attributes:
        bits: of the grid of the linears.
        stored_bits: of the container in the checkpoint; 4 for 3 bits, which no runtime has an operator for.
        group_size: after falling to a divisor; -1 is one group per row.
        ffn: feed-forward width after zero-padding.
        embedding_bits: 16 means fp16, not quantized.
        lm_head_bits: the same; equal to ``embedding_bits`` when tied.
        tied: whether the head is the embedding.
        notes: what gave way, for the user.
    """

    bits: int
    stored_bits: int
    group_size: int
    ffn: int
    embedding_bits: int
    lm_head_bits: int
    tied: bool
    notes: list[str] = field(default_factory=list)


def choose(config: Mapping[str, Any], params: RtnParams, *, where: str) -> Layout:
    """Return the layout for a model; ModelError when a tied head is to get other bits than the embedding."""
    tied = bool(config.get("tie_word_embeddings", False))
    head_bits = params.embedding_bits if params.lm_head_bits is None else params.lm_head_bits
    if tied and head_bits != params.embedding_bits:
        raise ModelError(
            f"{where}.lm_head_bits",
            f"{head_bits} beside embedding_bits {params.embedding_bits}",
            "one value: in this model the head is the embedding (tie_word_embeddings)",
            "Leave lm_head_bits out",
        )
    group_size, ffn, notes = fit_group_size(config, params.group_size)
    if params.bits == 3:
        notes.append("3-bit codes are stored in 4 bits: no runtime here has a 3-bit operator, so no bytes are saved")
    return Layout(
        bits=params.bits,
        stored_bits=4 if params.bits == 3 else params.bits,
        group_size=group_size,
        ffn=ffn,
        embedding_bits=params.embedding_bits,
        lm_head_bits=head_bits,
        tied=tied,
        notes=notes,
    )


def fit_group_size(config: Mapping[str, Any], wanted: int) -> tuple[int, int, list[str]]:
    """Return the group size, the feed-forward width to pad to, and notes for the user.

    The largest size up to ``wanted`` that divides the inputs of every linear wins. If none does because of the
    feed-forward width alone, that width is padded with zeros, which changes no output (dependencies: gate, up and
    down of zeros multiply to zero) and which every reader of the format takes, unlike a shorter last group.
    """
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    attention = int(config["num_attention_heads"]) * head_size(config)
    if wanted == -1:
        return -1, ffn, []
    allowed = [size for size in GROUP_SIZES if size <= wanted]
    whole = [size for size in allowed if not (hidden % size or attention % size or ffn % size)]
    if whole:
        notes = [] if whole[0] == wanted else [_fallen(wanted, whole[0], hidden, attention, ffn)]
        return whole[0], ffn, notes
    but_ffn = [size for size in allowed if not (hidden % size or attention % size)]
    if but_ffn:
        size = but_ffn[0]
        padded = -(-ffn // size) * size
        notes = [] if size == wanted else [_fallen(wanted, size, hidden, attention, padded)]
        notes.append(
            f"feed-forward width {ffn} padded with zeros to {padded}, a multiple of group_size {size}: no group size "
            f"from {GROUP_SIZES[-1]} up divides it. The outputs stay the same"
        )
        return size, padded, notes
    return (
        wanted,
        ffn,
        [
            f"no group size from {GROUP_SIZES[-1]} up divides the inputs (hidden {hidden}, heads x head size "
            f"{attention}): the last group of a row is shorter than {wanted}. "
            "The ONNX builder refuses such a checkpoint"
        ],
    )


def _fallen(wanted: int, size: int, hidden: int, attention: int, ffn: int) -> str:
    return (
        f"group_size {wanted} fell to {size}, the largest that divides the inputs of every linear "
        f"(hidden {hidden}, heads x head size {attention}, feed-forward {ffn})"
    )


def quantization_config(layout: Layout, params: RtnParams) -> dict[str, Any]:
    """Return the ``quantization_config`` of a "gptq" checkpoint, with the names that AutoGPTQ gave them."""
    gptq = params if isinstance(params, GptqParams) else None
    free_order = gptq is not None and gptq.act_order and not gptq.keep_groups
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",  # stored zero = zero point - 1; "gptq_v2" is silently misread by some readers
        "bits": layout.stored_bits,
        "group_size": layout.group_size,
        "sym": params.sym,
        "desc_act": free_order,
        "damp_percent": gptq.damp_frac if gptq is not None else 0.0,
        "true_sequential": gptq.true_sequential if gptq is not None else False,
        "static_groups": False,
        "lm_head": False,
    }
