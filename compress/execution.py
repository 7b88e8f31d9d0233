"""Maps a pure function over shards of rows: in this process, in a pool of processes, or on Ray.

`map_shards` cuts rows into shards and gives back one result for each, in order; what comes out does not depend on the
backend. At most twice as many shards as workers are in flight. A function that needs something costly, such as a
model, gets it from ``setup``, which runs once in each worker. Knows nothing of rows, stages or models.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compress import processes
from compress.doctor import cores
from compress.errors import EdgestillError, MissingExtraError, UserError

if TYPE_CHECKING:
    from compress.progress import Progress

T = TypeVar("T")
R = TypeVar("R")
Backend = Literal["inline", "processes", "ray"]
BACKENDS: tuple[Backend, ...] = ("inline", "processes", "ray")
IN_FLIGHT_PER_WORKER = 2  # one being worked on, one waiting: no worker is idle, and memory stays bounded
RAY_STORE_BYTES = 256 * 2**20


def split(rows: Sequence[T], shards: int) -> list[Sequence[T]]:
    """``rows`` in ``shards`` runs whose lengths differ by at most one; fewer when there are not enough rows."""
    count = max(1, min(shards, len(rows)))
    short, longer = divmod(len(rows), count)
    ends = [0]
    for index in range(count):
        ends.append(ends[-1] + short + (index < longer))
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def map_shards(
    fn: Callable[..., R],
    rows: Sequence[T],
    *,
    shards: int,
    backend: Backend = "inline",
    workers: int | None = None,
    setup: Callable[[], Any] | None = None,
    progress: Progress | None = None,
    what: str = "shards",
) -> list[R]:
    """Call ``fn(shard)`` for every shard and give back the results in the order of the shards; none for no rows.

    Args:
        fn: a pure function at the top of a module (or a ``functools.partial`` of one); with ``setup`` it is called
            as ``fn(shard, state)``.
        shards: how many; the cut depends on nothing else, so results are the same on every backend.
        workers: processes or Ray workers, at most one per shard; all usable cores when left out.
        setup: makes the ``state`` of a worker, once in each.
        what: label of the progress bar.

    Raises:
        UserError: unknown backend, or no positive number of shards or workers.
        MissingExtraError: Ray is not installed.
        EdgestillError: a worker died; or whatever ``fn`` raised.
    """
    if backend not in BACKENDS:
        raise UserError("backend", f"got {backend!r}", "one of " + ", ".join(BACKENDS))
    if shards < 1 or (workers is not None and workers < 1):
        raise UserError("shards", f"got {shards} shards on {workers} workers", "at least 1 of each")
    if not rows:
        return []
    parts = split(rows, shards)
    start = {"inline": _inline, "processes": _in_processes, "ray": _on_ray}[backend]
    # Closed by hand: an error's traceback would keep the generator, and with it the workers, alive.
    with contextlib.closing(start(fn, parts, setup, min(workers or cores(), len(parts)))) as results:
        return list(results if progress is None else progress.track(results, what, len(parts)))


def _inline(
    fn: Callable[..., R], parts: Sequence[Sequence[T]], setup: Callable[[], Any] | None, _count: int
) -> Generator[R]:
    extra = () if setup is None else (setup(),)
    for part in parts:
        yield fn(part, *extra)


@dataclass(frozen=True)
class _Raised:
    """An error of ours on its way home: exceptions with several arguments do not survive pickling."""

    kind: type[EdgestillError]
    parts: tuple[str, str, str, str]

    def again(self) -> EdgestillError:
        error = self.kind.__new__(self.kind)
        EdgestillError.__init__(error, *self.parts)
        return error


def _set_up(setup: Callable[[], Any] | None) -> tuple[Any, ...]:
    """What ``fn`` gets beside its shard; an error of ours is kept for the first shard to give back."""
    try:
        return () if setup is None else (setup(),)
    except EdgestillError as error:
        return (_raised(error),)


def _raised(error: EdgestillError) -> _Raised:
    return _Raised(type(error), (error.where, error.got, error.allowed, error.do))


def _guarded(fn: Callable[..., R], part: Sequence[Any], extra: tuple[Any, ...]) -> R | _Raised:
    if extra and isinstance(extra[0], _Raised):
        return extra[0]
    try:
        return fn(part, *extra)
    except EdgestillError as error:
        return _raised(error)


def _opened(result: R | _Raised) -> R:
    if isinstance(result, _Raised):
        raise result.again()
    return result


def _died(what: str) -> EdgestillError:
    return EdgestillError(
        what,
        "a worker process died; the system kills the largest process when memory runs out",
        do="Use fewer workers or more shards, or backend inline to see the cause.",
    )


# --- a pool of processes -------------------------------------------------------------------------------------------

_STATE: list[Any] = []  # of this worker process: what `_set_up` gave


def _start_worker(setup: Callable[[], Any] | None) -> None:
    """First thing in a worker: Ctrl-C is the parent's to handle, and without the parent there is no work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    _STATE[:] = _set_up(setup)


def _leave_with(sentinel: int) -> None:
    """A killed parent cannot stop its workers, and they would wait for ever."""
    wait_for([sentinel])
    os._exit(1)


def _work(fn: Callable[..., R], part: Sequence[Any]) -> R | _Raised:
    return _guarded(fn, part, tuple(_STATE))


def _in_processes(
    fn: Callable[..., R], parts: Sequence[Sequence[T]], setup: Callable[[], Any] | None, count: int
) -> Generator[R]:
    # spawn: a forked copy of a process that runs torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with processes.spawning():
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(setup,))
    finished = False
    try:
        flight: deque[Future[R | _Raised]] = deque()
        for part in parts:
            if len(flight) >= IN_FLIGHT_PER_WORKER * count:
                yield _opened(flight.popleft().result())
            with processes.spawning():  # a worker starts when there is work for it
                flight.append(pool.submit(_work, fn, part))
        while flight:
            yield _opened(flight.popleft().result())
        finished = True
    except BrokenProcessPool as error:
        raise _died("processes") from error
    finally:
        if not finished:
            _kill(pool)
        pool.shutdown(wait=True, cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Stop workers in the middle of their shards: after an error or Ctrl-C nobody wants the results."""
    for process in list((pool._processes or {}).values()):
        with contextlib.suppress(OSError, ValueError):  # already gone
            process.kill()


# --- Ray -----------------------------------------------------------------------------------------------------------


def _import_ray() -> Any:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # without it Ray writes a token into the home folder
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray", "backend ray") from error


class _Actor:
    """A Ray worker that holds what ``setup`` made."""

    def __init__(self, setup: Callable[[], Any]) -> None:
        self.extra = _set_up(setup)

    def work(self, fn: Callable[..., R], part: Sequence[Any]) -> R | _Raised:
        return _guarded(fn, part, self.extra)


def _on_ray(
    fn: Callable[..., R], parts: Sequence[Sequence[T]], setup: Callable[[], Any] | None, count: int
) -> Generator[R]:
    """One task per shard; with ``setup`` a pool of actors that take the shards in turn."""
    ray = _import_ray()
    started = not ray.is_initialized()
    # Ray puts the folder that is current now in front of what its workers search for modules: let that be ours.
    with processes.spawning(), contextlib.chdir(processes.ROOT) if started else contextlib.nullcontext():
        if started and os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        elif started:
            ray.init(
                num_cpus=count, include_dashboard=False, log_to_driver=False, object_store_memory=RAY_STORE_BYTES,
                logging_level="ERROR",
            )  # fmt: skip
    try:
        submit: Callable[[int, Sequence[T]], Any]
        if setup is None:
            task = ray.remote(num_cpus=1)(_guarded)
            submit = lambda _at, part: task.remote(fn, part, ())  # noqa: E731 - two short ways of one thing
        else:
            actors = [ray.remote(num_cpus=1)(_Actor).remote(setup) for _ in range(count)]
            submit = lambda at, part: actors[at % count].work.remote(fn, part)  # noqa: E731
        yield from _gathered(ray, submit, parts, count)
    finally:
        if started:
            ray.shutdown()


def _gathered(
    ray: Any, submit: Callable[[int, Sequence[T]], Any], parts: Sequence[Sequence[T]], count: int
) -> Iterator[Any]:
    """Results in order, with a bounded number of shards on their way."""
    flight: deque[Any] = deque()

    def oldest() -> Any:
        try:
            return _opened(ray.get(flight.popleft()))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except ray.exceptions.RayError as error:
            raise _died("ray") from error

    for at, part in enumerate(parts):
        if len(flight) >= IN_FLIGHT_PER_WORKER * count:
            yield oldest()
        flight.append(submit(at, part))
    while flight:
        yield oldest()
