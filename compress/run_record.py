"""The schema of ``run.json``, the one record of a run, from which the report and the final table are drawn.

Written to ``STORE/runs/ID/run.json`` after every stage (temporary file, then rename), so that it is whole at any
moment, also when the run fails, is interrupted or does not pass the gate. All values are JSON; times are UTC in
ISO 8601; durations are seconds; sizes are bytes; rates are tokens per second. Fields that are not known yet are
``None`` or empty, never absent. `write` and `read` move it to and from disk; this module knows nothing of stages.

Worked example (shortened)::

    {"schema": 1, "id": "20261123-205716-quickstart", "status": "done", "seconds": 212.4,
     "stages": [{"name": "model.distillation.logits", "step": 7, "key": "9f..", "cached": false, "seconds": 95.1,
                 "peak_memory_bytes": 911000000, "metrics": {"parameters": 800000}, "notes": [], ...}],
     "funnel": [{"step": "data.selection.dedup", "rows_in": 6000, "rows_out": 5200, "dropped": {"exact": 300,
                 "near": 500}, "added": 0}],
     "ledger": {"metric": "exact_match", "higher_is_better": true, "most_lost": "model.quantization.gptq",
                "entries": [{"step": "teacher", "loss": 0.0, ...}, ...]},
     "gate": {"passed": true, "most_lost": "model.quantization.gptq", "limits": [...]}, ...}
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

from typing_extensions import TypedDict  # that of typing is not read by pydantic before Python 3.12

from compress.errors import StoreError, UserError
from compress.files import json_text, write_whole
from compress.json_reader import checked, read_table
from compress.scratch import OWNER, abandoned

SCHEMA = 1
# Of the estimates: with and without what stood in the store when the run began.
TIME_OF_ALL, TIME_TO_RUN = "time of all stages", "time of the stages not in the store"

KILLED = "killed; the same command goes on from where it stood"

Status = Literal["running", "done", "gate_failed", "failed", "interrupted"]


class StageRecord(TypedDict):
    """One stage of the run, in the order of execution; stages not reached yet are listed with state ``waiting``."""

    name: str  # "model.distillation.logits"; evaluations also say of what: "evaluate.model after model.pruning"
    stage: str  # "model.distillation"
    method: str  # "logits"
    step: int | None  # index in the profile's `steps`, None for the implicit stages
    key: str  # artifact key, hex
    path: str | None  # artifact folder, None until it stands
    state: Literal["waiting", "running", "done", "failed"]
    cached: bool  # taken from the store
    seconds: float | None  # of this run; for a hit the seconds that making it once took
    peak_memory_bytes: int | None  # resident set of the process at its highest during the stage; for a hit, then
    metrics: dict[str, Any]  # StageResult.metrics
    notes: list[str]  # StageResult.notes: what gave way
    params: dict[str, Any]  # all parameters, defaults included
    inputs: dict[str, str]  # slot -> artifact key, or digest of an outside file or folder


class FunnelStep(TypedDict):
    """Rows through one data stage; rows_in - sum(dropped) + added == rows_out."""

    step: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]  # reason -> count
    added: int


class Measure(TypedDict):
    """A mean over test rows with its interval (``compress.scores``); an end that nothing is known of is None."""

    mean: float
    low: float | None
    high: float | None
    n: int


class LedgerEntry(TypedDict):
    """Quality after one step that made or changed the model, and what that step cost."""

    step: str  # "teacher", "model.distillation.logits", ..., "bundle"
    parameters: int | None
    bytes: int | None  # teacher: as fp32; checkpoints: the safetensors files; bundle: the whole folder
    metrics: dict[str, Measure]
    loss: float | None  # quality given up against the entry before, in the ledger's metric; positive is worse
    loss_low: float | None  # interval of the loss, row by row
    loss_high: float | None


class Ledger(TypedDict):
    """The loss ledger: which step cost how much quality."""

    metric: str  # the metric of `loss`
    higher_is_better: bool
    entries: list[LedgerEntry]
    most_lost: str | None  # the step with the largest loss, None when none lost anything


class LimitRecord(TypedDict):
    """One limit of the gate."""

    metric: str
    limit: str  # in words: "at most 0.02 below the teacher"
    comparison: str  # "max_drop", "min_ratio", "min", "max", ...
    limit_value: float
    value: float | None  # the compared figure: the drop, the ratio, or the plain value; None: not measured
    judged: float | None  # the end of its interval that was held against the limit, the pessimistic one
    low: float | None
    high: float | None
    measured: float | None  # of the bundle
    teacher: float | None  # of the teacher
    passed: bool
    reason: str  # one line in words


class GateRecord(TypedDict):
    """The verdict on what ships."""

    passed: bool
    limits: list[LimitRecord]
    most_lost: str | None  # the stage that lost most


class BenchRecord(TypedDict):
    """Speed of one subject on one machine at stated lengths; medians over the repeats; None is what was not told."""

    subject: str  # "teacher", "student", "bundle"
    runtime: str | None  # "torch fp32", "onnxruntime-genai int4", ...
    device: str
    threads: int | None
    prompt_tokens: int | None
    new_tokens: int | None
    repeats: int | None
    warmup: int | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    first_token_s: float | None
    peak_memory_bytes: int | None
    weight_bytes: int | None  # read for every decoded token
    memory_bandwidth_bytes_per_s: float | None  # measured on this machine
    read_bound_tokens_per_s: float | None  # bandwidth / weight_bytes


class SummaryRow(TypedDict):
    """One row of the final table: teacher, student, bundle."""

    subject: str
    parameters: int | None
    bytes: int | None
    metric: str | None
    quality: Measure | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    first_token_s: float | None
    peak_memory_bytes: int | None


class EstimateRecord(TypedDict):
    """What `plan` foretold and what came out; and a bundle's figures here, foretold from this machine's own rates."""

    what: str  # "bundle size", "decode on raspberry-pi-5", "time of all stages", "decode of the bundle here"
    unit: str  # "bytes", "tokens/s", "s"
    estimated: float
    measured: float | None


class AllocationPoint(TypedDict):
    """A choice of bits: bytes of the linears, and the divergence that is foretold for it."""

    bytes: float
    kl: float


class Allocation(TypedDict):
    """The metric of a step that chose bits under a budget: the frontier of all choices, and what was chosen."""

    frontier: list[AllocationPoint]
    bytes: float
    foretold_kl: float


class CurveRecord(TypedDict):
    """A training log. ``path`` is the JSON-lines file in the artifact; ``points`` at most 200 of its lines."""

    step: str
    path: str
    points: list[dict[str, float]]  # {"step": .., "loss": .., "kd_loss": .., "learning_rate": ..} as logged


class ErrorRecord(TypedDict):
    """Why a run failed."""

    kind: str  # class name
    message: str
    stage: str | None


class RunRecord(TypedDict):
    """The whole of ``run.json``."""

    schema: int
    id: str
    status: Status
    started: str
    finished: str | None
    seconds: float
    profile: dict[str, Any]  # {"name", "path", "description", "values": all values with defaults}
    teacher: dict[str, Any]  # {"path", "identity"}; of a hub model also {"name", "commit"}
    target: dict[str, Any] | None  # {"name", ...facts of the device}
    versions: dict[str, str]  # package -> version, "python" and "edgestill" included
    device: dict[str, Any]  # {"cpu", "cores", "threads", "memory_bytes", "instruction_sets", "system"}
    stages: list[StageRecord]
    funnel: list[FunnelStep]
    ledger: Ledger | None
    gate: GateRecord | None
    bench: list[BenchRecord]
    summary: list[SummaryRow]
    estimates: list[EstimateRecord]
    curves: list[CurveRecord]
    bundle: str | None  # folder of the bundle
    report: str | None  # path of report.html
    verdict: str  # one sentence
    error: ErrorRecord | None


def write(record: RunRecord, path: Path) -> None:
    """Write ``record`` as ``path``, whole or not at all.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    try:
        write_whole(path, json_text(record, indent=1) + "\n")
    except OSError as error:
        raise StoreError(str(path), error.strerror or str(error), do="Choose another place with --store.") from error


def read(path: Path) -> RunRecord:
    """Read a run record. One that says ``running`` while its process is dead is that of an interrupted run.

    Raises:
        UserError: no such file, not JSON, or of another schema.
    """
    record = read_table(path, UserError, allowed="a run.json written by edgestill", do="See: edgestill ls runs")
    if record.get("schema") != SCHEMA:
        raise UserError(str(path), "not a run record of this version", f"schema {SCHEMA}")
    checked(RunRecord, record, str(path), UserError)
    for at, stage in enumerate(record["stages"]):
        figures = stage["metrics"]
        for key, kind in (("allocation", Allocation), ("local_estimate", dict[str, Any])):
            if figures.get(key) is not None:
                checked(kind, figures[key], f"{path}: stages.{at}.metrics.{key}", UserError)
        if figures.get("allocation") and not figures["allocation"]["frontier"]:
            raise UserError(f"{path}: stages.{at}.metrics.allocation", "an empty frontier", "a point or more")
    if record["status"] == "running" and is_dead(path.parent):
        record["status"], record["verdict"] = "interrupted", KILLED
    return cast(RunRecord, record)


def close_dead(root: Path) -> None:
    """Write ``interrupted`` into the records of the runs below ``root`` whose process was killed."""
    for mark in root.glob(f"runs/*/{OWNER}"):
        path = mark.with_name("run.json")
        with suppress(UserError, StoreError):  # another version's, or not ours to write: shown as it should be, anyway
            if abandoned(mark.parent):
                write(read(path), path)
                mark.unlink(missing_ok=True)


def is_dead(folder: Path) -> bool:
    """Whether the process of a run that has not ended is dead: a living one has marked its folder."""
    return not (folder / OWNER).exists() or abandoned(folder) is True
