"""The journal: entries come back, also after a torn line, a kill, and from several threads."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from compress.errors import StoreError
from compress.journal import Journal


def test_entries_come_back(tmp_path):
    journal = Journal(tmp_path / "work", "answers")
    for key, value in ((0, None), ("a/1", ["text\u2028\n", None, True]), (0, {"x": "\ud800"})):
        journal.put(key, value)
    journal.sync()
    again = Journal(tmp_path / "work", "answers")
    assert (again.get(0), again.get("a/1"), again.get("b")) == ({"x": "\ud800"}, ["text\u2028\n", None, True], None)
    assert (len(again), 0 in again, "b" in again) == (2, True, False)
    again.clear()
    assert (len(again), len(Journal(tmp_path / "work", "answers"))) == (0, 0)


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_line_is_dropped_and_gone_on_behind(tmp_path, cut):
    journal = Journal(tmp_path, "answers")
    journal.put(1, "one")
    journal.put(2, "two")
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, "answers")
    assert again.get(1) == "one"
    assert again.get(2) == ("two" if cut == 1 else None)
    again.put(3, "three")
    assert [Journal(tmp_path, "answers").get(key) for key in (1, 3)] == ["one", "three"]


def test_damage_costs_its_own_lines_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'["1", "one"]\n\0\0\0\0\n[5, 6]\n{}\n' + b"[" * 5000 + b'\n["2", "two"]\n\xff')
    journal = Journal(tmp_path, "a")
    assert (journal.get(1), journal.get(2), len(journal)) == ("one", "two", 2)


def test_several_threads_write_whole_lines(tmp_path):
    journal = Journal(tmp_path, "a")
    threads = [
        threading.Thread(target=lambda n=n: [journal.put(f"{n}/{at}", "x" * 50) for at in range(40)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(tmp_path, "a")) == 160


def test_what_was_put_outlives_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from compress.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), 'a')\n"
        "for at in range(50): j.put(at, at)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert len(Journal(tmp_path, "a")) == 50


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Journal(tmp_path / "file", "a").put(1, 1)
