"""What a training run is told: `TrainSettings`, its learning-rate schedule, and the choice of number format.

`learning_rate` is a pure function of the step, so that a resumed run needs no scheduler state; `choose_bf16` says
whether bf16 is used: only where the CPU has instructions for it and the model is wide enough to gain.
Knows nothing of rows, models or losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from compress.model.distillation.losses import LossWeights
from compress.model.distillation.optimizers import OptimizerName

Precision = Literal["auto", "fp32", "bf16"]
BF16_TRAINING_WIDTH, BF16_SCORING_WIDTH = 256, 128  # in narrower models the casts eat what the products win


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a student is trained.

    Attributes:
        loss: weights of the loss; `train` takes the teacher's targets at ``loss.temperature``.
        epochs: passes over the training rows; a part is allowed.
        steps: optimizer steps, overrides ``epochs``.
        batch_tokens: padded tokens of one optimizer step.
        accumulate: parts into which a step is cut to save memory; changes nothing but rounding.
        activation_checkpointing: keep only what enters each layer and compute the layer again on the way back: less
            memory, more time.
        learning_rate: peak, reached after ``warmup_ratio`` of the steps, then a cosine down to
            ``final_lr_ratio`` of it.
        optimizer: ``muon`` (matrices by Muon, the rest by AdamW) or ``adamw``.
        weight_decay: decoupled, on matrices only.
        betas: AdamW's.
        grad_clip: largest norm of the gradient.
        average_decay: per-step decay of an exponential average of the weights, which is then what is validated
            and kept; 0 switches it off.
        validation_share, validation_rows: part of the rows held out, and at most how many.
        validations: how often the held-out loss is taken, beside the start.
        patience: validations without a new lowest held-out loss after which training ends; 0: never.
        keep: ``best`` by held-out loss, or ``last``.
        precision: ``auto``: see `choose_bf16`.
        log_every: steps between lines of the log; 0 gives about 100 lines.
        checkpoint_every_s, checkpoint_every_steps: what a kill can cost.
        seed: of the order of rows and of the held-out part.
    """

    loss: LossWeights = field(default_factory=LossWeights)
    epochs: float = 3.0
    steps: int | None = None
    batch_tokens: int = 4096
    accumulate: int = 1
    activation_checkpointing: bool = False
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.05
    final_lr_ratio: float = 0.02
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    average_decay: float = 0.0
    validation_share: float = 0.05
    validation_rows: int = 256
    validations: int = 8
    patience: int = 0
    keep: Literal["best", "last"] = "best"
    precision: Precision = "auto"
    log_every: int = 0
    checkpoint_every_s: float = 30.0
    checkpoint_every_steps: int | None = None
    seed: int = 0


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Learning rate of step ``step`` of ``total``: linear warm-up, then a half cosine (Loshchilov, Hutter 2017)."""
    warmup = round(total * settings.warmup_ratio)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    low = settings.final_lr_ratio
    return settings.learning_rate * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done)))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); elsewhere it is emulated and slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_device() -> str:
    """Where accelerate will put a model: the first GPU that torch sees, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_bf16(precision: Precision, *, width: int, training: bool = True, device: str | None = None) -> bool:
    """Whether the products of a model of hidden size ``width`` run in bf16; ``auto`` takes the faster format.

    ``device`` is where it runs; left out, where it will be trained.

    A rule from measurements (``docs/decisions.md``) and not a timing in place, which another busy process would tip:
    the same inputs must give
    the same bytes on machines of one kind. Between a CPU with bf16 and one without the bytes differ, as they do between
    any two CPUs whose products round otherwise.
    """
    if precision != "auto":
        return precision == "bf16"
    if (device or training_device()) != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return cpu_has_bf16() and width >= (BF16_TRAINING_WIDTH if training else BF16_SCORING_WIDTH)
