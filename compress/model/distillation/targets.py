"""The teacher's side of distillation: one callable, ``targets(batch) -> Targets``; the trainer cannot tell which.

`teacher_targets` makes it: `OnlineTargets` runs the teacher on the batch, `CachedTargets` reads what `fill_cache`
stored. `shared_vocabulary`
says how many token ids teacher and student have in common, `cache_header` what a cache is of.
Knows nothing of losses beyond the shape of a target, and nothing of optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import DataError, ModelError
from compress.model.distillation.cache import CacheHeader, CodecName, TargetCache, encode_for, tensors_of
from compress.model.distillation.filling import Asked, EvenBatch, Said, fill, joined
from compress.model.distillation.forward import kept_states
from compress.model.distillation.logit_map import logit_map
from compress.model.distillation.losses import Dense, States, Targets
from compress.model.distillation.packing import Batch, Indices, RowTable, moved
from compress.model.distillation.resume import kept_choice, value_digest
from compress.model.distillation.settings import Precision, choose_bf16
from compress.model.layers import output_head

if TYPE_CHECKING:
    from compress.progress import Progress

logger = logging.getLogger(__name__)

TargetFn = Callable[[Batch], Targets]
SHARD_POSITIONS = 16_384  # of one file; what is said of fewer lies in parts until it is whole
TEACHER_TOKENS = 4_096  # padded tokens of one teacher batch
CACHE_TOKENS = 1_024  # the same on a CPU, where a cache is filled: a batch takes seconds and is full more often
CACHE_PRODUCTS = 250e9  # multiplications of one such batch at most: five to ten seconds on two cores
LEAST_TOKENS = 32


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

    @property
    def models(self) -> Sequence[nn.Module]: ...

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

    @property
    def models(self) -> Sequence[nn.Module]:
        """The one that is run."""
        return [self.teacher]

    def __call__(self, batch: Batch) -> States:
        if self.head.device != batch.input_ids.device:  # the trainer has moved the student to a GPU
            self.teacher = self.teacher.to(batch.input_ids.device)
            self.head = output_head(self.teacher).weight[: len(self.head)]
        with torch.no_grad():
            states = kept_states(self.teacher, batch.input_ids, batch.keep, dtype=self.dtype)
            return States(states.to(self.head.dtype), self.head, self.temperature, self.logits)


class CachedTargets:
    """Reads the targets of a table's rows from a cache."""

    def __init__(self, cache: TargetCache, table: RowTable, wanted: Indices | None = None) -> None:
        """Look every row up at once, or those ``wanted`` alone.

        Raises:
            DataError: a row is not in the cache.
        """
        self.cache = cache
        self.first = torch.full((len(table),), -1, dtype=torch.int64)
        for row in range(len(table)) if wanted is None else wanted.tolist():
            self.first[row] = cache.first_position(table.key(row), f"number {row}")

    def __call__(self, batch: Batch) -> Targets:
        if bool((self.first[batch.rows] < 0).any()):
            got = f"row number {int(batch.rows[self.first[batch.rows] < 0][0])} was not asked about"
            raise DataError(str(self.cache.folder), got, do="Fill the cache with these rows first")
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
    wanted: Indices | None = None,
) -> tuple[TargetFn, dict[str, Any]]:
    """The callable that the trainer asks, and figures about it; a cache is made in ``folder``, or gone on with.

    ``named`` is the tokenizer that made the rows and the teacher's identity. Without ``codec``: top-k. ``wanted`` are
    the rows that the training reaches, all where it is left out: a cache holds no others.
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
    return cached_targets(TargetCache(folder, about), table, online, progress, wanted)


def cached_targets(
    cache: TargetCache, table: RowTable, online: Online, progress: Progress, wanted: Indices | None = None
) -> tuple[CachedTargets, dict[str, Any]]:
    """``cache`` filled with what ``online`` says of ``table``, as the trainer asks it, and figures about it.

    ``wanted`` are the rows that are asked about, all where it is left out.
    """
    fill_cache(cache, table, online, progress, wanted)
    return CachedTargets(cache, table, wanted), cache_figures(cache)


def cache_figures(cache: TargetCache) -> dict[str, Any]:
    """What a target token takes by the layout (with codec ``sample`` at most), and what it took on the disk."""
    return {
        "target_bytes_per_token": cache.header.bytes_per_token,
        "target_bytes_per_token_stored": round(cache.stored_bytes / max(1, cache.positions), 2),
        "target_positions": cache.positions,
    }


def fill_cache(
    cache: TargetCache, table: RowTable, online: Online, progress: Progress, wanted: Indices | None = None
) -> None:
    """Compute what ``cache`` lacks of ``table``, or of its rows ``wanted``; killed and run again, it goes on.

    A resumed cache holds the very files of an unbroken one, and of a teacher alone the very bits that it says of a row
    whatever others are asked about.
    """

    def code(batch: EvenBatch) -> Said:
        return _coded(batch, table, online, cache.header)

    fill(cache, Asked.of(table, wanted), code, progress, size=SHARD_POSITIONS, tokens=cache_tokens(online))


def cache_tokens(online: Online) -> int:
    """Padded tokens of one batch of the teacher: few enough that what it says is stored and shown every few seconds."""
    if online.device.type != "cpu":
        return TEACHER_TOKENS
    parameters = sum(p.numel() for model in online.models for p in model.parameters())
    tokens = CACHE_TOKENS
    while tokens > LEAST_TOKENS and tokens * parameters > CACHE_PRODUCTS:
        tokens //= 2
    return tokens


def _coded(batch: EvenBatch, table: RowTable, online: Online, header: CacheHeader) -> Said:
    """Teacher's coded targets of the rows of ``batch``, in their order.

    Every product has a shape that follows from the batch's width: the positions are filled up, too.
    """
    asked = table.batch(batch.filled, batch.width)
    most = asked.input_ids.numel()
    step = min(most, max(1, (1 << 22) // header.vocab))
    fill_up = asked.keep.new_zeros(-(-most // step) * step - len(asked.keep))
    said = online(replace(asked, keep=torch.cat([asked.keep, fill_up])).to(online.device))
    count = int(table.counts[batch.rows].sum())
    offsets = None
    if header.codec == "sample":
        offsets = torch.cat([header.offsets(table.key(row), int(table.counts[row])) for row in batch.rows])
    parts = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        logprobs = said.narrow(start, start + step).logprobs[: stop - start]
        if bool(torch.isnan(logprobs[:, 0]).any()):  # one NaN or infinite logit makes its whole row NaN
            raise ModelError("teacher", "its log-probabilities are not finite", "a teacher that gives no NaN")
        parts.append(tensors_of(encode_for(header, logprobs.cpu(), None if offsets is None else offsets[start:stop])))
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
