"""The process that a benchmark measures: opens a bundle, generates, and prints what it saw as one line of JSON.

Run as ``python -m deploy.bench_worker REQUEST`` by `deploy.bench`; a process of its own, so that peak memory is that
of the runtime with this bundle and nothing else, and that thread settings hold from the start. Imports no torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

_READ_BYTES = 256 << 20  # much larger than any cache
_READ_REPEATS = 7


def peak_memory_bytes() -> int:
    """Highest resident set of this process so far."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def read_bandwidth() -> float:
    """Bytes per second of reading memory from end to end: the fastest of several dot products of a large array.

    The number of threads is that of the process's linear algebra library, which the caller sets.
    """
    import numpy as np

    array = np.ones(_READ_BYTES // 4, dtype=np.float32)
    fastest = float("inf")
    for _ in range(_READ_REPEATS):
        start = time.perf_counter()
        np.dot(array, array)
        fastest = min(fastest, time.perf_counter() - start)
    return _READ_BYTES / fastest


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Measure one bundle; times in seconds, one entry per repeat."""
    before = time.perf_counter()
    from deploy.runners import GenaiRunner

    imported = time.perf_counter()
    base = peak_memory_bytes()
    runner = GenaiRunner(Path(request["folder"]), threads=request["threads"], verify=False)
    loaded = time.perf_counter()
    prompt_tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]
    ids = prompt_ids(runner, prompt_tokens)
    prefill, first_token, decode = [], [], []
    for repeat in range(request["warmup"] + request["repeats"]):
        read, first, rest = generate(runner, ids, new_tokens)
        if repeat >= request["warmup"]:
            prefill.append(read)
            first_token.append(first)
            decode.append(rest)
    peak = peak_memory_bytes()
    return {
        "import_s": imported - before,
        "load_s": loaded - imported,
        "prefill_s": prefill,
        "first_token_s": first_token,
        "decode_s": decode,
        "base_memory_bytes": base,
        "peak_memory_bytes": peak,
        "read_bytes_per_s": read_bandwidth() if request["bandwidth"] else None,
        "load_average": os.getloadavg()[0],
    }


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
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
