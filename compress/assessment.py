"""Measures the teacher, a checkpoint or a bundle on the test rows; the figures the gate and the ledger stand on.

Three stage functions differ only in what answers: the teacher's torch model, a checkpoint's, or the bundle, whose own
``run.py`` reads the texts and writes the answers in a process of its own, as on the device. Tasks: ``function_call``
generates answers and scores the parsed call, ``perplexity`` is the loss on the tokens that count, ``agreement`` the KL
divergence and equal first choice against the teacher on the same tokens. Row scores are kept (``compress.scores``),
predictions too. Which rows are measured is `compress.assessment_rows`'s question. Knows nothing of limits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.assessment_params import EvaluateParams
from compress.assessment_rows import JudgedRow, TextPath, judged_rows, request_of
from compress.context import StageContext, StageResult
from compress.data.rows import Row, read_rows
from compress.encoding import TokenRow, decode, load_tokenizer, stop_ids
from compress.errors import DataError, UserError
from compress.functions import functions_of
from compress.model.shapes import parameter_count
from compress.progress import Progress
from compress.scores import Scores, as_measure, measure
from evaluators import agreement
from evaluators.metrics import parse_call, score_calls, unknown_function

PREDICTIONS = "predictions.jsonl"
SLICE = 64  # tokens compared at once: float64 copies of (tokens, vocabulary) stay small for large vocabularies
FLOAT32_BYTES = 4
GENERATED_AT_ONCE = 128
TEXT_PATH = "the bundle's own run.py, in a process of its own"


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


class Device(TextPath, Protocol):
    """A bundle in a process of its own, which is given texts."""

    def answer(self, requests: Any, max_new_tokens: int) -> Any:
        """Greedy answers, each with its ``text``."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is measured: what ``opens`` its runtime, its own tokenizer, its sizes, and the ``context`` of its model.

    ``device`` answers in the runtime's place where the subject is a bundle.
    """

    name: str
    opens: Callable[[], Runtime]
    tokenizer: Any
    parameters: int | None
    bytes: int | None
    context: int
    device: Device | None = None

    @cached_property
    def runtime(self) -> Runtime:
        """Opened on first use."""
        return self.opens()


def evaluate_teacher(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure the teacher (a local folder); agreement with itself is left out."""
    assert ctx.teacher is not None, "the table says that this stage uses the teacher"
    folder = ctx.teacher.folder
    if folder is None:
        raise UserError("teacher", "an endpoint cannot be measured: it gives no logits of a whole row",
                        do="Leave out data.test and gate, or give the teacher's folder.")  # fmt: skip
    parameters = parameter_count(_config(folder))
    return evaluate(_checkpoint("teacher", folder, FLOAT32_BYTES * parameters, ctx), params, ctx)


def evaluate_model(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure a checkpoint in torch; quantized ones are opened as the plain weights that their codes stand for."""
    folder = ctx.inputs["model"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return evaluate(_checkpoint("model", folder, size, ctx), params, ctx)


def _checkpoint(name: str, folder: Path, size: int, ctx: StageContext) -> Subject:
    """A checkpoint of ``size`` bytes as what is measured."""
    config = _config(folder)
    return Subject(
        name,
        lambda: torch_runtime(folder, ctx.threads),
        load_tokenizer(folder),
        parameter_count(config),
        size,
        int(config["max_position_embeddings"]),
    )


def evaluate_bundle(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Measure the exported bundle in the runtime that the device uses, and through the bundle's own way with texts."""
    from deploy.bundle import open_bundle  # the runtime's library loads only here
    from deploy.runners import GenaiRunner
    from deploy.serving import BundleProcess, foreign_script

    folder = ctx.inputs["bundle"]
    bundle = open_bundle(folder)  # digests too
    bundle.need("onnx")
    with BundleProcess(folder, threads=ctx.threads) as device:
        subject = Subject(
            "bundle",
            lambda: GenaiRunner(folder, threads=ctx.threads, verify=False),  # every digest was just checked
            load_tokenizer(folder),
            bundle.parameters,
            bundle.bytes,
            int(bundle.info["onnx"]["context_tokens"]),
            device,
        )
        result = evaluate(subject, params, ctx)
    foreign = foreign_script(folder)
    result.metrics["text_path"] = TEXT_PATH
    result.notes += [f"text path: {TEXT_PATH}", *([foreign] if foreign else [])]
    return result


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


def _comparable(subject: Subject, params: EvaluateParams, ctx: StageContext) -> tuple[Path | None, list[str]]:
    """The teacher's folder, when agreement is asked for and can be had; else a note that says why not."""
    if "agreement" not in params.tasks or ctx.teacher is None or subject.name == "teacher":
        return None, []
    if ctx.teacher.folder is None:
        return None, ["agreement was left out: the teacher gives no logits"]
    if ctx.teacher.tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        return None, ["agreement was left out: teacher and student do not share a vocabulary"]
    return ctx.teacher.folder, []


def evaluate(subject: Subject, params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Run the tasks and write ``scores.json`` and ``predictions.jsonl``.

    Raises:
        DataError: a test row does not fit the task: no answer, a reference that is no call, too long.
    """
    rows = sample(read_rows(ctx.inputs["test"]), params.rows, ctx.seed)
    if "function_call" in params.tasks:
        check_calls(rows)
    home, notes = _comparable(subject, params, ctx)
    contexts = [subject.context, params.context_tokens or subject.context]
    contexts += [] if home is None else [int(_config(home)["max_position_embeddings"])]
    scored = "perplexity" in params.tasks or home is not None
    judged = judged_rows(rows, subject.tokenizer, params, context=min(contexts), device=subject.device, scored=scored)
    scores = Scores(subject.name, subject.parameters, subject.bytes)
    if judged.calls:
        call_task(subject, judged.calls, params, scores, ctx)
    if judged.tokens:
        teacher = None if home is None else torch_runtime(home, ctx.threads)
        token_tasks(subject, judged.tokens, params, scores, teacher=teacher, progress=ctx.progress)
    scores.write(ctx.out)
    found = {name: measure(scores, name, seed=ctx.seed) for name in scores.metrics}
    notes += [f"{name}: {interval.note}" for name, interval in found.items() if interval.note]
    figures = {name: as_measure(interval) for name, interval in found.items()}
    metrics = {"metrics": figures, "rows": len(rows), "parameters": subject.parameters, "bytes": subject.bytes}
    return StageResult(metrics=metrics | judged.counts, notes=notes + judged.notes)


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most ``count`` rows in a seeded random order: any first part of them is a fair sample, too."""
    return random.Random(seed).sample(rows, min(count, len(rows)))  # noqa: S311 - not for secrets


def check_calls(rows: Sequence[Row]) -> None:
    """Raise DataError for the first row whose answer is no function call."""
    for row in rows:
        if parse_call(row.answer) is None:
            raise DataError(f"test row {row.id}", f"its answer is no function call: {row.answer[:80]!r}",
                            '{"name": ..., "args": {...}}', "Take function_call out of evaluate.tasks.")  # fmt: skip


def call_task(
    subject: Subject, rows: Sequence[JudgedRow], params: EvaluateParams, scores: Scores, ctx: StageContext
) -> None:
    """Generate an answer for every row and score the call in it."""
    texts, order = _foreseen(subject, rows, params.max_new_tokens)
    with ctx.progress.bar(f"answers of the {subject.name}", len(rows)) as bar:
        bar.advance(len(rows) - len(order))
        for at in range(0, len(order), GENERATED_AT_ONCE):
            part = order[at : at + GENERATED_AT_ONCE]
            for i, text in zip(part, _answers(subject, [rows[i] for i in part], params.max_new_tokens), strict=True):
                texts[i] = text
            bar.advance(len(part))
    ids = [one.row.id for one in rows]
    known = known_functions(params, ctx)
    for name, values in score_calls(texts, [one.row.answer for one in rows], known).items():
        scores.add(name, ids, values)
    with (ctx.out / PREDICTIONS).open("w", encoding="utf-8") as out:
        for one, text in zip(rows, texts, strict=True):
            line = {"id": one.row.id, "request": one.row.user, "reference": one.row.answer, "prediction": text}
            if (strange := unknown_function(text, known)) is not None:
                line["unknown_function"] = strange
            out.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")


def known_functions(params: EvaluateParams, ctx: StageContext) -> set[str]:
    """Names of the functions that there are: as the parameters say, else those that test and training rows call."""
    if params.functions is not None:
        return set(params.functions)
    tables = [functions_of(ctx.inputs[slot]) for slot in ("test", "data") if slot in ctx.inputs]
    return set().union(*tables)


def _answers(subject: Subject, rows: Sequence[JudgedRow], limit: int) -> list[str]:
    """Greedy answers of at most ``limit`` tokens: a bundle is given the text, a checkpoint the tokens."""
    if subject.device is not None:
        found = subject.device.answer([request_of(one.row) for one in rows], limit)
        return [str(answered.text) for answered in found]
    prompts = [one.seen.prompt for one in rows]
    answers = subject.runtime.generate(prompts, limit, stop_ids(subject.tokenizer))
    return [decode(ids, subject.tokenizer) for ids in answers]


def _foreseen(subject: Subject, rows: Sequence[JudgedRow], limit: int) -> tuple[list[str], list[int]]:
    """Texts that need no generation, and the rows that do, short prompts first, since runtimes batch like lengths."""
    texts = [""] * len(rows)
    prompts = [one.seen.prompt for one in rows]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if subject.device is not None or not isinstance(subject.runtime, Foreseeing):
        return texts, order
    wanted = [one.row.answer for one in rows]
    encoded = subject.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    fit = [i for i in order if 0 < len(encoded[i]) < limit and decode(encoded[i], subject.tokenizer) == wanted[i]]
    stop = frozenset(stop_ids(subject.tokenizer))
    verdicts = subject.runtime.would_write([prompts[i] for i in fit], [encoded[i] for i in fit], stop)
    certain = {i for i, sure in zip(fit, verdicts, strict=True) if sure}
    for i in certain:
        texts[i] = wanted[i]
    return texts, [i for i in order if i not in certain]


def token_tasks(
    subject: Subject,
    rows: Sequence[JudgedRow],
    params: EvaluateParams,
    scores: Scores,
    *,
    teacher: Runtime | None,
    progress: Progress,
) -> None:
    """Loss on the tokens that count, and agreement with the teacher on the very same ones."""
    table = np.zeros((len(rows), 4))  # tokens, nats, KL in nats, equal first choices
    for at, one in enumerate(progress.track(rows, f"tokens of the {subject.name}")):
        logits = subject.runtime.logits(one.seen.ids)
        table[at] = score_row(one.seen, logits, None if teacher is None else _of_teacher(one, teacher, logits))
    ids, weights = [one.seen.id for one in rows], table[:, 0]
    if "perplexity" in params.tasks:
        scores.add("perplexity", ids, table[:, 1], weights)
        scores.add("nll", ids, table[:, 1], weights)
    shared = [at for at, one in enumerate(rows) if one.taught is not None]
    if teacher is not None and shared:
        names = [ids[at] for at in shared]
        scores.add("kl", names, table[shared, 2], weights[shared])
        scores.add("top1_agreement", names, table[shared, 3], weights[shared])


def _of_teacher(one: JudgedRow, teacher: Runtime, logits: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The teacher's logits where the bundle's count: each side read the prompt as it cuts it."""
    if one.taught is None:
        return None
    found = teacher.logits(one.taught.ids)
    if one.taught.ids == one.seen.ids:
        return found
    placed = np.zeros_like(logits)
    placed[np.flatnonzero(one.seen.answer[1:])] = found[np.flatnonzero(one.taught.answer[1:])]
    return placed


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
