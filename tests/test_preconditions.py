"""A plan refuses what the run would refuse: each of these profiles was called good, and the run failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.data.rows import chat_row, write_jsonl
from compress.errors import EdgestillError, UserError
from compress.estimates import estimate
from compress.pipeline import plan
from compress.profile import load_profile
from compress.store import Store
from tests.tiny import tiny_checkpoint

ENDPOINT = '"http://127.0.0.1:9/v1#m"'
REPLIES = '{"messages": [{"role": "user", "content": "a"}], "reply": "b"}\n'
DISTIL = "model.distillation: {init: teacher_layers, layers: 1, steps: 1}"
ROUND = "model.quantization: {method: rtn, bits: 8, group_size: 16}"
MIXED = "model.quantization: {method: mixed}"
JUDGED = {"data": "{pool: rows.jsonl, test: rows.jsonl}"}
TEXTS = {"data": "{pool: text.txt, test: text.txt}"}
BASE = {"teacher": "teacher", "data": "{pool: rows.jsonl}", "export": "null", "bench": "null"}

REFUSED = {
    "init: checkpoint without a model": (
        ["model.distillation: {init: checkpoint, steps: 1}"],
        {},
        "no step before this one leaves a model",
    ),
    "between tokenizers, without a model": (
        ["model.distillation: {method: cross_tokenizer, init: checkpoint, steps: 1}"],
        {},
        "no step before this one leaves a model",
    ),
    "an endpoint's shape": ([DISTIL], {"teacher": ENDPOINT}, "the teacher is an endpoint"),
    "a recording's logits": ([DISTIL], {"teacher": "replies.jsonl"}, "a file of recorded replies"),
    "made answers, an endpoint judges": (
        ["model.distillation: {method: gkd, init: checkpoint, steps: 1}"],
        {"teacher": ENDPOINT},
        "",
    ),
    "classes, an endpoint": (
        ["model.distillation: {method: classifier}"],
        {"teacher": ENDPOINT},
        "the teacher is an endpoint",
    ),
    "an endpoint is pruned": (
        ["model.pruning: {prune_ratio: 0.5}"],
        {"teacher": ENDPOINT},
        "the teacher is an endpoint",
    ),
    "an endpoint is rounded": ([ROUND], {"teacher": ENDPOINT}, "the teacher is an endpoint"),
    "an endpoint is measured": (
        ["data.selection: {method: dedup}"],
        {"teacher": ENDPOINT, **JUDGED},
        "cannot be measured",
    ),
    "scored by an endpoint": (["data.selection: {method: ifd}"], {"teacher": ENDPOINT}, "the teacher is an endpoint"),
    "embedded by an endpoint": (
        ["data.condensation: {method: k_center, embedding: teacher, share: 0.5}"],
        {"teacher": ENDPOINT},
        "the teacher is an endpoint",
    ),
    "invented by an endpoint": (
        ["data.synthesis: {method: magpie, rows: 4}"],
        {"teacher": ENDPOINT},
        "the teacher is an endpoint",
    ),
    "scored by a student that is not there": (
        ["data.selection: {method: ifd, scorer: student}"],
        {},
        "no step before this one makes a model",
    ),
    "heads that do not divide": (
        ["model.distillation: {init: scratch, heads: 3, steps: 1}"],
        {},
        "3 attention heads over 2 key-value heads",
    ),
    "mixed without a budget": ([MIXED], {}, "no budget and no target"),
    "made answers in two processes": (
        ["model.distillation: {method: minillm, steps: 1}"],
        {"hardware": "{processes: 2}"},
        "text that the student writes",
    ),
    "classes in two processes": (
        ["model.distillation: {method: classifier}"],
        {"hardware": "{processes: 2}"},
        "a loss on classes",
    ),
    "muon in parts": (
        ["model.distillation: {init: teacher_layers, layers: 1, steps: 1, optimizer: muon}"],
        {"hardware": "{processes: 2, sharding: full}"},
        "optimizer: muon",
    ),
    "calls in texts": ([], {**TEXTS, "evaluate": "{tasks: [function_call]}"}, "texts without answers"),
    "scores of texts": (["data.selection: {method: ifd}"], TEXTS, "without answers or labels"),
    "labels of texts": (["data.quality: {method: mislabel}"], TEXTS, "without answers or labels"),
    "codes that are not there": ([], {"export": "{formats: [gptq]}"}, "the model is not quantized"),
    "codes of a plain student": ([DISTIL], {"export": "{formats: [gptq]}"}, "the model is not quantized"),
    "the optimum environment": ([], {"export": "{backend: optimum}"}, "no interpreter at"),
    "a format that the target does not run": (
        [],
        {"export": "{formats: [gguf]}", "target": "odd.yaml"},
        "does not run",
    ),
    "columns of no meaning": ([], {"data": "{pool: rows.jsonl, columns: {nope: x}}"}, "unknown names nope"),
    "a teacher's file that is no recording": ([], {"teacher": "rows.jsonl"}, "expected an object such as"),
    "a teacher's file of another kind": ([], {"teacher": "text.txt"}, "is a file"),
    "an empty pool": ([], {"data": '{pool: ""}'}, "data.pool"),
    "blanks for test rows": ([], {"data": '{pool: rows.jsonl, test: " "}'}, "data.test"),
    "an empty teacher": ([], {"teacher": '""'}, "teacher"),
    "an empty name of another teacher": ([], {"teachers": '{b: ""}'}, "teachers.b"),
    "an empty target": ([], {"target": '""'}, "target"),
}
ACCEPTED = {
    "an endpoint checks labels": (["data.quality: {method: mislabel}"], {"teacher": ENDPOINT}),
    "a recording checks labels": (["data.quality: {method: mislabel}"], {"teacher": "replies.jsonl"}),
    "an endpoint and a benchmark": (["data.selection: {method: dedup}"], {"teacher": ENDPOINT, "bench": "{}"}),
    "logits in two processes": ([DISTIL], {"hardware": "{processes: 2}"}),
    "codes": ([ROUND], {"export": "{formats: [onnx, gptq]}"}),
    "texts": ([DISTIL], {**TEXTS, "evaluate": "{tasks: [perplexity]}"}),
    "mixed with a budget": ([MIXED.replace("}", ", budget_bits: 6}")], {}),
    "columns": ([], {"data": "{pool: rows.jsonl, columns: {prompt: question}}"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("profiles")
    tiny_checkpoint(place / "teacher", hidden=64, head_dim=16)
    write_jsonl(place / "rows.jsonl", [chat_row(f"lock door {n}", f"done {n}") for n in range(8)])
    (place / "text.txt").write_text("one text\n\nanother text\n")
    (place / "replies.jsonl").write_text(REPLIES)
    target = (Path(__file__).parents[1] / "profiles" / "targets" / "raspberry-pi-5.yaml").read_text()
    (place / "odd.yaml").write_text(
        "\n".join("formats: [onnx]" if line.startswith("formats:") else line for line in target.splitlines())
    )
    return place


def planned(folder: Path, steps: list[str], values: dict[str, str]) -> None:
    text = "".join(f"{key}: {value}\n" for key, value in {"edgestill": "1", "name": "x", **BASE, **values}.items())
    text += "steps:\n" + "".join(f"  - {step}\n" for step in steps) if steps else ""
    (folder / "p.yaml").write_text(text)
    found = plan(load_profile(folder / "p.yaml"), store=Store(folder / "store"))
    estimate(found).refuse_misfit()


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_what_the_run_would_refuse(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    steps, values, words = REFUSED[case]
    monkeypatch.setenv("EDGESTILL_OPTIMUM_PYTHON", str(folder / "nowhere"))
    with pytest.raises(UserError) as caught:
        planned(folder, steps, values)
    assert words in str(caught.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_plan_accepts_what_runs(folder: Path, case: str) -> None:
    try:
        planned(folder, *ACCEPTED[case])
    except EdgestillError as error:
        pytest.fail(f"{case}: {error}")
