"""The stage across tokenizers: a checkpoint that opens, the plain trainer's bytes where it says so, clear messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress.encoding import load_tokenizer, token_rows
from compress.errors import DataError, ModelError
from compress.model.checkpoint import check_folder, load_model, save_model
from compress.model.distillation.cache import TargetCache
from compress.model.distillation.cross_tokenizer import stage as module
from compress.model.distillation.cross_tokenizer.cache import ChunkCache
from compress.model.distillation.cross_tokenizer.model import CrossLoss, CrossTokenizerModel
from compress.model.distillation.cross_tokenizer.pairs import Chunks
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.cross_tokenizer.stage import distill
from compress.model.distillation.cross_tokenizer.targets import CrossTargets
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import OnlineTargets, shared_vocabulary
from compress.model.distillation.trainer import DistillationModel, train
from compress.stages import find, load_function, params_model
from compress.teachers import open_teacher
from tests.model.distillation.conftest import dying, files, killed_while_saving
from tests.model.distillation.cross_tokenizer import tokenizers_here as made
from tests.model.distillation.test_stage import write_source
from tests.tiny import tiny_checkpoint, tiny_conversations, tiny_model

QUICK = {"steps": 6, "batch_tokens": 1024, "validations": 2, "learning_rate": 3e-3}
SIZES = {"layers": 1, "heads": 2, "kv_heads": 1, "hidden": 32, "head_dim": 16, "ffn": 48}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "teacher", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128)
    made.save(made.byte_level(0), folder / "bytes")
    made.save(made.byte_level(40, template=None), folder / "bare")
    write_source(folder / "data", tiny_conversations(40))
    return folder


@pytest.fixture
def ready(context, place):
    def make(name="run", **more):
        values = {
            "inputs": {"data": place / "data"},
            "teacher": open_teacher(place / "teacher"),
        }
        return context(name, **(values | more))

    return make


@pytest.fixture
def scratch(place):
    return {**QUICK, **SIZES, "init": "scratch", "tokenizer": str(place / "bytes")}


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "alm"},
        {"loss": "alm", "debias": False, "targets": "online", "accumulate": 2},
        {"loss": "gold"},
        {"loss": "uld"},
        {"loss": "uld", "uld_pairs": "index"},
        {"kd_weight": 0.0},
    ],
)
def test_student_opens_plainly_with_its_own_tokenizer_and_has_learned(ready, scratch, place, given):
    ctx = ready()
    result = distill(CrossTokenizerParams(**scratch, **given), ctx)
    check_folder(ctx.out)
    model = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, local_files_only=True)
    student = load_tokenizer(ctx.out)
    assert student.get_vocab() == load_tokenizer(place / "bytes").get_vocab()
    assert model.config.vocab_size == len(student) == 259
    assert model.config.eos_token_id == student.eos_token_id
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert result.metrics["aligned_share"] > 0.95
    assert (result.metrics["validation_cross_loss"] > 0) == ("kd_weight" not in given)
    assert json.loads(json.dumps(result.metrics)) == result.metrics


@pytest.mark.parametrize(("loss", "cache"), [("spelled", TargetCache), ("alm", ChunkCache)])
def test_same_inputs_give_the_same_bytes_cached_or_resumed(ready, scratch, monkeypatch, loss, cache):
    params = CrossTokenizerParams(**scratch, loss=loss)
    made_files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ctx = ready(name, seed=seed)
        distill(params, ctx)
        made_files.append(files(ctx.out))
    assert made_files[0] == made_files[1]
    assert made_files[0]["model.safetensors"] != made_files[2]["model.safetensors"]

    ctx = ready("cut")
    killed_while_saving(module, lambda ctx: distill(params, ctx), ctx)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write", dying)  # the teacher is not asked again
        assert distill(params, ctx).metrics["resumed_from"] == 6
    assert files(ctx.out) == made_files[0]


def test_labels_alone_give_the_bytes_of_the_plain_trainer(ready, scratch, place, tmp_path):
    params = CrossTokenizerParams(**(scratch | {"kd_weight": 0.0}))
    ctx = ready()
    distill(params, ctx)
    tokenizer = load_tokenizer(place / "bytes")
    config = load_model(place / "teacher").config.to_dict()
    student = module._student(params, config, tokenizer, place / "bytes", ctx)
    table = RowTable(token_rows(place / "data", tokenizer, max_tokens=512), vocab=259)
    other = ready("plain")
    train(student, None, table, module.train_settings(params, ctx.seed), other, other.work / "log", vocab=259)
    found = load_model(ctx.out).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in student.state_dict().items())


def equal_tokenizers(place, **more):
    """Both sides with the teacher's tokenizer: model, batch, targets and the plain pair of loss and targets."""
    teacher = load_model(place / "teacher")
    tokenizer = load_tokenizer(place / "teacher")
    params = CrossTokenizerParams(**{"targets": "online", "loss": "alm"} | more)
    words = module.vocabulary(tokenizer, where="w")
    rows = token_rows(place / "data", tokenizer, max_tokens=512)
    pairs = module.Pairs(rows, rows, (words, words), where="w")
    side = module._Side(tokenizer, words, rows)
    table = RowTable(rows, vocab=words.size)
    batch = table.batch(np.arange(6))
    loss = module._loss(params, pairs, words, words)
    return params, teacher, loss, pairs, table, batch, side


@pytest.mark.parametrize(
    "given", [{"loss": "alm"}, {"loss": "alm", "debias": False}, {"loss": "gold"}, {"loss": "uld"}]
)
def test_equal_tokenizers_and_equal_models_give_no_loss(ready, place, given):
    params, teacher, loss, pairs, table, batch, side = equal_tokenizers(place, **given)
    assert loss.scale == 1.0
    targets, _ = module._targets(params, ready(), teacher, module._Lesson(side, side, pairs, (table, table)))
    found = targets(batch)
    assert (found.chunks.student == found.chunks.teacher).all()
    model = CrossTokenizerModel(load_model(place / "teacher"), loss, side.words.size)
    assert float(model(batch, found).kl) == pytest.approx(0.0, abs=1e-3)
    other = CrossTokenizerModel(tiny_model(seed=9, hidden=32, layers=1), loss, side.words.size)
    assert float(other(batch, found).kl) > 0.1


def test_gold_with_equal_tokenizers_is_plain_distillation_on_logits(ready, place):
    params, teacher, loss, pairs, table, batch, side = equal_tokenizers(place, loss="gold", kd_weight=0.7)
    targets, _ = module._targets(params, ready(), teacher, module._Lesson(side, side, pairs, (table, table)))
    grads, sums = [], []
    for kind in ("cross", "plain"):
        student = tiny_model(seed=9, hidden=32, layers=1, scale=0.3)
        if kind == "cross":
            parts = CrossTokenizerModel(student, loss, side.words.size)(batch, targets(batch))
        else:
            plain = OnlineTargets(load_model(place / "teacher"), vocab=side.words.size)
            parts = DistillationModel(student, LossWeights(0.7), side.words.size)(batch, plain(batch))
        parts.loss.backward()
        sums.append([float(parts.loss.detach()), float(parts.ce), float(parts.kl)])
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert float(torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0)) > 0.99999
    torch.testing.assert_close(grads[0].norm(), grads[1].norm(), rtol=1e-3, atol=1e-5)


def test_checkpoint_goes_on_from_the_model_slot(ready, scratch, place):
    first = ready("first")
    distill(CrossTokenizerParams(**scratch), first)
    ctx = ready("second", inputs={"data": place / "data", "model": first.out})
    result = distill(CrossTokenizerParams(**QUICK), ctx)
    before = json.loads((first.out / "edgestill.json").read_text())["training"]["validation_loss"]
    assert result.metrics["start_loss"] == pytest.approx(before, rel=1e-3)
    assert result.metrics["validation_loss"] < before


def test_a_batch_in_which_nothing_is_aligned_learns_its_labels(place):
    *_, batch, side = equal_tokenizers(place)
    none = torch.zeros((0, 2), dtype=torch.long)
    flags = torch.zeros(0, dtype=torch.bool)
    empty = CrossTargets(Chunks(none, none, flags, flags, flags), torch.zeros((0, 1)))
    loss = CrossLoss("alm", 0.5, 1.0)
    parts = CrossTokenizerModel(load_model(place / "teacher"), loss, side.words.size)(batch, empty)
    torch.testing.assert_close(parts.loss.detach(), parts.ce * 0.5)
    assert float(parts.kl) == 0


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_student_without_a_chat_template_is_refused(ready, scratch, place):
    with pytest.raises(ModelError, match="student's tokens: tokenizer: has no chat template"):
        distill(CrossTokenizerParams(**(scratch | {"tokenizer": str(place / "bare")})), ready())


def test_a_student_that_could_never_end_an_answer_is_refused(ready, scratch, tmp_path):
    endless = made.byte_level(
        0, template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )  # fmt: skip
    endless.eos_token = None
    made.save(endless, tmp_path / "endless")
    with pytest.raises(ModelError, match="the student's tokenizer has no token that ends an answer"):
        distill(CrossTokenizerParams(**(scratch | {"tokenizer": str(tmp_path / "endless")})), ready())


def test_the_plain_method_names_this_one_where_tokenizers_differ():
    ids = {"a": 0, "b": 1}, {"a": 1, "b": 0}
    with pytest.raises(ModelError, match=r"different tokenizers .* or method: cross_tokenizer"):
        shared_vocabulary(({"vocab_size": 2}, ids[0]), ({"vocab_size": 2}, ids[1]), where="w")


def test_missing_places_are_refused(ready, scratch, tmp_path):
    with pytest.raises(ModelError, match="init: checkpoint, but no step before this one leaves a model"):
        distill(CrossTokenizerParams(**QUICK), ready())
    with pytest.raises(ModelError, match=r"no tokenizer\.json in it"):
        distill(CrossTokenizerParams(**(scratch | {"tokenizer": str(tmp_path)})), ready("b"))


def test_rows_that_are_too_long_are_refused(ready, scratch, place):
    with pytest.raises(DataError, match=r"student's tokens: row .* expected at most 30"):
        distill(CrossTokenizerParams(**scratch, max_tokens=30, teacher_max_tokens=200), ready("a"))
    short = tiny_model(layers=1, hidden=32, vocab=259, positions=32)
    save_model(short, place / "short", tokenizer_from=place / "bytes", metadata={})
    ctx = ready("b", inputs={"data": place / "data", "model": place / "short"})
    with pytest.raises(ModelError, match=r"student: a row has \d+ tokens; expected at most 32"):
        distill(CrossTokenizerParams(**QUICK), ctx)


def test_a_teacher_that_is_no_local_model_is_refused(ready, scratch):
    class Endpoint:
        folder = None

    with pytest.raises(ModelError, match="the teacher is not a local model"):
        distill(CrossTokenizerParams(**scratch), ready(teacher=Endpoint()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": "scratch"}, "init: scratch needs tokenizer"),
        ({"tokenizer": "x"}, "takes the student as it is"),
        ({"layers": 2}, "takes the student as it is"),
        ({"loss": "dskd"}, "Input should be 'spelled', 'alm', 'gold' or 'uld'"),
        ({"alm_temperature": 0.0}, "greater than 0"),
        ({"top_k": 3, "loss": "alm"}, "top_k belongs to loss spelled; got loss alm"),
    ],
)
def test_params_refuse_nonsense(given, message):
    with pytest.raises(ValidationError, match=message):
        CrossTokenizerParams(**given)


def test_table_names_this_stage_and_logits_stays_the_usual_method():
    line = find("model.distillation", "cross_tokenizer")
    assert params_model(line) is CrossTokenizerParams
    assert load_function(line) is distill
    assert find("model.distillation").method == "logits"
