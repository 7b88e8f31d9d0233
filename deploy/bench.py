"""How fast a bundle is on this machine: prefill, decode, first token, load time, peak memory, and the bound by memory.

`bench_bundle` measures in a fresh process and gives a `BenchRecord`; `bench` is the stage, which puts beside it what
is foretold for this machine from its measured rates, so that the error of the estimate is known, and for a target, an
estimate and never a measurement. Figures are medians with
their spread, and say how busy the machine was: beside other work a benchmark is worth little. Imports no torch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.context import StageContext, StageResult
from compress.errors import EdgestillError, ModelError
from deploy.bundle import Bundle, open_bundle
from deploy.machine import here, measure_rates
from deploy.params import BenchParams
from deploy.sizing import estimate_of_bundle
from deploy.targets import Target

BENCH_FILE = "bench.json"
_TIME_LIMIT_S = 1800
_BUSY = 0.5  # load average per core from which a note is made
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Spread:
    """Lowest, median and highest of the repeats."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of ``values``."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class BenchRecord:
    """What was measured. Seconds, bytes and tokens per second; rates are those of the median repeat."""

    runtime: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    warmup: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    load_s: float
    peak_memory_bytes: int
    base_memory_bytes: int  # of the process before the bundle was opened
    prefill_s: Spread
    decode_s_per_token: Spread
    first_token_spread_s: Spread
    weight_bytes: int | None  # read for every decoded token
    memory_bandwidth_bytes_per_s: float | None  # sequential read, measured in the same process
    read_bound_tokens_per_s: float | None  # decode if reading the weights were all there is to do
    read_bound_share: float | None  # measured decode over that
    load_average: float

    def facts(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)


def bench_bundle(
    folder: Path,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    threads: int = 1,
    bandwidth: bool = True,
) -> BenchRecord:
    """Measure the bundle in ``folder`` on this machine in a process of its own.

    Raises:
        ModelError: the bundle is damaged, or its context is shorter than prompt and answer.
        EdgestillError: the measuring process failed.
    """
    bundle = open_bundle(folder)
    bundle.need("onnx")
    context = int(bundle.info["onnx"]["context_tokens"])
    if prompt_tokens + new_tokens > context:
        raise ModelError(
            str(folder),
            f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens}",
            f"at most {context} together, the bundle's context",
        )
    request = {
        "folder": str(folder.resolve()),
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup,
        "bandwidth": bandwidth,
    }
    return _record(bundle, request, _run_worker(request))


def _run_worker(request: dict[str, Any]) -> dict[str, Any]:
    """Run `deploy.bench_worker` and return what it printed."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    threads = dict.fromkeys(_THREAD_VARIABLES, str(request["threads"]))
    command = [sys.executable, "-m", "deploy.bench_worker", json.dumps(request)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, arguments as a list
            command,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
            check=False,
            env=os.environ | threads | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        do = "Use fewer repeats or tokens"
        raise EdgestillError("bench", f"not done after {_TIME_LIMIT_S} s", do=do) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EdgestillError("bench", f"the measuring process failed: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _record(bundle: Bundle, request: dict[str, Any], seen: dict[str, Any]) -> BenchRecord:
    later = request["new_tokens"] - 1
    decode = Spread.of([seconds / later for seconds in seen["decode_s"]])
    prefill, first = Spread.of(seen["prefill_s"]), Spread.of(seen["first_token_s"])
    weights, bandwidth = int(bundle.info["onnx"]["read_per_token_bytes"]), seen["read_bytes_per_s"]
    bound = None if bandwidth is None else bandwidth / weights
    bits = bundle.model["bits"]
    return BenchRecord(
        runtime=f"onnxruntime-genai {'fp32' if bits is None else f'int{bits}'}",
        threads=request["threads"],
        prompt_tokens=request["prompt_tokens"],
        new_tokens=request["new_tokens"],
        repeats=request["repeats"],
        warmup=request["warmup"],
        prefill_tokens_per_s=request["prompt_tokens"] / prefill.median,
        decode_tokens_per_s=1 / decode.median,
        first_token_s=first.median,
        load_s=seen["load_s"],
        peak_memory_bytes=seen["peak_memory_bytes"],
        base_memory_bytes=seen["base_memory_bytes"],
        prefill_s=prefill,
        decode_s_per_token=decode,
        first_token_spread_s=first,
        weight_bytes=weights,
        memory_bandwidth_bytes_per_s=bandwidth,
        read_bound_tokens_per_s=bound,
        read_bound_share=None if bound is None else 1 / decode.median / bound,
        load_average=seen["load_average"],
    )


def bench(params: BenchParams, ctx: StageContext) -> StageResult:
    """Measure the bundle slot and write ``bench.json``.

    Raises:
        ModelError, EdgestillError: as `bench_bundle`.
    """
    record = bench_bundle(
        ctx.inputs["bundle"],
        prompt_tokens=params.prompt_tokens,
        new_tokens=params.new_tokens,
        repeats=params.repeats,
        warmup=params.warmup,
        threads=ctx.threads,
    )
    metrics, notes = record.facts(), []
    metrics["local_estimate"] = local_estimate(ctx.inputs["bundle"], ctx.threads, params)
    if ctx.target is not None:
        metrics["target_estimate"] = target_estimate(ctx.inputs["bundle"], ctx.target, params)
        notes.append(f"target_estimate is reckoned for {ctx.target.name}; nothing was measured there")
        notes += ctx.target.notes
    text = json.dumps(metrics, indent=1, sort_keys=True) + "\n"
    (ctx.out / BENCH_FILE).write_text(text, encoding="utf-8")
    cores = os.cpu_count() or 1
    if record.load_average > _BUSY * cores:
        notes.append(
            f"the machine was busy (load average {record.load_average:.1f} on {cores} cores): these figures are too low"
        )
    return StageResult(metrics=metrics, notes=notes)


def local_estimate(folder: Path, threads: int, params: BenchParams) -> dict[str, Any]:
    """What is foretold for the bundle on this machine, from its rates at the model's width; measured in two seconds.

    Raises:
        EdgestillError: as `measure_rates`.
    """
    bundle = open_bundle(folder, verify=False)
    level = int(bundle.info["onnx"]["accuracy_level"])
    rates = measure_rates(threads, width=int(bundle.model["hidden"]), accuracy_level=level)
    return {**target_estimate(folder, here(rates), params), "rates": asdict(rates)}


def target_estimate(folder: Path, target: Target, params: BenchParams) -> dict[str, Any]:
    """What is foretold for the bundle on ``target`` at the lengths that are measured here.

    Raises:
        ModelError: as `sizing.estimate_of_bundle`.
    """
    tokens = params.prompt_tokens + params.new_tokens
    found = estimate_of_bundle(open_bundle(folder, verify=False), target, tokens, params.prompt_tokens)
    return {
        "target": target.name,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "first_token_s": params.prompt_tokens / found.prefill_tokens_per_s,
        "peak_memory_bytes": found.peak_memory_bytes,
        "usable_memory_bytes": target.usable_memory_bytes,
    }
