"""Environments of other tools, made by ``make interop`` under build/interop, and how a test asks them.

A worker is a script of ``tests/interop/workers`` that the other environment's interpreter runs: it gets a JSON request
and leaves arrays. Where an environment is missing its tests are skipped, or fail when ``make interop`` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GPTQMODEL_CPU_WORKERS": "2",  # its own choice on two cores is one too few
    "TORCHDYNAMO_DISABLE": "1",  # compiling would take longer than the tests
    "OMP_NUM_THREADS": "1",
}

Ask = Callable[..., dict[str, Any]]


def interpreter(name: str) -> Path:
    """The interpreter of the environment ``name``; skip, or fail under ``make interop``, where there is none."""
    python = ROOT / "build" / "interop" / name / "bin" / "python"
    if not python.exists():
        complain = pytest.fail if os.environ.get("EDGESTILL_INTEROP") else pytest.skip
        complain(f"no environment build/interop/{name}: make interop makes it")
    return python


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """A function that runs a worker in another environment and returns its arrays by name."""

    def run(environment: str, worker: str, request: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(worker)
        asked, answered = folder / "request.json", folder / "answer.npz"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(interpreter(environment)), "-I", str(WORKERS / f"{worker}_worker.py"), asked, answered]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables | OFFLINE, cwd=folder, timeout=1500
        )
        assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
        with np.load(answered) as arrays:
            return dict(arrays)

    return run
