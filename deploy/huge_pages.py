"""Puts this process's large memory regions on huge pages, where Linux offers them.

Decoding reads all weights once per token. On pages of 4 kB that is one miss of the address cache for every 4 kB, which
costs most on virtual machines; on pages of 2 MB almost none are left. `collapse` moves what is already allocated
(madvise with MADV_HUGEPAGE, then MADV_COLLAPSE of Linux 6.1; see madvise(2)). It changes no value, and does nothing
where the system has no huge pages. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

WORTH_BYTES = 16 << 20  # of weights, from which moving pays: less lies in the caches
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # asm-generic/mman-common.h
_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS, _TOTALS = Path("/proc/self/maps"), Path("/proc/self/smaps_rollup")


def collapse() -> int:
    """Ask the kernel to back the writable anonymous memory with huge pages; return the bytes that now are."""
    size = page_bytes()
    if not size:
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in list(regions(_MAPS.read_text(encoding="utf-8", errors="replace").splitlines(), size)):
        advise(start, stop - start, _MADV_HUGEPAGE)  # what is not touched yet comes as huge pages
        advise(start, stop - start, _MADV_COLLAPSE)  # moves what it can, and fails when that is not all
    return held_bytes()


def held_bytes() -> int:
    """Bytes of this process that lie on huge pages; 0 where the system does not say."""
    try:
        lines = _TOTALS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:")), 0)


def page_bytes() -> int:
    """Bytes of a huge page; 0 where the system has none to give."""
    if sys.platform != "linux":
        return 0
    try:
        return int(_SIZE_FILE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def regions(maps: Iterable[str], size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of whole huge pages of ``size`` bytes in private, writable memory that is of no file.

    ``maps`` are the lines of proc(5)'s ``/proc/PID/maps``.
    """
    for line in maps:
        span, access, _, _, inode, *name = line.split()
        if "w" not in access or "p" not in access or inode != "0" or (name and name[0] != "[heap]"):
            continue
        first, last = (int(part, 16) for part in span.split("-"))
        start, stop = -(-first // size) * size, last // size * size
        if stop > start:
            yield start, stop
