"""The offline cache of a teacher's distributions: what it thinks at every target position, a few bytes a token.

A folder: ``header.json`` says of which teacher, tokenizer, chat template, vocabulary, temperature and codec; each
``shard-N.safetensors`` holds rows (keyed by a hash of their token ids, so that any order and any subset can be read)
and beside it ``shard-N.json`` holds its digest and is written last: a shard without it does not exist.
Codec ``topk``: log-softmax over the whole vocabulary first, then the k likeliest ids (uint16, or int32 beyond 65536),
their fp16 log-probabilities and the fp16 logarithm of the mass of all others: 4k + 2 bytes a target token.
Codec ``sample``: tokens drawn from the whole distribution with their counts, see ``sampled``: at 12 draws at most 36
bytes a target token for up to 1.39 million ids, and fewer wherever a token is drawn twice.
Knows nothing of models or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError
from compress.model.distillation.cache_size import position_bytes
from compress.model.distillation.losses import Sparse
from compress.model.distillation.sampled import Drawn, DrawnShard, Sampled, draw, shares_of
from compress.model.distillation.shard_folder import ShardFolder

CodecName = Literal["topk", "sample"]
LATER = {"samples": 0, "seed": 0}  # what headers written before these fields stood for


@dataclass(frozen=True, slots=True)
class CacheHeader:
    """What a cache is of; two caches with equal headers hold equal values.

    Attributes:
        teacher: digest of the teacher's files.
        tokenizer: digest of the tokenizer.
        template: digest of the chat template.
        vocab: size of the vocabulary over which the log-softmax was taken.
        top_k: entries per position; 0 where the codec is ``sample``.
        temperature: at which the distribution was taken: the tail of another one cannot be had from it.
        codec: how positions are stored.
        version: of the format.
        samples: draws per position; 0 where the codec is ``topk``.
        seed: of the draws; 0 where there are none.
    """

    teacher: str
    tokenizer: str
    template: str
    vocab: int
    top_k: int
    temperature: float
    codec: CodecName = "topk"
    version: int = 1
    samples: int = 0
    seed: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one target position, keys not counted; with codec ``sample``, at most."""
        return position_bytes(self.vocab, top_k=self.top_k, samples=self.samples)

    def offsets(self, key: bytes, count: int) -> Tensor:
        """The random numbers (count,) of the row with ``key``: the row's own, whatever is drawn before it."""
        generator = np.random.Generator(np.random.PCG64([self.seed, int.from_bytes(key, "big")]))
        return torch.from_numpy(generator.random(count))


@dataclass(frozen=True, slots=True)
class Coded:
    """Positions as stored: ``ids`` (N, K) uint16 or int32, ``logprobs`` (N, K) fp16, ``log_tail`` (N,) fp16."""

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor


def encode(logprobs: Tensor, top_k: int) -> Coded:
    """Keep the ``top_k`` likeliest of ``logprobs`` (N, V), normalised over V, and the mass of the rest."""
    vocab = logprobs.shape[1]
    top, ids = logprobs.topk(min(top_k, vocab), dim=-1)  # sorted, likeliest first
    if top_k >= vocab:
        tail = torch.full_like(top[:, 0], -torch.inf)
    else:  # summed from the rest itself: one minus the top would lose it where the teacher is sure
        tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
    small = ids.to(torch.int32) if vocab > 1 << 16 else ids.to(torch.uint16)
    return Coded(small, top.half(), tail.half())


def decode(coded: Coded) -> Sparse:
    """Undo `encode` up to rounding; renormalised, so that it is a distribution again and the KL cannot go negative."""
    logprobs, tail = coded.logprobs.float(), coded.log_tail.float()
    total = torch.logsumexp(torch.cat([logprobs, tail[:, None]], dim=1), dim=1)
    return Sparse(_wide(coded.ids), logprobs - total[:, None], tail - total)


def encode_for(header: CacheHeader, logprobs: Tensor, offsets: Tensor | None) -> Coded | Drawn:
    """``logprobs`` (N, V) as the codec of ``header`` stores them; draws need ``offsets`` (N,)."""
    if header.codec == "topk":
        return encode(logprobs, header.top_k)
    assert offsets is not None, "the codec sample draws"
    return draw(logprobs, offsets, header.samples)


def tensors_of(coded: Coded | Drawn) -> dict[str, Tensor]:
    """What is stored of positions, by name."""
    return {field.name: getattr(coded, field.name) for field in fields(coded)}


def _wide(ids: Tensor) -> Tensor:
    if ids.dtype == torch.uint16:  # hardly any operator knows uint16
        return ids.view(torch.int16).long() & 0xFFFF
    return ids.long()


class TargetCache(ShardFolder):
    """An open cache: `missing` rows can be added by `append`, and positions read by `take`."""

    def __init__(self, folder: Path, header: CacheHeader) -> None:
        """Open or begin the cache in ``folder``; shards that fail their digest are left aside, as if never written.

        Raises:
            DataError: the folder holds the cache of another teacher, tokenizer, template or setting.
            StoreError: the header cannot be read or written.
        """
        self.header = header
        self._parts: list[Coded | DrawnShard] = []
        self._ends: list[int] = []  # positions up to the end of each shard
        self._where: dict[bytes, int] = {}  # key of a row -> its first position
        super().__init__(folder, asdict(header), later=LATER)

    def __reduce__(self) -> tuple[type[TargetCache], tuple[Path, CacheHeader]]:
        """Another process opens the files itself."""
        return TargetCache, (self.folder, self.header)

    @property
    def positions(self) -> int:
        """Target positions in the cache."""
        return self._ends[-1] if self._ends else 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def first_position(self, key: bytes, row: str) -> int:
        """Where the positions of a row begin.

        Raises:
            DataError: the cache does not hold the row.
        """
        try:
            return self._where[key]
        except KeyError:
            raise DataError(
                f"{self.folder}: row {row}", "is not in the teacher's cache", do="Fill the cache with these rows first"
            ) from None

    def append(self, keys: Sequence[bytes], counts: Sequence[int], coded: Coded | Drawn) -> None:
        """Add rows as one shard: whole after this call, or not there at all.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        self.write(keys, counts, tensors_of(coded), positions=sum(counts))

    def take(self, positions: Tensor) -> Sparse | Sampled:
        """The teacher's targets at ``positions`` (N,) int64, in their order."""
        picked: list[Tensor] = []
        shard = torch.bucketize(positions, torch.tensor(self._ends), right=True)
        for number, part in enumerate(self._parts):
            here = torch.nonzero(shard == number)[:, 0]
            if len(here):
                inside = positions[here] - (self._ends[number - 1] if number else 0)
                found = self._read(part, inside)
                picked = picked or [one.new_empty((len(positions), *one.shape[1:])) for one in found]
                for whole, one in zip(picked, found, strict=True):
                    whole[here] = one
        if self.header.codec == "sample":
            return shares_of(picked[0], picked[1], self.header.samples)
        ids, logprobs, log_tail = picked
        narrow = self.header.vocab <= 1 << 16
        return decode(Coded(ids.view(torch.uint16) if narrow else ids, logprobs, log_tail))

    def _read(self, part: Coded | DrawnShard, inside: Tensor) -> tuple[Tensor, ...]:
        """What is stored at places ``inside`` of one shard, one entry per position."""
        if isinstance(part, DrawnShard):
            return part.read(inside, self.header.samples)
        return _bits(part.ids)[inside], part.logprobs[inside], part.log_tail[inside]

    def _add(self, tensors: dict[str, Tensor]) -> None:
        at = self.positions
        keys = tensors["keys"].numpy()
        for key, count in zip(keys, tensors["counts"].tolist(), strict=True):
            self._where.setdefault(key.tobytes(), at)
            at += count
        if self.header.codec == "sample":
            drawn = Drawn(tensors["codes"])
            self._parts.append(DrawnShard(drawn, vocab=self.header.vocab, samples=self.header.samples))
        else:
            self._parts.append(Coded(tensors["ids"], tensors["logprobs"], tensors["log_tail"]))
        self._ends.append(at)


def _bits(ids: Tensor) -> Tensor:
    return ids.view(torch.int16) if ids.dtype == torch.uint16 else ids
