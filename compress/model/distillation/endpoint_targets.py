"""An endpoint as teacher: its top log-probabilities, asked once, as the very cache that a local teacher fills.

`endpoint_targets` fills it; `coded_places` makes one row's positions of what the server said. Servers that tell tokens
as text are read by `Spelling`: a text that several tokens share, or none has, is left to the tail, never guessed.
Knows nothing of HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.endpoint import Refused, Unanswered
from compress.endpoint_logprobs import Place, PromptScorer
from compress.errors import UserError
from compress.journal import Journal
from compress.model.distillation.cache import Coded, TargetCache, tensors_of
from compress.model.distillation.filling import Asked, EvenBatch, Said, fill
from compress.model.distillation.packing import Indices, RowTable
from compress.model.distillation.targets import CachedTargets, Codec, cache_figures, cache_header

if TYPE_CHECKING:
    from compress.context import StageContext
    from compress.model.distillation.params import LogitsParams
    from compress.teachers import EndpointTeacher

SHARD_POSITIONS = 2_048  # what the server said of a shard's rows is kept row by row until the shard is whole
SAID = "said"  # the journal of the shard that is being filled
BROKEN = "\ufffd"  # how a part of a character is written
BY_NUMBER = "token_id:"  # vLLM writes ids so when it is told to


class Spelling:
    """How a tokenizer's tokens are written as text: alone, behind another token, or as in its vocabulary."""

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab

    @cached_property
    def styles(self) -> list[list[str]]:
        """Text of every id in each style; a server's is the first that explains all tokens that were sent."""
        ids = range(self.vocab)
        anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        before = len(self._decoded([anchor]))
        behind = [self._decoded([anchor, token])[before:] for token in ids]
        raw = [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(ids))]
        return [behind, raw, [self.alone(token) for token in ids]]

    def alone(self, token: int) -> str:
        """A token's text with nothing before it."""
        return self._decoded([token])

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    @cached_property
    def unique(self) -> list[dict[str, int]]:
        """Text -> id in each style, without the texts that several tokens share."""
        found = []
        for texts in self.styles:
            seen: dict[str, int] = {}
            for token, text in enumerate(texts):
                seen[text] = -1 if text in seen else token
            found.append({text: token for text, token in seen.items() if token >= 0 and BROKEN not in text})
        return found

    def style_of(self, pairs: Sequence[tuple[int, str]]) -> int | None:
        """Number of the style in which a server wrote tokens: (id, text) as sent and told; ``None``: in none."""
        return next(
            (at for at, texts in enumerate(self.styles) if all(_same(texts[t], text) for t, text in pairs)), None
        )

    def id_of(self, text: str, style: int) -> int | None:
        """The token that is written ``text``; ``None`` when that is not certain."""
        if text.startswith(BY_NUMBER) and text[len(BY_NUMBER) :].isdigit():
            return int(text[len(BY_NUMBER) :])
        return self.unique[style].get(text)


def _same(ours: str, told: str) -> bool:
    """Whether a server may have meant the token that we write ``ours``; parts of a character have many spellings."""
    return ours == told or BROKEN in ours or told.startswith(BY_NUMBER)


def _alike(ours: str, told: str) -> bool:
    """Whether two texts are the same but for space around them, or one says nothing."""
    return BROKEN in ours + told or not told.strip() or ours.strip() == told.strip()


def endpoint_targets(
    teacher: EndpointTeacher,
    table: RowTable,
    params: LogitsParams,
    *,
    named: tuple[Any, str],
    folder: Path,
    ctx: StageContext,
    wanted: Indices | None = None,
) -> tuple[CachedTargets, dict[str, Any]]:
    """Fill a top-k cache in ``folder`` from ``teacher``, or go on with it; how the trainer asks it, and figures.

    ``wanted`` are the rows that are asked about, all where it is left out.

    Raises:
        UserError: a parameter that an endpoint cannot meet, a server that refuses, that cannot tell of given tokens,
            or that has another tokenizer.
        EdgestillError: no usable reply after all attempts; what the server said of other rows stays.
    """
    _check(params, ctx.name)
    codec = Codec("topk", params.top_k)
    header = cache_header(named, vocab=table.vocab, codec=codec, temperature=1.0)
    scorer = PromptScorer(teacher.client, header.top_k)
    spelling, journal = Spelling(named[0], table.vocab), Journal(folder, SAID)

    def code(batch: EvenBatch) -> Said:
        rows = batch.rows
        ids = [table.ids[table.starts[row] : table.starts[row] + table.lengths[row]].tolist() for row in rows]
        said = _said(scorer, ids, [table.key(row).hex() for row in rows], journal)
        style = _style(spelling, ids, said, teacher.client.url)
        parts = []
        for row, tokens, places in zip(rows, ids, said, strict=True):
            answer = table.answer[table.starts[row] : table.starts[row] + table.lengths[row]]
            asked = [(tokens[at], places[at - 1]) for at in range(1, len(tokens)) if answer[at]]
            parts.extend(asked)
        return tensors_of(coded_places(parts, spelling, style, top_k=header.top_k))

    cache = TargetCache(folder, header)
    try:
        fill(cache, Asked.of(table, wanted), code, ctx.progress, size=SHARD_POSITIONS, tokens=None)
    except (Refused, Unanswered) as error:
        asked = range(len(table)) if wanted is None else wanted.tolist()
        kept = sum(table.key(row) in cache or table.key(row).hex() in journal for row in asked)
        if not kept:
            raise
        more = f"{kept} of {len(asked)} rows are kept; the same command asks for the others alone"
        raise error.adding(more) from None
    journal.clear()
    return CachedTargets(cache, table, wanted), cache_figures(cache)


def _said(scorer: PromptScorer, ids: Sequence[list[int]], keys: Sequence[str], journal: Journal) -> list[list[Place]]:
    """What the server says of rows (their ``ids``); asked is only what ``journal`` does not hold."""
    missing = [at for at, key in enumerate(keys) if key not in journal]
    if len(missing) == len(keys):
        journal.clear()  # it is of the shard before, which is whole
    try:
        scorer.places(
            [ids[at] for at in missing],
            keep=lambda at, places: journal.put(keys[missing[at]], [place.as_json() for place in places]),
        )
    finally:
        journal.sync()
    return [[Place.of_json(place) for place in journal.get(key) or []] for key in keys]


def _check(params: LogitsParams, where: str) -> None:
    """Refuse what only a whole distribution gives."""
    for name, got, allowed, why in (
        ("targets", params.targets, "cache", "an endpoint is asked once, not in every step"),
        ("codec", params.codec, "topk", "an endpoint tells the likeliest tokens alone, so nothing can be drawn"),
        ("temperature", params.temperature, 1.0, "an endpoint tells the distribution at temperature 1"),
    ):
        if got != allowed:
            raise UserError(f"{where}.{name}", f"{got}, and {why}", str(allowed), "Or give a model folder as teacher")


def _style(spelling: Spelling, ids: Sequence[Sequence[int]], said: Sequence[Sequence[Place]], url: str) -> int:
    """The style in which the server wrote the tokens that were sent.

    Raises:
        UserError: it wrote other tokens: its tokenizer is another one.
    """
    pairs = sorted(
        {
            (token, place.text)
            for tokens, places in zip(ids, said, strict=True)
            for token, place in zip(tokens[1:], places, strict=True)
            if place.text is not None
        }
    )
    if any(place.by_text for places in said for place in places):
        style = spelling.style_of(pairs)
        if style is not None:
            return style
        wrong = [(token, text) for token, text in pairs if not _same(spelling.styles[0][token], text)]
    else:  # ids are sure, and the texts beside them depend on what stands before; most must be right all the same
        wrong = [(token, text) for token, text in pairs if not _alike(spelling.alone(token), text)]
        if 2 * len(wrong) <= len(pairs):
            return 0
    token, text = (wrong or pairs)[0]
    raise UserError(
        url,
        f"the server writes token {token} as {text!r}, and the tokenizer of the rows as {spelling.alone(token)!r}",
        "one tokenizer on both sides",
        "Serve the model whose tokenizer the student has",
    )


def coded_places(asked: Sequence[tuple[int, Place]], spelling: Spelling, style: int, *, top_k: int) -> Coded:
    """Positions as the cache stores them; ``asked`` is the token that stands there and what the server said of it.

    The likeliest ``top_k`` tokens that are known for certain are kept, the mass of everything else is the tail. Where
    fewer are known, the places left over are given to other ids, each with an even share of the tail: of those the
    server said no more than that.
    """
    vocab = spelling.vocab
    ids = torch.empty((len(asked), top_k), dtype=torch.int64)
    logprobs = torch.empty((len(asked), top_k), dtype=torch.float64)
    log_tail = torch.empty(len(asked), dtype=torch.float64)
    for row, (token, place) in enumerate(asked):
        known = _known(token, place, spelling, style)
        kept = sorted(known.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        mass = max(0.0, 1.0 - sum(math.exp(value) for _, value in kept))
        if len(kept) < top_k:
            share = mass / (vocab - len(kept))
            taken = {number for number, _ in kept}
            others = (number for number in range(vocab) if number not in taken)
            kept += [(next(others), _log(share)) for _ in range(top_k - len(kept))]
            mass = share * (vocab - top_k)
        ids[row] = torch.tensor([number for number, _ in kept])
        logprobs[row] = torch.tensor([value for _, value in kept], dtype=torch.float64)
        log_tail[row] = _log(mass)
    small = ids.to(torch.int32) if vocab > 1 << 16 else ids.to(torch.uint16)
    return Coded(small, logprobs.half(), log_tail.half())


def _known(token: int, place: Place, spelling: Spelling, style: int) -> dict[int, float]:
    """Log-probabilities of the tokens that are known for certain; that of the given ``token`` always is."""
    found = {number: value for number, value in place.by_id.items() if 0 <= number < spelling.vocab}
    for text, value in place.by_text.items():
        number = token if text == place.text else spelling.id_of(text, style)
        if number is not None and 0 <= number < spelling.vocab:
            found[number] = value
    return {number: value for number, value in found.items() if value > -math.inf}


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
