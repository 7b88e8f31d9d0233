"""Log-probabilities of given tokens from an OpenAI-compatible server: what it would have said there.

`PromptScorer.places` asks ``/completions`` with token ids as the prompt, in one of two forms: ``prompt_logprobs``
(vLLM: by token id) or ``echo`` with ``logprobs`` (the older OpenAI form: by text). Chat completions tell only of tokens
that the server itself chose and are not asked. Knows neither tokenizers nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.endpoint import ChatClient, Nonsense, Refused, Unanswered, excerpt
from compress.errors import UserError
from compress.progress import Bar

Form = Literal["prompt_logprobs", "echo"]
Ids = Sequence[int]
FORMS: tuple[Form, ...] = ("prompt_logprobs", "echo")
MAY_MISS = ("temperature",)  # the token that is generated is thrown away
ABOVE_ONE = 0.01  # by how much rounding may lift a sum of probabilities


@dataclass(frozen=True, slots=True)
class Place:
    """What a server says of one token of a prompt, given those before it; nats.

    Attributes:
        text: the token as the server writes it; ``None`` where it does not.
        by_id: log-probabilities by token id.
        by_text: log-probabilities by text, where the server tells no ids.
    """

    text: str | None
    by_id: dict[int, float] = field(default_factory=dict)
    by_text: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.by_id) + len(self.by_text)

    def as_json(self) -> list[Any]:
        """The same as a JSON value; a likelihood of nothing (minus infinity) is null there."""
        values = [{str(n): v if v > -math.inf else None for n, v in one.items()} for one in (self.by_id, self.by_text)]
        return [self.text, *values]

    @staticmethod
    def of_json(value: list[Any]) -> Place:
        """Undo `as_json`."""
        text, by_id, by_text = value
        known = [{n: -math.inf if v is None else float(v) for n, v in one.items()} for one in (by_id, by_text)]
        return Place(text, {int(n): v for n, v in known[0].items()}, known[1])


class _NotThisForm(Exception):
    """The reply is a completion, but without what this form asks for; internal."""


class PromptScorer:
    """Asks ``client`` for the ``top_k`` likeliest tokens at every place of prompts; the form is found out once."""

    def __init__(self, client: ChatClient, top_k: int) -> None:
        self.client, self.top_k = client, top_k
        self.form: Form | None = None

    def places(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        bar: Bar | None = None,
        keep: Callable[[int, list[Place]], None] | None = None,
    ) -> list[list[Place]]:
        """For each prompt of T token ids the T - 1 places behind its first token, in order.

        ``keep`` is called with the number of a prompt and its places as soon as they are there, by several threads.

        Raises:
            UserError: the server refuses, gives no log-probabilities of given tokens, too few of them, or reads
                another number of tokens.
            EdgestillError: no usable reply after all attempts.
        """
        if not prompts:
            return []
        first: list[list[Place]] = []
        if self.form is None:
            first = [self._probe(prompts[0])]
            if keep is not None:
                keep(0, first[0])
            if bar is not None:
                bar.advance()
        form = self.form
        assert form is not None, "the probe found it or raised"
        begin = len(first)
        later = None if keep is None else lambda at, places: keep(begin + at, places)
        return first + self.client.in_parallel(lambda ids: self._ask(ids, form), prompts[begin:], bar=bar, keep=later)

    def _probe(self, ids: Sequence[int]) -> list[Place]:
        """Ask in each form until one is understood."""
        why, silent = [], 0
        for form in FORMS:
            try:
                found = self._ask(ids, form)
            except _NotThisForm as error:
                why.append(f"{form}: {error}")
            except Refused as error:
                if error.code in (401, 403):
                    raise  # the key, which no form mends
                why.append(f"{form}: {error.got}")
            except Unanswered as error:
                silent += 1
                if error.code != 500 or silent == len(FORMS):  # some servers fail on a field that they do not know
                    raise
                why.append(f"{form}: {error.got}")
            else:
                self.form = form
                return found
        raise UserError(
            self.client.url,
            f"the server gives no log-probabilities of given tokens ({'; '.join(why)})",
            "a server whose /v1/completions takes token ids and knows prompt_logprobs, or echo with logprobs",
            f"Lower top_k (now {self.top_k}) if it is above the server's limit (vLLM: --max-logprobs), or give a model "
            "folder as teacher",
        )

    def _ask(self, ids: Sequence[int], form: Form) -> list[Place]:
        # one token is generated and thrown away: not every server takes 0, and some read it as without end
        body: dict[str, Any] = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        body |= {"prompt_logprobs": self.top_k} if form == "prompt_logprobs" else {"echo": True, "logprobs": self.top_k}
        read = _by_id if form == "prompt_logprobs" else _by_text
        found = self.client.ask("completions", body, lambda content: self._read(read, content, ids), may_miss=MAY_MISS)
        # tokens of one text are one entry: by text a place may tell of fewer, but with a limit every place does
        sizes = [len(place) for place in found] or [self.top_k]
        told = min(sizes) if form == "prompt_logprobs" else max(sizes)
        if told < self.top_k:
            raise UserError(
                self.client.url,
                f"the server gives {told} log-probabilities of a token, and top_k is {self.top_k}",
                do=f"Lower top_k to {told}, or raise the server's limit (vLLM: --max-logprobs)",
            )
        return found

    def _read(self, read: Callable[[Any, Ids], list[Place]], content: bytes, ids: Ids) -> list[Place]:
        """The places of a reply.

        Raises:
            Nonsense: it is no completion, or has no such figures although others had, or impossible ones.
            UserError: the server counts other tokens than were sent.
        """
        try:
            found = read(json.loads(content)["choices"][0], ids)
        except _NotThisForm as error:
            if self.form is None:
                raise
            raise Nonsense(f"{error}, though earlier replies had them") from error
        except _Count as error:
            raise UserError(
                self.client.url,
                f"the server tells of {error} tokens where {len(ids)} were sent",
                "a server that takes token ids as they are",
                "Check that it serves the model whose tokenizer made the rows, and that it cuts no prompt",
            ) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Nonsense(f"not a completion with log-probabilities: {excerpt(content)}") from error
        for place in found:
            values = (*place.by_id.values(), *place.by_text.values())
            if not all(value < ABOVE_ONE for value in values) or sum(map(math.exp, values)) > 1 + ABOVE_ONE:
                raise Nonsense("log-probabilities that no distribution has")  # NaN fails the comparison
        return found


class _Count(Exception):
    """Another number of tokens than was sent; internal."""


def _by_id(choice: dict[str, Any], ids: Ids) -> list[Place]:
    """The form of vLLM: a list with one mapping of token ids per token, nothing for the first."""
    listed = choice.get("prompt_logprobs")
    if listed is None:
        raise _NotThisForm("the reply has no prompt_logprobs")
    if len(listed) != len(ids):
        raise _Count(len(listed))
    found = []
    for token, place in zip(ids[1:], listed[1:], strict=True):
        text = place.get(str(token), {}).get("decoded_token")
        values = {int(name): float(entry["logprob"]) for name, entry in place.items()}
        found.append(Place(text if isinstance(text, str) else None, values))
    return found


def _by_text(choice: dict[str, Any], ids: Ids) -> list[Place]:
    """The older form of OpenAI: parallel lists over the prompt and, behind it, what was generated."""
    told, tokens = choice.get("logprobs"), len(ids)
    if not told or told.get("top_logprobs") is None:
        raise _NotThisForm("the reply has no top_logprobs")
    texts, given, top = told["tokens"], told["token_logprobs"], told["top_logprobs"]
    if not tokens <= len(texts) <= tokens + 1 or len(top) != len(texts) or len(given) != len(texts):
        raise _Count(len(texts))
    if len(texts) == 1 and tokens == 1:
        return []
    if top[1:tokens] and all(place is None for place in top[1:tokens]):
        raise _NotThisForm("the reply has no top_logprobs of the prompt's tokens")
    found = []
    for text, logprob, place in zip(texts[1:tokens], given[1:tokens], top[1:tokens], strict=True):
        values = {str(name): float(value) for name, value in place.items()}
        found.append(Place(str(text), by_text=values | {str(text): float(logprob)}))
    return found
