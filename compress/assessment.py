"""Measures the teacher, a checkpoint or a bundle on the test rows; the figures the gate and the ledger stand on.

Three stage functions differ only in what answers: the teacher's torch model, a checkpoint's, or the bundle in the
runtime that the device uses. Tasks: ``function_call`` generates answers and scores the parsed call, ``perplexity``
is the loss on the tokens that count, ``agreement`` the KL divergence and equal first choice against the teacher on
the same tokens. Row scores are kept (``compress.scores``), predictions too. Knows nothing of limits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.assessment_params import EvaluateParams
from compress.context import StageContext, StageResult
from compress.data.rows import Row, read_rows
from compress.encoding import TokenRow, decode, encode_prompt, encode_rows, load_tokenizer, stop_ids
from compress.errors import DataError, UserError
from compress.model.shapes import parameter_count
from compress.progress import Progress
from compress.scores import Scores, as_measure, measure
from evaluators import agreement
from evaluators.metrics import parse_call, score_calls

PREDICTIONS = "predictions.jsonl"
SLICE = 64  # tokens compared at once: float64 copies of (tokens, vocabulary) stay small for large vocabularies
FLOAT32_BYTES = 4
GENERATED_AT_ONCE = 128


class Runtime(Protocol):
    """What answers: a torch model or a bundle in its runtime."""

    def generate(self, prompts: Any, max_new_tokens: int, stop_ids: Any) -> list[list[int]]:
        """Greedy continuations, without the stop token."""
        ...

    def logits(self, ids: Any) -> NDArray[np.float32]:
        """Logits (T, vocabulary) after each of the ids (T,)."""
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """A runtime that can tell by one forward pass whether it would write a given answer."""

    def would_write(self, prompts: Any, answers: Any, stop_ids: frozenset[int]) -> list[bool]:
        """One verdict per prompt."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is measured: ``runtime`` with its own tokenizer, and its sizes."""

    name: str
    runtime: Runtime
    tokenizer: Any
    parameters: int | None
    bytes: int | None


def evaluate_teacher(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure the teacher (a local folder); agreement with itself is left out."""
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    folder = ctx.teacher.folder
    if folder is None:
        raise UserError("teacher", "an endpoint cannot be measured: it gives no logits of a whole row",
                        do="Leave out data.test and gate, or give the teacher's folder.")  # fmt: skip
    config = _config(folder)
    parameters = parameter_count(config)
    subject = Subject(
        "teacher", torch_runtime(folder, ctx.threads), load_tokenizer(folder), parameters, FLOAT32_BYTES * parameters
    )
    return evaluate(subject, params, ctx)


def evaluate_model(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure a checkpoint in torch; quantized ones are opened as the plain weights that their codes stand for."""
    folder = ctx.inputs["model"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    subject = Subject(
        "model", torch_runtime(folder, ctx.threads), load_tokenizer(folder), parameter_count(_config(folder)), size
    )
    return evaluate(subject, params, ctx)


def evaluate_bundle(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure the exported bundle in the runtime that the device uses, with the tokenizer that lies in it."""
    from deploy.bundle import open_bundle  # the runtime's library loads only here
    from deploy.runners import GenaiRunner

    folder = ctx.inputs["bundle"]
    bundle = open_bundle(folder)  # digests too
    bundle.need("onnx")
    runner = GenaiRunner(folder, threads=ctx.threads, verify=False)  # every digest was just checked
    return evaluate(Subject("bundle", runner, load_tokenizer(folder), bundle.parameters, bundle.bytes), params, ctx)


def torch_runtime(folder: Path, threads: int) -> Runtime:
    """A checkpoint as a runtime on ``threads`` threads."""
    import torch  # the bundle's evaluation needs it only for agreement

    from compress.model.checkpoint import check_tokenizer, load_model
    from compress.model.runtime import TorchRuntime

    check_tokenizer(folder, _config(folder))  # an id outside the vocabulary would end in the middle of the rows
    torch.set_num_threads(threads)
    return TorchRuntime(load_model(folder))


def _config(folder: Path) -> dict[str, Any]:
    from compress.model.checkpoint import read_config

    return read_config(folder)


def _teacher_runtime(subject: Subject, params: EvaluateParams, ctx: StageContext) -> tuple[Runtime | None, list[str]]:
    """The teacher as a runtime, when agreement is asked for and can be had; else a note that says why not."""
    if "agreement" not in params.tasks or ctx.teacher is None:
        return None, []
    if ctx.teacher.folder is None:
        return None, ["agreement was left out: the teacher gives no logits"]
    if ctx.teacher.tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        return None, ["agreement was left out: teacher and student do not share a vocabulary"]
    return torch_runtime(ctx.teacher.folder, ctx.threads), []


def evaluate(subject: Subject, params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Run the tasks and write ``scores.json`` and ``predictions.jsonl``.

    Raises:
        DataError: a test row does not fit the task: no answer, a reference that is no call, too long.
    """
    rows = sample(read_rows(ctx.inputs["test"]), params.rows, ctx.seed)
    scores = Scores(subject.name, subject.parameters, subject.bytes)
    teacher, notes = (None, []) if subject.name == "teacher" else _teacher_runtime(subject, params, ctx)
    if "function_call" in params.tasks:
        call_task(subject, rows, params, scores, ctx)
    if "perplexity" in params.tasks or teacher is not None:
        notes += token_tasks(
            subject, rows[: params.perplexity_rows], params, scores, teacher=teacher, progress=ctx.progress
        )
    scores.write(ctx.out)
    found = {name: measure(scores, name, seed=ctx.seed) for name in scores.metrics}
    notes += [f"{name}: {interval.note}" for name, interval in found.items() if interval.note]
    figures = {name: as_measure(interval) for name, interval in found.items()}
    metrics = {"metrics": figures, "rows": len(rows), "parameters": subject.parameters, "bytes": subject.bytes}
    return StageResult(metrics=metrics, notes=notes)


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most ``count`` rows in a seeded random order: any first part of them is a fair sample, too."""
    return random.Random(seed).sample(rows, min(count, len(rows)))  # noqa: S311 - not for secrets


def call_task(subject: Subject, rows: Sequence[Row], params: EvaluateParams, scores: Scores, ctx: StageContext) -> None:
    """Generate an answer for every row and score the call in it."""
    for row in rows:
        if parse_call(row.answer) is None:
            raise DataError(f"test row {row.id}", f"its answer is no function call: {row.answer[:80]!r}",
                            '{"name": ..., "args": {...}}', "Take function_call out of evaluate.tasks.")  # fmt: skip
    tokenizer = subject.tokenizer
    prompts = [encode_prompt(row.prompt, tokenizer) for row in rows]
    stop = stop_ids(tokenizer)
    texts, order = _foreseen(subject, rows, prompts, stop, params.max_new_tokens)
    with ctx.progress.bar(f"answers of the {subject.name}", len(prompts)) as bar:
        bar.advance(len(prompts) - len(order))
        for at in range(0, len(order), GENERATED_AT_ONCE):
            part = order[at : at + GENERATED_AT_ONCE]
            answers = subject.runtime.generate([prompts[i] for i in part], params.max_new_tokens, stop)
            for i, ids in zip(part, answers, strict=True):
                texts[i] = decode(ids, tokenizer)
            bar.advance(len(part))
    for name, values in score_calls(texts, [row.answer for row in rows]).items():
        scores.add(name, [row.id for row in rows], values)
    with (ctx.out / PREDICTIONS).open("w", encoding="utf-8") as out:
        for row, text in zip(rows, texts, strict=True):
            line = {"id": row.id, "request": row.user, "reference": row.answer, "prediction": text}
            out.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")


def _foreseen(
    subject: Subject, rows: Sequence[Row], prompts: Sequence[Sequence[int]], stop: Sequence[int], limit: int
) -> tuple[list[str], list[int]]:
    """Texts that need no generation, and the rows that do, short prompts first, since runtimes batch like lengths."""
    texts = [""] * len(rows)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if not isinstance(subject.runtime, Foreseeing):
        return texts, order
    encoded = subject.tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"]
    fit = [i for i in order if 0 < len(encoded[i]) < limit and decode(encoded[i], subject.tokenizer) == rows[i].answer]
    verdicts = subject.runtime.would_write([prompts[i] for i in fit], [encoded[i] for i in fit], frozenset(stop))
    certain = {i for i, sure in zip(fit, verdicts, strict=True) if sure}
    for i in certain:
        texts[i] = rows[i].answer
    return texts, [i for i in order if i not in certain]


def token_tasks(
    subject: Subject,
    rows: Sequence[Row],
    params: EvaluateParams,
    scores: Scores,
    *,
    teacher: Runtime | None,
    progress: Progress,
) -> list[str]:
    """Loss on the tokens that count, and agreement with the teacher on the very same ones."""
    encoded = encode_rows(rows, subject.tokenizer, max_tokens=params.max_tokens, truncate=True)
    encoded = [row for row in encoded if any(row.answer[1:])]
    if not encoded:
        raise DataError("data.test", "no row has a token to predict", "rows with an answer, or with text")
    table = np.zeros((len(encoded), 4))  # tokens, nats, KL in nats, equal first choices
    for at, row in enumerate(progress.track(encoded, f"tokens of the {subject.name}")):
        table[at] = score_row(row, subject.runtime.logits(row.ids), teacher.logits(row.ids) if teacher else None)
    ids, weights = [row.id for row in encoded], table[:, 0]
    if "perplexity" in params.tasks:
        scores.add("perplexity", ids, table[:, 1], weights)
        scores.add("nll", ids, table[:, 1], weights)
    if teacher is not None:
        scores.add("kl", ids, table[:, 2], weights)
        scores.add("top1_agreement", ids, table[:, 3], weights)
    skipped = len(rows) - len(encoded)
    return [f"{skipped} rows without a token to predict were left out"] if skipped else []


def score_row(
    row: TokenRow, logits: NDArray[np.float32], teacher: NDArray[np.float32] | None
) -> tuple[float, float, float, float]:
    """Tokens that count, their summed loss, summed KL to the teacher and equal first choices, of one row.

    Logits (T, vocabulary) at position t are of token t + 1.
    """
    targets = np.asarray(row.ids[1:])
    places = np.flatnonzero(np.asarray(row.answer[1:]))
    loss = kl = same = 0.0
    for at in range(0, len(places), SLICE):
        part = places[at : at + SLICE]
        loss += float(agreement.nll(logits[part], targets[part]).sum())
        if teacher is not None:
            both = agreement.compare(teacher[part], logits[part])
            kl, same = kl + float(both.kl.sum()), same + float(both.top1.sum())
    return float(len(places)), loss, kl, same
