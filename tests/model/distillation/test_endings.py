"""Several processes that are interrupted or killed: none stays behind, and what was trained goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from compress.context import StageContext
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import train
from compress.progress import Progress
from tests.model.distillation.test_parallel import ROWS, SETTINGS, TOLERANCE, curve, near, run
from tests.tiny import VOCAB, tiny_model

ROOT = Path(__file__).parents[3]
CODE = "import sys; from tests.model.distillation.test_endings import train_slowly; train_slowly(*sys.argv[1:])"


class Slow(OnlineTargets):
    """A teacher that takes its time."""

    def __call__(self, batch):
        time.sleep(0.3)
        return super().__call__(batch)


def train_slowly(folder, sharding):
    """What the interrupted process does: the run of `test_parallel`, slowly, in two processes."""
    work = Path(folder)
    ctx = StageContext(
        name="model.distillation.logits", inputs={}, out=work, work=work, seed=3, progress=Progress(quiet=True),
        threads=1, processes=2, sharding=sharding,
    )  # fmt: skip
    teacher = Slow(tiny_model(seed=9, scale=0.3), vocab=VOCAB)
    train(tiny_model(seed=1), teacher, ROWS, SETTINGS, ctx, work / "training.jsonl")


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether a process still runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(found, seconds, what):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize(("number", "sharding"), [(signal.SIGINT, "full"), (signal.SIGKILL, "none")])
def test_the_first_process_ends_and_so_do_the_others(context, number, sharding):
    ctx, whole = context("killed"), context("whole")
    command = [sys.executable, "-c", CODE, str(ctx.work), sharding]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        checkpoint = ctx.work / "training.checkpoint.safetensors"
        wait_until(lambda: checkpoint.exists() or parent.poll() is not None, 50, "no checkpoint")
        children = children_of(parent.pid)
        assert len(children) == 1
        assert alive(children[0])
        parent.send_signal(number)
        _, said = parent.communicate(timeout=15)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == -number
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    wait_until(lambda: not alive(children[0]), 5, "the other process stayed behind")

    student, _ = run(whole)
    other, report = run(ctx)
    assert report.resumed_from in {3, 6}
    assert np.abs(curve(whole) - curve(ctx)).max() < TOLERANCE
    assert near(student, other)
