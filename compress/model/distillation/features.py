"""Losses on what lies inside: hidden states and attention of the student against the teacher's, through projections.

`feature_loss` compares `Features` of both, `read_features` takes them from a model, `FeatureTargets` hands the trainer
the teacher's beside its logits, and `projected` lets the projections ride on the student while it trains, so that the
optimizer and the checkpoints see them as weights of it. Hidden states: squared error relative to the teacher's size,
behind a learned linear map (TinyBERT, Jiao et al. 2020, section 3.1). Attention: KL(teacher's head || a learned mix of
the student's heads). Needs the running teacher: no cache holds this. Knows nothing of the loss on logits.

Shapes: N kept positions, H width, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.model.distillation.logit_map import logit_map
from compress.model.distillation.losses import Dense, LossWeights, Sparse, States
from compress.model.distillation.packing import Batch
from compress.model.distillation.targets import OnlineTargets, TargetFn
from compress.model.layers import decoder_layers, output_head

PROJECTIONS = "distillation_projections"  # the student's attribute that holds them
OWN_HEAD = 4.0  # start of a head's weight in the mix: 98 % of two heads, 87 % of eight


@dataclass(frozen=True, slots=True)
class Features:
    """One entry per compared layer: ``hidden`` (N, H), ``attention`` (N, heads, T), empty where not compared."""

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class FeatureStates:
    """The teacher's target at N positions, with its features."""

    states: States
    features: Features

    def narrow(self, start: int, stop: int) -> Dense | Sparse:
        """The target of positions ``start`` to ``stop``."""
        return self.states.narrow(start, stop)


class Projections(nn.Module):
    """Per compared layer a linear map of the student's width to the teacher's, and a mix of heads for each of its own.

    The map starts as the identity where the widths are equal, else with orthogonal rows or columns.
    """

    def __init__(self, weights: LossWeights, layers: int, student: Any, teacher: Any, *, seed: int) -> None:
        super().__init__()
        self.maps, self.mixes = nn.ParameterList(), nn.ParameterList()
        own, other = int(student.hidden_size), int(teacher.hidden_size)
        heads, wanted = int(student.num_attention_heads), int(teacher.num_attention_heads)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(layers):
            if weights.hidden_weight:
                start = torch.eye(own) if own == other else torch.empty(other, own)
                if own != other:
                    nn.init.orthogonal_(start, generator=generator)
                self.maps.append(nn.Parameter(start))
            if weights.attention_weight:
                nearest = torch.arange(wanted) * heads // wanted
                self.mixes.append(nn.Parameter(functional.one_hot(nearest, heads).float() * OWN_HEAD))


def layer_pairs(student: int, teacher: int, which: str) -> list[tuple[int, int]]:
    """Which layers are compared, counted from 1: all of the student's, spread over the teacher's, or the last alone."""
    if which == "last":
        return [(student, teacher)]
    return [(layer, max(1, round(layer * teacher / student))) for layer in range(1, student + 1)]


def read_features(
    model: nn.Module, batch: Batch, layers: list[int], weights: LossWeights, *, dtype: torch.dtype
) -> tuple[Tensor, Features]:
    """Last hidden states (N, H) of ``batch``, and the features of ``layers``, by the library's own forward pass."""
    decoder = cast(Any, model).model
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = decoder(
            input_ids=batch.input_ids,
            use_cache=False,
            output_hidden_states=weights.hidden_weight > 0,
            output_attentions=weights.attention_weight > 0,
        )

    def kept(states: Tensor) -> Tensor:
        return states.flatten(0, 1).index_select(0, batch.keep)

    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    if weights.hidden_weight:  # entry 0 is the embedding
        hidden = tuple(kept(found.hidden_states[layer]) for layer in layers)
    if weights.attention_weight:  # (B, heads, T, T) each
        attention = tuple(kept(found.attentions[layer - 1].transpose(1, 2)) for layer in layers)
    return kept(found.last_hidden_state), Features(hidden, attention)


def feature_loss(student: Features, teacher: Features, projections: Projections, weights: LossWeights) -> Tensor:
    """Weighted sum of both losses over the positions, mean over layers (and heads), fp64; autograd can follow it."""
    total = (student.hidden or student.attention)[0].new_zeros((), dtype=torch.float64)
    for one, other, matrix in zip(student.hidden, teacher.hidden, projections.maps, strict=True):
        total = (
            total
            + weights.hidden_weight / len(student.hidden) * hidden_loss(one.to(matrix.dtype) @ matrix.T, other).sum()
        )
    for one, other, mix in zip(student.attention, teacher.attention, projections.mixes, strict=True):
        mixed = torch.einsum("nst,hs->nht", one.to(mix.dtype), torch.softmax(mix, dim=-1))
        total = total + weights.attention_weight / len(student.attention) * attention_loss(mixed, other).sum()
    return total


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of projected states (N, H): (N,); 1 where the student says nothing."""
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    size = teacher.square().sum(dim=-1).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student.to(teacher.dtype) - teacher).square().sum(dim=-1) / size


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of attention (N, heads, T), mean over the heads: (N,)."""
    tiny = torch.finfo(torch.float32).tiny
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    gap = teacher.clamp_min(tiny).log() - student.to(teacher.dtype).clamp_min(tiny).log()
    return (teacher * gap).sum(dim=-1).mean(dim=-1)


class FeatureTargets:
    """Runs the teacher on every batch, for its logits and its features."""

    def __init__(self, online: OnlineTargets, weights: LossWeights, *, student_layers: int) -> None:
        self.teacher, self.temperature, self.dtype = online.teacher, online.temperature, online.dtype
        self.vocab, self.weights, self.logits = len(online.head), weights, logit_map(online.teacher)
        count = len(decoder_layers(self.teacher))
        self.layers = [other for _, other in layer_pairs(student_layers, count, weights.feature_layers)]

    def __call__(self, batch: Batch) -> FeatureStates:
        self.teacher = self.teacher.to(batch.input_ids.device)  # the trainer may have moved the student to a GPU
        head = output_head(self.teacher).weight[: self.vocab]
        with torch.no_grad():
            last, features = read_features(self.teacher, batch, self.layers, self.weights, dtype=self.dtype)
            return FeatureStates(States(last.to(head.dtype), head, self.temperature, self.logits), features)


def feature_targets(
    target_fn: TargetFn | None, student: nn.Module, weights: LossWeights, *, where: str
) -> FeatureTargets:
    """`FeatureTargets` in the place of ``target_fn``.

    Raises:
        ModelError: it is not one running teacher.
    """
    if not isinstance(target_fn, OnlineTargets):
        raise ModelError(
            f"{where}.hidden_weight, attention_weight",
            "a teacher that does not run beside the student",
            "one teacher with targets: online: hidden states and attention are in no cache and behind no endpoint",
        )
    return FeatureTargets(target_fn, weights, student_layers=len(decoder_layers(student)))


@contextmanager
def projected(student: PreTrainedModel, teacher: PreTrainedModel, weights: LossWeights, *, seed: int) -> Iterator[None]:
    """Put projections on ``student`` and let both models tell their attention; everything as before afterwards."""
    if not weights.wants_features:
        yield
        return
    models = [student, teacher] if weights.attention_weight else []
    before: list[Any] = [model.config._attn_implementation for model in models]
    count = len(decoder_layers(student))
    layers = len(layer_pairs(count, len(decoder_layers(teacher)), weights.feature_layers))
    for model in models:  # the fused kernels keep their weights to themselves
        model.set_attn_implementation("eager")
    setattr(student, PROJECTIONS, Projections(weights, layers, student.config, teacher.config, seed=seed))
    try:
        yield
    finally:
        delattr(student, PROJECTIONS)
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)
