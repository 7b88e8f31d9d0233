"""Time and peak memory of a piece of work in this process.

`Meter` is a context manager. On Linux the kernel's own high-water mark of the resident set is reset at the start
(proc(5), /proc/pid/clear_refs, value 5), so that the peak is of this piece alone and exact; elsewhere it is the
peak since the process began, which is too high for all but the hungriest stage. Child processes are not counted.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_resident_bytes() -> int | None:
    """High-water mark of this process's resident set; None where the system does not tell."""
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Meter:
    """Measures its ``with`` block: ``seconds`` and ``peak_memory_bytes``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory_bytes: int | None = None
        self._start = 0.0

    def __enter__(self) -> Meter:
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            CLEAR.write_text("5", encoding="ascii")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_memory_bytes = peak_resident_bytes()
