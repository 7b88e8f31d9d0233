"""The verdict on what ships, and the loss ledger: which step cost how much quality.

`judge` is the stage function. It reads the row scores of the teacher, of the model after every step and of the
bundle, compares neighbours and ends pairwise, and holds the bundle against the profile's limits. A gate that says
no is a result, not a failure: the stage succeeds and the command ends with exit code 3. Loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.assessment_params import GateParams
from compress.context import StageContext, StageResult
from compress.files import json_text, write_whole
from compress.run_record import GateRecord, Ledger, LedgerEntry, LimitRecord
from compress.scores import Scores, as_measure, difference, higher_is_better, measure, ratio, read_scores
from evaluators.gate import Limit, LimitResult, Measured
from evaluators.gate import judge as hold

FILE = "verdict.json"
PREFERRED = ("exact_match", "perplexity", "nll", "kl")  # the ledger's metric, the first that was measured

WORDS = {
    "min": "at least {0:g}",
    "max": "at most {0:g}",
    "max_drop": "at most {0:g} below the teacher",
    "max_rise": "at most {0:g} above the teacher",
    "min_ratio": "at least {0:g} times smaller than the teacher",
    "max_ratio": "at most {0:g} times the teacher's",
}


def ledger_metric(limits: Sequence[Limit], scores: Sequence[tuple[str, Scores]]) -> str:
    """The metric in which losses are told: that of the first limit on quality, else the preferred one."""
    shared = [name for name in scores[-1][1].metrics if all(name in each.metrics for _, each in scores)]
    measured = shared or scores[-1][1].metrics
    for name in [*(limit.metric for limit in limits), *PREFERRED]:
        if name in measured:
            return name
    return measured[0]


def build_ledger(scores: Sequence[tuple[str, Scores]], metric: str, *, seed: int, samples: int, level: float) -> Ledger:
    """Quality after each step, in order, and what each cost against the one before (positive is worse)."""
    sign = -1.0 if higher_is_better(metric) else 1.0
    entries: list[LedgerEntry] = []
    for at, (step, these) in enumerate(scores):
        loss = difference(these, scores[at - 1][1], metric, seed=seed, samples=samples, level=level) if at else None
        ends = sorted((sign * loss.low, sign * loss.high)) if loss else [None, None]
        intervals = {name: measure(these, name, seed=seed, level=level) for name in these.metrics}
        entries.append(
            {
                "step": step,
                "parameters": these.parameters,
                "bytes": these.bytes,
                "metrics": {name: as_measure(interval) for name, interval in intervals.items()},
                "loss": (sign * loss.mean if loss else None) if at else 0.0,
                "loss_low": ends[0],
                "loss_high": ends[1],
            }
        )
    losses = [(entry["loss"], entry["step"]) for entry in entries if entry["loss"] is not None and entry["loss"] > 0]
    worst = max(losses, key=lambda pair: pair[0])[1] if losses else None
    return {"metric": metric, "higher_is_better": sign < 0, "entries": entries, "most_lost": worst}


def measured_of(scores: Sequence[tuple[str, Scores]], params: GateParams, *, seed: int) -> dict[str, Measured]:
    """What is known of the shipped subject (the last one), metric by metric, against the teacher."""
    shipped = scores[-1][1]
    teacher = dict(scores).get("teacher")
    found: dict[str, Measured] = {}
    options = {"seed": seed, "samples": params.samples}
    for name in shipped.metrics:
        seen = Measured(shipped.value(name), interval=measure(shipped, name, level=params.level, **options))
        if teacher is not None and name in teacher.metrics:
            seen = replace(
                seen,
                teacher=teacher.value(name),
                difference=difference(shipped, teacher, name, level=params.level, **options),
                ratio=ratio(shipped, teacher, name, level=params.level, **options),
            )
        found[name] = seen
    parameters = shipped.parameters or next((s.parameters for _, s in reversed(scores) if s.parameters), None)
    for name, value, of_teacher in (
        ("parameters", parameters, teacher.parameters if teacher else None),
        ("bundle_bytes", shipped.bytes if shipped.subject == "bundle" else None, teacher.bytes if teacher else None),
    ):
        if value is not None:
            found[name] = Measured(value=float(value), teacher=None if of_teacher is None else float(of_teacher))
    return found


def limit_record(result: LimitResult, measured: Mapping[str, Measured]) -> LimitRecord:
    """One answered limit in the run record's form."""
    seen = measured.get(result.metric)
    interval = result.interval
    value = interval.mean if interval is not None else result.judged
    return {
        "metric": result.metric,
        "limit": WORDS[result.kind].format(result.bound),
        "comparison": result.kind,
        "limit_value": result.bound,
        "value": value,
        "judged": result.judged,
        "low": interval.low if interval is not None else None,
        "high": interval.high if interval is not None else None,
        "measured": seen.value if seen else None,
        "teacher": seen.teacher if seen else None,
        "passed": result.passed,
        "reason": result.reason,
    }


def judge(params: GateParams, ctx: StageContext) -> StageResult:
    """Compare all evaluations and hold the last against the limits; writes ``verdict.json``.

    The inputs are the slots ``evaluation.NN.STEP``; their order is the order of the steps.
    """
    scores = [(slot.split(".", 2)[2], read_scores(ctx.inputs[slot])) for slot in sorted(ctx.inputs)]
    limits = [Limit(limit.metric, *limit.comparison) for limit in params.limits]
    metric = ledger_metric(limits, scores)
    ledger = build_ledger(scores, metric, seed=ctx.seed, samples=params.samples, level=params.level)
    measured = measured_of(scores, params, seed=ctx.seed)
    verdict = hold(limits, measured)
    gate: GateRecord = {
        "passed": verdict.passed,
        "limits": [limit_record(result, measured) for result in verdict.results],
        "most_lost": ledger["most_lost"],
    }
    metrics = {"ledger": ledger, "gate": gate}
    write_whole(ctx.out / FILE, json_text(metrics, indent=1) + "\n")
    return StageResult(metrics={"passed": verdict.passed, "limits": len(limits), "most_lost": ledger["most_lost"]})
