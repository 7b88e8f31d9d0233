"""Quiet enough to time: a ratio of speeds is told when runs on a machine that did nothing else give it.

`QuietRuns` waits before each run until the load average is below `LIMIT`, and looks during it at what other processes
took of the processors; beside load it ends the program with exit code 1, so that no table is printed. `lowest` picks
the run whose ratio is told. Knows nothing of what is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psutil

LIMIT = 0.3  # load average before a run, and cores that others may take during it
RUNS = 3
POLL_S = 5.0
Run = TypeVar("Run")


def add_option(parser: argparse.ArgumentParser) -> None:
    """How long a run waits for a quiet machine."""
    parser.add_argument("--wait", type=float, default=900.0, help="seconds to wait for a quiet machine before a run")


class QuietRuns:
    """Lets runs happen on a quiet machine alone."""

    def __init__(
        self, wait_s: float, *, load: Callable[[], float] | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.wait_s, self.sleep = wait_s, sleep
        self.load = load or (lambda: os.getloadavg()[0])
        self.loads: list[float] = []  # before each run

    def wait(self) -> None:
        """Return once the machine is quiet; SystemExit when it is not in time."""
        waited = 0.0
        while (seen := self.load()) >= LIMIT:
            if waited >= self.wait_s:
                raise SystemExit(refusal(f"the load average is {seen:.2f} after {waited:.0f} s of waiting"))
            self.sleep(POLL_S)
            waited += POLL_S
        self.loads.append(seen)

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run: waits before it, and refuses it when other processes worked meanwhile."""
        self.wait()
        start, others = time.monotonic(), _others_s()
        yield
        cores = (_others_s() - others) / max(time.monotonic() - start, 1e-9)
        if cores >= LIMIT:
            raise SystemExit(refusal(f"other processes took {cores:.2f} cores during the run"))

    def told(self) -> str:
        """The loads before the runs, for the text below a table."""
        return f"load average before each run {', '.join(f'{load:.2f}' for load in self.loads)}"


def refusal(what: str) -> str:
    """Why there is no table."""
    return f"no table: {what}; expected less than {LIMIT}. Run it again when nothing else runs"


def lowest(runs: list[Run], ratio: Callable[[Run], float]) -> Run:
    """The run with the lowest ratio: the one that is told."""
    return min(runs, key=ratio)


def _others_s() -> float:
    """Processor seconds that processes other than this one and its children have taken so far."""
    times = psutil.cpu_times()
    busy = times.user + times.system  # guests are counted in user
    own = psutil.Process()
    mine = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        mine += spent.user + spent.system + spent.children_user + spent.children_system
    return float(busy - mine)
