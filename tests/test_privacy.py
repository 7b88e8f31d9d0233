"""Nothing is told to anyone: telemetry is off, and a whole run and a bundle try to reach no host at all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.data.rows import chat_row, write_jsonl
from deploy.bundle import RUNNER
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PROFILE = """\
edgestill: 1
name: private
teacher: teacher
data: {pool: pool.jsonl, test: pool.jsonl}
hardware: {threads: 1}
steps:
  - model.distillation: {init: teacher_layers, layers: 1, steps: 1, batch_tokens: 64, max_tokens: 64}
  - model.quantization: {method: rtn, bits: 8, group_size: 16}
evaluate: {tasks: [perplexity], rows: 2}
bench: {prompt_tokens: 4, new_tokens: 2, repeats: 1, warmup: 0}
"""
# Sockets of this machine: AF_UNIX are named files of ours or of the system's resolver, AF_NETLINK asks the kernel.
LOCAL = ("AF_UNIX", "AF_NETLINK")
TRACE = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-e", "signal=none")


def test_telemetry_is_off_before_anything_is_loaded() -> None:
    script = f"import sys, os; import MODULE; print({{name: os.environ.get(name) for name in {[*compress.TELEMETRY]}}})"
    bare = {name: value for name, value in os.environ.items() if name not in compress.TELEMETRY}
    for module in ("compress", "compress.entry", "deploy", "deploy.bundle"):
        command = [sys.executable, "-c", script.replace("MODULE", module)]
        done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(compress.TELEMETRY), module


def test_what_the_user_says_counts() -> None:
    script = "import os, compress; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    env = os.environ | {"ORT_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


def test_the_runner_switches_it_off_by_itself(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in compress.TELEMETRY}
    script = "import os, run; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=RUNNER.parent, env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def sandbox() -> list[str]:
    """The command in front of another that has no network and is watched; skips where there is no such thing."""
    for program in ("strace", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    probe = subprocess.run(["unshare", "-rn", *TRACE, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(
            f"this system lets no one make a network namespace or watch a process: {probe.stderr.strip()[:200]}"
        )
    return ["unshare", "-rn", *TRACE]


def sent_out(trace: str) -> list[str]:
    """Lines of a trace that tell of a socket other than this machine's own."""
    return [line for line in trace.splitlines() if "sa_family=" in line and not any(name in line for name in LOCAL)]


def test_an_attempt_would_be_seen(tmp_path: Path) -> None:
    code = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9))"
    command = [*sandbox(), "-o", str(tmp_path / "trace"), sys.executable, "-c", code]
    subprocess.run(command, capture_output=True, check=False)
    assert sent_out((tmp_path / "trace").read_text()), "the trace shows nothing"


@pytest.mark.timeout(900)  # about 40 s on two idle cores
def test_a_run_and_its_bundle_reach_for_no_host(tmp_path: Path) -> None:
    before = sandbox()
    tiny_checkpoint(tmp_path / "teacher", hidden=64, head_dim=16)
    write_jsonl(tmp_path / "pool.jsonl", [chat_row(f"lock door {n}", f"done {n}") for n in range(12)])
    (tmp_path / "private.yaml").write_text(PROFILE)
    home = tmp_path / "home"
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    env = {name: value for name, value in os.environ.items() if name not in compress.TELEMETRY}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home), "TMPDIR": str(tmp_path / "temporary")}

    def watched(name: str, *command: str) -> str:
        line = [*before, "-o", str(tmp_path / name), sys.executable, *command]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr + done.stdout

    said = watched("run.trace", "-m", "compress.entry", "run", "private.yaml", "--store", "store")
    (runner,) = (tmp_path / "store").glob("artifacts/*/run.py")
    watched("runner.trace", str(runner), "lock the door", "--max-new-tokens", "2", "--threads", "1")
    for name in ("run.trace", "runner.trace"):
        assert not sent_out((tmp_path / name).read_text()), name
    assert re.search(r"deploy\.bench\.local", said), "the bundle was timed, in a process of its own"
    left = [path for path in home.rglob("*") if re.search(r"deviceid|\.db$|\.ses$", path.name)]
    assert not left, "a lasting id of this device"
    assert not list((tmp_path / "temporary").iterdir())
