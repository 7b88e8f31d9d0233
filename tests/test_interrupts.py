"""Ctrl-C at any moment of the command gives exit code 130 and one message, never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Python's own start, before the first line of ours, is the one moment that a program cannot do anything about.
SCRIPT = """\
import os, signal, sys

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass  # handlers run between two instructions

sys.meta_path.insert(0, AtImport())
sys.argv = ["edgestill", "plan", "quickstart", "--store", {store!r}]
from compress.entry import main
sys.exit(main())
"""


def interrupted(module: str, store: Path, **options: object) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(module=module, store=str(store))
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("compress.cli", "interrupted before anything was done"),
        ("typer", "interrupted before anything was done"),
        ("typer.core", "interrupted before anything was done"),
        ("compress.errors", "interrupted before anything was done"),
        ("compress.pipeline", "interrupted; the same command goes on"),
        ("compress.plans", "interrupted; the same command goes on"),
        ("compress.yaml_reader", "interrupted; the same command goes on"),
    ],
)
def test_interrupt_while_the_command_loads(module: str, words: str, tmp_path: Path) -> None:
    done = interrupted(module, tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("edgestill: error: " + words)
    assert done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or in the background of a script."""
    done = interrupted("typer", tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 0, done.stderr


def test_the_entry_loads_next_to_nothing() -> None:
    script = "import sys; before = set(sys.modules); import compress.entry; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    ours = {"compress", "compress.entry", "compress.processes", "compress.version"}
    assert {"typing", "typer", "compress.cli"}.isdisjoint(done.stdout.split())
    assert {name for name in done.stdout.split() if name.startswith("compress")} == ours
