"""Results of long or paid work, kept one by one, so that a killed stage goes on where it was.

`Journal.get` and `Journal.put` are all: a file of JSON lines, each with its key. A line is handed to the system at once
and so survives the end of the process however it comes; it is forced onto the disk at most every second, for a machine
that loses power. A line that was torn is dropped. Its sibling for arrays is ``compress.data.chunks``. Knows nothing
of what is kept.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from compress.errors import StoreError

SYNC_EVERY_S = 1.0


class Journal:
    """Entries under ``folder``, which must belong to this very input and these parameters; safe between threads."""

    def __init__(self, folder: Path, name: str) -> None:
        """Open what is there.

        Raises:
            StoreError: it cannot be read.
        """
        self.path = folder / f"{name}.jsonl"
        self._lock = threading.Lock()
        self._synced, self._unsynced = 0.0, False
        self._torn = False  # whether a kill has left a part of a line at the end
        self._entries = self._read()

    def __contains__(self, key: int | str) -> bool:
        return str(key) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: int | str) -> Any | None:
        """The entry, or None when it was not put yet."""
        return self._entries.get(str(key))

    def put(self, key: int | str, value: Any) -> None:
        """Keep ``value`` (JSON).

        Raises:
            StoreError: it cannot be written, as when the disk is full.
        """
        line = json.dumps([str(key), value], sort_keys=True) + "\n"
        with self._lock:
            now = time.monotonic()
            self._append(line.encode("ascii"), sync=now - self._synced >= SYNC_EVERY_S)
            self._entries[str(key)] = value

    def sync(self) -> None:
        """Force all onto the disk now."""
        with self._lock:
            if self._unsynced:
                self._append(b"", sync=True)

    def _append(self, content: bytes, *, sync: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" + content if self._torn else content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            raise StoreError(str(self.path), error.strerror or str(error), do="Free some space") from error
        self._torn, self._unsynced = False, not sync

    def clear(self) -> None:
        """Forget all entries: they are kept elsewhere by now."""
        self.path.unlink(missing_ok=True)
        self._entries.clear()

    def _read(self) -> dict[str, Any]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(str(self.path), error.strerror or str(error)) from error
        self._torn = bool(content) and not content.endswith(b"\n")
        found = {}
        for line in content.split(b"\n"):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue  # empty, or torn
            if isinstance(key, str):
                found[key] = value
        return found
