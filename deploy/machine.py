"""What this machine can do in the runtime itself: rates of memory, products and small operators, and a target of it.

`measure_rates` measures in a process of its own with a stated number of threads; `here` makes a `Target` of such rates,
against which the error of an estimate can be told; `target_text` is the file that ``edgestill targets measure`` writes.
Products are the runtime's own MatMulNBits and MatMul at the shape of a prompt, not a library's. Imports no torch; facts
such as cores and instruction sets are given by the caller.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import processes
from compress.errors import EdgestillError
from deploy.targets import Target

WIDTH, PROMPT, BLOCK = 1024, 64, 32  # a product of (64, 1024) with (1024, 1024), groups of 32
NARROW = 256  # below it a product is mostly dispatch, which ``node_seconds`` counts already
LEVEL = 4  # of accuracy: activations in 8 bits, as exported where nothing else is said
SMALL, CHAIN = 64, 200  # a chain of 200 operators on 64 values: the runtime's own time, next to no arithmetic
STORAGE_BYTES = 128 << 20
HERE = "this-machine"
_SECONDS = 0.25  # for one rate
_TIME_LIMIT_S = 300
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Rates:
    """Rates of this machine on ``threads`` threads; the fastest of the repeats, so that other work matters little."""

    threads: int
    read_bytes_per_s: float
    fp32_flops_per_s: float
    code_ops_per_s: float  # MatMulNBits with 4-bit codes
    code_row_ops_per_s: float  # the same with one row: a token that is decoded
    node_seconds: float
    load_average: float


def measure_rates(threads: int, *, width: int = WIDTH, accuracy_level: int = LEVEL) -> Rates:
    """Measure this machine on ``threads`` threads, in a process of its own; takes about two seconds.

    ``width`` is that of the square matrices, at least `NARROW` and rounded up to a multiple of 32, ``accuracy_level``
    that of the coded ones.

    Raises:
        EdgestillError: the measuring process failed.
    """
    side = -(-max(width, NARROW) // BLOCK) * BLOCK
    settings = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    try:
        with processes.held_input() as given:
            done = subprocess.run(  # noqa: S603 - our own module, arguments as a list
                processes.python("-m", "deploy.machine", *map(str, (threads, side, accuracy_level))),
                stdin=given,
                capture_output=True,
                text=True,
                timeout=_TIME_LIMIT_S,
                check=False,
                env=processes.environment(**settings),
            )
    except subprocess.TimeoutExpired as error:
        raise EdgestillError("measuring this machine", f"not done after {_TIME_LIMIT_S} s") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EdgestillError("measuring this machine", f"the measuring process failed: {last[0]}")
    return Rates(**json.loads(done.stdout.strip().splitlines()[-1]))  # our own process


def here(rates: Rates, **facts: Any) -> Target:
    """Return this machine as a target: its measured rates, and ``facts`` for the other fields of `Target`."""
    values: dict[str, Any] = {
        "edgestill": 1,
        "name": HERE,
        "description": f"this machine, {rates.threads} threads, measured",
        "cpu": platform.processor() or platform.machine(),
        "isa": [platform.machine()],
        "cores": rates.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_bandwidth_bytes_per_s": rates.read_bytes_per_s,
        "read_efficiency": 1.0,
        "fp32_flops_per_s": rates.fp32_flops_per_s,
        "compute_efficiency": 1.0,
        "code_ops_per_s": rates.code_ops_per_s,
        "code_row_ops_per_s": rates.code_row_ops_per_s,
        "node_seconds": rates.node_seconds,
        "storage_bytes": shutil.disk_usage(Path.cwd()).free,
        "storage_read_bytes_per_s": 1.0,  # no estimate reads it
        "runtime": "onnxruntime-genai",
        "formats": ["onnx", "gptq", "gguf"],
        **facts,
    }
    return Target(**{"usable_memory_bytes": values["memory_bytes"], **values})


def machine_target(machine: Mapping[str, Any], rates: Rates, name: str, folder: Path) -> Target:
    """Return the target that a file in ``folder`` will hold; ``machine`` as of ``compress.doctor.machine``.

    Raises:
        EdgestillError: the storage cannot be measured.
    """
    limit = int(machine["memory_bytes"])
    return here(
        rates,
        name=name,
        description=f"{machine['cpu']}, {rates.threads} cores, {limit / 1e9:.3g} GB, measured",
        cpu=str(machine["cpu"]),
        isa=[str(machine["system"]).split()[-1], *machine["instruction_sets"]],
        usable_memory_bytes=available_memory_bytes(limit),
        storage_bytes=shutil.disk_usage(folder).free,
        storage_read_bytes_per_s=storage_read_bytes_per_s(folder),
    )


def available_memory_bytes(limit: int) -> int:
    """Memory that a program may fill now: what Linux counts as available, at most ``limit`` (a container's)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return limit
    return min(limit, found)


def storage_read_bytes_per_s(folder: Path) -> float:
    """Sequential read of a file in ``folder``, past the cache where the system can be told to forget it (Linux).

    Raises:
        EdgestillError: the file cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            block = os.urandom(1 << 20)
            for _ in range(STORAGE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(1 << 20):
                pass
            return STORAGE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        raise EdgestillError(str(folder), error.strerror or str(error), do="Give another place with --out") from error


def target_text(target: Target, single: Rates, rates: Rates, *, when: str, versions: Mapping[str, str]) -> str:
    """Return a target file for ``target``; comments say how each figure came about.

    ``single`` holds the rates on one thread, ``rates`` those on all; ``when`` is a date.
    """
    runtime = f"onnxruntime {versions.get('onnxruntime', '?')}"
    busy = f", load average {rates.load_average:.1f}: beside other work these rates are too low"
    return f"""\
# Measured on {when} by: edgestill targets measure ({runtime}{busy if rates.load_average > rates.threads / 2 else ""}).
edgestill: 1
name: {json.dumps(target.name)}
description: {json.dumps(target.description)}

# As /proc/cpuinfo says; cores are those that this process may use (affinity, container limit).
cpu: {json.dumps(target.cpu)}
cores: {target.cores}
isa: [{", ".join(target.isa)}]

# All memory; and what was available to a new program, at most the container's limit.
memory_bytes: {target.memory_bytes}
usable_memory_bytes: {target.usable_memory_bytes}

# A dot product of 256 MB read from end to end, {rates.threads} threads; one thread reads {single.read_bytes_per_s:.3e}.
memory_bandwidth_bytes_per_s: {target.memory_bandwidth_bytes_per_s:.4e}
read_efficiency: 1.0  # the figure above is measured, not the bus's

# A product of ({PROMPT}, {WIDTH}) and ({WIDTH}, {WIDTH}) in the runtime, {rates.threads} threads; one thread: \
{single.fp32_flops_per_s:.3e}.
fp32_flops_per_s: {target.fp32_flops_per_s:.4e}
compute_efficiency: 1.0

# The same product from 4-bit codes in groups of {BLOCK}, activations in 8 bits (MatMulNBits, accuracy level 4); one \
thread: {single.code_ops_per_s:.3e}.
code_ops_per_s: {rates.code_ops_per_s:.4e}
# With one row instead of {PROMPT}, as when a token is decoded; one thread: {single.code_row_ops_per_s:.3e}.
code_row_ops_per_s: {rates.code_row_ops_per_s:.4e}

# One small operator ({SMALL} values, MatMulNBits), the mean over a chain of {CHAIN}.
node_seconds: {target.node_seconds:.3e}

# Free space beside this file; {STORAGE_BYTES >> 20} MB written there and read back past the cache.
storage_bytes: {target.storage_bytes}
storage_read_bytes_per_s: {target.storage_read_bytes_per_s:.4e}

runtime: {target.runtime}
formats: [{", ".join(target.formats)}]
context_tokens: {target.context_tokens}
"""


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls."""
    work()
    found, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - start)
    return found


def _session(nodes: list[Any], weights: dict[str, Any], columns: int, threads: int) -> Callable[[int], float]:
    """Return a function: rows -> seconds of one run of ``nodes`` from ``x0`` to ``y``, both (rows, ``columns``)."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", columns]) for name in ("x0", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "rate", value[:1], value[1:], tensors)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    model = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def seconds(rows: int) -> float:
        feed = {"x0": np.linspace(-1, 1, rows * columns, dtype=np.float32).reshape(rows, columns)}
        return _fastest(lambda: session.run(None, feed))

    return seconds


def _coded(size: int, result: str, level: int) -> tuple[Any, dict[str, Any]]:
    """Return a MatMulNBits node over a square matrix of 4-bit codes, and its weights."""
    import numpy as np
    from onnx import helper

    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, (size, size // BLOCK, BLOCK // 2), dtype=np.uint8)
    scales = draw.random(size * size // BLOCK, dtype=np.float32) / size
    node = helper.make_node(
        "MatMulNBits", ["x0", "codes", "scales"], [result], domain="com.microsoft",
        K=size, N=size, bits=4, block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    return node, {"codes": codes, "scales": scales}


def _rates(threads: int, width: int, level: int) -> Rates:
    """Measure in this process."""
    import numpy as np
    from onnx import helper

    from deploy.bundle_runner.run import read_bandwidth

    row = 2 * width * width
    plain = np.random.default_rng(0).random((width, width), dtype=np.float32)
    product = _session([helper.make_node("MatMul", ["x0", "w"], ["y"])], {"w": plain}, width, threads)
    node, weights = _coded(width, "y", level)
    coded = _session([node], weights, width, threads)
    small, weights = _coded(SMALL, "x1", level)
    chain = []
    for at in range(CHAIN):
        after = "y" if at == CHAIN - 1 else f"x{at + 1}"
        kind = helper.make_node(small.op_type, [f"x{at}", *small.input[1:]], [after], domain=small.domain)
        kind.attribute.extend(small.attribute)
        chain.append(kind)
    return Rates(
        threads=threads,
        read_bytes_per_s=read_bandwidth(),
        fp32_flops_per_s=PROMPT * row / product(PROMPT),
        code_ops_per_s=PROMPT * row / coded(PROMPT),
        code_row_ops_per_s=row / coded(1),
        node_seconds=_session(chain, weights, SMALL, threads)(1) / CHAIN,
        load_average=os.getloadavg()[0],
    )


if __name__ == "__main__":
    processes.leave_with_parent()
    sys.stdout.write(json.dumps(asdict(_rates(*map(int, sys.argv[1:4])))) + "\n")
