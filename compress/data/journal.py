"""Answers of long work, kept as numbered JSON files so that a killed stage goes on where it was.

`Journal.get` and `Journal.put` are all. A file is written whole under another name first. Its sibling for arrays is
``chunks``. Knows nothing of what is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.files import json_text, write_whole


@dataclass(frozen=True)
class Journal:
    """Entries 0, 1, ... called ``name`` under ``folder``, which must belong to this very input and these parameters."""

    folder: Path
    name: str

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.json"

    def get(self, number: int) -> Any | None:
        """The entry, or None when it was not put yet."""
        path = self._path(number)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, number: int, value: Any) -> None:
        """Keep ``value`` (JSON)."""
        write_whole(self._path(number), json_text(value))
