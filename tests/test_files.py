"""Files are written whole and on disk, and JSON holds what JSON has."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from compress import cli, terminal
from compress.cli import app
from compress.errors import UserError
from compress.files import json_text, whole_file, write_whole
from compress.store import check_outside

ROOT = Path(__file__).parents[1]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    write_whole(tmp_path / "new" / "a.json", "text")
    assert calls == ["sync", "rename", "sync"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def broken() -> None:
        with whole_file(path) as stream:
            stream.write(b"ne")
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_text("a longer text that a killed process left")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / ".a.tmp").exists()


def test_two_writers_take_turns(tmp_path: Path) -> None:
    path, texts = tmp_path / "a", [str(n) * 50_000 for n in range(8)]
    writers = [threading.Thread(target=write_whole, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_text() in texts
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_there_is_one_way_to_write_and_rename() -> None:
    """Folders and files of a device have their own; all else goes through `compress.files`."""
    allowed = {"compress/files.py", "compress/store.py", "compress/single.py", "deploy/archive.py", "deploy/tune.py"}
    allowed |= {"deploy/remote/device_side.py"}
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("compress", "deploy", "evaluators")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"os\.(replace|rename)\(|\.rename\(", path.read_text(encoding="utf-8"))
    }
    assert found <= allowed, found - allowed


def test_json_has_neither_nan_nor_minus_zero() -> None:
    value = {
        "b": [math.nan, -math.inf, -0.0, 1.5],
        "a": {"c": np.float64("nan"), "d": np.float64(-0.0)},
        "e": (1, -0.0),
    }
    text = json_text(value)
    assert text == '{"a": {"c": null, "d": 0.0}, "b": [null, null, 0.0, 1.5], "e": [1, 0.0]}'
    assert json.loads(text, parse_constant=pytest.fail) is not None
    assert json_text({"x": np.float32("inf")}, default=float) == '{"x": null}'
    with pytest.raises(TypeError):
        json_text({"x": {1}})


def test_control_characters_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = "a\x1b[31mred\x9b2J\u202eback"
    terminal.show_rows(("run",), [(told,)], terminal.console())
    cli.show(told)
    cli.show_json({"said": told})
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert out.count("red") == 3
    assert json.loads(out[out.index("{") :]) == {"said": told}


def test_outputs_lie_outside_of_inputs_and_stores(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(bundle / "inner")
    for out in (bundle / "out", bundle / "inner" / "deep" / "out", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match="lies in the input"):
            check_outside(out, [bundle])
    check_outside(tmp_path / "bundle-tuned", [bundle])
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="lies in the stored artifact"):
        check_outside(bundle / "inner" / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", ""],
        ["export", "m", "--out", ""],
        ["bench", "b", "--out="],
        ["step", "data.selection.dedup", "--in", "", "--out", "o"],
        ["step", "data.selection.dedup", "--in", "rows.jsonl", "--out", " "],
        ["run", "p.yaml", "--store", ""],
        ["ls", "runs", "--store="],
        ["tune", "b", "--out", ""],
        ["pack", ""],
        ["eval", "m", "--data", ""],
        ["report", ""],
        ["targets", "measure", "--out", ""],
        ["doctor", "--store", "\t"],
    ],
)
def test_an_empty_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "an empty value" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_no_plain_file_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is no plain file"):
        write_whole(pipe, "x")
    assert pipe.is_fifo()
    assert not list(tmp_path.glob(".*"))
