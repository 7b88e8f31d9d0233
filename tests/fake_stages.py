"""A table of cheap stages for tests of the pipeline: they read and write text files and load nothing heavy.

``CALLS`` collects the names of the stages that really ran in this process. The slow stage counts in its work folder,
so that a test can kill it in the middle and see it go on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from compress.assessment_params import EvaluateParams
from compress.context import Params, StageContext, StageResult
from compress.errors import TrainingError
from compress.ingestion_params import SourceParams
from compress.scores import Scores, as_measure, measure
from compress.stages import Stage

CALLS: list[str] = []
ROWS = 40


class TextParams(Params):
    """A text to append."""

    text: str = Field("x", description="appended")
    times: int = Field(1, ge=1, le=9, description="how often")
    error: bool = Field(False, description="fail half-way")
    steps: int = Field(0, ge=0, description="slow stages: how many steps of 0.05 s")
    context_tokens: int | None = Field(None, description="export: as the real one's")


class BenchParams(Params):
    """Lengths."""

    prompt_tokens: int = Field(8, ge=1, description="prompt")
    new_tokens: int = Field(8, ge=1, description="new")


def _text(folder: Path) -> str:
    if folder.is_file():
        return folder.read_text(encoding="utf-8")
    content = folder / "content.txt"
    return content.read_text(encoding="utf-8") if content.exists() else (folder / "config.json").read_text()


def source(params: SourceParams, ctx: StageContext) -> StageResult:
    """Take the user's file."""
    CALLS.append(ctx.name)
    (ctx.out / "content.txt").write_text(_text(ctx.inputs["source"]), encoding="utf-8")
    return StageResult({"rows_in": ROWS, "rows_out": ROWS, "dropped": {}})


def append(params: TextParams, ctx: StageContext) -> StageResult:
    """Write what came in, and the parameters."""
    CALLS.append(ctx.name)
    parts = [_text(folder) for _, folder in sorted(ctx.inputs.items())]
    (ctx.out / "content.txt").write_text("|".join([*parts, params.text * params.times, str(ctx.seed)]))
    if params.error:
        raise TrainingError("step 7", "the loss is NaN", do="Lower the learning rate.")
    return StageResult({"rows_in": ROWS, "rows_out": ROWS - 4, "dropped": {"short": 4}, "parameters": 10})


def slow(params: TextParams, ctx: StageContext) -> StageResult:
    """Like `append`, in steps that are kept in the work folder."""
    state = ctx.work / "state.txt"
    done = state.read_text() if state.exists() else ""
    while len(done) < params.steps:
        time.sleep(0.05)
        done += str(len(done) % 10)
        temporary = state.with_suffix(".tmp")
        temporary.write_text(done)
        os.replace(temporary, state)
    result = append(params, ctx)
    (ctx.out / "steps.txt").write_text(done)
    return result


def evaluate(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Scores that fall with every step: 40 rows, of which one more is wrong per stroke in the content."""
    CALLS.append(ctx.name)
    subject = next((slot for slot in ("bundle", "model") if slot in ctx.inputs), "teacher")
    wrong = 0 if subject == "teacher" else _text(ctx.inputs[subject]).count("|")
    values = np.ones(ROWS)
    values[:wrong] = 0.0
    scores = Scores(
        subject, 600 if subject == "teacher" else 100, {"teacher": 2400, "model": 400, "bundle": 90}[subject]
    )
    scores.add("exact_match", [str(i) for i in range(ROWS)], values)
    scores.write(ctx.out)
    return StageResult({"metrics": {"exact_match": as_measure(measure(scores, "exact_match", seed=ctx.seed))}})


def bench(params: BenchParams, ctx: StageContext) -> StageResult:
    """Made-up speeds."""
    CALLS.append(ctx.name)
    (ctx.out / "bench.json").write_text("{}")
    figures = {
        "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 10.0,
        "first_token_s": 0.01,
        "peak_memory_bytes": 9,
    }
    return StageResult(dict(figures))


def _line(stage: str, method: str, function: str, params: str = "TextParams", **slots: object) -> Stage:
    return Stage(stage, method, f"tests.fake_stages:{params}", f"tests.fake_stages:{function}", **slots)  # type: ignore[arg-type]


def _evaluate(method: str, *reads: str, uses: tuple[str, ...] = ()) -> Stage:
    params = "compress.assessment_params:EvaluateParams"
    return Stage("evaluate", method, params, "tests.fake_stages:evaluate", reads=reads, writes="evaluation", uses=uses)


TABLE: tuple[Stage, ...] = (
    Stage(
        "data.source", "read", "compress.ingestion_params:SourceParams", "tests.fake_stages:source", reads=("source",)
    ),
    _line("data.selection", "first", "append", reads=("data",)),
    _line("data.selection", "second", "append", reads=("data",), uses=("tokenizer",)),
    _line("data.quality", "only", "append", reads=("data",), optional=("reference",)),
    _line(
        "model.distillation", "fake", "slow", reads=("data",), optional=("model",), writes="model", uses=("teacher",)
    ),
    _line("model.pruning", "fake", "append", reads=("data", "model"), writes="model"),
    _line("model.quantization", "fake", "append", reads=("model",), writes="model"),
    _line("deploy.export", "bundle", "append", reads=("model",), writes="bundle", uses=("target",)),
    _evaluate("teacher", "test", uses=("teacher",)),
    _evaluate("model", "model", "test"),
    _evaluate("bundle", "bundle", "test"),
    Stage(
        "evaluate",
        "gate",
        "compress.assessment_params:GateParams",
        "compress.judgement:judge",
        reads=("evaluations",),
        writes="verdict",
    ),
    _line("deploy.bench", "local", "bench", "BenchParams", reads=("bundle",), writes="bench", uses=("device",)),
    _line("deploy.bench", "checkpoint", "bench", "BenchParams", reads=("model",), writes="bench", uses=("device",)),
)

PROFILE = """\
edgestill: 1
name: fake
seed: 7
teacher: teacher
data: {pool: pool.jsonl, test: test.jsonl}
steps:
  - data.selection: {method: first, text: a}
  - data.selection: {method: second, text: b}
  - model.distillation: {text: c, steps: STEPS}
  - model.quantization: {text: d}
evaluate: {tasks: [function_call]}
gate: [{metric: exact_match, max_drop: 0.5}, {metric: parameters, min_ratio: 6}, {metric: bundle_bytes, min_ratio: 20}]
bench: {prompt_tokens: 4}
"""


def write_profile(folder: Path, *, steps: int = 0) -> Path:
    """A profile with its teacher and data in ``folder``; returns the profile's path."""
    teacher = folder / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text('{"vocab_size": 8}')
    (teacher / "model.safetensors").write_bytes(b"weights")
    (teacher / "tokenizer.json").write_text("{}")
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pool.jsonl").write_text('{"text": "one"}\n')
    (folder / "test.jsonl").write_text('{"text": "two"}\n')
    path = folder / "fake.yaml"
    path.write_text(PROFILE.replace("STEPS", str(steps)))
    return path
