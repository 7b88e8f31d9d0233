"""A student cut up over the processes of a team: each holds its part of weights, gradients and optimizer state.

`Shards` cuts (FSDP2, torch's own ``fully_shard``) and hands the whole student back in the end; `whole` gathers one
tensor, `put` gives every process its part of one, `local` is the part of this process. But for the last they are
collective: every process calls them, for the same tensors in the same order. Proven over gloo on CPUs; written for
nccl on GPUs too, where it was never run. Knows nothing of losses, of checkpoints or of profiles.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compress.errors import UserError
from compress.model.distillation.losses import LossParts
from compress.model.distillation.parallel import Team, check_alone
from compress.model.distillation.settings import TrainSettings, training_device
from compress.model.layers import decoder_layers, linears

if TYPE_CHECKING:
    from compress.context import StageContext

KEY = "hardware.sharding"


def check_sharding(
    sharding: str, settings: TrainSettings | None = None, *, student: nn.Module | None = None, other: str = ""
) -> None:
    """Refuse what cannot be done with parts of weights; ``other`` says what else than a plain run is asked for.

    Stages ask before they load anything, `train` once more with all that it knows.

    Raises:
        UserError: ``sharding`` is ``full`` with Muon, losses on features, adapters or quantizers in the student, or
            ``other``.
    """
    if sharding != "full":
        return
    layers = [] if student is None else decoder_layers(student)
    changed = any(
        type(linear).forward is not nn.Linear.forward for layer in layers for linear in linears(layer).values()
    )
    muon = settings is not None and settings.optimizer == "muon"
    features = settings is not None and settings.loss.wants_features
    for there, got, allowed in (
        (muon, "optimizer: muon, which steps by whole matrices", "optimizer: adamw"),
        (features, "hidden_weight or attention_weight", "a loss on logits alone"),
        (changed, "adapters or quantizers inside the student's layers", "a student of plain linear layers"),
        (bool(other), other, "rows in their turn and a loss on logits"),
    ):
        if there:
            raise UserError(KEY, f"full with {got}", allowed, "Set sharding: none, or change the step")


def check_hardware(
    ctx: StageContext, settings: TrainSettings | None = None, *, student: nn.Module | None = None, other: str = ""
) -> None:
    """Refuse what several processes, or parts of weights, cannot do; the arguments are those of `check_sharding`.

    Raises:
        UserError: as `check_sharding` and `check_alone`.
    """
    check_sharding(ctx.sharding, settings, student=student, other=other)
    check_alone(ctx.processes, ctx.name, other)


def check_team(team: Team) -> None:
    """Refuse a team that has nothing to share out, or not a GPU for each.

    Raises:
        UserError: one process alone, or fewer GPUs than processes.
    """
    if team.size == 1:
        raise UserError(KEY, "full with one process, which holds everything", "2 processes or more",
                        "Set hardware.processes, or sharding: none")  # fmt: skip
    if training_device() == "cuda" and torch.cuda.device_count() < team.local_size:
        raise UserError(KEY, f"full with {team.local_size} processes for {torch.cuda.device_count()} GPUs",
                        "a GPU for each process", "Lower hardware.processes")  # fmt: skip


def skeleton(student: nn.Module) -> nn.Module:
    """A copy of ``student`` whose weights have shapes and no content; tied weights stay tied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in student.parameters()
    }
    return copy.deepcopy(student, memo)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` from all of its parts; itself where it is not cut up."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` in this process, the very memory of it; all of it where it is not cut up."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def put(into: Tensor, given: Tensor | None, team: Team) -> None:
    """Write the first process's ``given`` into ``into`` of all processes, of which each may hold a part."""
    with torch.no_grad():
        if isinstance(into, DTensor):
            given = torch.empty(into.shape, dtype=into.dtype) if given is None else given.to(into.dtype)
            part = distribute_tensor(given.to(into.device), into.device_mesh, into.placements)
            local(into).copy_(part.to_local())
        else:
            if given is not None:
                into.copy_(given)
            team.spread([into])


class _Root(nn.Module):
    """What FSDP2 calls the root, whose hooks gather what lies outside the layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> LossParts:
        parts: LossParts = self.inner(*given)
        return replace(parts, loss=parts.loss.clone())  # a view would not carry the hooks


class Shards:
    """The parts of a student and the module that trains them.

    ``student`` is the caller's whole student in the first process, ``None`` in the others; ``twin`` its `skeleton`,
    which gets the weights; ``model`` holds ``twin`` and gives the loss. The caller's student loses its weights here,
    one layer after the other, and gets the trained ones from `hand_back`; where training fails, it stays without.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, student: nn.Module | None, team: Team) -> None:
        self.twin, self.team = twin, team
        self.given = None if student is None else dict(student.named_parameters())
        self.names = {id(p): name for name, p in twin.named_parameters()}
        self.mesh = init_device_mesh(training_device(), (team.size,))
        self.model = _Root(model)
        for part in [*decoder_layers(twin), self.model]:
            emptied = self._fill(part)
            self._cut(part)
            for parameter in emptied:
                parameter.data = parameter.data.new_empty(0)

    def _fill(self, part: nn.Module) -> list[Tensor]:
        """Give the weights of ``part`` their content; returns the caller's, which are no longer needed."""
        emptied: list[Tensor] = []
        for meta in [p for p in part.parameters() if p.is_meta]:
            if self.given is None:
                content = torch.empty(meta.shape, dtype=meta.dtype)
            else:
                mine = self.given[self.names[id(meta)]]
                content = mine.detach()
                emptied.append(mine)
            content = content.to(training_device())
            self.team.spread([content])
            # the same object, so that tied weights stay tied
            cast(Any, torch.utils).swap_tensors(meta, nn.Parameter(content, requires_grad=meta.requires_grad))
        return emptied

    def _cut(self, part: nn.Module) -> None:
        fully_shard(part, mesh=self.mesh)
        cut = cast(FSDPModule, part)
        # gradients are of sums already divided by all positions of the step: they are to be added, not averaged
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)

    def settle(self) -> None:
        """Drop what a pass without gradients left gathered, before weights are changed by hand or memory is needed."""
        cast(FSDPModule, self.model).reshard()

    def hand_back(self) -> None:
        """Put the whole weights into the caller's student."""
        for name, parameter in self.twin.named_parameters():
            content = whole(parameter)
            if self.given is not None:
                self.given[name].data = content
