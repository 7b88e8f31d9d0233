"""The teacher's side of distillation: one callable, ``targets(batch) -> Targets``; the trainer cannot tell which.

`teacher_targets` makes it: `OnlineTargets` runs the teacher on the batch, `CachedTargets` reads what `fill_cache`
stored. `shared_vocabulary`
says how many token ids teacher and student have in common, `cache_header` what a cache is of.
Knows nothing of losses beyond the shape of a target, and nothing of optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.model.distillation.cache import CacheHeader, CodecName, Coded, TargetCache, encode_for, joined, shards
from compress.model.distillation.forward import kept_states
from compress.model.distillation.logit_map import logit_map
from compress.model.distillation.losses import Dense, States, Targets
from compress.model.distillation.packing import Batch, Indices, RowTable, cut, moved
from compress.model.distillation.resume import kept_choice, value_digest
from compress.model.distillation.sampled import Drawn
from compress.model.distillation.settings import Precision, choose_bf16
from compress.model.distillation.shard_folder import ordered
from compress.model.layers import output_head

if TYPE_CHECKING:
    from compress.progress import Progress

logger = logging.getLogger(__name__)

TargetFn = Callable[[Batch], Targets]
SHARD_POSITIONS = 16_384  # a kill loses at most the teacher's work on these
TEACHER_TOKENS = 4_096  # padded tokens of one teacher batch


class TargetParams(Protocol):
    """What the parameters of a stage say about its targets."""

    @property
    def targets(self) -> Literal["cache", "online"]: ...

    @property
    def top_k(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def precision(self) -> Precision: ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How a cache stores what the teacher says: ``top_k`` entries, or ``samples`` draws by ``seed``."""

    name: CodecName = "topk"
    top_k: int = 32
    samples: int = 12
    seed: int = 0


class DenseTargets(Protocol):
    """Targets that hold all log-probabilities."""

    def narrow(self, start: int, stop: int) -> Dense: ...


class Online(Protocol):
    """Whoever can say all log-probabilities of a batch: one teacher, or a mixture of several."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, batch: Batch) -> DenseTargets: ...


class OnlineTargets:
    """Runs the teacher on every batch."""

    def __init__(self, teacher: nn.Module, *, vocab: int, temperature: float = 1.0, bf16: bool = False) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.head = output_head(teacher).weight[:vocab]  # padded rows of the vocabulary take no probability
        self.temperature, self.dtype = temperature, torch.bfloat16 if bf16 else torch.float32
        self.logits = logit_map(teacher)

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return self.head.device

    def __call__(self, batch: Batch) -> States:
        if self.head.device != batch.input_ids.device:  # the trainer has moved the student to a GPU
            self.teacher = self.teacher.to(batch.input_ids.device)
            self.head = output_head(self.teacher).weight[: len(self.head)]
        with torch.no_grad():
            states = kept_states(self.teacher, batch.input_ids, batch.keep, dtype=self.dtype)
            return States(states.to(self.head.dtype), self.head, self.temperature, self.logits)


class CachedTargets:
    """Reads the targets of a table's rows from a cache."""

    def __init__(self, cache: TargetCache, table: RowTable) -> None:
        """Look every row up at once.

        Raises:
            DataError: a row is not in the cache.
        """
        self.cache = cache
        self.first = torch.tensor([cache.first_position(table.key(row), f"number {row}") for row in range(len(table))])

    def __call__(self, batch: Batch) -> Targets:
        before = torch.cumsum(batch.counts, 0) - batch.counts  # targets of the batch before each row
        shift = torch.repeat_interleave(self.first[batch.rows] - before, batch.counts)
        return moved(self.cache.take(shift + torch.arange(len(shift))), batch.labels.device)


def teacher_targets(
    teacher: PreTrainedModel,
    table: RowTable,
    params: TargetParams,
    *,
    named: tuple[Any, str],
    folder: Path,
    progress: Progress,
    codec: Codec | None = None,
) -> tuple[TargetFn, dict[str, Any]]:
    """The callable that the trainer asks, and figures about it; a cache is made in ``folder``, or gone on with.

    ``named`` is the tokenizer that made the rows and the teacher's identity. Without ``codec``: top-k.
    """
    online_too = params.targets == "online"  # then it follows the student to its device; a cache is filled here
    device = None if online_too else teacher.device.type
    width = int(teacher.config.hidden_size)
    bf16 = kept_choice(
        folder.with_suffix(".json"), choose_bf16(params.precision, width=width, training=online_too, device=device)
    )
    online = OnlineTargets(teacher, vocab=table.vocab, temperature=params.temperature, bf16=bf16)
    if online_too:
        return online, {}
    codec = codec or Codec(top_k=params.top_k)
    about = cache_header(named, vocab=table.vocab, codec=codec, temperature=params.temperature)
    return cached_targets(TargetCache(folder, about), table, online, progress)


def cached_targets(
    cache: TargetCache, table: RowTable, online: Online, progress: Progress
) -> tuple[CachedTargets, dict[str, Any]]:
    """``cache`` filled with what ``online`` says of ``table``, as the trainer asks it, and figures about it."""
    fill_cache(cache, table, online, progress)
    return CachedTargets(cache, table), cache_figures(cache)


def cache_figures(cache: TargetCache) -> dict[str, Any]:
    """What a target token takes by the layout (with codec ``sample`` at most), and what it took on the disk."""
    return {
        "target_bytes_per_token": cache.header.bytes_per_token,
        "target_bytes_per_token_stored": round(cache.stored_bytes / cache.positions, 2),
        "target_positions": cache.positions,
    }


def fill_cache(cache: TargetCache, table: RowTable, online: Online, progress: Progress) -> None:
    """Compute what ``cache`` lacks of ``table``; killed and run again, it goes on at the next shard.

    Shards and batches are cut from all rows before those already stored are skipped, so that a resumed cache
    holds the very bits of an unbroken one (a product's last bit depends on the size of its batch).
    """
    fill_by(cache, table, lambda rows: _coded(rows, table, online, cache.header), progress, size=SHARD_POSITIONS)


def fill_by(
    cache: TargetCache,
    table: RowTable,
    code: Callable[[Indices], Coded | Drawn],
    progress: Progress,
    *,
    size: int,
) -> None:
    """`fill_cache` with ``code``, which gives the coded targets of rows, in shards of ``size`` positions."""
    keys = [table.key(row) for row in range(len(table))]
    rows = ordered(keys, table.lengths)
    with progress.bar("teacher", int(table.lengths[rows].sum())) as bar:
        for piece in shards(table.counts[rows].tolist(), size):
            run = rows[piece]
            if not all(keys[row] in cache for row in run):
                cache.append([keys[row] for row in run], table.counts[run].tolist(), code(run))
            bar.advance(int(table.lengths[run].sum()))


def _coded(rows: Indices, table: RowTable, online: Online, header: CacheHeader) -> Coded | Drawn:
    """Teacher's coded targets of ``rows`` (sorted by length), in their order."""
    parts = []
    for piece in cut(rows, table.lengths, TEACHER_TOKENS):
        said = online(table.batch(piece).to(online.device))
        count = int(table.counts[piece].sum())
        offsets = None
        if header.codec == "sample":
            offsets = torch.cat([header.offsets(table.key(row), int(table.counts[row])) for row in piece])
        step = max(1, (1 << 22) // header.vocab)
        for start in range(0, count, step):
            stop = min(start + step, count)
            logprobs = said.narrow(start, stop).logprobs
            if bool(torch.isnan(logprobs[:, 0]).any()):  # one NaN or infinite logit makes its whole row NaN
                raise ModelError("teacher", "its log-probabilities are not finite", "a teacher that gives no NaN")
            parts.append(encode_for(header, logprobs.cpu(), None if offsets is None else offsets[start:stop]))
    return joined(parts)


def cache_header(named: tuple[Any, str], *, vocab: int, codec: Codec, temperature: float) -> CacheHeader:
    """Header of the cache of a teacher; ``named`` is the tokenizer that made the rows, and the teacher's identity."""
    tokenizer, identity = named
    draws = codec.name == "sample"
    return CacheHeader(
        teacher=identity,
        tokenizer=value_digest(tokenizer.get_vocab()),
        template=value_digest(tokenizer.chat_template),
        vocab=vocab,
        top_k=0 if draws else min(codec.top_k, vocab),
        temperature=temperature,
        codec=codec.name,
        samples=codec.samples if draws else 0,
        seed=codec.seed if draws else 0,
    )


def shared_vocabulary(
    teacher: tuple[Mapping[str, Any], Mapping[str, int]],
    student: tuple[Mapping[str, Any], Mapping[str, int]],
    *,
    where: str,
) -> int:
    """Number of token ids that both models can produce; each side is (config, token -> id).

    The embeddings may be padded to different sizes; the tokens must be the same.

    Raises:
        ModelError: the tokenizers differ, or a model's vocabulary is smaller than its tokenizer's.
    """
    (teacher_config, teacher_ids), (student_config, student_ids) = teacher, student
    if teacher_ids != student_ids:
        differing = sorted({*teacher_ids.items()} ^ {*student_ids.items()}, key=lambda item: (item[1], item[0]))
        token, number = differing[0]
        raise ModelError(
            where,
            f"teacher and student have different tokenizers ({len(teacher_ids)} and {len(student_ids)} tokens; "
            f"{token!r} is {number} in one of them only)",
            "one tokenizer for both: distillation on logits compares token by token",
            "Use init: teacher_layers or scratch, which take the teacher's tokenizer, or method: cross_tokenizer",
        )
    vocab = max(teacher_ids.values()) + 1
    for name, config in (("teacher", teacher_config), ("student", student_config)):
        if int(config["vocab_size"]) < vocab:
            raise ModelError(
                where, f"the {name}'s vocab_size is {config['vocab_size']}", f"at least {vocab}, its tokenizer's size"
            )
    return vocab


def local_folder(folder: Path | None, *, where: str, endpoint: bool = False) -> Path:
    """The folder of a teacher that must be at hand as weights; ``endpoint``: whether one could teach here otherwise.

    Raises:
        ModelError: the teacher is a recording, or an endpoint where a model is needed.
    """
    if folder is None:
        other = (
            "; an endpoint can teach alone, and only a student that is there already (init: checkpoint) or that a "
            "local teacher gives its shape (mixture: {NAME: 1})"
        )
        raise ModelError(
            where,
            "the teacher is not a local model, and distillation on logits needs all its log-probabilities",
            f"a teacher given as a model folder{other if endpoint else ''}",
        )
    return folder


def check_rows_fit(table: RowTable, configs: Sequence[Mapping[str, Any]], *, where: str) -> None:
    """Raise ModelError when a row is longer than the context of one of the models."""
    longest = int(table.lengths.max())
    for config in configs:
        context = config.get("max_position_embeddings")
        if context is not None and longest > int(context):
            raise ModelError(
                where, f"a row has {longest} tokens", f"at most {context}, the model's context", "Lower max_tokens"
            )
