"""How fast a bundle is, here or on a device: prefill, decode, first token, load, memory, energy, and the memory bound.

`bench_bundle` runs the bundle's runner (`deploy.bundle_runner.run`) in a fresh process, here or on a device, and gives
a `BenchRecord`; `bench` is the stage for this machine, `bench_on` the same for a device. Beside it stands what is
foretold for this machine from its measured rates, so that the error of the estimate is known, and for a target, an
estimate and never a measurement. Figures are medians with their spread, and say how busy the machine was: beside other
work a benchmark is worth little. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict  # that of typing is not read by pydantic before Python 3.12

from compress import processes
from compress.context import StageContext, StageResult
from compress.errors import EdgestillError, ModelError, StoreError
from compress.files import file_sha256, json_text, write_whole
from compress.json_reader import JsonFault, checked, parse_json, required
from deploy.bundle import BUNDLE_FILE, RUNNER, Bundle, open_bundle
from deploy.machine import here, measure_rates
from deploy.params import BenchParams
from deploy.remote.sync import Copied, Remote, copy_bundle
from deploy.remote.transport import Device, Finished, Local
from deploy.sizing import estimate_of_bundle
from deploy.targets import Target

BENCH_FILE = "bench.json"
_TIME_LIMIT_S = 1800.0
_BUSY = 0.5  # load average per core from which a note is made
_DIGEST_LETTERS = 16  # of a bundle's digest, which names its folder on a device


@dataclass(frozen=True)
class Spread:
    """Lowest, median and highest of the repeats."""

    low: float
    median: float
    high: float


class _Machine(TypedDict):
    """Facts of the machine that are compared with a target's."""

    cpu: str
    cores: Annotated[int, Field(ge=1, le=1 << 20)]
    system: Annotated[str, Field(pattern=r"\S")]
    instruction_sets: list[str]


@dataclass(frozen=True)
class BenchRecord:
    """What was measured. Seconds, bytes and tokens per second; rates are those of the median repeat."""

    where: str  # "local", "ssh://user@host", "adb://serial"
    runtime: str
    runtime_version: str | None
    threads: int
    tuned: bool  # settings that were found for a device were in use
    prompt_tokens: int
    new_tokens: int
    repeats: int
    warmup: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    load_s: float
    peak_memory_bytes: int | None  # None where the system does not tell
    base_memory_bytes: int | None  # of the process before the bundle was opened
    prefill_s: Spread
    decode_s_per_token: Spread
    first_token_spread_s: Spread
    weight_bytes: int | None  # read for every decoded token
    memory_bandwidth_bytes_per_s: float | None  # sequential read, measured in the same process
    read_bound_tokens_per_s: float | None  # decode if reading the weights were all there is to do
    read_bound_share: float | None  # measured decode over that
    load_average: float | None
    energy: dict[str, Any]  # source, prefill_j_per_token, decode_j_per_token, reason where a figure is None
    temperature: dict[str, Any]  # before_c, after_c by sensor, reason where there is none
    machine: dict[str, Any]  # cpu, board, cores, memory_bytes, system, python

    def facts(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, where: str, seen: dict[str, Any]) -> BenchRecord:
        """The record of what the runner printed; EdgestillError when that is something else."""
        wanted = {field.name for field in fields(cls)} - {"where"}
        if set(seen) != wanted:
            got = f"the runner's record has other fields: {', '.join(sorted(set(seen) ^ wanted))}"
            raise EdgestillError(f"bench {where}", got)
        checked(cls, {"where": where, **seen}, f"bench {where}", EdgestillError)
        checked(_Machine, seen["machine"], f"bench {where}: machine", EdgestillError)
        ends = ("low", "median", "high")  # of a spread; another runner may tell more
        spreads = {
            name: Spread(*(seen[name][end] for end in ends))
            for name in ("prefill_s", "decode_s_per_token", "first_token_spread_s")
        }
        return cls(where=where, **(seen | spreads))


@dataclass(frozen=True)
class OnDevice:
    """A device, and what the user says of it."""

    device: Device
    python: str = "python3"
    folder: str | None = None  # where the bundle goes; None: a place of its own in the device's cache


def bench_bundle(
    folder: Path,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    threads: int | None = 1,
    bandwidth: bool = True,
    on: OnDevice | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> BenchRecord:
    """Measure the bundle in ``folder`` in a process of its own, here or ``on`` a device.

    ``threads`` None takes what was tuned, else what the runtime's config says, else the machine's physical cores.

    Raises:
        ModelError: the bundle is damaged, or its context is shorter than prompt and answer.
        TargetError: the device cannot be reached, or lacks what the runner needs.
        EdgestillError: the copy broke off, or the measuring process failed.
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
    values = {"prompt-tokens": prompt_tokens, "new-tokens": new_tokens, "repeats": repeats, "warmup": warmup}
    options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    options += [] if threads is None else ["--threads", str(threads)]
    options += ["--bench", "--stop-on-eof", *([] if bandwidth else ["--no-bandwidth"])]
    if on is None:
        device: Device = Local()
        command = processes.python(str(RUNNER), "--bundle", str(folder.resolve()))
    else:
        device, remote = on.device, remote_of(on, bundle)
        say(_told(copy_bundle(remote, bundle, say), remote))
        command = [remote.python, remote.runner, "--bundle", remote.folder]
    say(f"measuring on {device.where}")
    return BenchRecord.of(device.where, _seen(device.where, device.run([*command, *options], timeout=_TIME_LIMIT_S)))


def remote_of(on: OnDevice, bundle: Bundle) -> Remote:
    """Where ``bundle`` lies on the device: the user's folder, else one that its digest names."""
    name = file_sha256(bundle.folder / BUNDLE_FILE)[:_DIGEST_LETTERS]
    return Remote(on.device, on.folder or on.device.folder(name), on.python, on.folder is not None)


def _told(copied: Copied, remote: Remote) -> str:
    parts = {"sent": copied.sent, "continued": copied.resumed, "already there": copied.kept}
    told = ", ".join(f"{len(names)} {how}" for how, names in parts.items() if names)
    return f"{remote.device.where}:{remote.folder}: {told} ({copied.bytes / 1e6:.1f} MB copied, all digests right)"


def _seen(where: str, done: Finished) -> dict[str, Any]:
    """What the runner printed."""
    if done.returncode:
        raise EdgestillError(f"bench {where}", f"the measuring process failed: {done.last_line}")
    try:
        seen = parse_json(done.stdout.strip().splitlines()[-1])
    except (JsonFault, IndexError) as error:
        raise EdgestillError(f"bench {where}", f"the runner's answer is not JSON: {done.stdout[-200:]!r}") from error
    return required({"its answer": seen}, "its answer", dict, f"bench {where}", EdgestillError)


def bench(params: BenchParams, ctx: StageContext) -> StageResult:
    """Measure the bundle slot on this machine and write ``bench.json``.

    Raises:
        ModelError, EdgestillError: as `bench_bundle`.
    """
    record = bench_bundle(ctx.inputs["bundle"], **params.model_dump(), threads=ctx.threads)
    return _result(record, ctx.inputs["bundle"], ctx.target, params, ctx.out, local=True)


def bench_on(
    on: OnDevice,
    folder: Path,
    params: BenchParams,
    *,
    threads: int | None = None,
    target: Target | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> StageResult:
    """Measure the bundle in ``folder`` on a device as `bench` does here; ``bench.json`` goes into ``out`` if given.

    Raises:
        ModelError, TargetError, EdgestillError: as `bench_bundle`.
        StoreError: ``out`` cannot be written.
    """
    record = bench_bundle(folder, **params.model_dump(), threads=threads, on=on, say=say)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        return _result(record, folder, target, params, out, local=False)
    except OSError as error:
        raise StoreError(str(out), error.strerror or str(error), do="Give another --out") from error


def _result(
    record: BenchRecord, folder: Path, target: Target | None, params: BenchParams, out: Path | None, *, local: bool
) -> StageResult:
    metrics, notes = record.facts(), []
    if local:
        metrics["local_estimate"] = local_estimate(folder, record.threads, params)
    if target is not None:
        metrics["target_estimate"] = target_estimate(folder, target, params)
        notes.append(f"target_estimate is reckoned for {target.name}; nothing was measured there")
        notes += target.notes
    if out is not None:
        write_whole(out / BENCH_FILE, json_text(metrics, indent=1) + "\n")
    load, cores = record.load_average, int(record.machine["cores"])
    if load is not None and load > _BUSY * cores:
        notes.append(f"the machine was busy (load average {load:.1f} on {cores} cores): these figures are too low")
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
