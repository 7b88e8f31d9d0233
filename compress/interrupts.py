"""Ctrl-C in the first moments of the command, while its imports run.

`end_at_once` is the handler until the command's own handling takes over (`hand_over`): an interrupt in the midst of
an import would end in a traceback, and there is nothing to clean up yet. Loads nothing that Python has not loaded
anyway, so that the moment without a handler is as short as it can be.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def begin() -> None:
    """Let Ctrl-C end the process at once, unless it is ignored, as under nohup."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(_number: int, _frame: object) -> None:
    """The handler: one message and the exit code, without unwinding what is half imported."""
    sys.stderr.write("edgestill: error: interrupted before anything was done\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def hand_over() -> None:
    """Give Ctrl-C back to Python: from here on it is an exception that is caught, and what runs can clean up."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
