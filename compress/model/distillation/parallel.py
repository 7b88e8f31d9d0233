"""Several processes that train one student: each takes its part of the rows, and the gradients are summed.

`assembled` gives the `Team` of a run: alone; processes that it starts itself; or those that torchrun started. The first
process says what is to be done (`Team.share`), writes every file and tells the user; the others run `follow`. A process
that dies ends all of them. Works over gloo. Knows nothing of losses, of teachers or of checkpoints.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from compress import processes
from compress.errors import TrainingError, UserError
from compress.model.distillation.packing import Indices
from compress.scratch import scratch

PATIENCE = timedelta(minutes=30)  # of a collective operation: one process may wait while another asks a teacher
START_S = 120.0  # until a started process has loaded its libraries
_SERVE = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"
OWN_TEXT = "text that the student writes"
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torchrun sets


@dataclass(frozen=True)
class Team:
    """The processes of one run; ``rank`` is this one's number among ``size``, from 0."""

    rank: int = 0
    size: int = 1
    children: Sequence[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=tuple)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of the processes are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def part(self, rows: Indices) -> tuple[Indices, float]:
        """This process's share of ``rows`` and its weight: 0 for a row that it takes only to keep in step."""
        mine = rows[self.rank :: self.size]
        return (mine, 1.0) if len(mine) else (rows[:1], 0.0)

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``values`` (any shape) added up over all processes."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(values.copy())
        distributed.all_reduce(tensor)
        return tensor.numpy()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Put the sum over all processes into every ``.grad``; one that is missing counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        for kind in sorted(kinds, key=str):
            grads = [p.grad for p in parameters if p.grad is not None and (p.dtype, p.device) == kind]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            distributed.all_reduce(flat)
            pieces = torch.split(flat, [grad.numel() for grad in grads])
            for grad, piece in zip(grads, pieces, strict=True):
                grad.copy_(piece.view_as(grad))

    def share(self, value: Any) -> Any:
        """The first process's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def agreed(self, wish: bool) -> bool:
        """Whether the first process wishes so; cheaper than `share`."""
        if self.size == 1:
            return wish
        flag = torch.tensor([wish])
        distributed.broadcast(flag, src=0)
        return bool(flag)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's ``tensors``, in place."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    distributed.broadcast(tensor, src=0)


def launched() -> tuple[int, int] | None:
    """(rank, size) as a launcher gave them; ``None`` without one.

    Raises:
        UserError: the launcher's numbers make no sense.
    """
    if any(name not in os.environ for name in _LAUNCHED):
        return None
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError("the launcher", f"RANK {rank} of WORLD_SIZE {size}", "a rank below the size")
    return int(rank), int(size)


def check_size(found: int | None, wanted: int, where: str) -> None:
    """Refuse a launcher that started ``found`` processes (``None``: there is none) where ``wanted`` were asked for.

    Raises:
        UserError: fewer or more than asked for.
    """
    if found is None and "ACCELERATE_MIXED_PRECISION" in os.environ and wanted > 1:
        found = 1  # accelerate launch --cpu runs the command as it is, whatever --num_processes says
    if found is not None and wanted > 1 and found != wanted:
        raise UserError(
            where, f"the launcher started {found} of {wanted} processes", f"hardware.processes {wanted}, all of them",
            f"Start without a launcher, or with torchrun --nproc-per-node {wanted}",
        )  # fmt: skip


def check_alone(wanted: int, where: str, what: str) -> None:
    """Refuse several processes for ``what``, which one alone can do; an empty text: several can.

    Raises:
        UserError: several are asked for, or a launcher started them.
    """
    found = launched()
    size = max(wanted, 1 if found is None else found[1])
    if size > 1 and what:
        raise UserError(where, f"{size} processes for {what}", "one", "Set hardware.processes to 1")


@contextmanager
def assembled(wanted: int, where: str) -> Iterator[Team]:
    """The team of one run in its first process: ``wanted`` processes, or as many as the launcher started.

    Raises:
        UserError: the launcher started another number than was asked for.
        TrainingError: a process cannot start, or died.
    """
    found = launched()
    check_size(None if found is None else found[1], wanted, where)
    if found is not None and found[1] > 1:
        _join_launched()
        yield Team(*found)
    elif wanted > 1:
        with _started(wanted, where) as team:
            yield team
    else:
        yield Team()


def told(team: Team, job: tuple[Any, ...], where: str) -> None:
    """Tell the other processes what to do: ``job`` is a function's arguments and, first, the function.

    Raises:
        UserError: it cannot be sent.
    """
    if team.size > 1:
        try:
            team.share(job)  # torch's own broadcast, in memory; it fails before anything is sent
        except (AttributeError, TypeError) as error:
            raise UserError(
                where, f"cannot be told to other processes ({error})", "one process", "Set hardware.processes to 1"
            ) from error


def as_launched(command: Callable[[], object]) -> None:
    """Run ``command`` in the first process of a launcher; the others train with it and end when it ends.

    Where it fails they are left to the launcher, which ends them.
    """
    found = launched()
    if found is not None and found[0] > 0:
        follow()
        return
    try:
        command()
    except SystemExit as end:
        if not end.code:
            dismiss()
        raise
    dismiss()


def dismiss() -> None:
    """Let the processes of a launcher go; called by the first one when it has nothing more for them."""
    _join_launched()
    Team(0, distributed.get_world_size()).share(None)
    distributed.destroy_process_group()


def follow() -> None:
    """Be one of the processes beside the first: do what it says until it has nothing more."""
    _join_launched()
    team = Team(distributed.get_rank(), distributed.get_world_size())
    while (job := team.share(None)) is not None:
        function, *arguments = job
        function(team, *arguments)
    distributed.destroy_process_group()


@contextmanager
def _started(size: int, where: str) -> Iterator[Team]:
    """Processes of our own: they meet over a file, and end with this one, whatever ends it."""
    with scratch() as folder:
        children: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for rank in range(1, size):
                log = folder / f"{rank}.log"
                command = processes.python("-c", _SERVE, str(folder), str(rank), str(size))
                env = processes.environment()
                with log.open("wb") as file:
                    child = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
                        command, env=env, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
                    )
                children.append((child, log))
            _wait(lambda: len([*folder.glob("*.ready")]) == size - 1, children, where)
            _meet(folder, 0, size)
            team = Team(0, size, children)
            yield team
            team.share(None)
        except RuntimeError as error:  # a lost connection: say whose
            time.sleep(0.5)
            _check(children, where)
            if isinstance(error, distributed.DistBackendError) or "gloo" in str(error):
                raise TrainingError(where, f"the processes lost one another ({error})", do="Run again") from error
            raise
        finally:
            for child, _ in children:
                child.kill()
                child.wait()
                if child.stdin is not None:
                    child.stdin.close()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _join_launched() -> None:
    if not distributed.is_initialized():
        backend = _backend(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        distributed.init_process_group(backend, timeout=PATIENCE)
    os.environ.pop("LOCAL_RANK", None)  # accelerate would wrap the model and sum the gradients a second time


def _meet(folder: Path, rank: int, size: int) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]
    distributed.init_process_group(_backend(rank, size), store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _backend(rank: int, size: int) -> str:
    """gloo, and nccl beside it where each of ``size`` processes of this machine can have a GPU, which it then takes."""
    if torch.cuda.device_count() < size:
        return "gloo"
    torch.cuda.set_device(rank)
    return "cpu:gloo,cuda:nccl"


def _wait(ready: Callable[[], bool], children: Sequence[tuple[subprocess.Popen[bytes], Path]], where: str) -> None:
    end = time.monotonic() + START_S
    while not ready():
        _check(children, where)
        if time.monotonic() > end:
            raise TrainingError(where, f"a process did not start in {START_S:.0f} s", do="Lower hardware.processes")
        time.sleep(0.02)


def _check(children: Sequence[tuple[subprocess.Popen[bytes], Path]], where: str) -> None:
    """Raise TrainingError for a process that ended too early, with its last words."""
    for rank, (child, log) in enumerate(children, start=1):
        code = child.poll()
        if code is not None:
            words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            said = f": {words[0]}" if words else ""
            do = "Run again; it goes on from its last checkpoint. Code -9 is often lack of memory"
            raise TrainingError(where, f"process {rank} of {len(children) + 1} ended with code {code}{said}", do=do)


def serve(folder: str, rank: str, size: str) -> None:
    """Be a process that another one started: meet the rest in ``folder`` and follow."""
    processes.leave_with_parent()
    (Path(folder) / f"{rank}.ready").touch()
    _meet(Path(folder), int(rank), int(size))
    follow()
