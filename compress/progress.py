"""Progress of long work: a bar with an estimate on a terminal, plain lines elsewhere.

`Progress.track` wraps an iterable, `Progress.bar` counts by hand, `Progress.say` prints a line.
Knows nothing of stages. Writes to standard error, so that ``--json`` on standard output stays clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from compress.errors import safe_to_show

T = TypeVar("T")
LINE_EVERY_S = 10.0  # plain mode: one line per this many seconds, so that a log stays readable


class Bar:
    """A counter towards ``total``; ``advance`` draws when enough time went by."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, max(total, 1), 0
        self.start = self.last = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units; ``note`` (such as a loss) is shown beside the figure."""
        self.done += n
        now = time.monotonic()
        if now - self.last >= self.progress.every_s:
            self.last = now
            self.progress.draw(self, now, note)


class Progress:
    """Where progress goes; ``quiet`` shows nothing (tests, ``--json``)."""

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False, prefix: str = "") -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet, self.prefix = quiet, prefix
        self.terminal = self.stream.isatty() and not quiet
        self.every_s = 0.1 if self.terminal else LINE_EVERY_S

    def say(self, text: str) -> None:
        """Print one line, above any bar."""
        if not self.quiet:
            clear = "\r\x1b[2K" if self.terminal else ""
            print(f"{clear}{self.prefix}{safe_to_show(text)}", file=self.stream, flush=True)

    def draw(self, bar: Bar, now: float, note: str) -> None:
        """Draw ``bar`` as it stands at ``now`` (seconds of ``time.monotonic``)."""
        if self.quiet:
            return
        share = min(bar.done / bar.total, 1.0)
        left = (now - bar.start) * (1 - share) / share if share > 0 else 0.0
        text = f"{bar.what} {bar.done}/{bar.total} {share:4.0%}, about {left:.0f} s left"
        if note:
            text += f", {note}"
        if self.terminal:
            filled = round(share * 20)
            self.stream.write(f"\r\x1b[2K{self.prefix}[{'=' * filled}{' ' * (20 - filled)}] {safe_to_show(text)}")
            self.stream.flush()
        else:
            self.say(text)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        """A bar counted by hand."""
        yield Bar(self, what, total)
        if self.terminal:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and count them."""
        if total is None:
            items = list(items)
            total = len(items)
        with self.bar(what, total) as bar:
            for item in items:
                yield item
                bar.advance()
