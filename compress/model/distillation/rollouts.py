"""Answers that a student makes for training: alone, from a mixture with its teacher, or with the teacher's veto.

`sample` draws from the student, or from (1 - mix) * student + mix * teacher (MiniLLM, Gu et al. 2024, section 2.2);
`speculate` lets the student propose and the teacher replace what is outside its own ``top_k`` (speculative KD, Xu et
al. 2024, algorithm 1), block by block: of a block stays what is before its first replaced token. Every draw follows
from (seed, step, row, place) alone, so that neither the batch that a row is in nor a resumed run changes it. Rows run
together over a KV cache and leave when they are done. Knows nothing of losses or tokenizers.

Shapes: B rows, V vocabulary, M most new tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compress.model.distillation.decoding import Decoder

COMPACT_BELOW = 0.875  # share of running rows at which those that are done are dropped: copying the cache costs as well
STEADY = 1.0 - 1e-12  # keeps a uniform draw inside the last token's interval


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to be answered: its tokens, the most new ones, and which row of which step it is."""

    prompt: tuple[int, ...]
    limit: int
    step: int
    row: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt with the answer that was made for it; a row as `RowTable` takes it.

    Attributes:
        row: which row of the table the prompt is of.
        ids: prompt and answer, a stop token included.
        start: length of the prompt.
        logprobs: of each new token, nats, under what it was drawn from.
        finished: whether a stop token ends it.
        own: new tokens that are the student's.
    """

    row: int
    ids: tuple[int, ...]
    start: int
    logprobs: tuple[float, ...]
    finished: bool
    own: int

    @property
    def id(self) -> str:
        """For messages."""
        return f"answer to row {self.row}"

    @property
    def answer(self) -> tuple[int, ...]:
        """1 at every new token."""
        return (0,) * self.start + (1,) * (len(self.ids) - self.start)


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        vocab: token ids in use.
        stops: tokens that end an answer.
        seed: of the draws.
        temperature: of every distribution that is drawn from.
        batch: rows that run together.
    """

    vocab: int
    stops: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    batch: int = 128


def uniforms(seed: int, step: int, row: int, count: int) -> npt.NDArray[np.float64]:
    """Draws in [0, 1) for ``count`` places of a row: (2, count), from a generator that counts (Salmon et al. 2011)."""
    two = 1 << 64
    bits = np.random.Philox(key=[seed % two, row % two], counter=[0, 0, step % two, 0])
    return np.random.Generator(bits).random((count, 2)).T


def pick(probabilities: Tensor, draw: Tensor) -> Tensor:
    """Token of each row (B,) where the cumulative sum of ``probabilities`` (B, V) passes ``draw`` (B,) of the whole."""
    cumulative = probabilities.cumsum(dim=-1)
    goal = (draw * STEADY)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True)[:, 0].clamp_(max=probabilities.shape[-1] - 1)


def log_chance(probabilities: Tensor, token: Tensor) -> Tensor:
    """Logarithm (B,) of the probability of ``token`` (B,); finite."""
    return probabilities.gather(1, token[:, None])[:, 0].clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def sample(
    student: nn.Module, asks: Sequence[Ask], drawing: Drawing, *, teacher: nn.Module | None = None, mix: float = 0.0
) -> list[Rollout]:
    """One answer per ask, in order; ``mix`` is the teacher's part in the distribution that is drawn from."""
    models = [student] if teacher is None or mix == 0.0 else [student, teacher]
    results: dict[int, Rollout] = {}
    with torch.inference_mode():
        for picked in _batches(asks, drawing.batch):
            rows = _Rows(models, [asks[i] for i in picked], drawing)
            while rows.running:
                _sampled(rows, mix)
            results |= dict(zip(picked, rows.rollouts(), strict=True))
    return [results[i] for i in range(len(asks))]


def speculate(
    student: nn.Module, teacher: nn.Module, asks: Sequence[Ask], drawing: Drawing, *, top_k: int, block: int
) -> list[Rollout]:
    """One answer per ask, in order, proposed by the student in blocks of ``block`` tokens.

    A replaced token is drawn from the teacher's ``top_k`` likeliest. With ``top_k`` 1 the answers are the teacher's
    greedy ones, with the whole vocabulary the student's own; neither depends on ``block``.
    """
    results: dict[int, Rollout] = {}
    with torch.inference_mode():
        for picked in _batches(asks, drawing.batch):
            rows = _Rows([student, teacher], [asks[i] for i in picked], drawing)
            while rows.running:
                _speculated(rows, min(top_k, drawing.vocab), block)
            results |= dict(zip(picked, rows.rollouts(), strict=True))
    return [results[i] for i in range(len(asks))]


def _batches(asks: Sequence[Ask], size: int) -> list[list[int]]:
    """Indices in batches of prompts of like length."""
    order = sorted(range(len(asks)), key=lambda i: len(asks[i].prompt))
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Rows:
    """Rows that are being answered, and the models that have read them but for their last token."""

    def __init__(self, models: Sequence[nn.Module], asks: Sequence[Ask], drawing: Drawing) -> None:
        self.asks, self.drawing = asks, drawing
        most = max(ask.limit for ask in asks)
        lengths = torch.tensor([len(ask.prompt) for ask in asks])
        prompts = np.zeros((len(asks), int(lengths.max())), dtype=np.int64)
        draws = np.zeros((2, len(asks), most))
        for at, ask in enumerate(asks):
            prompts[at, : len(ask.prompt)] = ask.prompt
            draws[:, at, : ask.limit] = uniforms(drawing.seed, ask.step, ask.row, ask.limit)
        device = next(models[0].parameters()).device
        self.draws = torch.from_numpy(draws).to(device)
        self.made = torch.zeros((len(asks), most), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((len(asks), most), dtype=torch.float64, device=device)
        self.count = torch.zeros(len(asks), dtype=torch.int64, device=device)
        self.own = torch.zeros_like(self.count)
        self.limit = torch.tensor([ask.limit for ask in asks], device=device)
        self.stops = torch.tensor(drawing.stops, dtype=torch.int64, device=device)
        self.finished = torch.zeros(len(asks), dtype=torch.bool, device=device)
        self.index = torch.arange(len(asks), device=device)  # which of the rows run
        self.alive = torch.ones_like(self.finished)  # of those that run, which are not over
        self.last = torch.from_numpy(prompts).to(device)[self.index, lengths.to(device) - 1]
        slots = int(max(len(ask.prompt) + ask.limit for ask in asks))
        self.decoders = []
        for model in models:
            decoder = Decoder(model, rows=len(asks), slots=slots, vocab=drawing.vocab)
            decoder.start(torch.from_numpy(prompts).to(device), lengths.to(device))
            self.decoders.append(decoder)

    @property
    def running(self) -> bool:
        """Whether a row is not over."""
        return bool(self.alive.any())

    def draw(self, which: int, ahead: int = 0) -> Tensor:
        """The uniform draws (B,) for the next place, or one ``ahead`` of it."""
        place = (self.count[self.index] + ahead).clamp(max=self.made.shape[1] - 1)
        return self.draws[which, self.index, place]

    def probabilities(self, states: Tensor, decoder: Decoder) -> Tensor:
        """Distribution (..., V), float64, after hidden states (..., H)."""
        return torch.softmax(decoder.logits(states).double() / self.drawing.temperature, dim=-1)

    def take(self, token: Tensor, logprob: Tensor, own: Tensor, where: Tensor) -> Tensor:
        """Note a token (B,) of the rows ``where`` (B,); returns those that go on."""
        rows = self.index[where]
        place = self.count[rows]
        self.made[rows, place], self.logprobs[rows, place] = token[where], logprob[where]
        self.count[rows] += 1
        self.own[rows] += own[where].long()
        self.last = torch.where(where, token, self.last)
        stopped = where & torch.isin(token, self.stops)
        self.finished[self.index[stopped]] = True
        full = self.count[self.index] >= self.limit[self.index]
        self.alive = self.alive & ~stopped & ~(where & full)
        return where & self.alive

    def compact(self) -> None:
        """Drop the rows that are over, when it pays."""
        alive = int(self.alive.sum())
        if 0 < alive < COMPACT_BELOW * len(self.index):
            keep = self.alive.nonzero()[:, 0]
            for decoder in self.decoders:
                decoder.select(keep)
            self.index, self.last, self.alive = self.index[keep], self.last[keep], self.alive[keep]

    def rollouts(self) -> list[Rollout]:
        """What came of the rows, in order."""
        made, logprobs = self.made.tolist(), self.logprobs.tolist()
        counts, own, finished = self.count.tolist(), self.own.tolist(), self.finished.tolist()
        return [
            Rollout(ask.row, (*ask.prompt, *made[i][:n]), len(ask.prompt), tuple(logprobs[i][:n]), finished[i], own[i])
            for i, (ask, n) in enumerate(zip(self.asks, counts, strict=True))
        ]


def _sampled(rows: _Rows, mix: float) -> None:
    """One token for every row."""
    found = [rows.probabilities(decoder.read(rows.last[:, None])[:, -1], decoder) for decoder in rows.decoders]
    probabilities = found[0] if len(found) == 1 else torch.lerp(found[0], found[1], mix)
    token = pick(probabilities, rows.draw(0))
    rows.take(token, log_chance(probabilities, token), torch.ones_like(rows.alive), rows.alive)
    rows.compact()


def _speculated(rows: _Rows, top_k: int, block: int) -> None:
    """One block for every row: the student's tokens up to the first that the teacher replaces, that one included."""
    student, teacher = rows.decoders
    before, proposed, chances, tokens = rows.last, [], [], rows.last
    for ahead in range(block):
        probabilities = rows.probabilities(student.read(tokens[:, None])[:, -1], student)
        tokens = pick(probabilities, rows.draw(0, ahead))
        proposed.append(tokens)
        chances.append(log_chance(probabilities, tokens))
    read = torch.stack([before, *proposed[:-1]], dim=1)  # (B, block)
    states = teacher.read(read)  # (B, block, H); the distributions are made one place at a time
    start = student.at - block
    going = rows.alive
    taken = torch.zeros_like(start)
    for ahead, (token, chance) in enumerate(zip(proposed, chances, strict=True)):
        judged = rows.probabilities(states[:, ahead], teacher)  # (B, V)
        floor = judged.topk(top_k, dim=-1).values[:, -1:]  # (B, 1), the last of the likeliest
        best = judged.masked_fill(judged < floor, 0.0)
        fine = (judged >= floor).gather(1, token[:, None])[:, 0]
        other = pick(best, rows.draw(1))
        instead = log_chance(best / best.sum(dim=-1, keepdim=True), other)
        taken += going.long()
        going = rows.take(torch.where(fine, token, other), torch.where(fine, chance, instead), fine, going) & fine
        if not bool(going.any()):
            break
    for decoder in rows.decoders:
        decoder.at = start + taken
    rows.compact()
