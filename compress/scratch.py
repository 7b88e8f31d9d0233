"""Folders that live no longer than the process that uses them.

`scratch` makes one and removes it, also when the work fails or is interrupted. What ``kill -9`` leaves is found and
removed by the next command that makes one in the same place. `held` marks any folder as used by this process, and
`abandoned` tells whether its user is dead. The mark is a file with a lock that the system releases with the process;
on a file system that others share, a folder of another machine is left alone. Knows nothing of what lies in them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OWNER = ".owner"
BESIDE, TEMPORARY = ".edgestill-", "edgestill-"  # beside an output, and in the system's place for temporary files
_FORSAKEN_S = 3600.0  # a folder without a mark is taken for one that is just being made until it is this old


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder in ``parent`` (the system's place for temporary files), gone when the block ends.

    Raises:
        OSError: it cannot be made.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    clear(place)
    handle = None
    while handle is None:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY if parent is None else BESIDE, dir=place))
        handle = _take(folder)
    try:
        files = folder / "files"
        files.mkdir()
        yield files
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Mark ``folder`` as used by this process until the block ends; gives False, unmarked, when a living one uses it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _take(folder)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # the folder may be gone
            (folder / OWNER).unlink()
        os.close(handle)


def abandoned(folder: Path) -> bool | None:
    """Whether the process that marked ``folder`` is dead; None where that cannot be told: no mark, another machine."""
    with _released(folder) as dead:
        return dead


def clear(place: Path) -> None:
    """Remove from ``place`` the scratch of processes that are dead."""
    with suppress(OSError):
        for folder in [*place.glob(f"{BESIDE}*"), *place.glob(f"{TEMPORARY}*"), *place.glob(".*.work")]:
            with suppress(OSError):
                if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
                    continue
                with _released(folder) as dead:
                    if dead and folder.suffix == ".work":  # a command can go on from what is in it
                        (folder / "files").rmdir()
                        (folder / OWNER).unlink()
                        folder.rmdir()
                    elif dead:
                        shutil.rmtree(folder, ignore_errors=True)
                    elif dead is None and time.time() - folder.stat().st_mtime > _FORSAKEN_S:
                        folder.rmdir()  # killed before it was marked; one that holds anything stays


def _take(folder: Path) -> int | None:
    """Descriptor that holds the mark of ``folder``; None when another process has it."""
    file = folder / OWNER
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locked = _lock(handle)
            if locked is False:
                os.close(handle)
                return None
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps({**_self(), "locked": bool(locked)}).encode())
                return handle
        except FileNotFoundError:  # whoever had it removed the file meanwhile
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def _released(folder: Path) -> Iterator[bool | None]:
    """As `abandoned`; while the block is open nobody else can take a folder that is."""
    try:
        handle = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        locked = _lock(handle)
        if locked is False:
            yield False
            return
        try:
            owner = json.loads(os.pread(handle, 4096, 0))
        except ValueError:  # just being made
            owner = None
        yield _dead(owner, locked=bool(locked)) if isinstance(owner, dict) else None
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock an open file; False when another process has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True


def _dead(owner: dict[str, Any], *, locked: bool) -> bool | None:
    """Whether the process of a mark is dead, which this process could take: its lock says so, else its number.

    The same kernel is asked, or this machine before it was started anew; of another one nothing is known: its locks
    may not reach here.
    """
    here = _self()
    if owner.get("boot") != here["boot"]:
        return True if here["machine"] and all(owner.get(key) == here[key] for key in ("machine", "host")) else None
    if not here["boot"] and owner.get("host") != here["host"]:
        return None
    if locked and owner.get("locked"):
        return True
    return None if owner.get("pids") != here["pids"] else owner.get("started") != _started(owner.get("pid"))


def _self() -> dict[str, Any]:
    """What a mark says of this process."""
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "pids": _link("/proc/self/ns/pid"),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "machine": _text("/etc/machine-id"),
        "host": platform.node(),
    }


def _started(pid: Any) -> str:
    """When a process of this machine started, in the kernel's ticks; empty when there is none or nothing tells."""
    words = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return words[19] if len(words) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
