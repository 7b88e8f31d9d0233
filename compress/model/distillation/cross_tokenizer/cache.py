"""The offline cache of a teacher's likelihoods of chunks: one number a chunk, or two where the end of words counts.

A folder as the cache of distributions is one: ``header.json`` says what it is of, each ``shard-N.safetensors`` holds
rows by their keys, and ``shard-N.json`` beside it holds its digest and is written last. The numbers are fp32 and few,
so all of them are in memory. Knows nothing of models or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import DataError
from compress.model.distillation.shard_folder import ShardFolder


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a cache is of; two caches with equal headers hold equal values.

    Attributes:
        teacher: digest of the teacher's files.
        tokenizer, template: digests of the teacher's tokenizer and chat template.
        student_tokenizer, student_template: of the student's: they decide where chunks end.
        columns: numbers per chunk: log-likelihood, and with 2 that a word begins behind it.
        codec: how chunks are stored.
        version: of the format.
    """

    teacher: str
    tokenizer: str
    template: str
    student_tokenizer: str
    student_template: str
    columns: int
    codec: str = "chunks"
    version: int = 1

    @property
    def bytes_per_chunk(self) -> int:
        """Bytes of one chunk, keys not counted."""
        return 4 * self.columns


class ChunkCache(ShardFolder):
    """An open cache: rows are added by `append` and read by `take`."""

    unit = "chunks"

    def __init__(self, folder: Path, header: ChunkHeader) -> None:
        """Open or begin the cache in ``folder``; shards that fail their digest are left aside, as if never written.

        Raises:
            DataError: the folder holds the cache of something else.
            StoreError: the header cannot be read or written.
        """
        self.header = header
        self._rows: dict[bytes, Tensor] = {}
        super().__init__(folder, asdict(header))

    @property
    def chunks(self) -> int:
        """Chunks in the cache."""
        return sum(len(values) for values in self._rows.values())

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def append(self, keys: Sequence[bytes], counts: Sequence[int], values: Tensor) -> None:
        """Add rows with ``counts`` chunks, ``values`` (sum of them, columns) fp32, as one shard: whole or not at all.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        self.write(keys, counts, {"values": values}, chunks=len(values))

    def take(self, keys: Sequence[bytes]) -> Tensor:
        """The numbers of rows (chunks of all of them, columns), in their order.

        Raises:
            DataError: a row is not in the cache.
        """
        missing = [number for number, key in enumerate(keys) if key not in self._rows]
        if missing:
            got = f"{len(missing)} of {len(keys)} rows are not in the teacher's cache"
            raise DataError(str(self.folder), got, do="Fill the cache with these rows first")
        return torch.cat([self._rows[key] for key in keys])

    def _add(self, tensors: dict[str, Tensor]) -> None:
        pieces = torch.split(tensors["values"], tensors["counts"].tolist())
        for key, values in zip(tensors["keys"].numpy(), pieces, strict=True):
            self._rows.setdefault(key.tobytes(), values)
