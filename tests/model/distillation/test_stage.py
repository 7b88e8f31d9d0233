"""The stage: a checkpoint that opens, the same bytes every time, and one clear message for what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress.data.rows import read_rows, write_rows
from compress.encoding import load_tokenizer
from compress.errors import DataError, ModelError
from compress.model.checkpoint import check_folder, load_model, save_model
from compress.model.distillation import stage as module
from compress.model.distillation import targets as targets_module
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.stages import STAGES, load_function, params_model
from compress.teachers import open_teacher
from tests.model.distillation.conftest import Killed, dying, files
from tests.tiny import tiny_checkpoint, tiny_conversations, tiny_model

QUICK = {"steps": 6, "batch_tokens": 512, "top_k": 16, "validations": 2, "learning_rate": 3e-3}


def write_source(folder, talks):
    """Write chats as a data artifact."""
    from compress.data.rows import read_source

    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    folder.mkdir()
    write_rows(folder, read_source(source).rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "teacher", layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128)
    write_source(folder / "data", tiny_conversations(80))
    return folder


@pytest.fixture
def ready(context, place):
    def make(name="run", **more):
        return context(
            name, **({"inputs": {"data": place / "data"}, "teacher": open_teacher(place / "teacher")} | more)
        )

    return make


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({}, None),
        ({"layers": 2, "ffn": 64}, 2),
        ({"init": "scratch", "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 32, "head_dim": 16, "ffn": 48}, 1),
        ({"prune_ratio": 0.0, "targets": "online", "kd_weight": 1.0, "temperature": 2.0}, 3),
        ({"init": "scratch", "kd_weight": 0.0, "average_decay": 0.9}, None),
    ],
)
def test_student_opens_plainly_and_has_learned(ready, given, layers):
    ctx = ready()
    result = distill(LogitsParams(**QUICK, **given), ctx)
    check_folder(ctx.out)
    model = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, local_files_only=True)
    assert result.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert result.metrics["parameters"] <= result.metrics["parameters_teacher"]
    assert layers is None or model.config.num_hidden_layers == layers
    assert load_tokenizer(ctx.out).get_vocab() == ctx.teacher.tokenizer.get_vocab()
    if given.get("prune_ratio") != 0.0:
        assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert (ctx.out / "training.jsonl").read_text().count("\n") == 7
    assert json.loads(json.dumps(result.metrics)) == result.metrics


def test_default_student_has_half_the_parameters(ready):
    result = distill(LogitsParams(**QUICK), ready())
    assert result.metrics["parameters"] == pytest.approx(result.metrics["parameters_teacher"] / 2, rel=0.15)


def test_same_inputs_give_the_same_bytes_and_another_seed_others(ready):
    params = LogitsParams(**QUICK, init="scratch", layers=1)
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ctx = ready(name, seed=seed)
        distill(params, ctx)
        made.append(files(ctx.out))
    assert made[0] == made[1]
    assert made[0]["model.safetensors"] != made[2]["model.safetensors"]


@pytest.mark.parametrize("where", ["targets", "training", "saving"])
def test_interrupted_stage_goes_on_to_the_same_bytes(ready, monkeypatch, where):
    monkeypatch.setattr(targets_module, "SHARD_POSITIONS", 200)
    params = LogitsParams(**QUICK, layers=2)
    unbroken = ready("whole")
    distill(params, unbroken)
    ctx = ready("cut")
    with monkeypatch.context() as patch:
        if where == "targets":
            original, calls = targets_module.TargetCache.write, []

            def stopping(self, *args, **told):
                calls.append(1)
                if len(calls) == 3:
                    raise Killed("killed")
                original(self, *args, **told)

            patch.setattr(targets_module.TargetCache, "write", stopping)
        elif where == "training":
            taken = targets_module.CachedTargets.__call__
            seen = []

            def failing(self, batch):
                seen.append(1)
                if len(seen) == 5:
                    raise Killed("killed")
                return taken(self, batch)

            patch.setattr(targets_module.CachedTargets, "__call__", failing)
        else:
            patch.setattr(module, "save_model", dying)
        with pytest.raises(Killed, match="killed"):
            distill(params, ctx)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    result = distill(params, ctx)
    assert files(ctx.out) == files(unbroken.out)
    if where == "saving":
        assert result.metrics["resumed_from"] == 6


def test_teacher_is_not_asked_again_after_the_cache_is_full(ready, monkeypatch):
    params = LogitsParams(**QUICK, layers=2)
    ctx = ready()
    distill(params, ctx)

    def never(*_):
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr(targets_module.OnlineTargets, "__call__", never)
    (ctx.work / "training.checkpoint.safetensors").unlink()
    distill(params, ctx)


def test_checkpoint_goes_on_from_the_model_slot(ready, place, tmp_path):
    first = ready("first")
    distill(LogitsParams(**QUICK, layers=1), first)
    ctx = ready("second", inputs={"data": place / "data", "model": first.out})
    result = distill(LogitsParams(**QUICK, init="checkpoint"), ctx)
    before = json.loads((first.out / "edgestill.json").read_text())["training"]["validation_loss"]
    assert result.metrics["start_loss"] == pytest.approx(before, rel=1e-3)
    assert result.metrics["validation_loss"] < before
    assert result.metrics["shape"]["layers"] == 1


def test_checkpoint_without_a_model_is_refused(ready):
    with pytest.raises(ModelError, match=r"init: checkpoint, but no step before this one leaves a model"):
        distill(LogitsParams(**QUICK, init="checkpoint"), ready())


def test_student_with_another_tokenizer_is_refused(ready, place, tmp_path):
    tiny_checkpoint(tmp_path / "other", vocab=300)
    ctx = ready(inputs={"data": place / "data", "model": tmp_path / "other"})
    with pytest.raises(ModelError, match="teacher and student have different tokenizers"):
        distill(LogitsParams(**QUICK, init="checkpoint"), ctx)


def test_vocabularies_padded_to_different_sizes_are_fine(ready, place, tmp_path):
    wide = tiny_model(seed=4, vocab=352, layers=1, hidden=32)
    save_model(wide, tmp_path / "wide", tokenizer_from=place / "teacher", metadata={})
    ctx = ready(inputs={"data": place / "data", "model": tmp_path / "wide"})
    distill(LogitsParams(**QUICK, init="checkpoint"), ctx)
    assert load_model(ctx.out).config.vocab_size == 352


def test_teacher_that_is_no_local_model_is_refused(ready):
    class Endpoint:
        folder = None

    with pytest.raises(ModelError, match="the teacher is not a local model"):
        distill(LogitsParams(**QUICK), ready(teacher=Endpoint()))


def test_rows_that_are_too_long_are_refused_or_cut(ready):
    with pytest.raises(DataError, match=r"has \d+ tokens; expected at most 12"):
        distill(LogitsParams(**QUICK, max_tokens=12), ready("a"))
    with pytest.raises(DataError, match="no row with an answer within 3 tokens"):
        distill(LogitsParams(**QUICK, max_tokens=3, truncate=True), ready("b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prune_ratio": 0.5, "layers": 2}, r"prune_ratio and sizes \(layers\) exclude each other"),
        ({"init": "checkpoint", "ffn": 64}, "takes the student as it is"),
        ({"head_dim": 16}, "head_dim can be chosen with init: scratch only"),
        ({"kd_weight": 1.5}, "less than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"kdweight": 0.5}, "Extra inputs are not permitted"),
        ({"beta": 0.5}, "beta belongs to divergence jsd; got divergence forward_kl"),
        ({"divergence": "jsd", "skew": 0.1}, "skew belongs to divergence skew_kl, skew_reverse_kl, skew_pair"),
        ({"divergence": "jsd", "beta": 1.5}, "less than or equal to 1"),
        ({"divergence": "skew_kl", "skew": 1.0}, "less than 1"),
        ({"divergence": "kl"}, "Input should be 'forward_kl', 'reverse_kl'"),
        ({"divergence": "jsd", "adaptive_skew": True}, "adaptive_skew needs a divergence with a skew above 0; got jsd"),
        ({"divergence": "skew_kl", "skew": 0.0, "adaptive_skew": True}, "adaptive_skew needs a divergence with a skew"),
        ({"divergence": "skew_kl", "student_source": "own"}, "student_source belong to skew_pair"),
        ({"student_weight": 0.5}, "student_source belong to skew_pair"),
        ({"divergence": "skew_pair", "student_source": "own"}, "student_source needs kd_weight: 1"),
        ({"divergence": "skew_kl", "adaptive_skew": True, "accumulate": 2}, "accumulate must be 1"),
        ({"patience": 2, "validation_rows": 0}, "patience needs held-out rows"),
        ({"hidden_weight": 1.0}, "need targets: online; the cache holds logits alone"),
        ({"epochs": "3"}, "valid number"),
        ({"learning_rate": float("nan")}, "finite number"),
    ],
)
def test_params_refuse_nonsense(given, message):
    with pytest.raises(ValidationError, match=message):
        LogitsParams(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"layers": 4}, "layers 4; expected 1 to 3"), ({"ffn": 300}, "ffn 300; expected at most 128")],
)
def test_student_larger_than_the_teacher_cannot_be_cut_out(ready, given, message):
    with pytest.raises(ModelError, match=message):
        distill(LogitsParams(**QUICK, **given), ready())


def test_table_line_names_this_stage():
    line = next(line for line in STAGES if line.stage == "model.distillation")
    assert params_model(line) is LogitsParams
    assert load_function(line) is distill


def test_every_parameter_has_a_description_and_reaches_the_trainer():
    assert all(field.description for field in LogitsParams.model_fields.values())
    changed = LogitsParams(
        epochs=9.0, steps=9, batch_tokens=99, accumulate=9, learning_rate=0.9, warmup_ratio=0.9, final_lr_ratio=0.9,
        activation_checkpointing=True,
        weight_decay=0.9, grad_clip=0.9, average_decay=0.9, kd_weight=0.9, temperature=9.0, label_smoothing=0.9,
        validation_share=0.9, validation_rows=9, validations=9,
        patience=9, keep="last", optimizer="muon", precision="bf16",
    )  # fmt: skip
    plain, other = (dataclasses.asdict(module.train_settings(params, 1)) for params in (LogitsParams(), changed))
    same = {name for name in plain if plain[name] == other[name]}
    assert same == {"seed", "betas", "log_every", "checkpoint_every_s", "checkpoint_every_steps"}


def test_every_parameter_of_the_loss_reaches_the_trainer():
    def told(**given):
        return module.train_settings(LogitsParams(**given), 1, given.pop("confidence", None)).loss

    assert told() == LossWeights()
    assert told(divergence="reverse_kl") == LossWeights(divergence="reverse_kl")
    assert told(divergence="jsd") == LossWeights(divergence="jsd", number=0.5)
    assert told(divergence="jsd", beta=0.0) == LossWeights(divergence="jsd", number=0.0)
    assert told(divergence="skew_reverse_kl") == LossWeights(divergence="skew_reverse_kl", number=0.1)
    assert told(divergence="cakld", reverse_share=0.2) == LossWeights(divergence="cakld", number=0.2)
    measured = module.train_settings(LogitsParams(divergence="cakld"), 1, 0.7).loss
    assert measured == LossWeights(divergence="cakld", number=0.7)
    pair = told(divergence="skew_pair", skew=0.2, adaptive_skew=True, student_weight=0.5)
    assert pair == LossWeights(divergence="skew_pair", number=0.2, adaptive=True, student_weight=0.5)
    features = told(targets="online", hidden_weight=0.3, attention_weight=0.2, feature_layers="last")
    assert features == LossWeights(hidden_weight=0.3, attention_weight=0.2, feature_layers="last")


@pytest.mark.parametrize(
    "given",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "cakld"},
        {"divergence": "jsd", "targets": "online", "temperature": 1.5},
        {"divergence": "skew_kl", "adaptive_skew": True, "skew": 0.5},
        {"divergence": "skew_reverse_kl", "label_smoothing": 0.1},
        {"divergence": "skew_pair", "student_source": "own", "student_weight": 1.5, "kd_weight": 1.0, "layers": 1},
    ],
)
def test_every_divergence_trains_and_tells_the_forward_kl(ready, place, tmp_path, given):
    inputs = {"data": place / "data"}
    if "student_source" in given:
        rows = read_rows(place / "data")
        marked = [dataclasses.replace(row, source="own") for row in rows[::2]] + rows[1::2]
        (tmp_path / "marked").mkdir()
        write_rows(tmp_path / "marked", marked)
        inputs = {"data": tmp_path / "marked"}
    result = distill(LogitsParams(**(QUICK | {"layers": 2} | given)), ready(inputs=inputs))
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert result.metrics["validation_kl"] > 0
    assert not any("skew_pair is skew_kl" in note for note in result.notes)
    if given["divergence"] == "cakld":
        assert 0 < result.metrics["confidence"] < 1


def test_a_pair_without_text_of_the_student_says_so(ready):
    result = distill(LogitsParams(**QUICK, divergence="skew_pair", layers=1), ready())
    assert any("skew_pair is skew_kl" in note for note in result.notes)


def test_a_source_that_no_row_has_is_refused(ready):
    params = LogitsParams(**QUICK, divergence="skew_pair", student_source="own", kd_weight=1.0)
    with pytest.raises(DataError, match=r"no row of source 'own'; expected one of its sources: "):
        distill(params, ready())


def test_data_stays_as_it_was(ready, place):
    before = files(place)
    distill(LogitsParams(**QUICK, layers=1), ready())
    assert files(place) == before
    assert read_rows(place / "data")
