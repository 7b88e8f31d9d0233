"""What a run must not lose: its checkpoint and its best weights, each one file of whole tensors.

The format is the same however many processes train and however they hold the weights, so that a run goes on with
another number of them, cut up or not. The first process writes and reads; the others take part where tensors have to
be gathered or spread, one at a time. Knows nothing of models or of what the values mean.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from compress.errors import StoreError
from compress.model.distillation.parallel import Team
from compress.model.distillation.resume import SavedTensors, in_file_order, open_tensors, save_tensors
from compress.model.distillation.sharding import put, whole

logger = logging.getLogger(__name__)
Outlines = dict[str, Tensor]  # tensors of shape and number format without content


class Snapshots:
    """Checkpoint and best weights of the run called ``name`` in ``folder``; ``fingerprint`` is the first process's.

    Every method is collective: all processes of ``team`` call it, for the same tensors.
    """

    def __init__(self, folder: Path, name: str, team: Team, fingerprint: str) -> None:
        self.checkpoint_path = folder / f"{name}.checkpoint.safetensors"
        self.best_path = folder / f"{name}.best.safetensors"
        self.team, self.fingerprint = team, fingerprint
        self.found: SavedTensors | None = None

    def open(self) -> tuple[Outlines, dict[str, Any]] | None:
        """Outlines of the tensors and values of the checkpoint; ``None`` without one of this very run."""
        if self.team.first:
            self.found = open_tensors(self.checkpoint_path)
            if self.found is not None and self.found.values.get("fingerprint") != self.fingerprint:
                logger.warning("%s is of another run and left aside", self.checkpoint_path)
                self.found = None
        told = None if self.found is None else (self.found.outlines, self.found.values)
        shared: tuple[Outlines, dict[str, Any]] | None = self.team.share(told)
        return shared

    def load(self, into: Mapping[str, Tensor]) -> None:
        """Fill ``into``, by name, from the checkpoint that `open` found, and close it."""
        self._fill(into, self.found)
        self.found = None

    def load_best(self, into: Mapping[str, Tensor], step: int) -> None:
        """Fill ``into``, by name, with the best weights, which must be of ``step``.

        Raises:
            StoreError: they are not there.
        """
        best = open_tensors(self.best_path) if self.team.first else None
        if self.team.first and (best is None or best.values != self._of(step)):
            raise StoreError(
                str(self.best_path),
                f"does not hold the best weights, of step {step}",
                do="Remove the folder and run again",
            )
        self._fill(into, best)

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write a checkpoint; raises StoreError as `save_tensors`."""
        self._write(self.checkpoint_path, tensors, {"fingerprint": self.fingerprint, **values})

    def save_best(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Write the best weights; raises StoreError as `save_tensors`."""
        self._write(self.best_path, tensors, self._of(step))

    def _of(self, step: int) -> dict[str, Any]:
        return {"step": step, "fingerprint": self.fingerprint}

    def _write(self, path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if self.team.first:
            save_tensors(path, tensors, values, whole=whole)
        else:
            for name in in_file_order(tensors):
                if isinstance(tensors[name], DTensor):
                    whole(tensors[name])

    def _fill(self, into: Mapping[str, Tensor], saved: SavedTensors | None) -> None:
        for name in sorted(into):
            put(into[name], None if saved is None else saved[name], self.team)
