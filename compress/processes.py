"""Python processes of our own: how they start, where they may import from, and that they end with whoever asked.

`python` and `environment` start one that imports what this process imports, and nothing from the current folder: a
``compress.py`` or ``json.py`` that happens to lie there is never run. `spawning` does the same for a library that
starts processes itself, `leave_current_folder` for this process. `held_input` gives a child a standard input that
closes when this process dies, however it dies; the child watches it with `requests` or `leave_with_parent`. Loads next
to nothing, since the command line begins with it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that our packages lie in
ORPHANED = 130  # exit code of a child whose parent is gone


def search_path() -> list[str]:
    """`sys.path` without the current folder, relative entries included; our own packages' folder is always in it.

    The current folder stays where it belongs to Python or to this installation: our own checkout, ``site-packages``.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was removed
        here = ""
    own = {ROOT, os.path.dirname(os.__file__)}
    kept = [
        entry
        for entry in sys.path
        if os.path.isabs(entry)
        and (
            os.path.realpath(entry) != here
            or entry in own
            or os.path.basename(entry) in ("site-packages", "dist-packages")
        )
    ]
    return kept if ROOT in kept else [ROOT, *kept]


def leave_current_folder() -> None:
    """Let this process and all that it starts import nothing from the current folder any more."""
    sys.path[:] = search_path()
    os.environ["PYTHONSAFEPATH"] = "1"
    given = os.environ.get("PYTHONPATH")
    if given:  # an empty part of it means the current folder
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in given.split(os.pathsep) if os.path.isabs(part))


def python(*arguments: str) -> list[str]:
    """The command that runs this Python with ``arguments``, such as ``-m``, ``compress.checkpoint_bench``."""
    return [sys.executable, "-P", *arguments]


_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG of linux/prctl.h, SIGKILL
_TIED += "if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])"


def tied(command: Sequence[str]) -> list[str]:
    """``command``, a program that is not ours and watches nothing, so that the system ends it with this process.

    It must be started by a thread that waits for it, for it ends with that thread. Linux alone can do this; elsewhere
    the command is as it was.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def environment(**settings: str) -> dict[str, str]:
    """The environment of a Python process of ours: this one's, the same places to import from, and ``settings``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search_path()), "PYTHONSAFEPATH": "1", **settings}


def spawning() -> AbstractContextManager[None]:
    """While it is open, a Python process that a library starts is as one of ours; this process is not changed."""
    from contextlib import contextmanager

    @contextmanager
    def changed() -> Iterator[None]:
        paths, variables = list(sys.path), {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
        os.environ.update({name: value for name, value in environment().items() if name in variables})
        sys.path[:] = search_path()  # multiprocessing hands it on
        try:
            yield
        finally:
            sys.path[:] = paths
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    return changed()


def held_input(line: str = "") -> AbstractContextManager[int]:
    """A pipe to be a child's standard input: ``line`` stands in it, and it closes when the block or this process ends.

    ``line`` has at most 64 KiB, what a pipe holds.
    """
    from contextlib import contextmanager

    @contextmanager
    def opened() -> Iterator[int]:
        read, write = os.pipe()
        try:
            if line:
                os.write(write, f"{line}\n".encode())
            yield read
        finally:
            os.close(read)
            os.close(write)

    return opened()


def requests() -> Iterator[str]:
    """In a child: the lines of standard input. From now on it ends at once when that closes: whoever asked is gone."""
    from queue import SimpleQueue
    from threading import Thread

    found: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        rest = b""
        while piece := os.read(0, 1 << 16):  # not sys.stdin: its lock would be held when the interpreter ends
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                found.put(line.decode())
        os._exit(ORPHANED)

    Thread(target=read, daemon=True).start()
    return iter(found.get, None)


def leave_with_parent() -> None:
    """In a child: end at once when standard input closes; what is written there is not read by anyone."""
    from threading import Thread

    def read() -> None:
        try:
            while os.read(0, 1 << 16):
                pass
        except OSError:  # closed before it was ours
            pass
        os._exit(ORPHANED)

    Thread(target=read, daemon=True).start()
