"""Low-rank adapters (LoRA, Hu et al. 2022) on the linears of a model, by peft: put in, trained, merged.

`add_adapters` gives a model adapters to train; `Adapters.merge` makes it the plain model again, with W + scale * B A
for each W. `effective_weight` is that sum of one linear, for forward passes of our own. Knows nothing of training.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.errors import MissingExtraError, ModelError
from compress.model.layers import ATTENTION, LINEARS, MLP, decoder_layers, linears

TARGETS = {"all": LINEARS, "attention": ATTENTION, "ffn": MLP}
SCALE = 2.0  # alpha over rank, where none is given
_NAME = "default"


@dataclass(frozen=True)
class Adapters:
    """Adapters in a model: peft's hold on them, and how many parameters they have."""

    tuner: Any
    parameters: int

    def merge(self) -> None:
        """Add scale * B A to each weight and take the adapters out; the model is plain and trainable again."""
        model: nn.Module = self.tuner.merge_and_unload()
        model.requires_grad_(True)


def add_adapters(model: nn.Module, rank: int, *, alpha: float | None, targets: str, seed: int, where: str) -> Adapters:
    """Give linears of ``model`` adapters of ``rank``; they alone are trainable then.

    ``targets`` is a key of `TARGETS`. A (rank, inputs) is drawn from ``seed``, B (outputs, rank) is zero: at the start
    the model computes what it did. ``alpha`` over ``rank`` scales their product (default: 2).

    Raises:
        ModelError: the rank is not below the sides of the matrices.
        MissingExtraError: peft is not installed.
    """
    names = TARGETS[targets]
    _check_rank(model, rank, names, where)
    peft = _import_peft(where)
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALE * rank if alpha is None else alpha, target_modules=list(names), lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = peft.tuners.lora.LoraModel(model, config, _NAME)
    return Adapters(tuner, sum(p.numel() for p in model.parameters() if p.requires_grad))


def is_adapter(part: nn.Module) -> bool:
    """Whether ``part`` is a plain linear with one adapter of ours."""
    return list(getattr(part, "lora_A", ())) == [_NAME] and type(cast(Any, part).base_layer) is nn.Linear


def is_product(part: nn.Module) -> bool:
    """Whether ``part`` multiplies by its `effective_weight` and does nothing else but add its bias."""
    return type(part).forward is nn.Linear.forward or is_adapter(part)


def effective_weight(part: nn.Module) -> Tensor:
    """What a linear multiplies by, (outputs, inputs): its weight, and scale * B A where it has an adapter."""
    weight: Tensor = cast(Any, part).weight
    if not is_adapter(part):
        return weight
    up, down = cast(Any, part).lora_B[_NAME].weight, cast(Any, part).lora_A[_NAME].weight
    return torch.addmm(weight, up, down, alpha=cast(Any, part).scaling[_NAME])


def _check_rank(model: nn.Module, rank: int, names: tuple[str, ...], where: str) -> None:
    parts = linears(decoder_layers(model)[0])
    name, sides = min(((name, parts[name].weight.shape) for name in names), key=lambda item: min(item[1]))
    if rank >= min(sides):
        raise ModelError(
            f"{where}.lora_rank",
            f"{rank}, and {name} is a matrix of {sides[0]} x {sides[1]}",
            f"a rank below {min(sides)}",
            "Lower it, or set it to 0 to train the weights themselves",
        )


def _import_peft(where: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise MissingExtraError("peft", "lora", f"{where}.lora_rank") from error
