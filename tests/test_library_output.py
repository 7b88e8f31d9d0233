"""Messages of libraries: not between progress lines, each shown once at the end, none lost."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import library_output
from compress.library_output import told

WORK = """
import logging, os, sys, time, warnings
from compress import cli, library_output
from compress.progress import Progress
import typer

@cli.app.command("work")
def work(lines: int = 2, fail: bool = False, kill: bool = False) -> None:
    shown = cli.progress()
    handler = logging.StreamHandler()  # as transformers has one: it keeps the stream that it found
    log = logging.getLogger("transformers"); log.addHandler(handler)
    shown.say("first line")
    for at in range(lines):
        log.warning("the weights are %d bits", at % 2)
    warnings.warn("an old argument")
    os.write(2, b"native code warns\\r\\nLoading:  50%|#####     | 1/2\\r")
    shown.say("last line")
    if kill:
        time.sleep(60)
    if fail:
        raise ValueError("oops")

cli.app(sys.argv[1:])
"""


def work(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "work.py"
    script.write_text(WORK, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script), "work", *arguments], capture_output=True, text=True, check=False,
        env={"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
    )  # fmt: skip


def test_progress_lines_stand_together_and_messages_behind_them_once(tmp_path: Path) -> None:
    done = work(tmp_path, "--lines", "5")
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[:2] == ["first line", "last line"]
    assert lines[2:4] == ["note: the weights are 0 bits (3 times)", "note: the weights are 1 bits (2 times)"]
    assert "an old argument" in done.stderr
    assert "note: native code warns" in lines
    assert "50%" not in done.stderr
    assert not list(tmp_path.glob("edgestill-messages-*"))


def test_an_error_comes_last_and_nothing_is_lost(tmp_path: Path) -> None:
    done = work(tmp_path, "--fail")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert "note: the weights are 0 bits" in lines
    assert lines[-1].startswith("edgestill: error: ValueError: oops")


def test_a_process_that_is_killed_leaves_its_messages(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), "work", "--kill"], stderr=subprocess.PIPE, text=True,
        env={"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        while process.stderr.readline() != "last line\n":
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (left,) = tmp_path.glob("edgestill-messages-*")
    assert "the weights are 1 bits" in left.read_text(encoding="utf-8")


def test_many_messages_stay_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = WORK.replace('"the weights are %d bits", at % 2', '"message %d", at')
    monkeypatch.setitem(globals(), "WORK", script)
    done = work(tmp_path, "--lines", "50")
    (left,) = tmp_path.glob("edgestill-messages-*")
    assert re.search(rf"note: \d+ more messages of libraries: {left}", done.stderr)
    assert "message 49" in left.read_text(encoding="utf-8")
    assert done.stderr.count("note: message") == library_output.SHOWN_LINES


def test_what_is_told_is_safe_and_short() -> None:
    assert told("a\x1b[2Jb\n\n a \n" + "x" * 1000)[1:] == ["a", "x" * 400 + "..."]
    assert "\x1b" not in "".join(told("a\x1b[2Jb"))


def test_a_stream_of_the_callers_own_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    assert library_output.begin() is sys.stderr
    library_output.end()
