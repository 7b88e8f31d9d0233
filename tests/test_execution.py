"""Shards: the same results on every backend, bounded work in flight, clear ends."""

import functools
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from compress import execution
from compress.errors import DataError, EdgestillError, MissingExtraError, UserError
from compress.execution import map_shards, split
from compress.progress import Progress

ROOT = Path(__file__).parent.parent


def squares(shard):
    return [row * row for row in shard]


def with_offset(offset, shard):
    return [row + offset for row in shard]


def with_state(shard, state):
    return [row + state["base"] for row in shard], state["pid"]


def state():
    return {"base": 100, "pid": os.getpid()}


def slow_first(shard):
    time.sleep(0.3 if shard[0] == 0 else 0.0)
    return shard[0]


def bad_row(shard):
    if 7 in shard:
        raise DataError("rows.jsonl:7", "no answer", "an answer", "Drop it.")
    return len(shard)


def missing(shard):
    raise MissingExtraError("nltk", "text", "sentences")


def bug(shard):
    raise ZeroDivisionError(f"of {shard[0]}")


def die(shard):
    os.kill(os.getpid(), signal.SIGKILL)


def bad_setup():
    raise DataError("teacher", "no such folder")


BACKENDS = ["inline", "processes"]


@pytest.mark.parametrize(
    ("rows", "shards", "lengths"),
    [(10, 3, [4, 3, 3]), (10, 1, [10]), (2, 5, [1, 1]), (6, 3, [2, 2, 2]), (0, 4, [0])],
)
def test_split(rows, shards, lengths):
    parts = split(range(rows), shards)
    assert [len(part) for part in parts] == lengths
    assert [row for part in parts for row in part] == list(range(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_in_order(backend):
    assert map_shards(squares, list(range(7)), shards=3, backend=backend, workers=2) == [[0, 1, 4], [9, 16], [25, 36]]
    assert map_shards(functools.partial(with_offset, 5), [1, 2], shards=9, backend=backend, workers=2) == [[6], [7]]
    assert map_shards(bug, [], shards=3, backend=backend) == []


def test_a_slow_shard_keeps_its_place():
    assert map_shards(slow_first, list(range(6)), shards=6, backend="processes", workers=2) == list(range(6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_setup_runs_once_in_each_worker(backend):
    results = map_shards(with_state, list(range(8)), shards=8, backend=backend, workers=2, setup=state)
    assert [rows for rows, _ in results] == [[100 + row] for row in range(8)]
    workers = {pid for _, pid in results}
    assert (workers == {os.getpid()}) if backend == "inline" else (len(workers) <= 2 and os.getpid() not in workers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_come_home_whole(backend):
    with pytest.raises(DataError, match=r"^rows.jsonl:7: no answer; expected an answer. Drop it.$") as caught:
        map_shards(bad_row, list(range(20)), shards=10, backend=backend, workers=2)
    assert (caught.value.where, caught.value.do) == ("rows.jsonl:7", "Drop it.")
    with pytest.raises(MissingExtraError, match=r"pip install 'edgestill\[text\]'"):
        map_shards(missing, [1], shards=1, backend=backend)
    with pytest.raises(ZeroDivisionError, match="of 1"):
        map_shards(bug, [1], shards=1, backend=backend)
    with pytest.raises(DataError, match="teacher: no such folder"):
        map_shards(with_state, [1, 2], shards=2, backend=backend, setup=bad_setup, workers=2)


def test_a_dead_worker_is_an_error():
    with pytest.raises(EdgestillError, match=r"processes: a worker process died.*Use fewer workers"):
        map_shards(die, list(range(6)), shards=6, backend="processes", workers=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "spark", "shards": 1}, "backend: got 'spark'; expected one of inline, processes, ray"),
        ({"shards": 0}, "shards: got 0 shards"),
        ({"shards": 1, "workers": 0}, "on 0 workers"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        map_shards(squares, [1], **arguments)


def test_progress_counts_shards(capsys):
    seen = []
    progress = Progress(quiet=True)
    progress.draw = lambda bar, now, note: seen.append((bar.what, bar.done, bar.total))
    progress.every_s = lambda passed: 0.0
    map_shards(squares, list(range(4)), shards=2, progress=progress, what="near duplicates")
    assert seen == [("near duplicates", 1, 2), ("near duplicates", 2, 2)]


def test_inline_holds_one_shard_at_a_time():
    seen = []

    def fn(shard):
        seen.append(list(shard))
        if len(seen) == 2:
            raise DataError("x", "stop")

    with pytest.raises(DataError, match="stop"):
        map_shards(fn, list(range(10)), shards=10)
    assert seen == [[0], [1]]


def test_work_in_flight_is_bounded(monkeypatch):
    pending, most = 0, 0

    class Pool:
        """Counts what was submitted and not yet taken."""

        def __init__(self, *args, **kwargs):
            self._processes = {}

        def submit(self, work, fn, part):
            nonlocal pending, most
            pending += 1
            most = max(most, pending)
            return types.SimpleNamespace(result=lambda: self.take(fn(part)))

        def take(self, value):
            nonlocal pending
            pending -= 1
            return value

        def shutdown(self, **kwargs):
            pass

    monkeypatch.setattr(execution, "ProcessPoolExecutor", Pool)
    results = map_shards(squares, list(range(50)), shards=50, backend="processes", workers=3)
    assert results == [[row * row] for row in range(50)]
    assert most == execution.IN_FLIGHT_PER_WORKER * 3


SLEEPER = """\
import os, sys, time
from compress.execution import map_shards

def sleep(shard):
    with open(sys.argv[1], "a") as stream:
        stream.write(f"{os.getpid()}\\n")
    time.sleep(300)

if __name__ == "__main__":
    map_shards(sleep, list(range(8)), shards=8, backend="processes", workers=2)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc").is_dir() else "R"
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_work(tmp_path, number):
    script, log = tmp_path / "sleeper.py", tmp_path / "log"
    script.write_text(SLEEPER)
    log.touch()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, log], env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 40
        while len(log.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(pid) for pid in log.read_text().split()]
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert len(workers) == 2
    if number == signal.SIGINT:
        assert process.returncode in (1, -signal.SIGINT)
        assert "KeyboardInterrupt" in error
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if alive(pid)] == []


# --- Ray -----------------------------------------------------------------------------------------------------------


def test_ray_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtraError, match=r"backend ray: the package 'ray' is not installed\. .*edgestill\[ray\]"
    ):
        map_shards(squares, [1], shards=1, backend="ray")


class FakeRay(types.ModuleType):
    """As much of Ray as `execution` uses, in this process; counts what is in flight."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self, crash=None):
        super().__init__("ray")
        self.log, self.flying, self.most, self.crash = [], 0, 0, crash

    def is_initialized(self):
        return False

    def init(self, **options):
        self.log.append(("init", options))

    def shutdown(self):
        self.log.append("shutdown")

    def remote(self, **options):
        assert options == {"num_cpus": 1}
        ray = self

        class Remote:
            def __init__(self, call):
                self.call = call

            def remote(self, *args):
                if isinstance(self.call, type):  # an actor
                    actor = self.call(*args)
                    return types.SimpleNamespace(work=Remote(actor.work))
                ray.flying += 1
                ray.most = max(ray.most, ray.flying)
                return self.call, args

        return Remote

    def get(self, reference):
        self.flying -= 1
        if self.crash is not None:
            raise self.crash
        call, args = reference
        try:
            return call(*args)
        except ArithmeticError as error:
            raise self.exceptions.RayTaskError(error) from error


@pytest.fixture
def fake_ray(monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return ray


def test_ray_gets_one_task_per_shard(fake_ray):
    assert map_shards(squares, list(range(20)), shards=20, backend="ray", workers=3) == [
        [row * row] for row in range(20)
    ]
    assert fake_ray.most == execution.IN_FLIGHT_PER_WORKER * 3
    ((_, options), end) = fake_ray.log
    assert (options["num_cpus"], options["include_dashboard"], end) == (3, False, "shutdown")
    results = map_shards(with_state, list(range(5)), shards=5, backend="ray", workers=2, setup=state)
    assert [rows for rows, _ in results] == [[100 + row] for row in range(5)]


def test_errors_on_ray(fake_ray, monkeypatch):
    with pytest.raises(DataError, match=r"rows\.jsonl:7: no answer"):
        map_shards(bad_row, list(range(20)), shards=10, backend="ray", workers=2)
    with pytest.raises(ZeroDivisionError, match="of 1"):
        map_shards(bug, [1], shards=1, backend="ray")
    with pytest.raises(DataError, match="teacher: no such folder"):
        map_shards(with_state, [1, 2], shards=2, backend="ray", setup=bad_setup, workers=2)
    fake_ray.crash = FakeRay.exceptions.RayError("the node died")
    with pytest.raises(EdgestillError, match="ray: a worker process died"):
        map_shards(squares, [1], shards=1, backend="ray")
    assert fake_ray.log[-1] == "shutdown"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    fake_ray.crash = None
    map_shards(squares, [1], shards=1, backend="ray")
    assert fake_ray.log[-2] == ("init", {"log_to_driver": False})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_real_ray():
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # once: each start takes seconds
    try:
        real_ray()
    finally:
        ray.shutdown()


def real_ray():
    rows = list(range(20))
    assert map_shards(squares, rows, shards=6, backend="ray", workers=2) == map_shards(squares, rows, shards=6)
    results = map_shards(with_state, rows, shards=6, backend="ray", workers=2, setup=state)
    assert [part for part, _ in results] == [part for part, _ in map_shards(with_state, rows, shards=6, setup=state)]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: no answer"):
        map_shards(bad_row, rows, shards=10, backend="ray", workers=2)
    with pytest.raises(ZeroDivisionError, match="of 1"):
        map_shards(bug, [1], shards=1, backend="ray")
    with pytest.raises(EdgestillError, match="ray: a worker process died"):
        map_shards(die, rows, shards=2, backend="ray", workers=2)
