"""A folder of rows in shards with a header that says what they are of: the part that every teacher's cache shares.

``header.json`` says what the cache is of. Each ``shard-N.safetensors`` holds rows by their keys; ``shard-N.json``
beside it holds its digest and is written last: a shard without it does not exist. `ordered` says in which order rows
are computed. Knows nothing of what a shard holds beside keys and counts.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import DataError, StoreError
from compress.files import file_sha256
from compress.json_reader import parse_json
from compress.model.distillation.packing import Indices
from compress.model.distillation.resume import save_tensors, write_json

logger = logging.getLogger(__name__)


class ShardFolder(ABC):
    """An open folder; a subclass keeps what `_add` hands it. What of the next shard is made so far may lie in parts.

    ``unit`` is what is counted of a row.
    """

    unit = "positions"

    def __init__(self, folder: Path, header: Mapping[str, Any], *, later: Mapping[str, Any] | None = None) -> None:
        """Open or begin the cache in ``folder``; shards that fail their digest are left aside, as if never written.

        ``later`` are the values that header entries stand for in a file that is older than they are.

        Raises:
            DataError: the folder holds the cache of something else.
            StoreError: the header cannot be read or written.
        """
        self.folder = folder
        self.stored_bytes = 0  # of all shards on disk, keys and file headers included
        self._next = 0  # number of the next shard
        self._check_header(header, later or {})
        for marker in sorted(folder.glob("shard-*.json")):
            self._next = int(marker.stem.partition("-")[2]) + 1
            self._open(marker)

    @abstractmethod
    def _add(self, tensors: dict[str, Tensor]) -> None:
        """Take over a shard: ``keys`` (rows, 16) uint8, ``counts`` (rows,) int32, and what was written beside them."""

    def write(self, keys: Sequence[bytes], counts: Sequence[int], tensors: Mapping[str, Tensor], **told: int) -> None:
        """Add rows as one shard: whole after this call, or not there at all; ``told`` goes into its marker.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        path = self.folder / f"shard-{self._next:05d}.safetensors"
        whole = self._write(path, keys, counts, tensors, **told)
        self._next += 1
        self._take_over(whole, path)

    @abstractmethod
    def __contains__(self, key: bytes) -> bool:
        """Whether the row with ``key`` is in a shard."""

    def write_part(self, keys: Sequence[bytes], counts: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Add rows to those of the next shard that survive a kill. Raises StoreError as `write` does."""
        self._write(self.folder / f"part-{len(self._part_markers()):05d}.safetensors", keys, counts, tensors)

    def parts(self) -> list[tuple[list[bytes], dict[str, Tensor]]]:
        """Keys and tensors of each part, up to the first that is damaged."""
        found = []
        for marker in self._part_markers():
            tensors = self._tensors(marker)
            if tensors is None:
                break
            keys = [key.tobytes() for key in tensors.pop("keys").numpy()]
            del tensors["counts"]
            found.append((keys, {name: tensor.clone() for name, tensor in tensors.items()}))
        return found

    def drop_parts(self) -> None:
        """Remove all parts: their shard is whole, or wanted no more."""
        for marker in reversed(self._part_markers()):  # the last first: what is left is a beginning
            marker.unlink()
            marker.with_suffix(".safetensors").unlink(missing_ok=True)

    def _part_markers(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.json"))

    def _write(
        self, path: Path, keys: Sequence[bytes], counts: Sequence[int], tensors: Mapping[str, Tensor], **told: int
    ) -> dict[str, Tensor]:
        """A file of rows, and behind it its marker."""
        whole = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1).copy()),
            "counts": torch.tensor(counts, dtype=torch.int32),
            **tensors,
        }
        save_tensors(path, whole, {})
        write_json(path.with_suffix(".json"), {"sha256": file_sha256(path), "rows": len(keys), **told})
        return whole

    def _check_header(self, wanted: Mapping[str, Any], later: Mapping[str, Any]) -> None:
        path = self.folder / "header.json"
        if not path.is_file():
            write_json(path, dict(wanted))
            return
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(str(path), f"cannot be read ({error})", do="Remove the folder; it is made anew") from error
        for name, value in wanted.items():
            got = found.get(name, later.get(name)) if isinstance(found, dict) else found
            if not isinstance(found, dict) or got != value:
                raise DataError(
                    str(path),
                    f"the cache's {name} is {got!r}",
                    repr(value),
                    f"It was made with another {name}: remove the folder, or use the {name} that it was made with",
                )

    def _open(self, marker: Path) -> None:
        tensors = self._tensors(marker)
        if tensors is not None:
            self._take_over(tensors, marker.with_suffix(".safetensors"))

    def _tensors(self, marker: Path) -> dict[str, Tensor] | None:
        """The tensors of a file, None where they cannot be trusted."""
        path = marker.with_suffix(".safetensors")
        try:
            digest = parse_json(marker.read_bytes())["sha256"]
            if file_sha256(path) != digest:
                logger.warning("%s fails its digest; its rows are computed again", path)
                return None
            tensors: dict[str, Tensor] = load_file(path)  # mapped, so that only what is taken is read
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s cannot be read (%s); its rows are computed again", path, error)
            return None
        return tensors

    def _take_over(self, tensors: dict[str, Tensor], path: Path) -> None:
        self.stored_bytes += path.stat().st_size
        self._add(tensors)


def ordered(keys: Sequence[bytes], lengths: Indices, wanted: Indices | None = None) -> Indices:
    """Rows by length and key, equal ones once: the order in which a cache is filled, whatever is stored already.

    ``wanted`` are the rows that count, all where it is left out.
    """
    rows = range(len(keys)) if wanted is None else wanted.tolist()
    first = {keys[row]: row for row in reversed(rows)}
    return np.array(sorted(first.values(), key=lambda row: (lengths[row], keys[row])), dtype=np.int64)
