"""Progress of long work: a bar with an estimate on a terminal, plain lines elsewhere.

`Progress.track` wraps an iterable, `Progress.bar` counts by hand, `Progress.say` prints a line. A bar is drawn with
`rich.progress` on one line, whatever the width; where there is no terminal, or a dumb one, no control code is written.
Knows nothing of stages. Writes to standard error, so that ``--json`` on standard output stays clean.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Columns

from compress.errors import safe_to_show

T = TypeVar("T")
DRAW_EVERY_S = 0.1
LINE_EVERY_S, LINE_LATER_S = 10.0, 60.0  # plain mode: a line each 10 s, later a tenth of what has passed, at most 60 s
NARROW = 40  # columns below which there is no room for a bar
ERASE = "\r\x1b[2K"


class Bar:
    """A counter towards ``total``; ``advance`` draws when enough time went by."""

    def __init__(self, progress: Progress, what: str, total: int, unit: str = "") -> None:
        self.progress, self.what, self.total, self.unit = progress, what, max(total, 1), unit
        self.done = self.before = 0
        self.start = self.last = time.monotonic()

    def resume(self, n: int) -> None:
        """Count ``n`` units that an earlier run has done: they say nothing about the time that is left."""
        self.done += n
        self.before += n

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units; ``note`` (such as a loss) is shown beside the figure."""
        self.done += n
        now = time.monotonic()
        if now - self.last >= self.progress.every_s(now - self.start):
            self.last = now
            self.progress.draw(self, now, note)

    def left_s(self, now: float) -> float | None:
        """Seconds that the rest will take at the pace so far; None where nothing was done."""
        fresh = self.done - self.before
        return (now - self.start) * max(0, self.total - self.done) / fresh if fresh > 0 else None


class Progress:
    """Where progress goes; ``quiet`` shows nothing (tests, ``--json``)."""

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False, prefix: str = "") -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet, self.prefix = quiet, prefix
        self.terminal = not quiet and self.stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")

    def every_s(self, passed: float) -> float:
        """Seconds between two drawings, ``passed`` seconds after the beginning."""
        return DRAW_EVERY_S if self.terminal else max(LINE_EVERY_S, min(LINE_LATER_S, passed / 10))

    def say(self, text: str) -> None:
        """Print one line, above any bar."""
        if not self.quiet:
            print(f"{ERASE * self.terminal}{self.prefix}{safe_to_show(text)}", file=self.stream, flush=True)

    def draw(self, bar: Bar, now: float, note: str) -> None:
        """Draw ``bar`` as it stands at ``now`` (seconds of ``time.monotonic``)."""
        if self.quiet:
            return
        count = f"{bar.done:,}/{bar.total:,}{' ' * bool(bar.unit)}{bar.unit}"
        left = bar.left_s(now)
        rest = "" if left is None else f"{duration(left)} left"
        if self.terminal:
            self.stream.write(ERASE + self._line(bar, count, rest, note))
            self.stream.flush()
        else:
            told = [f"{bar.what} {count} {min(bar.done / bar.total, 1.0):.0%}", rest and f"about {rest}", note]
            self.say(", ".join(part for part in told if part))

    @contextmanager
    def bar(self, what: str, total: int, unit: str = "") -> Iterator[Bar]:
        """A bar counted by hand; ``unit`` is what is counted."""
        made = Bar(self, what, total, unit)
        if self.terminal:
            self.draw(made, made.start, "")
        try:
            yield made
        finally:
            if self.terminal:
                self.stream.write(ERASE)
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

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console  # loaded once something is drawn

        return Console(file=self.stream, highlight=False, emoji=False, markup=False)

    @cached_property
    def _columns(self) -> Columns:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def text(template: str, *, ratio: int | None = None, least: int | None = None) -> TextColumn:
            column = Column(no_wrap=True, overflow="ellipsis", ratio=ratio, min_width=least)
            return TextColumn(template, markup=False, table_column=column)

        bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))
        parts = [text("{task.description}", least=8), bar, text("{task.percentage:>3.0f}%", least=4)]
        parts += [text("{task.fields[count]}"), text("{task.fields[rest]}"), text("{task.fields[note]}")]
        return Progress(*parts, console=self._console, auto_refresh=False, expand=True)

    def _line(self, bar: Bar, count: str, rest: str, note: str) -> str:
        """The bar as one line that is narrower than the terminal; what does not fit is left out, the note first."""
        from rich.cells import cell_len, set_cell_size

        console, columns = self._console, self._columns
        width, share = max(4, console.width - 1), min(bar.done / bar.total, 1.0)  # a full line would break on some
        what, note = safe_to_show(f"{self.prefix}{bar.what}"), safe_to_show(note)
        if width < NARROW:
            return set_cell_size(f"{share:.0%} {what}", width).rstrip()
        if cell_len(what) > width // 2:
            what = set_cell_size(what, width // 2 - 1) + "\N{HORIZONTAL ELLIPSIS}"
        room = width - cell_len(what) - 4 - 4 - 6  # beside description, the shortest bar, the percentage and blanks
        shown = []
        for part in (rest, count, note):
            room -= cell_len(part)
            shown.append(part if room >= 0 else "")
        for task in columns.task_ids:
            columns.remove_task(task)
        columns.add_task(what, total=bar.total, completed=min(bar.done, bar.total), count=shown[1], rest=shown[0],
                         note=shown[2])  # fmt: skip
        with console.capture() as caught:
            console.print(columns.get_renderable(), width=width, end="")
        return caught.get().split("\n", 1)[0]


def duration(seconds: float) -> str:
    """A time that is left, as a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
