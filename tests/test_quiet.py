"""Timing on a quiet machine alone: runs wait, and there is no table beside load."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks import quiet
from benchmarks.quiet import QuietRuns, lowest


def test_a_run_waits_until_the_machine_is_quiet() -> None:
    loads = iter([2.0, 0.9, 0.31, 0.29])
    slept: list[float] = []
    runs = QuietRuns(60, load=lambda: next(loads), sleep=slept.append)
    runs.wait()
    assert len(slept) == 3
    assert runs.told() == "load average before each run 0.29"


def test_beside_load_there_is_no_table() -> None:
    runs = QuietRuns(20, load=lambda: 1.5, sleep=lambda _: None)
    with pytest.raises(SystemExit) as end, runs.run():
        raise AssertionError("it must not run")
    assert str(end.value).startswith("no table: the load average is 1.50 after 20 s of waiting; expected less than 0.3")


def test_a_program_that_refuses_ends_with_1() -> None:
    code = "from benchmarks.quiet import QuietRuns; QuietRuns(0, load=lambda: 9.0).wait(); print('table')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no table" in done.stderr
    assert not done.stdout


def test_work_of_others_during_a_run_refuses_it_and_own_work_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([0.0, 0.0001, 0.0, 5.0])
    monkeypatch.setattr(quiet, "_others_s", lambda: next(busy))
    runs = QuietRuns(0, load=lambda: 0.1)
    with runs.run():
        time.sleep(0.05)
    with pytest.raises(SystemExit, match="other processes took"), runs.run():
        time.sleep(0.05)


def test_what_this_process_takes_is_not_that_of_others() -> None:
    before, mine = quiet._others_s(), time.process_time()
    while time.process_time() - mine < 0.5:
        pass
    wall = time.monotonic()
    assert quiet._others_s() - before < 100  # the machine may be busy; own work alone would be told by its sign
    assert time.monotonic() - wall < 5


def test_the_lowest_run_is_told() -> None:
    assert lowest([1.16, 1.12, 1.3], lambda ratio: ratio) == 1.12
