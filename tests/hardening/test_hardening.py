"""Mutated inputs over every reader: each is read, or refused by a message with exit code 1 or 2. No faults, no crashes.

Here some of each; ``EDGESTILL_MUTATIONS=5000 pytest tests/hardening -m 'slow or not slow'`` reads so many. What fails
is named ``READER:SEED``, which ``python -m tests.hardening.worker`` repeats.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hardening.readers import READERS

ROOT = Path(__file__).parents[2]
EACH = 10  # of every reader, in the default tests
PATIENCE_S = 120.0  # wall time for one input on a busy machine; the worker bounds processor time


class Worker:
    """The reading process, begun again when an input ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> dict[str, Any]:
        """The worker's verdict, or that it died or hung."""
        if self.process is None:
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            command = [sys.executable, "-m", "tests.hardening.worker"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], PATIENCE_S)[0]
        line = self.process.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        said = f"the process ended with {self.close()}" if ready else f"not done after {PATIENCE_S:g} s"
        self.close()
        return {"input": name, "verdict": "fault", "said": said, "seconds": 0.0}

    def close(self) -> int | None:
        """End the process; its exit code, where there was one."""
        process, self.process = self.process, None
        if process is None:
            return None
        try:
            code = process.wait(1)  # of its own
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        process.communicate()
        return code


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.close()


def read_all(worker: Worker, name: str, seeds: range) -> None:
    """Ask for each; what is a fault fails the test, with what repeats it."""
    found = [worker.ask(f"{name}:{seed}") for seed in seeds]
    faults = [f"{one['input']}: {one['said']}" for one in found if one["verdict"] == "fault"]
    counted = Counter(one["verdict"] for one in found)
    print(f"{name}: {dict(counted)}, slowest {max(one['seconds'] for one in found):.1f} s")
    assert not faults, f"{len(faults)} of {len(found)}\n" + "\n".join(faults[:20])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_mutated_inputs_are_read_or_refused(worker: Worker, name: str) -> None:
    read_all(worker, name, range(EACH))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_many_mutated_inputs_are_read_or_refused(worker: Worker, name: str) -> None:
    count = -(-int(os.environ.get("EDGESTILL_MUTATIONS", "5000")) // len(READERS))
    read_all(worker, name, range(1000, 1000 + count))
