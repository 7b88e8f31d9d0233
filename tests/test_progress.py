"""Progress: one line at any width, no control codes off a terminal, and an estimate that forgets what was there."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

from compress import progress as module
from compress.progress import Progress, duration

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm-256color")
    return now


@pytest.mark.parametrize("width", [8, 20, 39, 40, 41, 60, 79, 80, 81, 120, 200])
@pytest.mark.parametrize("what", ["teacher", "answers of the student, quantized", "言語モデルの蒸留を進める", "x" * 90])
def test_a_bar_holds_on_one_line(clock: list[float], monkeypatch: pytest.MonkeyPatch, width: int, what: str) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    shown = Progress(stream=stream, prefix="process 3: ")
    with shown.bar(what, 12_345_678, unit="positions") as bar:
        for n, note in ((1, ""), (4_000_000, "loss 1.234"), (8_000_000, "[red]loss[/] nan")):
            clock[0] += 7200
            bar.advance(n, note)
    frames = stream.getvalue().split(module.ERASE)
    assert len(frames) == 6  # before, at 0, three times, and cleared
    for frame in frames:
        assert cell_len(CODES.sub("", frame)) < width
        assert not re.search(r"[\r\n]|\x1b\[[^m]*[A-Zln]", frame), "only colours"
    if width >= 40:
        assert "32%" in frames[3]


def test_80_columns_show_count_and_estimate(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(stream=stream).bar("teacher", 1000, unit="positions") as bar:
        clock[0] += 30
        bar.advance(250)
    assert "25% 250/1,000 positions 90 s left" in CODES.sub("", stream.getvalue())


def test_no_color_is_kept_to(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with Progress(stream=stream).bar("teacher", 10) as bar:
        clock[0] += 1
        bar.advance(5)
    assert not re.search(r"\x1b\[[0-9;]*m", stream.getvalue().replace("\x1b[0m", ""))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_off_a_terminal_there_are_plain_lines_now_and_then(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = stream()
    shown = Progress(stream=out)
    with shown.bar("teacher", 7200, unit="positions") as bar:
        for _ in range(7200):
            clock[0] += 1
            bar.advance(1, "loss 1.0")
    shown.say("done")
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert lines[0] == "teacher 10/7,200 positions 0%, about 2.0 h left, loss 1.0"
    assert lines[-1] == "done"
    assert 120 < len(lines) < 180, "each 10 s in the beginning, each minute after 10 minutes"


def test_what_was_there_does_not_count_in_the_estimate(clock: list[float]) -> None:
    out = io.StringIO()
    with Progress(stream=out).bar("teacher", 1000) as bar:
        bar.resume(900)
        clock[0] += 10
        bar.advance(10)
    assert out.getvalue() == "teacher 910/1,000 91%, about 90 s left\n"


def test_a_line_stands_above_the_bar_and_an_error_leaves_none_behind(clock: list[float]) -> None:
    out = Terminal()
    shown = Progress(stream=out)

    def work() -> None:
        with shown.bar("teacher", 10):
            shown.say("a note")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        work()
    assert out.getvalue().endswith(f"{module.ERASE}a note\n{module.ERASE}")


def test_quiet_shows_nothing() -> None:
    out = Terminal()
    shown = Progress(stream=out, quiet=True)
    shown.say("x")
    assert list(shown.track([1, 2], "counting")) == [1, 2]
    assert not out.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 99, 100, 5990, 7200)] == ["0 s", "99 s", "2 min", "100 min", "2.0 h"]
