"""A process that holds one bundle under one setting and times a request whenever it is told to.

Run as ``python -m deploy.tune_worker REQUEST`` by `deploy.tune`: prints ``{}`` when the bundle is open and warm, then
for every line on standard input one line of JSON with the seconds of one request. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def serve(request: dict[str, Any]) -> None:
    """Open the bundle and answer every line of standard input."""
    from deploy.bench_worker import generate, prompt_ids
    from deploy.runners import GenaiRunner

    runner = GenaiRunner(
        Path(request["folder"]),
        threads=request["threads"],
        verify=False,
        session=request["session"],
        search=request["search"],
        on_huge_pages=request["huge_pages"],
    )
    ids, new_tokens = prompt_ids(runner, request["prompt_tokens"]), request["new_tokens"]
    generate(runner, ids, new_tokens)
    _say({})
    for _ in sys.stdin:
        _, first, rest = generate(runner, ids, new_tokens)
        _say({"prefill_s": first, "decode_s": rest / (new_tokens - 1)})


def _say(answer: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
