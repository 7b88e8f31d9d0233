"""The classifier's stage: a plain checkpoint, the same bytes, what the teacher adds, and clear messages."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress.data.rows import chat_row, make_row, write_rows
from compress.encoding import encode_prompt, load_tokenizer
from compress.errors import DataError, ModelError
from compress.model.checkpoint import check_folder, load_model
from compress.model.distillation.classifier import stage, teacher
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.classifier.rows import ClassTable, read_questions
from compress.model.distillation.classifier.stage import distill
from compress.model.quantization.gptq_stage import round_to_nearest
from compress.model.quantization.params import RtnParams
from compress.stages import find, load_function, params_model
from compress.teachers import open_teacher
from tests.model.distillation.conftest import files
from tests.reference import classifier as slow
from tests.tiny import tiny_checkpoint, tiny_conversations

QUICK = {
    "init": "scratch", "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 32, "head_dim": 16, "ffn": 48, "steps": 12,
    "batch_tokens": 1024, "validations": 2, "learning_rate": 1e-2, "validation_share": 0.2, "attribution_points": 4,
}  # fmt: skip


def rows_of(count, *, labelled=lambda index: True):
    found = {}
    for index, talk in enumerate(tiny_conversations(count)):
        name = json.loads(talk[1]["content"])["name"]
        row = make_row(text=talk[0]["content"], label=name if labelled(index) else None)
        found.setdefault(row.id, row)
    return list(found.values())


def save(folder, rows):
    folder.mkdir()
    write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "teacher", layers=2, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=64)
    save(folder / "data", rows_of(60))
    save(folder / "half", rows_of(60, labelled=lambda index: index % 2))
    return folder


@pytest.fixture
def ready(context, place):
    def make(name="run", data="data", **more):
        values = {"inputs": {"data": place / data}, "teacher": open_teacher(place / "teacher")}
        return context(name, **(values | more))

    return make


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attribution_weight": 0.5},
        {"attribution_weight": 0.5, "precision": "bf16"},
        {"kd_weight": 0.0},
        {"temperature": 3.0, "accumulate": 2},
    ],
)
def test_student_opens_plainly_and_has_learned(ready, given):
    ctx = ready()
    result = distill(ClassifierParams(**QUICK, **given), ctx)
    check_folder(ctx.out)
    model = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert 0 <= result.metrics["validation_accuracy"] <= 1
    assert ("attribution_gap" in result.metrics) == ("attribution_weight" in given)
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    told = json.loads((ctx.out / "edgestill.json").read_text(encoding="utf-8"))
    assert told["classes"] == {name: name for name in ("lock", "none", "set_light", "set_timer")}
    assert told["prompt"] == "{text}"


def test_a_student_cut_out_of_the_teacher_and_one_that_goes_on(ready, place):
    ctx = ready()
    distill(ClassifierParams(layers=1, steps=2, multiple_of=16), ctx)
    assert load_model(ctx.out).config.num_hidden_layers == 1
    other = ready("on", inputs={"data": place / "data", "model": ctx.out})
    distill(ClassifierParams(init="checkpoint", steps=2), other)
    assert files(other.out)["model.safetensors"] != files(ctx.out)["model.safetensors"]


def test_it_learns_the_labels_and_answers_with_their_words_also_when_quantized(ready, place):
    ctx = ready()
    result = distill(ClassifierParams(**(QUICK | {"steps": 120, "kd_weight": 0.0})), ctx)
    assert result.metrics["validation_accuracy"] == 1
    assert result.metrics["validation_class_mass"] > 0.8
    later = ready("later", inputs={"model": ctx.out})
    round_to_nearest(RtnParams(bits=8, group_size=32), later)
    check_folder(later.out)
    tokenizer = load_tokenizer(ctx.out)
    rows = rows_of(60)
    for folder in (ctx.out, later.out):
        model, right = load_model(folder), 0
        for row in rows:
            ids = torch.tensor([encode_prompt([{"role": "user", "content": row.text}], tokenizer)])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            right += tokenizer.decode(made[0, ids.shape[1] :]) == f"{row.label}<|end|>"
        assert right / len(rows) > 0.9


def test_attributions_come_nearer_with_their_weight(ready):
    cosines = []
    for name, weight in (("a", 1e-9), ("b", 2.0)):
        params = ClassifierParams(**(QUICK | {"steps": 40, "attribution_weight": weight}))
        cosines.append(distill(params, ready(name)).metrics["validation_attribution_cosine"])
    assert cosines[1] > cosines[0] + 0.2


def test_same_inputs_give_the_same_bytes_and_no_attribution_weight_asks_for_none(ready, monkeypatch):
    made = []
    monkeypatch.setattr(teacher, "explain", None)  # would fail
    for name, more in (("a", {}), ("b", {"attribution_points": 7, "attribution_baseline": "zero"})):
        ctx = ready(name)
        distill(ClassifierParams(**(QUICK | more)), ctx)
        made.append(files(ctx.out))
    assert made[0] == made[1]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(ready, monkeypatch):
    params = ClassifierParams(**(QUICK | {"attribution_weight": 1.0}))
    monkeypatch.setattr(teacher, "TEACHER_TOKENS", 256)
    monkeypatch.setattr(teacher, "SAVE_SECONDS", 0.0)
    whole = ready("whole")
    distill(params, whole)
    honest, asked = teacher.explain, []

    class Killed(Exception):
        pass

    def dying(*given):
        asked.append(1)
        if len(asked) == 3:
            raise Killed("killed")
        return honest(*given)

    ctx = ready("cut")
    monkeypatch.setattr(teacher, "explain", dying)
    with pytest.raises(Killed):
        distill(params, ctx)
    monkeypatch.setattr(stage, "save_model", lambda *_, **__: (_ for _ in ()).throw(Killed("killed again")))
    with pytest.raises(Killed, match="again"):
        distill(params, ctx)
    once = len(asked) - 3  # the two pieces that were done were not asked for again
    monkeypatch.undo()
    monkeypatch.setattr(teacher, "TEACHER_TOKENS", 256)
    monkeypatch.setattr(teacher, "explain", None)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    assert distill(params, ctx).metrics["resumed_from"] == 12
    table = ClassTable(read_questions(ctx.inputs["data"], load_tokenizer(ctx.out), params).asked, 4)
    assert once == len(teacher._pieces(table)) - 2
    assert files(ctx.out) == files(whole.out)


def test_rows_without_a_label(ready, place):
    quick = QUICK | {"steps": 2}
    alone = distill(ClassifierParams(**quick, **{"kd_weight": 0.0}), ready("a", "half"))
    assert alone.metrics["rows"] == alone.metrics["rows_labelled"] < len(rows_of(60))
    assert any("have no label and were left out" in note for note in alone.notes)
    soft = distill(ClassifierParams(**quick), ready("b", "half"))
    assert soft.metrics["rows"] == len(rows_of(60))
    assert soft.metrics["rows_labelled"] == alone.metrics["rows_labelled"]
    assert soft.metrics["notes"] == []
    hard = distill(ClassifierParams(**quick, kd_weight=0.0, unlabelled="teacher"), ready("c", "half"))
    assert hard.metrics["rows_labelled"] == hard.metrics["rows"] == len(rows_of(60))
    unsure = ClassifierParams(**quick, unlabelled="teacher", min_confidence=1.0)
    assert distill(unsure, ready("d", "half")).metrics["rows_labelled_by_teacher"] < hard.metrics["rows"]


def test_deeper_prompts_are_asked_about_unsure_rows_alone(place, ready):
    tokenizer, model = load_tokenizer(place / "teacher"), load_model(place / "teacher")
    params = ClassifierParams(deeper=["which of them: {text}"], confidence=0.9999)
    questions = read_questions(place / "data", tokenizer, params)
    table = ClassTable(questions.asked, 4)
    asked = teacher.Teacher(model, tokenizer, len(tokenizer), params)
    first = asked.all_scores(table)
    sure = torch.softmax(first, 1).amax(1) >= 0.9999
    assert 0 < int(sure.sum()) < len(table)
    ctx = ready()
    found = teacher.teach(asked, questions, table, ctx.work, ctx.progress)
    assert found.asked_again == (int((~sure).sum()),)
    assert torch.equal(found.scores[sure], first[sure])
    row = int(torch.nonzero(~sure)[0, 0])
    prompt = encode_prompt([{"role": "user", "content": "which of them: " + questions.rows[row].text}], tokenizer)
    with torch.no_grad():
        expected = slow.scores(model, prompt, questions.asked[row].answers)
    torch.testing.assert_close(found.scores[row], expected, rtol=1e-4, atol=1e-3)


def test_questions_are_chats_and_texts_and_know_their_own_text(tmp_path, place):
    tokenizer = load_tokenizer(place / "teacher")
    system = {"role": "system", "content": "sort"}
    rows = [
        make_row(text="dim the hall", label="b"),
        chat_row("lock it", "yes"),
        make_row(messages=[system, {"role": "user", "content": "dim the hall"}], label="a"),
    ]
    params = ClassifierParams(classes=["b", "a"], answers={"a": "yes"}, prompt="Class of {text}?")
    found = read_questions(save(tmp_path / "rows", rows), tokenizer, params)
    assert found.labels.tolist() == [0, 1, 1]
    assert [tokenizer.decode(q.prompt[q.first : q.last]).strip() for q in found.asked] == [
        "dim the hall", "lock it", "dim the hall",
    ]  # fmt: skip
    for question in found.asked:
        assert [tokenizer.decode(answer) for answer in question.answers] == ["b<|end|>", "yes<|end|>"]
    tree = ClassTable(found.asked, 2).batch(np.arange(3))
    assert tree.end.tolist() == [len(question.prompt) - 1 for question in found.asked]


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([make_row(text="a")], {}, "labels none; expected rows of two labels or more"),
        ([make_row(text="a", label="x")], {"classes": ["y", "z"]}, "label 'x'; expected one of y, z"),
        (
            [make_row(text="a", label="x"), make_row(text="b", label="y")],
            {"answers": {"x": "y"}},
            "an answer of its own",
        ),
        ([make_row(text="a", label="x"), make_row(text="b", label="y")], {"answers": {"z": "y"}}, "for no class: z"),
        (
            [make_row(text="a " * 99, label="x"), make_row(text="b", label="y")],
            {"max_tokens": 20},
            "at most max_tokens",
        ),
        (
            [make_row(messages=[{"role": "assistant", "content": "a"}], label="x"), make_row(text="b", label="y")],
            {},
            "no user's message to answer",
        ),
        ([make_row(text="a"), make_row(text="b")], {"classes": ["x", "y"], "kd_weight": 0.0}, "no row has a label"),
    ],
)
def test_rows_that_are_no_questions_are_refused(ready, tmp_path, rows, given, message):
    ctx = ready(inputs={"data": save(tmp_path / "rows", rows)})
    with pytest.raises(DataError) as caught:
        distill(ClassifierParams(**(QUICK | given)), ctx)
    assert message in str(caught.value)
    assert not list(ctx.out.iterdir())


def test_no_checkpoint_to_go_on_from_is_refused(ready):
    with pytest.raises(ModelError, match="no step before this one leaves a model"):
        distill(ClassifierParams(init="checkpoint"), ready())


def test_a_window_that_a_row_does_not_fit_into_is_refused():
    full = {"layer_types": ["full_attention"], "sliding_window": 8}
    short = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    stage.check_windows([full, {}], 9, where="here")
    stage.check_windows([short], 8, where="here")
    with pytest.raises(ModelError, match="a row of 9 tokens, and layers that see 8 tokens back"):
        stage.check_windows([full, short], 9, where="here")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 1, "prune_ratio": 0.5}, "exclude each other"),
        ({"prompt": "what is it"}, "needs {text} once"),
        ({"deeper": ["look: {text}"]}, "deeper and confidence go together"),
        ({"classes": ["a", "a"]}, "two labels or more, each once"),
        ({"min_confidence": 0.5}, "is for unlabelled: teacher"),
    ],
)
def test_parameters_that_do_not_fit_together(given, message):
    with pytest.raises(ValidationError) as caught:
        ClassifierParams(**given)
    assert message in str(caught.value)


def test_the_table_of_stages_names_it():
    line = find("model.distillation", "classifier")
    assert params_model(line) is ClassifierParams
    assert load_function(line) is distill
