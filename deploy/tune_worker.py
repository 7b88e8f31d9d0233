"""A process that holds one bundle under one setting and times a request whenever it is told to.

Run as ``python -m deploy.tune_worker REQUEST`` by `deploy.tune`: prints ``{}`` when the bundle is open and warm, then
for every line on standard input one line of JSON with the seconds of one request. Imports no torch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from compress import processes


def serve(request: dict[str, Any]) -> None:
    """Open the bundle and answer every line of standard input; end at once when it closes."""
    lines = processes.requests()
    from deploy.runners import GenaiRunner

    runner = GenaiRunner(
        Path(request["folder"]),
        threads=request["threads"],
        verify=False,
        session=request["session"],
        search=request["search"],
    )
    ids, new_tokens = prompt_ids(runner, request["prompt_tokens"]), request["new_tokens"]
    generate(runner, ids, new_tokens)
    _say({})
    for _ in lines:
        _, first, rest = generate(runner, ids, new_tokens)
        _say({"prefill_s": first, "decode_s": rest / (new_tokens - 1)})


def _say(answer: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def prompt_ids(runner: Any, count: int) -> list[int]:
    """Return the ids of a prompt of ``count`` tokens; which ones does not matter to its speed."""
    first = min(5, runner.vocabulary - 1)
    return [first + at % max(1, runner.vocabulary - first) for at in range(count)]


def generate(runner: Any, ids: list[int], new_tokens: int) -> tuple[float, float, float]:
    """Return seconds of reading the prompt, of that and the first token, and of the tokens after the first."""
    import numpy as np

    generator = runner.start(len(ids) + new_tokens)
    start = time.perf_counter()
    generator.append_tokens(np.asarray(ids, dtype=np.int32))
    read = time.perf_counter()
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return read - start, first - start, time.perf_counter() - first


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
