"""A bundle that reads and answers texts as it does on its device: its ``run.py``, in a process of its own.

`BundleProcess` starts ``run.py --serve`` and exchanges lines of JSON with it. The script is edgestill's own copy, since
nothing that lies in a bundle is executed here; `foreign_script` tells whether the bundle's differs. Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from compress import processes
from compress.errors import ModelError
from compress.files import file_sha256
from deploy.bundle import RUNNER, RUNNER_FILE

_GRACE_S = 10.0  # for a process whose input was closed


@dataclass(frozen=True)
class Answered:
    """What a bundle made of one request: ids of the prompt, ids of the answer without its end, and its text."""

    prompt: list[int]
    ids: list[int]
    text: str


class BundleProcess:
    """``run.py --serve`` over the bundle in ``folder`` on ``threads`` threads; a context manager.

    Raises:
        ModelError: by every method: the bundle cannot be opened there, or cannot serve the request.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self.folder = folder
        command = processes.python(str(RUNNER), "--serve", "--bundle", str(folder.resolve()))
        command = processes.tied(command + ([] if threads is None else ["--threads", str(threads)]))
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603 - a list, and our own script
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )

    def __enter__(self) -> BundleProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def encode(self, requests: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Token ids of each request: ``{"text": ...}`` as it is, ``{"messages": [...]}`` through the template."""
        return [[int(token) for token in self._ask({"op": "encode", **request})["ids"]] for request in requests]

    def answer(self, requests: Sequence[Mapping[str, Any]], max_new_tokens: int) -> list[Answered]:
        """Greedy answers to requests as of `encode`; prompts of one length run together."""
        found = self._ask({"op": "answer", "requests": list(requests), "max_new_tokens": max_new_tokens})["answers"]
        return [Answered(one["prompt"], one["ids"], one["text"]) for one in found]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "a pipe was asked for"
        assert stdout is not None, "a pipe was asked for"
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
            found = json.loads(line) if line else {"error": self._last_line()}
        except (OSError, ValueError) as error:
            found = {"error": self._last_line() or f"{type(error).__name__}: {error}"}
        if not isinstance(found, dict) or "error" in found:
            said = found["error"] if isinstance(found, dict) else str(found)[:200]
            raise ModelError(str(self.folder), f"its run.py cannot {request['op']}: {said}", "a text path that works")
        return found

    def _last_line(self) -> str:
        """What the process said last on its standard error, when it is over."""
        self._process.wait(_GRACE_S)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:300] if lines else f"it ended with exit code {self._process.returncode}"


def foreign_script(folder: Path) -> str:
    """A note where the run.py that lies in the bundle is not edgestill's own, which was used; empty where it is."""
    path = folder / RUNNER_FILE
    own, found = file_sha256(RUNNER), file_sha256(path) if path.is_file() else "missing"
    if found == own:
        return ""
    return f"the bundle's run.py ({found[:16]}) is not this edgestill's ({own[:16]}), which was used in its place"
