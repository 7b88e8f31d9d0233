"""A client for OpenAI-compatible servers: chat completions with log probabilities, retried within bounds.

`ChatClient.complete` asks one conversation, `complete_all` many at a time and in order; `ask` and `in_parallel` are the
same for any other kind of request. Only the standard library; knows nothing of rows, stages or torch. A server that
refuses a parameter is asked without it (``endpoint_dialects``); one that refuses otherwise (4xx) is the user's to
correct and is not asked again; one that is busy, silent or talks nonsense is asked ``attempts`` times, and then named
in an error, as is one whose reply never ends. What is in flight when the work ends has a moment to arrive.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from compress.endpoint_address import KEY_VARIABLE, check_model, check_url, read_key
from compress.endpoint_dialects import REFUSALS, Dialect
from compress.endpoint_replies import Nonsense, Reply, excerpt, read_reply
from compress.endpoint_transport import Answered, Broken, Ending, Overrun, post
from compress.errors import EdgestillError, UserError, safe_to_show
from compress.progress import Bar

__all__ = ["ChatClient", "Nonsense", "Refused", "Reply", "Request", "Unanswered", "excerpt"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
Q = TypeVar("Q")

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # worth asking again
MAX_WAIT_S = 30.0
SILENCE_S, WHOLE_S = 60.0, 70.0  # seconds without a byte, and for a whole reply from the moment that it is asked for
SECONDS_VARIABLE = "EDGESTILL_REPLY_SECONDS"  # for servers that think longer: sets both
FAILED_GRACE_S, STOPPED_GRACE_S = 30.0, 10.0  # for what is in flight when a request failed, or the user stops the work
_ENDING: ContextVar[Ending] = ContextVar("ending")  # of the work that a thread does
OPTIONAL = ("seed", "logprobs", "top_p", "temperature")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked with every conversation."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Refused(UserError):
    """The server refuses the request (4xx); ``code`` is HTTP's."""

    code = 0


class Unanswered(EdgestillError):
    """No usable reply in all attempts; ``code`` is HTTP's of the last one, 0 where there was none."""

    code = 0


class Stopped(Exception):
    """The work is to end, and this request was not asked; internal."""


def _seconds(otherwise: float) -> float:
    """The limit that the user sets, else ``otherwise``.

    Raises:
        UserError: it is no number of seconds.
    """
    text = os.environ.get(SECONDS_VARIABLE, "")
    if not text:
        return otherwise
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 86_400.0:
        raise UserError(SECONDS_VARIABLE, f"got {text!r}", "seconds, from 1 to 86400")
    return value


@dataclass(frozen=True)
class ChatClient:
    """Talks to ``url`` (such as ``http://localhost:8000/v1``) about ``model``.

    Attributes:
        timeout_s: how long the server may stay silent.
        whole_s: how long it may take for a whole reply.
        attempts: how often a request is sent at most.
        backoff_s: pause before the second attempt, doubled each time; a server's Retry-After goes first.
        key_variable: environment variable that holds the API key; nothing is sent when it is unset.
        parallel: requests in flight.
        dialect: what the server was found to take.
    """

    url: str
    model: str
    timeout_s: float = field(default_factory=lambda: _seconds(SILENCE_S))
    whole_s: float = field(default_factory=lambda: _seconds(WHOLE_S))
    attempts: int = 4
    backoff_s: float = 1.0
    key_variable: str = KEY_VARIABLE
    parallel: int = 4
    dialect: Dialect = field(default_factory=Dialect, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        check_model(self.model)
        read_key(self.key_variable)

    def complete_all(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        request: Request,
        *,
        bar: Bar | None = None,
        keep: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """Answers in the order of ``conversations``; the first failure stops the rest. ``keep`` as `in_parallel`."""
        return self.in_parallel(lambda asked: self.complete(asked, request), conversations, bar=bar, keep=keep)

    def in_parallel(
        self,
        ask: Callable[[Q], T],
        questions: Sequence[Q],
        *,
        bar: Bar | None = None,
        keep: Callable[[int, T], None] | None = None,
    ) -> list[T]:
        """What ``ask`` gives for ``questions``, in their order, some at a time; the first failure stops the rest.

        ``keep`` is called with the number of a question and its answer as soon as that is there, by several threads,
        also for those that arrive after a failure or an interrupt.
        """
        ending, counting = Ending(), threading.Lock()

        def one(at: int) -> T:
            _ENDING.set(ending)
            if ending.called:
                raise Stopped
            answer = ask(questions[at])
            if keep is not None:
                keep(at, answer)
            if bar is not None:
                with counting:
                    bar.advance()
            return answer

        futures: list[Future[T]] = []
        grace_s = FAILED_GRACE_S
        pool = ThreadPoolExecutor(max_workers=self.parallel)
        try:
            futures += [pool.submit(one, at) for at in range(len(questions))]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            grace_s = STOPPED_GRACE_S
            raise
        finally:
            ending.within(grace_s)  # what is in flight is paid for; what is not begun is never asked
            try:
                wait([future for future in futures if not future.cancel()], timeout=grace_s + 1.0)
            finally:
                ending.within(0.0)
                pool.shutdown(wait=False, cancel_futures=True)

    def complete(self, messages: Sequence[Mapping[str, str]], request: Request) -> Reply:
        """Ask one conversation.

        Raises:
            UserError: the server refuses the request (4xx): key, model name, parameters.
            Unanswered: no usable reply after all attempts.
        """
        body = {
            "messages": [dict(message) for message in messages],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "logprobs": True,
        }
        if request.top_p != 1.0:
            body["top_p"] = request.top_p
        return self.ask(
            "chat/completions", body, lambda content: read_reply(content, request.max_new_tokens), may_miss=OPTIONAL
        )

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T], *, may_miss: Sequence[str] = ()) -> T:
        """Send ``body`` to ``path`` below the URL and give what ``read`` makes of the reply, within the attempts.

        ``read`` raises `Nonsense` for a reply that is not what the protocol says; the request is then repeated. The
        parameters ``may_miss`` are left out for a server that refuses them.

        Raises:
            UserError, Unanswered: as `complete`.
        """
        why, code, attempt, ending = "", 0, 0, _ENDING.get(Ending())
        while attempt < self.attempts:
            wait_s, code = self.backoff_s * 2**attempt, 0
            try:
                return read(self._adapted(path, {"model": self.model, **body}, may_miss))
            except Answered as answered:
                why, code = f"HTTP {answered.code}: {excerpt(answered.body)}", answered.code
                if code not in BUSY:
                    raise self._refused(answered, why) from None
                wait_s = _retry_after(answered.retry_after, wait_s)
            except Overrun as error:  # asking again would take as long again
                why = str(error)
                break
            except (Nonsense, Broken) as error:
                why = str(error)
            attempt += 1
            logger.warning("%s: attempt %d of %d: %s", self.url, attempt, self.attempts, safe_to_show(why))
            if attempt < self.attempts and ending.pause(min(wait_s, MAX_WAIT_S)):
                raise Stopped
        raise self._unanswered(why, code, attempt)

    def _adapted(self, path: str, body: Mapping[str, Any], may_miss: Sequence[str]) -> bytes:
        """The reply to ``body`` in the server's own words; a refusal that teaches something is not the last.

        Raises:
            Answered, Broken: as `endpoint_transport.post`.
        """
        for _ in range(2 * len(body)):
            sent = self.dialect.spoken(path, body)
            try:
                return self._post(path, json.dumps(sent).encode())
            except Answered as answered:
                if answered.code not in REFUSALS or not self.dialect.learn(path, sent, answered.body, may_miss):
                    raise
        return self._post(path, json.dumps(self.dialect.spoken(path, body)).encode())

    def _post(self, path: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = read_key(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        limits = {"silence_s": self.timeout_s, "whole_s": max(self.whole_s, self.timeout_s)}
        content = post(f"{self.url.rstrip('/')}/{path}", body, headers, ending=_ENDING.get(Ending()), **limits)
        code = _error_inside(content)
        if code:
            raise Answered(code, content)
        return content

    def _unanswered(self, why: str, code: int, attempt: int) -> Unanswered:
        if attempt < self.attempts:
            got = f"no usable reply: {why}"
            do = f"Check the server; where it needs longer, set {SECONDS_VARIABLE} to the seconds that a reply may take"
        else:
            got = f"no usable reply in {self.attempts} attempts; the last: {why}"
            do = "Check that the server runs and is not overloaded"
        failure = Unanswered(self.url, got, do=do)
        failure.code = code
        return failure

    def _refused(self, answered: Answered, why: str) -> Refused:
        code = answered.code
        advice = {
            401: f"Set the environment variable {self.key_variable}",
            402: "Pay for more at the provider",
            403: f"Check the key in the environment variable {self.key_variable}",
            404: f"Check the URL (it ends in /v1 on most servers) and the model name {self.model!r}",
        }
        if 300 <= code < 400:
            to = " ".join(safe_to_show(answered.location.partition("?")[0]).split())[:200] or "nowhere"
            why = f"HTTP {code}, it sends on to {to}, and redirects are not followed: they would carry the key along"
            advice[code] = "If you trust that address, give it as the teacher's, up to /v1"
        error = Refused(self.url, f"the server refuses: {why}", do=advice.get(code, "Check the endpoint's settings"))
        error.code = code
        return error


def _error_inside(content: bytes) -> int:
    """The code of an error that a server sends as if it were a reply (200); 0 where it is a reply."""
    if content.lstrip()[:1] != b"{" or b'"error"' not in content[:4096]:
        return 0
    try:
        found = json.loads(content)
        error = None if found.get("choices") else found.get("error")
        code = error.get("code", error.get("status")) if isinstance(error, dict) else None
        return int(code) if isinstance(code, int) and 400 <= code < 600 else 0
    except (ValueError, AttributeError, RecursionError):
        return 0


def _retry_after(text: str, otherwise: float) -> float:
    """Seconds that the server asks to wait; a date or nonsense counts for nothing."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return otherwise
