"""One HTTP request to an endpoint and its whole reply, within bounds of time and size.

`post` sends and reads. No redirect is followed: it would carry the key and the rows to somewhere else. A reply ends
within ``whole_s`` seconds however slowly it drips, headers included, and is at most `MAX_REPLY_BYTES` long. `Ending`
tells requests in flight that they have little time left. Proxies of the environment are used. Knows nothing of models.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from compress.errors import safe_to_show

MAX_REPLY_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
LOOK_EVERY_S = 0.25  # how soon a request in flight notices that it is to end


class Answered(Exception):
    """The server answered with another code than 2xx; ``code``, ``body``, ``retry_after`` and ``location`` say how."""

    def __init__(self, code: int, body: bytes, *, retry_after: str = "", location: str = "") -> None:
        super().__init__(code)
        self.code, self.body, self.retry_after, self.location = code, body, retry_after, location


class Broken(Exception):
    """No whole reply came: the text says why."""


class Overrun(Broken):
    """The reply was not whole in time, although something came."""


class Ending:
    """Says until when requests in flight may go on; without end until `within` is called."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._until = 0.0

    def within(self, seconds: float) -> None:
        """Requests in flight have ``seconds`` left, and none is begun any more."""
        self._until = time.monotonic() + seconds
        self._event.set()

    def pause(self, seconds: float) -> bool:
        """Wait; whether the end was called meanwhile."""
        return self._event.wait(seconds)

    @property
    def called(self) -> bool:
        """Whether no new request may begin."""
        return self._event.is_set()

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self._event.is_set() and time.monotonic() >= self._until


class _Clock:
    """The limits of one request."""

    def __init__(self, silence_s: float, whole_s: float, ending: Ending) -> None:
        self.silence_s, self.whole_s, self.ending = silence_s, whole_s, ending
        self.start, self.came = time.monotonic(), 0

    def receive(self, sock: Any, into: Any) -> int:
        """``sock.recv_into`` within the limits.

        Raises:
            Overrun, Broken: the reply takes too long, or the work is to end.
            TimeoutError: the server was silent for too long.
        """
        quiet_until = time.monotonic() + self.silence_s
        while True:
            now = time.monotonic()
            if self.ending.over:
                raise Broken("the work was ended")
            if now >= self.start + self.whole_s:
                raise Overrun(f"the reply was not whole after {self.whole_s:.0f} s, {self.came} bytes had come")
            if now >= quiet_until:
                raise TimeoutError
            sock.settimeout(max(0.01, min(LOOK_EVERY_S, quiet_until - now, self.start + self.whole_s - now)))
            try:
                count: int = sock.recv_into(into)
            except TimeoutError:
                continue
            self.came += count
            return count


class _Stream(io.RawIOBase):
    """What a response reads from, in place of the socket's own file."""

    def __init__(self, sock: Any, clock: _Clock) -> None:
        super().__init__()
        self.sock, self.clock = sock, clock
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open until this is closed

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, into: Any) -> int:
        """As `_Clock.receive`."""
        return self.clock.receive(self.sock, into)

    def close(self) -> None:
        """Let go of the socket."""
        self._file.close()
        super().close()


def _timed(kind: Any, clock: _Clock) -> Callable[..., Any]:
    """Connections of ``kind`` whose responses keep to ``clock``."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp.close()
            self.fp = io.BufferedReader(_Stream(sock, clock))

    def connect(host: str, **options: Any) -> Any:
        connection = kind(host, **options)
        connection.response_class = Response
        return connection

    return connect


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self.clock = clock

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_timed(http.client.HTTPConnection, self.clock), req)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self.clock = clock

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_timed(http.client.HTTPSConnection, self.clock), req, context=self._context)  # type: ignore[attr-defined]


def post(
    address: str, body: bytes, headers: Mapping[str, str], *, silence_s: float, whole_s: float, ending: Ending
) -> bytes:
    """The reply to ``body``, whole.

    Raises:
        Answered: another code than 2xx, redirects among them.
        Broken: no reply, none in time, or only a part of one.
    """
    clock = _Clock(silence_s, whole_s, ending)
    opener = urllib.request.OpenerDirector()  # with these alone: nothing follows redirects or opens files
    for handler in (
        urllib.request.ProxyHandler(),
        _Plain(clock),
        _Secure(clock),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(address, data=body, headers=dict(headers), method="POST")  # noqa: S310 - checked
    try:
        with opener.open(request, timeout=silence_s) as response:
            content: bytes = response.read(MAX_REPLY_BYTES + 1)
            promised, coding = (response.headers.get(name, "") for name in ("Content-Length", "Content-Encoding"))
    except urllib.error.HTTPError as error:
        with error:
            told = (error.headers.get(name, "") for name in ("Retry-After", "Location"))
            retry_after, location = told
            raise Answered(error.code, _error_body(error), retry_after=retry_after, location=location) from None
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:  # URLError is an OSError
        raise Broken(_why(error)) from None
    if len(content) > MAX_REPLY_BYTES:
        raise Broken(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
    if promised.isdigit() and len(content) < int(promised):  # reading with a limit does not notice by itself
        raise Broken(f"the connection broke after {len(content)} of {promised} bytes")
    if coding.lower() not in ("", "identity"):
        raise Broken(f"the reply is compressed ({coding[:40]}), although the request did not offer that")
    return content


def _error_body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(MAX_ERROR_BYTES)
    except (OSError, http.client.HTTPException, ValueError, Broken):
        return b""


def _why(error: Exception) -> str:
    reason: Any = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection broke after {len(error.partial)} bytes"
    if isinstance(reason, TimeoutError):
        return "no reply in time"
    return safe_to_show(" ".join(str(reason).split())[:200]) or type(reason).__name__
