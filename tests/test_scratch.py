"""Scratch folders go with their process, however it ends, and those of a living one are left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import scratch as module
from compress.scratch import OWNER, abandoned, clear, held, scratch

ROOT = Path(__file__).parents[1]
HOLDER = """\
import sys, time
from pathlib import Path
from compress.scratch import held, scratch
place = Path(sys.argv[1])
with scratch(place) as folder, held(place / "kept"):
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(100)
"""


def holder(place: Path) -> subprocess.Popen[str]:
    """Another process that has scratch in ``place`` and uses ``kept`` there."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_it_is_empty_and_goes_again(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        assert not list(folder.iterdir())
        (folder / "a").write_text("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_goes_when_the_work_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), scratch(tmp_path):
        raise error
    assert not list(tmp_path.iterdir())


def test_the_system_s_place_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch() as folder:
        assert folder.parent.parent == tmp_path
        assert folder.parent.name.startswith("edgestill-")


def test_what_a_killed_process_left_is_cleared_by_the_next_and_not_before(tmp_path: Path) -> None:
    process = holder(tmp_path)
    before = set(tmp_path.iterdir())
    clear(tmp_path)
    with scratch(tmp_path):
        pass
    assert set(tmp_path.iterdir()) == before, "its process lives"
    assert abandoned(tmp_path / "kept") is False
    with held(tmp_path / "kept") as ours:
        assert not ours
    killed(process)
    assert set(tmp_path.iterdir()) == before
    assert abandoned(tmp_path / "kept") is True
    with scratch(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with held(tmp_path / "kept") as ours:
        assert ours
    assert abandoned(tmp_path / "kept") is None, "its mark went with the block"


def test_two_at_once_do_not_clear_each_other(tmp_path: Path) -> None:
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        clear(tmp_path)
        assert first.is_dir()
        assert second.is_dir()


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, True),
        ({"boot": "another"}, True),  # this machine, started anew
        ({"boot": "another", "host": "another"}, None),  # another machine, over a shared file system
        ({"boot": "another", "machine": "another"}, None),
        ({"boot": "another", "machine": ""}, None),
        ({"host": "another", "machine": "another", "pids": "another"}, True),  # a container on this very kernel
        ({"locked": False}, True),  # a file system without locks: the number of the process tells
        ({"locked": False, "pids": "another"}, None),
    ],
)
def test_whose_mark_it_is_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], dead: bool | None
) -> None:
    monkeypatch.setattr(module, "_text", lambda path: "this" if path.endswith(("boot_id", "machine-id")) else "")
    process = holder(tmp_path)
    killed(process)
    mark = tmp_path / "kept" / OWNER
    told = json.loads(mark.read_text()) | {"boot": "this", "machine": "this"} | change
    mark.write_text(json.dumps(told))
    monkeypatch.setattr(module, "_started", lambda pid: "")
    assert abandoned(tmp_path / "kept") is dead


def test_a_living_process_is_known_without_locks(tmp_path: Path) -> None:
    with held(tmp_path / "kept"):
        told = json.loads((tmp_path / "kept" / OWNER).read_text()) | {"locked": False}
    (tmp_path / "kept" / OWNER).write_text(json.dumps(told))
    assert abandoned(tmp_path / "kept") is False
    (tmp_path / "kept" / OWNER).write_text(json.dumps(told | {"started": "1"}))
    assert abandoned(tmp_path / "kept") is True, "another process has that number now"


def test_what_is_no_scratch_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / "edgestill-file").write_text("x")
    (tmp_path / "edgestill-mine").mkdir()
    (tmp_path / "edgestill-mine" / "model").write_text("x")
    (tmp_path / ".edgestill-new").mkdir()
    (tmp_path / "edgestill-link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    clear(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    old = time.time() - 7200
    for name in (".edgestill-new", "edgestill-mine"):
        os.utime(tmp_path / name, (old, old))
    clear(tmp_path)
    assert not (tmp_path / ".edgestill-new").exists(), "killed before it was marked"
    assert (tmp_path / "edgestill-mine" / "model").exists()


def test_a_kill_of_the_command_is_mended_by_the_next(tmp_path: Path) -> None:
    """The command: SIGTERM and SIGHUP give 130 and leave nothing, and SIGKILL leaves what the next one clears."""
    script = (
        "import sys, time\nimport compress.cli as cli, compress.data.selection.static as static\n"
        "from compress import interrupts\n"
        "def slow(params, ctx):\n    print('ready', flush=True)\n    time.sleep(100)\n"
        "static.dedup = slow\ninterrupts.begin()\n"
        "sys.argv = ['edgestill', 'step', 'data.selection.dedup', '--in', 'rows.jsonl', '--out', 'out.jsonl']\n"
        "cli.main()\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def ended_by(number: signal.Signals) -> tuple[int, str]:
        command = [sys.executable, "-c", script]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    assert ended_by(signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(list(tmp_path.glob(".edgestill-*"))) == 1
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        code, errors = ended_by(number)
        assert code == 130, errors
        assert errors == "edgestill: error: interrupted; the same command goes on from where it stood\n"
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
