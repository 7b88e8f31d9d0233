"""What libraries write on standard error while a command works: kept aside, and shown once at the end.

Loggers, warnings and native code alike write to the file descriptor 2. `begin` points it at a file and gives back a
stream to the real standard error, for progress; `end` points it back and shows what came, each line once. A long text
stays in its file, which is named; so it does when the process is killed. Where standard error is not the descriptor
(a program that calls edgestill), nothing is touched. Knows nothing of commands.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from compress.errors import safe_to_show

STDERR = 2
SHOWN_LINES, SHOWN_LETTERS = 10, 400
BARS = re.compile(r"\d+%\|.*\|")  # a library's own progress bar: each of its states is a line


@dataclass
class _Aside:
    """Where standard error was, and the file that stands in for it."""

    real: TextIO
    path: Path


_now: list[_Aside] = []


def begin() -> TextIO:
    """Keep aside what is written on standard error from now on; returns a stream to where it went before."""
    if _now:
        return _now[0].real
    try:
        if sys.stderr is None or sys.stderr.fileno() != STDERR:
            return sys.stderr
        sys.stderr.flush()
        handle, name = tempfile.mkstemp(prefix="edgestill-messages-", suffix=".log")
    except (OSError, ValueError):  # a stream of a caller's own, or no place for a file
        return sys.stderr
    real = os.fdopen(os.dup(STDERR), "w", encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(handle, STDERR)
    os.close(handle)
    _now.append(_Aside(real, Path(name)))
    return real


def end() -> None:
    """Give standard error back and show on it what libraries wrote in the meantime."""
    if not _now:
        return
    aside = _now.pop()
    sys.stderr.flush()
    aside.real.flush()
    os.dup2(aside.real.fileno(), STDERR)
    aside.real.close()
    lines = told(aside.path.read_text(encoding="utf-8", errors="replace"))
    for line in lines[:SHOWN_LINES]:
        sys.stderr.write(f"note: {line}\n")
    if len(lines) > SHOWN_LINES:
        sys.stderr.write(f"note: {len(lines) - SHOWN_LINES} more messages of libraries: {aside.path}\n")
    else:
        aside.path.unlink(missing_ok=True)


def told(text: str) -> list[str]:
    """The different lines of ``text`` in their order, with how often each came; a bar's states are left out."""
    lines = [safe_to_show(line).strip() for line in re.split(r"[\r\n]+", text)]
    counted = Counter(line for line in lines if line and not BARS.search(line))
    return [
        f"{line[:SHOWN_LETTERS]}{'...' * (len(line) > SHOWN_LETTERS)}{f' ({times} times)' * (times > 1)}"
        for line, times in counted.items()
    ]
