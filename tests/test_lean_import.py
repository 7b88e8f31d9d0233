"""What must be light is light: help, plans and hits load no heavy package."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime_genai",
    "onnx",
    "datasets",
    "pyarrow",
    "accelerate",
    "numpy",
)
LIGHT = ("compress", "compress.cli", "compress.stages", "compress.pipeline", "compress.profile", "compress.plans")


def loaded(script: str) -> list[str]:
    """Heavy packages that are loaded after ``script``."""
    tail = f"\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script + tail], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    return list(eval(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module: str) -> None:
    assert loaded(f"import {module}") == []


def command(*arguments: str) -> str:
    """A script that runs the command line and expects exit code 0."""
    return (
        f"import sys\nfrom compress import cli\nsys.argv = ['edgestill', *{list(arguments)!r}]\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
    )


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "compress.cli", "--help"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage:" in done.stdout
    # processor time, so that other work on the same cores does not count; on an idle machine it is the wall's time
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["step", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(command(*arguments)) == []


@pytest.mark.parametrize("what", ["stages", "runs"])
def test_listing_loads_nothing_heavy(what: str, tmp_path: Path) -> None:
    assert loaded(command("ls", what, "--store", str(tmp_path))) == []
