"""Keeps the record of a run while it goes: stages as they finish, and what is drawn from their figures.

`Recorder` writes ``run.json`` after every change. `funnel`, `summary` and `curve` turn stage figures into the parts
of the record that the report and the final table show. Knows figures only: no stage's code, no profile's meaning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, cast

from compress import doctor, run_record
from compress.errors import EdgestillError, StoreError, safe_to_show
from compress.hub_cache import commit_of_folder
from compress.json_reader import parse_json, read_table
from compress.plans import Node, Plan
from compress.run_record import (
    BenchRecord,
    CurveRecord,
    EstimateRecord,
    FunnelStep,
    Ledger,
    LedgerEntry,
    LimitRecord,
    RunRecord,
    StageRecord,
    Status,
    SummaryRow,
)

log = logging.getLogger(__name__)

CURVE_POINTS = 200
TRAINING_LOG = "training.jsonl"
VERDICT = "verdict.json"
LOCAL = (
    ("prefill of the bundle here", "prefill_tokens_per_s", "tokens/s"),
    ("decode of the bundle here", "decode_tokens_per_s", "tokens/s"),
    ("peak memory of the bundle here", "peak_memory_bytes", "bytes"),
)


def now() -> str:
    """UTC in ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def funnel(stages: Iterable[StageRecord]) -> list[FunnelStep]:
    """Rows through the data stages, from their ``rows_in``, ``rows_out`` and ``dropped``."""
    steps: list[FunnelStep] = []
    for stage in stages:
        figures = stage["metrics"]
        aside = stage["stage"] == "data.source" and not stage["name"].endswith("of pool")
        if "rows_in" not in figures or "rows_out" not in figures or not stage["stage"].startswith("data.") or aside:
            continue
        dropped = {str(reason): int(count) for reason, count in figures.get("dropped", {}).items()}
        rows_in, rows_out = int(figures["rows_in"]), int(figures["rows_out"])
        added = rows_out - rows_in + sum(dropped.values())
        steps.append(
            {"step": stage["name"], "rows_in": rows_in, "rows_out": rows_out, "dropped": dropped, "added": added}
        )
    return steps


def curve(step: str, folder: Path) -> CurveRecord | None:
    """The training log of a model artifact, thinned to at most 200 points; None where there is none."""
    path = folder / TRAINING_LOG
    if not path.is_file():
        return None
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = parse_json(line, constants=True)
        points.append(
            {name: float(value) for name, value in values.items() if isinstance(value, int | float) and isfinite(value)}
        )
    stride = max(1, -(-len(points) // CURVE_POINTS))
    kept = points[::stride]
    if points and kept[-1] is not points[-1]:
        kept.append(points[-1])
    return {"step": step, "path": str(path), "points": kept}


def summary(ledger: Ledger | None, bench: Sequence[BenchRecord]) -> list[SummaryRow]:
    """The final table: teacher, student (the last model before quantization) and bundle."""
    entries: dict[str, LedgerEntry] = {}
    for entry in ledger["entries"] if ledger else []:
        if entry["step"] in ("teacher", "bundle"):
            entries[entry["step"]] = entry
        elif not entry["step"].startswith("model.quantization"):
            entries["student"] = entry
    speeds = {row["subject"]: row for row in bench}
    rows: list[SummaryRow] = []
    for subject in ("teacher", "student", "bundle"):
        entry_of, speed = entries.get(subject), speeds.get(subject)
        if entry_of is None and speed is None:
            continue
        metric = ledger["metric"] if ledger and entry_of else None
        rows.append(
            {
                "subject": subject,
                "parameters": entry_of["parameters"] if entry_of else None,
                "bytes": entry_of["bytes"] if entry_of else None,
                "metric": metric,
                "quality": entry_of["metrics"].get(metric) if entry_of and metric else None,
                "prefill_tokens_per_s": speed["prefill_tokens_per_s"] if speed else None,
                "decode_tokens_per_s": speed["decode_tokens_per_s"] if speed else None,
                "first_token_s": speed["first_token_s"] if speed else None,
                "peak_memory_bytes": speed["peak_memory_bytes"] if speed else None,
            }
        )
    return rows


def bench_record(subject: str, figures: dict[str, Any], device: dict[str, Any]) -> BenchRecord:
    """A bench stage's figures in the record's form; what the stage does not tell is None."""
    row = {name: figures.get(name) for name in BenchRecord.__annotations__}
    row["subject"] = subject
    row["device"] = figures.get("device") or device["cpu"]
    row["threads"] = figures.get("threads") or device["threads"]
    return cast("BenchRecord", row)


def measured(what: str, record: RunRecord) -> float | None:
    """What came out for one of the figures that a plan foretells; None when it was not measured in this run."""
    rows = {row["subject"]: row for row in record["summary"]}
    peaks = [stage["peak_memory_bytes"] or 0 for stage in record["stages"]]
    times = [stage["seconds"] or 0.0 for stage in record["stages"]]
    ran = [stage["seconds"] or 0.0 for stage in record["stages"] if not stage["cached"]]
    whole = all(stage["state"] == "done" for stage in record["stages"])
    found: dict[str, float | None] = {
        run_record.TIME_OF_ALL: sum(times) if whole else None,
        run_record.TIME_TO_RUN: sum(ran) if whole else None,
        "peak memory of the run": max(peaks, default=0) or None,
        "teacher parameters": rows["teacher"]["parameters"] if "teacher" in rows else None,
        "student parameters": rows["student"]["parameters"] if "student" in rows else None,
        "bundle size": rows["bundle"]["bytes"] if "bundle" in rows else None,
    }
    return found.get(what)


def local_estimates(stages: Iterable[StageRecord]) -> list[EstimateRecord]:
    """A bundle's speed and memory here: reckoned from this machine's measured rates, beside what was measured.

    No device is at hand where a target's figures could be checked; this is the error of the same reckoning.
    """
    found: list[EstimateRecord] = []
    for stage in stages:
        figures = stage["metrics"]
        if stage["stage"] == "deploy.bench" and (reckoned := figures.get("local_estimate")):
            for what, key, unit in LOCAL:
                found.append({"what": what, "unit": unit, "estimated": reckoned[key], "measured": figures.get(key)})
    return found


def failure(limit: LimitRecord) -> str:
    """A limit that does not hold: metric, limit, what was measured with its interval, and the end that counted."""
    head, value, judged = f"{limit['metric']}: {limit['limit']}", limit["value"], limit["judged"]
    if value is None or judged is None:
        return f"{head}, but {limit['reason'].removeprefix(limit['metric'] + ': ')}"
    text = f"{head}, measured {value:.4g}"
    if limit["low"] is not None and limit["high"] is not None:
        end = "upper" if judged == limit["high"] else "lower"
        text += f" (interval {limit['low']:.4g} to {limit['high']:.4g}, judged at its {end} end {judged:.4g})"
    if limit["comparison"] not in ("min", "max") and limit["measured"] is not None and limit["teacher"] is not None:
        text += f", from {limit['measured']:.6g} against the teacher's {limit['teacher']:.6g}"
    return text


class Recorder:
    """The record of one run and its file."""

    def __init__(self, plan: Plan, folder: Path, run_id: str) -> None:
        self.plan, self.folder = plan, folder
        self.path = folder / "run.json"
        profile, facts = plan.profile, plan.facts
        target = facts.target
        teacher: dict[str, Any] = {}
        if facts.teacher is not None:
            teacher = {"path": str(facts.teacher.path), "identity": facts.teacher.key}
            if profile.teacher != teacher["path"]:  # a name on the hub
                teacher |= {"name": profile.teacher, "commit": commit_of_folder(facts.teacher.path)}
        self.record: RunRecord = {
            "schema": run_record.SCHEMA,
            "id": run_id,
            "status": "running",
            "started": now(),
            "finished": None,
            "seconds": 0.0,
            "profile": {
                "name": profile.name,
                "description": profile.description,
                "values": profile.model_dump(mode="json"),
            },
            "teacher": teacher,
            "target": None if target is None else target.model_dump(mode="json"),
            "versions": doctor.versions(),
            "device": facts.device,
            "stages": [self._waiting(node) for node in plan.nodes],
            "funnel": [],
            "ledger": None,
            "gate": None,
            "bench": [],
            "summary": [],
            "estimates": [],
            "curves": [],
            "bundle": None,
            "report": None,
            "verdict": "",
            "error": None,
        }

    @staticmethod
    def _waiting(node: Node) -> StageRecord:
        return {
            "name": node.name,
            "stage": node.stage.stage,
            "method": node.stage.method,
            "step": node.step,
            "key": node.key,
            "path": None,
            "state": "waiting",
            "cached": False,
            "seconds": None,
            "peak_memory_bytes": None,
            "metrics": {},
            "notes": [],
            "params": node.params.model_dump(mode="json"),
            "inputs": {slot: source.key for slot, source in node.inputs.items()},
        }

    def started(self, at: int) -> None:
        """Stage ``at`` of the plan begins."""
        self.record["stages"][at]["state"] = "running"
        self.write()

    def finished(self, at: int, folder: Path, result: dict[str, Any], *, cached: bool) -> None:
        """Stage ``at`` stands in ``folder``; ``result`` holds metrics, notes, seconds and peak_memory_bytes."""
        stage, node = self.record["stages"][at], self.plan.nodes[at]
        stage["state"], stage["path"], stage["cached"] = "done", str(folder), cached
        stage["metrics"], stage["notes"] = result.get("metrics", {}), [*map(safe_to_show, result.get("notes", []))]
        stage["seconds"], stage["peak_memory_bytes"] = result.get("seconds"), result.get("peak_memory_bytes")
        roles = {role for role, source in self.plan.roles.items() if source is node}
        self._draw(stage, folder, roles)
        if not cached:
            self.write()

    def _draw(self, stage: StageRecord, folder: Path, roles: set[str]) -> None:
        """Fill the parts of the record that this stage gives figures for."""
        record = self.record
        record["funnel"] = funnel(record["stages"])
        if "bundle" in roles:
            record["bundle"] = str(folder)
        if "verdict" in roles:
            verdict = read_table(folder / VERDICT, StoreError)
            record["ledger"], record["gate"] = verdict["ledger"], verdict["gate"]
        for role in roles:
            if role.startswith("bench of "):
                record["bench"].append(bench_record(role.removeprefix("bench of "), stage["metrics"], record["device"]))
        if stage["stage"].startswith("model.") and (drawn := curve(stage["name"], folder)):
            record["curves"].append(drawn)
        record["summary"] = summary(record["ledger"], record["bench"])

    def close(self, status: Status, seconds: float, error: BaseException | None = None) -> None:
        """The run is over; say how in one sentence and write the record."""
        record = self.record
        record["status"], record["seconds"], record["finished"] = status, seconds, now()
        running = next((stage for stage in record["stages"] if stage["state"] == "running"), None)
        if error is not None:
            if running is not None and status == "failed":
                running["state"] = "failed"
            name = running["name"] if running else None
            message = str(error) if isinstance(error, EdgestillError) else f"{type(error).__name__}: {error}"
            record["error"] = {"kind": type(error).__name__, "message": safe_to_show(message), "stage": name}
        for entry in record["estimates"]:
            entry["measured"] = measured(entry["what"], record)
        record["estimates"] += local_estimates(record["stages"])
        record["verdict"] = self._verdict(running["name"] if running else None)
        self.write()

    def _verdict(self, running: str | None) -> str:
        record = self.record
        if record["status"] == "interrupted":
            return f"Interrupted in {running or 'the run'}; the same command goes on from there."
        if record["status"] == "failed":
            assert record["error"] is not None, "a failed run has an error"
            return f"Failed in {running or 'the run'}: {record['error']['message']}"
        gate = record["gate"]
        if gate is None:
            return "Done; nothing was judged."
        if not gate["limits"]:
            return "Done; the profile sets no limit."
        if gate["passed"]:
            return f"The gate passed: {len(gate['limits'])} of {len(gate['limits'])} limits hold."
        told = "; ".join(failure(limit) for limit in gate["limits"] if not limit["passed"])
        lost = f"The step that lost most is {gate['most_lost']}." if gate["most_lost"] else "No step lost quality."
        return f"The gate failed on {told}. {lost}"

    def write(self) -> None:
        """Write ``run.json``."""
        run_record.write(self.record, self.path)
