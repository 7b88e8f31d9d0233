"""Parameters of evaluation and of the gate, and which limits can be judged at all; imports only pydantic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from compress.context import Params

Task = Literal["function_call", "perplexity", "agreement"]
METRICS: dict[Task, tuple[str, ...]] = {  # what each task measures
    "function_call": ("exact_match", "function_accuracy", "argument_f1", "valid_json", "unknown_function_rate"),
    "perplexity": ("perplexity", "nll"),
    "agreement": ("kl", "top1_agreement"),
}
SIZES = ("parameters", "bundle_bytes")  # known without a task
OF_BOTH = METRICS["agreement"]  # told of two models at once: the teacher has none of its own to compare with
DEFAULT_TASKS: tuple[Task, ...] = ("perplexity", "agreement")
Comparison = Literal["min", "max", "max_drop", "max_rise", "min_ratio", "max_ratio"]


ABSOLUTE: tuple[Comparison, ...] = ("min", "max")  # judged without the teacher's figure


class EvaluateParams(Params):
    """What is measured on the test rows, and on how many of them."""

    tasks: list[Task] = Field(default_factory=lambda: list(DEFAULT_TASKS), min_length=1, description="what to measure")
    rows: int = Field(1000, ge=1, description="test rows for the task metrics, a seeded sample of them all")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="longest answer that is generated")
    max_tokens: int = Field(512, ge=8, description="longest row of perplexity and agreement, in tokens")
    context_tokens: int | None = Field(
        None,
        ge=8,
        description="longest prompt and answer together that any model is given, so that all are measured on the same; "
        "left out: in a run as the bundle's, else each model's own",
    )
    too_long: Literal["truncate", "skip", "error"] = Field(
        "truncate",
        description="a row longer than that: its text or answer loses its end, and what cannot be answered then is "
        "left out; or it is left out; or it is an error, before anything is measured",
    )
    functions: dict[str, list[str]] | None = Field(
        None, description="functions that there are, with their arguments; left out: those that the rows call"
    )
    perplexity_rows: int = Field(200, ge=1, description="rows for perplexity and agreement, first of the sample")


class LimitParams(Params):
    """One limit: a metric and exactly one comparison."""

    metric: str = Field(description="name of a measured metric, or parameters, or bundle_bytes")
    min: float | None = Field(None, description="the bundle's value is at least this")
    max: float | None = Field(None, description="the bundle's value is at most this")
    max_drop: float | None = Field(None, ge=0, description="at most this far below the teacher")
    max_rise: float | None = Field(None, ge=0, description="at most this far above the teacher")
    min_ratio: float | None = Field(None, gt=0, description="teacher / bundle is at least this")
    max_ratio: float | None = Field(None, gt=0, description="bundle / teacher is at most this")

    @model_validator(mode="after")
    def _one_comparison(self) -> LimitParams:
        given = [name for name in Comparison.__args__ if getattr(self, name) is not None]  # type: ignore[attr-defined]
        if len(given) != 1:
            names = ", ".join(Comparison.__args__)  # type: ignore[attr-defined]
            raise ValueError(f"exactly one of {names} is needed, got {len(given)}")
        return self

    @property
    def comparison(self) -> tuple[Comparison, float]:
        """The comparison that was given and its limit."""
        for name in Comparison.__args__:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if value is not None:
                return name, float(value)
        raise AssertionError("validated above: one comparison is given")


def unjudgeable(
    limit: LimitParams, tasks: Sequence[Task], *, bundle: bool, teacher: bool
) -> tuple[str, str, str, str] | None:
    """Why ``limit`` can never be judged: (key, got, allowed, what to do); None where it can.

    Args:
        tasks: what is evaluated.
        bundle: whether a bundle is exported.
        teacher: whether there is a teacher.
    """
    name, (kind, _) = limit.metric, limit.comparison
    measured = [metric for task in tasks for metric in METRICS[task] if teacher or metric not in OF_BOTH]
    measured += [size for size in SIZES if bundle or size != "bundle_bytes"]
    if name not in measured:
        task = next((task for task, names in METRICS.items() if name in names), None)
        do = "Switch the export on, or take the limit out." if name == "bundle_bytes" else "Name a teacher."
        if task is not None and task not in tasks:
            do = f"Add {task} to evaluate.tasks, or take the limit out."
        return "metric", f"{name} is not measured by this profile", f"one of {', '.join(measured)}", do
    if kind in ABSOLUTE:
        return None
    if name in OF_BOTH:
        got = f"{name} already compares with the teacher, who has no {name} of its own"
        return kind, got, " or ".join(ABSOLUTE), f"Write {{metric: {name}, {'max' if name == 'kl' else 'min'}: ...}}."
    if not teacher:
        got = f"{kind} compares with the teacher, and the profile names none"
        return kind, got, " or ".join(ABSOLUTE), "Name a teacher."
    return None


class GateParams(Params):
    """The limits and how sure the judgement must be."""

    limits: list[LimitParams] = Field(default_factory=list, description="all must hold")
    samples: int = Field(10_000, ge=100, description="bootstrap samples")
    level: float = Field(0.95, gt=0.5, lt=1.0, description="confidence level of the intervals")


class CheckpointBenchParams(Params):
    """Lengths at which a checkpoint is timed in torch, for the table beside the bundle."""

    prompt_tokens: int = Field(32, ge=1, description="tokens of the prompt")
    new_tokens: int = Field(64, ge=1, description="tokens that are generated")
    repeats: int = Field(3, ge=1, description="measured repeats; the median counts")
    warmup: int = Field(1, ge=0, description="repeats before that are not measured")
