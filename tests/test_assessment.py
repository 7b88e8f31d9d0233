"""Evaluation of tiny models: known answers, row scores, agreement, the gate's stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.assessment import Subject, evaluate, evaluate_model, evaluate_teacher, sample, score_row
from compress.assessment_params import EvaluateParams, GateParams
from compress.assessment_rows import judged_rows
from compress.context import StageContext, StageResult
from compress.data.rows import Row, chat_row, make_row, write_rows
from compress.encoding import TokenRow, encode_prompt, encode_rows, encode_text_prompt, load_tokenizer
from compress.errors import DataError
from compress.judgement import judge
from compress.progress import Progress
from compress.scores import Scores, read_scores
from compress.teachers import LocalTeacher
from tests.tiny import tiny_checkpoint

CALL = '{"name":"set_light","args":{"room":"kitchen","level":30}}'
WRONG = '{"name":"set_light","args":{"room":"hall","level":30}}'


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "student", seed=2)


def context(tmp_path: Path, rows: list[Row], **inputs: Path) -> StageContext:
    test = tmp_path / "test"
    test.mkdir(exist_ok=True)
    write_rows(test, rows)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    teacher = inputs.pop("teacher", None)
    return StageContext(
        name="evaluate",
        inputs={"test": test, **inputs},
        out=out,
        work=tmp_path,
        seed=3,
        progress=Progress(quiet=True),
        teacher=LocalTeacher(teacher) if teacher else None,
        threads=1,
    )


def calls(count: int) -> list[Row]:
    return [chat_row(f"dim the kitchen lights to {i}", CALL) for i in range(count)]


class Scripted:
    """A runtime that says what it is told, in the order of the prompts (the prompts being of one length)."""

    def __init__(self, answers: list[str], tokenizer: Any) -> None:
        self.answers, self.tokenizer, self.at = answers, tokenizer, 0

    def generate(self, prompts: Any, max_new_tokens: int, stop_ids: Any) -> list[list[int]]:
        part = self.answers[self.at : self.at + len(prompts)]
        self.at += len(prompts)
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]

    def logits(self, ids: Any) -> Any:
        return np.zeros((len(ids), 320), dtype=np.float32)


def test_calls_are_scored_row_by_row(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    answers = [CALL, WRONG, "no json", CALL.replace(",", ", ")]
    subject = Subject("bundle", lambda: Scripted(answers, tokenizer), tokenizer, 10, 20, 256)
    ctx = context(tmp_path, calls(4))
    evaluate(subject, EvaluateParams(tasks=["function_call"]), ctx)
    scores = read_scores(ctx.out)
    assert (scores.parameters, scores.bytes) == (10, 20)
    assert scores.sums["exact_match"].tolist() == [1, 0, 0, 1]
    assert scores.sums["function_accuracy"].tolist() == [1, 1, 0, 1]
    assert scores.sums["argument_f1"].tolist() == [1, 0.5, 0, 1]
    assert scores.sums["valid_json"].tolist() == [1, 1, 0, 1]
    kept = [json.loads(line) for line in (ctx.out / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in kept] == answers


def test_flat_logits_have_the_vocabulary_as_perplexity(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    subject = Subject("bundle", lambda: Scripted([], tokenizer), tokenizer, None, None, 256)
    result = evaluate(subject, EvaluateParams(tasks=["perplexity"]), context(tmp_path, calls(3)))
    assert result.metrics["metrics"]["perplexity"]["mean"] == pytest.approx(320)


def test_row_scores_equal_the_plain_formula() -> None:
    rng = np.random.default_rng(0)
    ours, teachers = rng.normal(size=(150, 11)).astype("f4"), rng.normal(size=(150, 11)).astype("f4")
    ids = rng.integers(0, 11, 150)
    answer = (rng.random(150) < 0.6).astype(int)
    answer[0] = 1  # the first token has nothing before it: never counted
    row = TokenRow("r", tuple(int(i) for i in ids), tuple(int(a) for a in answer))
    tokens, loss, kl, same = score_row(row, ours, teachers)
    wanted = np.zeros(4)
    for t in range(1, 150):
        if not answer[t]:
            continue
        q = np.exp(ours[t - 1].astype("f8")) / np.exp(ours[t - 1].astype("f8")).sum()
        p = np.exp(teachers[t - 1].astype("f8")) / np.exp(teachers[t - 1].astype("f8")).sum()
        wanted += [1, -np.log(q[ids[t]]), (p * np.log(p / q)).sum(), float(p.argmax() == q.argmax())]
    assert [tokens, loss, kl, same] == pytest.approx(wanted.tolist())


def test_model_against_itself_agrees_fully(teacher: Path, tmp_path: Path) -> None:
    params = EvaluateParams(tasks=["perplexity", "agreement"])
    of_teacher = evaluate_teacher(params, context(tmp_path, calls(5), teacher=teacher))
    of_model = evaluate_model(params, context(tmp_path, calls(5), teacher=teacher, model=teacher))
    measures = of_model.metrics["metrics"]
    assert measures["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert measures["top1_agreement"]["mean"] == 1.0
    assert measures["perplexity"] == of_teacher.metrics["metrics"]["perplexity"]
    assert "kl" not in of_teacher.metrics["metrics"]


def test_other_model_disagrees(teacher: Path, student: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path, calls(5), teacher=teacher, model=student)
    measures = evaluate_model(EvaluateParams(tasks=["agreement"]), ctx).metrics["metrics"]
    assert set(measures) == {"kl", "top1_agreement"}
    assert measures["kl"]["mean"] > 0.01
    assert measures["top1_agreement"]["mean"] < 1


def test_perplexity_equals_the_models_own_loss(teacher: Path, tmp_path: Path) -> None:
    import torch

    from compress.model.checkpoint import load_model

    rows = [make_row(text="the kitchen light is on"), make_row(text="the hall is dark")]
    ctx = context(tmp_path, rows, model=teacher)
    mean = evaluate_model(EvaluateParams(tasks=["perplexity"]), ctx).metrics["metrics"]["nll"]["mean"]
    model, losses, tokens = load_model(teacher), 0.0, 0
    for row in encode_rows(rows, load_tokenizer(teacher), max_tokens=512):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (len(row.ids) - 1)
        tokens += len(row.ids) - 1
    assert mean == pytest.approx(losses / tokens, rel=1e-5)


def test_the_same_evaluation_gives_the_same_bytes(teacher: Path, student: Path, tmp_path: Path) -> None:
    params = EvaluateParams(tasks=["function_call", "perplexity", "agreement"], max_new_tokens=4)
    outs = []
    for _ in range(2):
        ctx = context(tmp_path, calls(6), teacher=teacher, model=student)
        evaluate_model(params, ctx)
        outs.append({path.name: path.read_bytes() for path in ctx.out.iterdir()})
    assert outs[0] == outs[1]
    assert set(outs[0]) == {"scores.json", "predictions.jsonl"}


def test_sample_is_seeded_and_its_first_part_is_the_smaller_sample() -> None:
    rows = calls(50)
    assert sample(rows, 20, 1) == sample(rows, 20, 1) != sample(rows, 20, 2)
    assert len(sample(rows, 99, 1)) == 50


def test_reference_that_is_no_call_is_named(teacher: Path, tmp_path: Path) -> None:
    rows = [chat_row("hello", "good day")]
    ctx = context(tmp_path, rows, model=teacher)
    with pytest.raises(DataError, match=rf"test row {rows[0].id}: its answer is no function call: 'good day'"):
        evaluate_model(EvaluateParams(tasks=["function_call"]), ctx)


def scored(subject: str, right: list[float], nats: list[float], *, parameters: int, size: int) -> Scores:
    scores = Scores(subject, parameters, size)
    ids = [str(i) for i in range(len(right))]
    scores.add("exact_match", ids, np.asarray(right))
    scores.add("perplexity", ids, np.asarray(nats), np.full(len(nats), 4.0))
    return scores


def judged(tmp_path: Path, limits: list[dict[str, Any]], subjects: list[tuple[str, Scores]]) -> tuple[StageResult, Any]:
    inputs = {}
    for at, (step, scores) in enumerate(subjects):
        folder = tmp_path / step
        folder.mkdir()
        scores.write(folder)
        inputs[f"evaluation.{at:02d}.{step}"] = folder
    out = tmp_path / "verdict"
    out.mkdir()
    ctx = StageContext("evaluate.gate", inputs, out, tmp_path, 5, Progress(quiet=True))
    result = judge(GateParams.model_validate({"limits": limits}), ctx)
    return result, json.loads((out / "verdict.json").read_text())


def test_gate_ledger_and_limits(tmp_path: Path) -> None:
    n = 200
    teacher = scored("teacher", [1.0] * n, [4.0] * n, parameters=600, size=2400)
    student = scored("model", [0.0] * 4 + [1.0] * (n - 4), [4.4] * n, parameters=100, size=400)
    shipped = scored("bundle", [0.0] * 10 + [1.0] * (n - 10), [4.8] * n, parameters=100, size=60)
    limits = [
        {"metric": "exact_match", "max_drop": 0.1},
        {"metric": "exact_match", "max_drop": 0.02},
        {"metric": "parameters", "min_ratio": 6},
        {"metric": "bundle_bytes", "min_ratio": 50},
        {"metric": "perplexity", "max_ratio": 1.3},
    ]
    steps = [("teacher", teacher), ("model.distillation.logits", student), ("bundle", shipped)]
    result, verdict = judged(tmp_path, limits, steps)
    assert not result.metrics["passed"]
    assert [limit["passed"] for limit in verdict["gate"]["limits"]] == [True, False, True, False, True]
    assert verdict["gate"]["limits"][3]["value"] == pytest.approx(40)
    assert verdict["gate"]["limits"][4]["value"] == pytest.approx(np.exp(0.2))
    entries = verdict["ledger"]["entries"]
    assert [entry["loss"] for entry in entries] == pytest.approx([0, 0.02, 0.03])
    assert verdict["ledger"]["most_lost"] == "bundle"
    low, high = entries[2]["loss_low"], entries[2]["loss_high"]
    # 6 rows of 200 changed, all the same way: the lower end is the score, the upper one the exact bound
    assert low == pytest.approx(0.0106, abs=0.0005)
    assert high == pytest.approx(0.0642, abs=0.0005)


def test_ratio_of_perplexities_is_judged_at_the_end_of_its_paired_interval(tmp_path: Path) -> None:
    """Equal rises give a sharp ratio; a few rows that rise much give the same point and a wide one."""
    n = 200
    rows = np.linspace(1.0, 9.0, n)  # the paired interval is blind to how the rows differ among themselves
    teacher = scored("teacher", [1.0] * n, list(rows), parameters=6, size=24)
    even = scored("bundle", [1.0] * n, list(rows + 0.4), parameters=6, size=24)
    rise = np.zeros(n)
    rise[:8] = 0.4 * n / 8
    uneven = scored("bundle", [1.0] * n, list(rows + rise), parameters=6, size=24)
    limits = [{"metric": "perplexity", "max_ratio": 1.12}, {"metric": "perplexity", "min_ratio": 1 / 1.12}]
    for name, shipped, passed in (("even", even, True), ("uneven", uneven, False)):
        (tmp_path / name).mkdir()
        _, verdict = judged(tmp_path / name, limits, [("teacher", teacher), ("bundle", shipped)])
        for limit, point in zip(verdict["gate"]["limits"], (np.exp(0.1), np.exp(-0.1)), strict=True):
            assert limit["value"] == pytest.approx(point)  # the same for both, and within the limit
            assert limit["passed"] is passed
    losses = np.random.default_rng(0).choice(rise, (20_000, n)).mean(axis=1) / 4.0
    low, high = np.exp(np.quantile(losses, [0.025, 0.975]))
    limit = verdict["gate"]["limits"][0]
    assert (limit["low"], limit["high"]) == pytest.approx((low, high), rel=0.01)
    assert limit["judged"] == limit["high"]


def test_ratio_to_a_teacher_that_scores_nothing_is_no_pass(tmp_path: Path) -> None:
    teacher = scored("teacher", [0.0] * 8 + [1.0], [4.0] * 9, parameters=6, size=24)
    shipped = scored("bundle", [0.0] * 9, [4.0] * 9, parameters=6, size=24)
    limits = [{"metric": "exact_match", "max_ratio": 9}]
    _, verdict = judged(tmp_path, limits, [("teacher", teacher), ("bundle", shipped)])
    assert not verdict["gate"]["passed"]
    assert "cannot be told" in verdict["gate"]["limits"][0]["reason"]


def test_ledger_in_perplexity_counts_a_rise_as_loss(tmp_path: Path) -> None:
    teacher = scored("teacher", [1.0] * 9, [4.0] * 9, parameters=6, size=24)
    shipped = scored("bundle", [1.0] * 9, [8.0] * 9, parameters=6, size=24)
    _, verdict = judged(
        tmp_path, [{"metric": "perplexity", "max_rise": 9}], [("teacher", teacher), ("bundle", shipped)]
    )
    ledger = verdict["ledger"]
    assert (ledger["metric"], ledger["higher_is_better"]) == ("perplexity", False)
    assert ledger["entries"][1]["loss"] == pytest.approx(np.exp(2) - np.exp(1))


@pytest.mark.parametrize("limit", [{"metric": "m"}, {"metric": "m", "min": 1, "max": 2}])
def test_limit_has_exactly_one_comparison(limit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of min, max, max_drop"):
        GateParams.model_validate({"limits": [limit]})


def long_row(words: int = 200) -> Row:
    """A request of so many words, where the tiny models have room for 256 tokens."""
    return chat_row("dim the lights " * (words // 3), CALL)


@pytest.mark.parametrize("task", ["function_call", "perplexity"])
def test_a_row_that_is_too_long_is_named_and_treated_as_asked(
    teacher: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*calls(3), long_row()]
    ctx = context(tmp_path, rows, model=teacher)
    limits = {"function_call": 256, "perplexity": 200}
    values = {"tasks": [task], "max_tokens": 200, "max_new_tokens": 4}
    told = rf"{task}: 1 of 4 test rows are longer than {limits[task]} tokens \((the context|max_tokens)\)"
    named = f"{told} and were left out: "
    for too_long in ("truncate", "skip"):
        result = evaluate_model(EvaluateParams.model_validate(values | {"too_long": too_long}), ctx)
        assert [note for note in result.notes if re.match(named + rf"row {rows[3].id} \(\d+ tokens\)", note)]
        assert result.metrics[f"{task}_left_out"] == 1
        assert len(read_scores(ctx.out).ids[read_scores(ctx.out).metrics[0]]) == 3
    monkeypatch.setattr("compress.assessment.torch_runtime", None)  # the row is named before a model is opened
    with pytest.raises(DataError, match=rf"test row {rows[3].id}: has \d+ tokens .*expected at most {limits[task]} "):
        evaluate_model(EvaluateParams.model_validate(values | {"too_long": "error"}), ctx)
    with pytest.raises(DataError, match=r"data\.test: none of 1 rows has a token to predict within"):
        evaluate_model(EvaluateParams.model_validate(values), context(tmp_path, rows[3:], model=teacher))


def test_a_long_text_is_cut_to_the_shortest_context(teacher: Path, tmp_path: Path) -> None:
    rows = [make_row(text="dim the lights " * 90), make_row(text="lock the door")]
    for values, most in (({}, 256), ({"context_tokens": 100}, 100), ({"max_tokens": 60}, 60)):
        ctx = context(tmp_path, rows, model=teacher, teacher=teacher)
        params = EvaluateParams.model_validate({"tasks": ["perplexity", "agreement"], **values})
        result = evaluate_model(params, ctx)
        assert max(read_scores(ctx.out).weights["nll"]) == most - 1
        assert result.metrics["perplexity_cut"] == 1
        assert result.metrics["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-9)


class Elsewhere:
    """A device that cuts every request into one token more."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, requests: Any) -> list[list[int]]:
        return [
            [7, *(encode_prompt(one["messages"], self.tokenizer) if "messages" in one
                  else encode_text_prompt(one["text"], self.tokenizer))]
            for one in requests
        ]  # fmt: skip


def test_prompts_that_the_device_cuts_otherwise_are_counted_and_used(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    rows = [*calls(2), make_row(text="the hall")]
    params = EvaluateParams(tasks=["function_call", "perplexity"])
    found = judged_rows(rows, tokenizer, params, context=256, device=Elsewhere(tokenizer))
    assert found.counts["rows_cut_otherwise"] == 3
    assert found.notes[0].startswith(f"the device cuts 3 of 3 rows into other tokens than training: row {rows[0].id} (")
    for one in found.tokens[:2]:
        assert one.taught is not None
        assert one.seen.ids == (7, *one.taught.ids)
        assert one.seen.targets == one.taught.targets
    assert found.tokens[2].taught is None, "of another cut of a text nothing can be compared token by token"
    assert found.calls[0].seen.prompt == (7, *encode_prompt(rows[0].prompt, tokenizer))


def test_the_gate_compares_rows_that_all_were_measured_on(tmp_path: Path) -> None:
    teacher = scored("teacher", [1.0, 1.0, 0.0, 0.0], [4.0] * 4, parameters=6, size=24)
    shipped = Scores("bundle", 6, 24)
    shipped.add("exact_match", ["0", "1"], np.ones(2))
    result, verdict = judged(
        tmp_path, [{"metric": "exact_match", "max_drop": 0.9}], [("teacher", teacher), ("bundle", shipped)]
    )
    assert result.metrics["rows_left_out"] == 2
    assert result.notes == ["2 rows that not every model was measured on are left out on all sides"]
    assert verdict["gate"]["limits"][0]["teacher"] == 1.0
