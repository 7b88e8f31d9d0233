"""Long row-wise measurements in chunks that survive a kill.

`map_chunks` calls a function on one chunk of rows after another and keeps every answer as a ``.npy`` file; called
again with the same folder it starts behind the last whole one. Knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compress.errors import EdgestillError
from compress.files import whole_file
from compress.progress import Progress

T = TypeVar("T")


def map_chunks(
    rows: Sequence[T],
    measure: Callable[[Sequence[T]], NDArray[Any]],
    *,
    folder: Path,
    name: str,
    size: int,
    progress: Progress,
    what: str,
) -> NDArray[Any]:
    """``measure`` over chunks of ``size`` rows, results joined along the first axis.

    ``folder`` must belong to this very input and these parameters, as a stage's work folder does. Chunk borders are
    fixed, so an interrupted call and an unbroken one give the same array.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with progress.bar(what, len(rows)) as bar:
        for number, start in enumerate(range(0, len(rows), size)):
            chunk = rows[start : start + size]
            path = folder / f"{name}-{number:05d}.npy"
            if path.exists():
                part = np.load(path, allow_pickle=False)
            else:
                part = measure(chunk)
                _save(path, part)
            if len(part) != len(chunk):
                raise EdgestillError(str(path), f"{len(part)} results for {len(chunk)} rows", do="Delete this file")
            parts.append(part)
            bar.advance(len(chunk))
    return np.concatenate(parts) if parts else np.zeros(0)


def _save(path: Path, part: NDArray[Any]) -> None:
    with whole_file(path) as file:
        np.save(file, part, allow_pickle=False)
