"""The stage with every kind of teacher: cache of draws, several teachers, an endpoint; profile and command line."""

from __future__ import annotations

import json
import shutil

import pytest
from pydantic import ValidationError

from compress.data.rows import read_rows, write_rows
from compress.errors import DataError, ModelError, ProfileError, UserError
from compress.model.checkpoint import load_model
from compress.model.distillation import targets as targets_module
from compress.model.distillation import voices as module
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.pipeline import plan
from compress.profile import load_profile
from compress.progress import Progress
from compress.single import Request, parse_teachers, run_stage
from compress.stages import find
from compress.store import Store
from compress.teachers import open_teacher, record
from tests.model.distillation.conftest import files
from tests.model.distillation.test_endpoint_targets import by_number, serve
from tests.model.distillation.test_stage import write_source
from tests.tiny import tiny_checkpoint, tiny_conversations

assert serve, "the server of the endpoint's tests is a fixture here too"
QUICK = {"steps": 4, "batch_tokens": 512, "validations": 2, "learning_rate": 3e-3, "layers": 1}
SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "scale": 0.3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("teacher", "second", "third")):
        tiny_checkpoint(folder / name, seed=seed, **SHAPE)
    tiny_checkpoint(folder / "foreign", vocab=300)
    write_source(folder / "data", tiny_conversations(60))
    return folder


@pytest.fixture
def ready(context, place):
    def make(name="run", *, others=("second", "third"), **more):
        given = {"inputs": {"data": place / "data"}, "teacher": open_teacher(place / "teacher")}
        given["teachers"] = {one: open_teacher(place / one) for one in others}
        return context(name, **(given | more))

    return make


def made(ctx, **params):
    result = distill(LogitsParams(**(QUICK | params)), ctx)
    return result.metrics, files(ctx.out)


def test_draws_teach_and_a_killed_stage_goes_on_to_the_same_bytes(ready, monkeypatch):
    monkeypatch.setattr(targets_module, "SHARD_POSITIONS", 200)
    figures, whole = made(ready("whole"), codec="sample", kd_weight=1.0)
    assert figures["validation_loss"] < figures["start_loss"]
    assert figures["target_bytes_per_token"] == 24
    assert figures["target_bytes_per_token_stored"] > 0
    ctx = ready("cut")
    with monkeypatch.context() as patch:
        original, calls = targets_module.TargetCache.write, []

        def dying(self, *args, **told):
            calls.append(1)
            if len(calls) == 3:
                raise InterruptedError("killed")
            original(self, *args, **told)

        patch.setattr(targets_module.TargetCache, "write", dying)
        with pytest.raises(InterruptedError, match="killed"):
            made(ctx, codec="sample", kd_weight=1.0)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    assert made(ctx, codec="sample", kd_weight=1.0)[1] == whole


@pytest.mark.parametrize("targets", ["cache", "online"])
def test_all_weight_on_one_teacher_is_that_teacher_bit_for_bit(ready, place, targets):
    plain = made(ready("plain"), targets=targets)[1]
    assert made(ready("mixed"), targets=targets, mixture={"teacher": 3.0, "second": 0.0})[1] == plain
    assert made(ready("second"), targets=targets, mixture={"second": 1.0})[1] != plain
    said = {"routing": "column", "routing_column": "meta.by", "mixture": {"second": 1.0, "teacher": 1.0}}
    told = place / f"told-{targets}"
    told.mkdir()
    write_rows(told, [_with(row, by="teacher") for row in read_rows(place / "data")])
    routed, found = made(ready("routed", inputs={"data": told}), targets=targets, **said)
    assert found["model.safetensors"] == plain["model.safetensors"], "though two teachers were there"
    assert routed["mixture"] == {"second": 0.0, "teacher": 1.0}


def _with(row, **meta):
    return type(row)(row.id, row.source, row.messages, row.text, row.label, {**row.meta, **meta})


@pytest.mark.parametrize(
    "given",
    [
        {"mixture": {"teacher": 1.0, "second": 1.0}},
        {"mixture": {"second": 1.0, "third": 3.0}, "codec": "sample"},
        {"mixture": {"teacher": 1.0, "second": 1.0, "third": 1.0}, "routing": "loss"},
        {"mixture": {"teacher": 1.0, "second": 1.0}, "routing": "entropy", "targets": "online", "temperature": 2.0},
    ],
)
def test_several_teachers_teach_and_a_resumed_stage_gives_the_same_bytes(ready, monkeypatch, given):
    first = ready("first")
    figures, whole = made(first, **given)
    assert sum(figures["mixture"].values()) == pytest.approx(1, abs=1e-5)
    assert json.loads(json.dumps(figures)) == figures
    if given.get("routing", "fixed") != "fixed":
        monkeypatch.setattr(module, "row_scores", lambda *_: pytest.fail("the routing was made anew"))
        (first.work / "training.checkpoint.safetensors").unlink()
        shutil.rmtree(first.out)
        first.out.mkdir()
        assert made(first, **given)[1] == whole


def test_an_endpoint_teaches_a_student_that_a_local_teacher_shapes(ready, place, serve):
    """The same student as from the model behind the endpoint, but for the rounding of what is sent as text."""
    model = load_model(place / "second")
    teacher, _ = serve(lambda handler, body, number: by_number(model, body))
    ctx = ready("far", others=(), teachers={"far": teacher})
    figures = made(ctx, mixture={"far": 1.0}, top_k=16)[0]
    near = made(ready("near"), mixture={"second": 1.0}, top_k=16)[0]
    for name in ("start_loss", "validation_loss", "validation_kl"):
        assert figures[name] == pytest.approx(near[name], rel=1e-3)
    assert figures["parameters_teacher"] == near["parameters_teacher"]


def test_an_endpoint_teaches_a_student_that_is_there_already(ready, place, serve):
    model = load_model(place / "second")
    teacher, _ = serve(lambda handler, body, number: by_number(model, body))
    inputs = {"data": place / "data", "model": place / "third"}
    params = LogitsParams(**(QUICK | {"layers": None, "init": "checkpoint", "top_k": 16}))
    result = distill(params, ready(teacher=teacher, inputs=inputs))
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert "parameters_teacher" not in result.metrics
    with pytest.raises(ModelError, match=r"not a local model.*init: checkpoint"):
        made(ready("bare", teacher=teacher))


def test_teachers_that_do_not_fit_are_refused(ready, place, serve, tmp_path):
    with pytest.raises(UserError, match=r"logits\.mixture\.fourth: no teacher of that name; expected teacher, second"):
        made(ready("a"), mixture={"fourth": 1.0})
    with pytest.raises(ModelError, match=r"logits\.mixture\.foreign: its tokenizer is another one"):
        made(ready("b", others=("foreign",)), mixture={"foreign": 1.0, "teacher": 1.0})
    far, bodies = serve(lambda handler, body, number: {})
    with pytest.raises(ModelError, match=r"logits\.mixture\.far: the teacher is not a local model"):
        made(ready("c", others=(), teachers={"far": far}), mixture={"far": 1.0, "teacher": 1.0})
    assert not bodies
    record(tmp_path / "replies.jsonl", [], [])
    with pytest.raises(ModelError, match=r"logits: the teacher is not a local model"):
        made(ready("d", teacher=open_teacher(tmp_path / "replies.jsonl")))
    said = {"routing": "column", "routing_column": "meta.by", "mixture": {"second": 1.0, "teacher": 1.0}}
    with pytest.raises(DataError, match=r"row [0-9a-f]+: has no meta\.by; expected every row with one"):
        made(ready("e"), **said)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"codec": "sample", "targets": "online"}, "codec: sample is how a cache is stored"),
        ({"codec": "sample", "top_k": 8}, "top_k is for codec: topk"),
        ({"samples": 8}, "samples is for codec: sample"),
        ({"samples": 256, "codec": "sample"}, "less than or equal to 255"),
        ({"mixture": {"a": 0.0}}, "gives every teacher the weight 0"),
        ({"mixture": {"a": -1.0}}, "greater than or equal to 0"),
        ({"routing": "loss"}, "routing: loss is between teachers"),
        ({"routing": "loss", "mixture": {"a": 1.0, "b": 0.0}}, "routing: loss is between teachers"),
        ({"routing": "column", "mixture": {"a": 1.0, "b": 1.0}}, "routing_column go together"),
        ({"routing_column": "source"}, "routing_column go together"),
        ({"routing_column": "text"}, "String should match pattern"),
        ({"codec": "sample", "divergence": "jsd"}, "codec: sample needs divergence forward_kl"),
        ({"mixture": {"a": 1.0}, "hidden_weight": 1.0, "targets": "online"}, "the profile's own teacher alone"),
        ({"mixture": {"a": 1.0}, "divergence": "cakld"}, "cakld with mixture: give reverse_share"),
    ],
)
def test_parameters_are_judged_together(given, message):
    with pytest.raises(ValidationError, match=message):
        LogitsParams(**given)


# ---------------------------------------------------------------------------------- profile and command line

PROFILE = """\
edgestill: 1
name: several
teacher: teacher
teachers: {second: second, far: "http://localhost:9/v1#toy"}
data: pool.jsonl
steps:
  - model.distillation: {method: logits, mixture: {teacher: 1, second: 2}}
evaluate: null
bench: null
"""


@pytest.fixture
def write(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "second", "third"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "data.jsonl", tmp_path / "pool.jsonl")

    def write(text=PROFILE):
        (tmp_path / "p.yaml").write_text(text)
        return tmp_path / "p.yaml"

    return write


def key_of(path, tmp_path, *overrides):
    found = plan(load_profile(path, overrides=overrides), store=Store(tmp_path / "store"))
    return next(node for node in found.nodes if node.stage.stage == "model.distillation").key


def test_a_profile_names_more_teachers_and_their_identity_is_in_the_key(write, tmp_path):
    path = write()
    profile = load_profile(path)
    assert profile.teachers == {"second": str(tmp_path / "second"), "far": "http://localhost:9/v1#toy"}
    before = key_of(path, tmp_path)
    assert key_of(path, tmp_path, "teachers.third=third") == before, "a teacher that no step names changes nothing"
    assert key_of(path, tmp_path, "teachers.second=third") != before
    assert key_of(path, tmp_path, "steps[0].model.distillation.mixture={far: 1}") != before
    (tmp_path / "second" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert key_of(path, tmp_path) != before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("second: 2}", "secnd: 2}", r"p\.yaml:7: steps\[0\]\.model\.distillation\.mixture\.secnd: no teacher of that "
         r"name; expected one of teacher, second, far\. Did you mean 'second'\?"),
        ("second: 2}", "second: -2}", r"mixture\.second: got -2; expected at least 0"),
        ("{second: second,", "{teacher: second,", r"p\.yaml:4: teachers\.teacher: is the name of the profile's own"),
        ("{second: second,", "{Second: second,", r"p\.yaml:4: teachers\.Second"),
        ("{second: second,", "{second: 3,", r"teachers\.second: got 3; expected a string"),
    ],
)  # fmt: skip
def test_mistakes_in_a_profile_of_several_teachers(write, old, new, message):
    assert old in PROFILE
    with pytest.raises(ProfileError, match=message):
        load_profile(write(PROFILE.replace(old, new)))


def test_a_single_step_takes_named_teachers(place, tmp_path):
    params = LogitsParams(**(QUICK | {"mixture": {"teacher": 1.0, "second": 1.0}}))
    request = Request(
        find("model.distillation", "logits"), params, {"data": place / "data"}, tmp_path / "out",
        teacher=str(place / "teacher"), teachers=parse_teachers([f"second={place / 'second'}"]), threads=1,
    )  # fmt: skip
    result = run_stage(request, Progress(quiet=True))
    assert result.metrics["mixture"] == {"teacher": 0.5, "second": 0.5}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for wrong in (["second"], ["=x"], ["a="], ["a=x", "a=y"], ["teacher=x"]):
        with pytest.raises(UserError, match="--teachers: got"):
            parse_teachers(wrong)
