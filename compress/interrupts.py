"""Ctrl-C, SIGTERM and SIGHUP: one way to end every command, with exit code 130 and nothing left behind.

`end_at_once` is the handler in the first moments of the command, while its imports run: an interrupt in the midst of an
import would end in a traceback, and there is nothing to clean up yet. Then the command's own handling takes over
(`hand_over`): all three are a KeyboardInterrupt. A signal that is ignored stays so, as SIGHUP under nohup. Loads
nothing that Python has not loaded anyway, so that the moment without a handler is as short as it can be.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def begin() -> None:
    """Let these signals end the process at once, unless they are ignored or someone handles them."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, end_at_once)


def end_at_once(_number: int, _frame: object) -> None:
    """The handler: one message and the exit code, without unwinding what is half imported."""
    sys.stderr.write("edgestill: error: interrupted before anything was done\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def hand_over() -> None:
    """Make an exception of these signals: from here on it is caught, and what runs can clean up."""
    for number in SIGNALS:
        if signal.getsignal(number) is end_at_once:
            signal.signal(number, signal.default_int_handler)
