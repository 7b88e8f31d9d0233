"""A client for OpenAI-compatible servers: chat completions with log probabilities, retried within bounds.

`ChatClient.complete` asks one conversation, `complete_all` many at a time and in order; `ask` and `in_parallel` are the
same for any other kind of request. Only the standard library;
knows nothing of rows, stages or torch. A server that refuses (4xx) is the user's to correct and is not asked again;
one that is busy, slow, silent or talks nonsense is asked ``attempts`` times, and then named in an error.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from compress.errors import EdgestillError, UserError
from compress.progress import Bar

logger = logging.getLogger(__name__)
T = TypeVar("T")
Q = TypeVar("Q")

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # worth asking again
MAX_REPLY_BYTES = 16 << 20
MAX_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as text. ``mean_logprob`` (nats per token) is NaN where the server gave none."""

    text: str
    mean_logprob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked with every conversation."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Nonsense(Exception):
    """A reply that is not what the protocol says; becomes an `EdgestillError` when it is the last."""


class Refused(UserError):
    """The server refuses the request (4xx); ``code`` is HTTP's."""

    code = 0


class Unanswered(EdgestillError):
    """No usable reply in all attempts; ``code`` is HTTP's of the last one, 0 where there was none."""

    code = 0


@dataclass(frozen=True)
class ChatClient:
    """Talks to ``url`` (such as ``http://localhost:8000/v1``) about ``model``.

    Attributes:
        timeout_s: how long the server may stay silent.
        attempts: how often a request is sent at most.
        backoff_s: pause before the second attempt, doubled each time; a server's Retry-After goes first.
        key_variable: environment variable that holds the API key; nothing is sent when it is unset.
        parallel: requests in flight.
    """

    url: str
    model: str
    timeout_s: float = 60.0
    attempts: int = 4
    backoff_s: float = 1.0
    key_variable: str = "OPENAI_API_KEY"
    parallel: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("teacher", f"the endpoint is {self.url!r}", "a URL such as http://localhost:8000/v1")
        if not self.model:
            raise UserError(
                "teacher", "the endpoint names no model", "URL#MODEL, such as http://localhost:8000/v1#llama"
            )
        if parts.username or parts.password:
            raise UserError("teacher", "the endpoint's URL holds a password", "the key in an environment variable")

    def complete_all(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], request: Request, *, bar: Bar | None = None
    ) -> list[Reply]:
        """Answers in the order of ``conversations``; the first failure stops the rest."""
        return self.in_parallel(lambda conversation: self.complete(conversation, request), conversations, bar=bar)

    def in_parallel(self, ask: Callable[[Q], T], questions: Sequence[Q], *, bar: Bar | None = None) -> list[T]:
        """What ``ask`` gives for ``questions``, in their order, some at a time; the first failure stops the rest."""
        with ThreadPoolExecutor(max_workers=self.parallel) as pool:
            futures = [pool.submit(ask, question) for question in questions]
            try:
                found = []
                for future in futures:
                    found.append(future.result())
                    if bar is not None:
                        bar.advance()
                return found
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

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
            "top_p": request.top_p,
            "seed": request.seed,
            "logprobs": True,
        }
        return self.ask("chat/completions", body, _read_reply)

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """Send ``body`` to ``path`` below the URL and give what ``read`` makes of the reply, within the attempts.

        ``read`` raises `Nonsense` for a reply that is not what the protocol says; the request is then repeated.

        Raises:
            UserError, Unanswered: as `complete`.
        """
        content = json.dumps({"model": self.model, **body}).encode()
        why, code = "", 0
        for attempt in range(self.attempts):
            wait, code = self.backoff_s * 2**attempt, 0
            try:
                return read(self._post(path, content))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}: {excerpt(_error_body(error))}"
                if error.code not in BUSY:
                    raise self._refused(error.code, why) from error
                wait, code = _retry_after(error, wait), error.code
            except Nonsense as error:
                why = str(error)
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSError
                why = _transport(error)
            logger.warning("%s: attempt %d of %d: %s", self.url, attempt + 1, self.attempts, why)
            if attempt + 1 < self.attempts:
                time.sleep(min(wait, MAX_WAIT_S))
        failure = Unanswered(
            self.url,
            f"no usable reply in {self.attempts} attempts; the last: {why}",
            do="Check that the server runs and is not overloaded, then run again: what is done is kept",
        )
        failure.code = code
        raise failure

    def _post(self, path: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(self.key_variable, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/{path}"
        request = urllib.request.Request(address, data=body, headers=headers, method="POST")  # noqa: S310 - checked
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:  # noqa: S310 - http(s) only, checked
            content: bytes = response.read(MAX_REPLY_BYTES + 1)
            promised = response.headers.get("Content-Length", "")
        if len(content) > MAX_REPLY_BYTES:
            raise Nonsense(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
        if promised.isdigit() and len(content) < int(promised):  # reading with a limit does not notice by itself
            raise Nonsense(f"the connection broke after {len(content)} of {promised} bytes")
        return content

    def _refused(self, code: int, why: str) -> Refused:
        advice = {
            401: f"Set the environment variable {self.key_variable}",
            403: f"Check the key in the environment variable {self.key_variable}",
            404: f"Check the URL (it ends in /v1 on most servers) and the model name {self.model!r}",
        }
        error = Refused(self.url, f"the server refuses: {why}", do=advice.get(code, "Check the endpoint's settings"))
        error.code = code
        return error


def _read_reply(content: bytes) -> Reply:
    """The first choice of a chat completion."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
        logprobs = [float(token["logprob"]) for token in ((choice.get("logprobs") or {}).get("content") or [])]
        finished = choice.get("finish_reason") == "stop"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Nonsense(f"not a chat completion: {excerpt(content)}") from error
    if text is None:
        text = ""  # servers give null for an answer without text
    if not isinstance(text, str):
        raise Nonsense(f"the message is no text: {excerpt(content)}")
    mean = sum(logprobs) / len(logprobs) if logprobs else math.nan
    return Reply(text, mean if math.isfinite(mean) else math.nan, finished)


def _transport(error: OSError | http.client.HTTPException) -> str:
    reason: Any = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection broke after {len(error.partial)} bytes"
    if isinstance(reason, TimeoutError):
        return "no reply in time"
    return str(reason) or type(reason).__name__


def _retry_after(error: urllib.error.HTTPError, otherwise: float) -> float:
    """Seconds that the server asks to wait; a date or nonsense counts for nothing."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except (ValueError, AttributeError):
        return otherwise


def _error_body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(4096)
    except (OSError, http.client.HTTPException):
        return b""


def excerpt(content: bytes) -> str:
    """The beginning of a reply for a message, on one line."""
    text = " ".join(content[:400].decode("utf-8", errors="replace").split())
    return (text[:160] + " ...") if len(text) > 160 else (text or "(empty)")
