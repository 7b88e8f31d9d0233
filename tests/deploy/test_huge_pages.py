"""Huge pages: which regions are taken, that values stay, and that nothing happens where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy import huge_pages

MB = 1 << 20
MAPS = """\
00400000-00c00000 r-xp 00000000 fe:00 131 /usr/bin/python3
01000000-01a00000 rw-p 00000000 00:00 0 [heap]
10100000-10b00000 rw-p 00000000 00:00 0
20000000-20100000 rw-p 00000000 00:00 0
30000000-30800000 rw-s 00000000 00:01 77 /dev/shm/x
40000000-40800000 rw-p 00000000 fe:00 99 /data/model.onnx.data
50000000-50800000 ---p 00000000 00:00 0
60000000-60800000 rw-p 00000000 00:00 0 [stack]
"""


def test_only_whole_pages_of_private_memory_are_taken() -> None:
    found = list(huge_pages.regions(MAPS.splitlines(), 2 * MB))
    assert found == [(0x01000000, 0x01A00000), (0x10200000, 0x10A00000)]


def test_memory_moves_and_keeps_its_values() -> None:
    if not huge_pages.page_bytes():
        pytest.skip("this system has no transparent huge pages")
    array = np.arange(8 * MB, dtype=np.int64)
    before = huge_pages.held_bytes()
    held = huge_pages.collapse()
    if held == 0:
        pytest.skip("this kernel grants no huge pages (before Linux 6.1, or switched off)")
    assert held >= max(before, 32 * MB)  # of the array's 64
    assert np.array_equal(array, np.arange(8 * MB))


def test_where_there_are_none_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "absent")
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "must not be read")
    assert huge_pages.page_bytes() == 0
    assert huge_pages.collapse() == 0
    monkeypatch.setattr("sys.platform", "darwin")
    assert huge_pages.collapse() == 0
