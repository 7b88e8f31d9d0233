"""A stage context over rows in a temporary folder, for the tests of data stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.context import StageContext
from compress.data.rows import Row, write_rows
from compress.progress import Progress


def make_context(
    folder: Path, rows: Sequence[Row], *, name: str, teacher: Any = None, seed: int = 7, out: str = "out", **slots: Path
) -> StageContext:
    """``rows`` become the data slot; ``out`` and ``work`` are made."""
    for sub in ("data", out, f"{out}-work"):
        (folder / sub).mkdir(exist_ok=True)
    write_rows(folder / "data", rows)
    return StageContext(
        name=name,
        inputs={"data": folder / "data", **slots},
        out=folder / out,
        work=folder / f"{out}-work",
        seed=seed,
        progress=Progress(quiet=True),
        teacher=teacher,
    )
