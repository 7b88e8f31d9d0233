"""The optimizers of distillation: AdamW, and Muon for the matrices of the layers with AdamW for everything else.

`make_optimizer` chooses; `orthogonalize` is Muon's maths. Both keep their whole state per parameter, so that a
checkpoint of ``state_dict()`` resumes them. Knows nothing of losses or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.model.layers import decoder_layers

OptimizerName = Literal["muon", "adamw"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al. 2024): steepest at zero
ITERATIONS = 5
UPDATE_RMS = 0.2  # that of an AdamW step, so that rates near AdamW's serve (Liu et al. 2025, section 2.2)
MOMENTUM = 0.95


def orthogonalize(stacked: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of each matrix of ``stacked`` (L, rows, columns), rows <= columns, near 1.

    Five steps of a Newton-Schulz iteration, products in ``dtype``; singular values end between about 0.7 and 1.2, and
    those that are tiny beside the largest stay small. Zero stays zero.
    """
    first, second, third = COEFFICIENTS
    matrix = (stacked / stacked.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)).to(dtype)
    for _ in range(ITERATIONS):
        gram = matrix @ matrix.mT  # (L, rows, rows)
        inner = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        matrix = torch.baddbmm(matrix, inner, matrix, beta=first)
    orthogonal: Tensor = matrix.to(stacked.dtype)
    return orthogonal


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalized matrix by matrix, and AdamW for parameters that are no plain matrices.

    Source: Jordan et al. 2024 ("Muon", the method and its coefficients) with the step size and weight decay of Liu et
    al. 2025 ("Muon is Scalable for LLM Training", section 2.2). Matrices of one shape are worked on as one batch: for a
    small model that is what makes it affordable. ``dtype`` is that of the iteration's products.
    """

    def __init__(
        self, matrices: Sequence[Tensor], rest: list[dict[str, Any]], *, decay: float, dtype: torch.dtype, **adam: Any
    ) -> None:
        self.dtype = dtype
        self.adam = torch.optim.AdamW(rest, fused=True, **adam) if rest else None
        groups = [{"params": matrices, "weight_decay": decay, "lr": adam["lr"], "muon": True}]
        groups += [group | {"muon": False} for group in (self.adam.param_groups if self.adam else [])]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; there is no closure."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices([p for p in group["params"] if p.grad is not None], group)
        if self.adam is not None:  # it works on this optimizer's own groups and state, also after load_state_dict
            self.adam.param_groups = [group for group in self.param_groups if not group["muon"]]
            self.adam.state = self.state
            self.adam.step()

    def _step_matrices(self, matrices: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        buckets: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for matrix in matrices:
            assert matrix.grad is not None, "matrices without a gradient were left out"
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
            state["momentum"].lerp_(matrix.grad, 1.0 - MOMENTUM)
            step = torch.lerp(matrix.grad, state["momentum"], MOMENTUM)  # Nesterov
            buckets.setdefault(tuple(sorted(step.shape)), []).append((matrix, step))
        for shape, members in buckets.items():
            tall = [step.shape[0] > step.shape[1] for _, step in members]
            stacked = torch.stack([step.T if turn else step for (_, step), turn in zip(members, tall, strict=True)])
            size = UPDATE_RMS * math.sqrt(shape[1]) * group["lr"]
            for (matrix, _), turn, update in zip(
                members, tall, orthogonalize(stacked, dtype=self.dtype).unbind(), strict=True
            ):
                matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
                matrix.add_(update.T if turn else update, alpha=-size)


def make_optimizer(
    model: nn.Module, name: OptimizerName, *, learning_rate: float, decay: float, betas: tuple[float, float], bf16: bool
) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over the trainable parameters of ``model``.

    Only matrices decay. Muon takes the matrices inside the layers; embedding and output head, whose rows are learned
    each at its own pace, stay with AdamW.
    """
    named = {label: p for label, p in model.named_parameters() if p.requires_grad}
    inside = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    inner = [p for p in named.values() if p.ndim == 2 and id(p) in inside]
    outer = [p for p in named.values() if p.ndim == 2 and id(p) not in inside]
    vectors = [p for p in named.values() if p.ndim != 2]
    adam: dict[str, Any] = {"lr": learning_rate, "betas": betas}
    if name == "muon" and inner:
        rest = _groups(outer, vectors, decay)
        return Muon(inner, rest, decay=decay, dtype=torch.bfloat16 if bf16 else torch.float32, **adam)
    return torch.optim.AdamW(_groups(inner + outer, vectors, decay), fused=True, **adam)


def _groups(matrices: Sequence[Tensor], vectors: Sequence[Tensor], decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
