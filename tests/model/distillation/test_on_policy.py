"""The stages that let the student write: their limits, resume, clear messages, and the student's text afterwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.encoding import TokenRow
from compress.errors import DataError, ModelError, TrainingError, UserError
from compress.model.distillation import on_policy as module
from compress.model.distillation import on_policy_stage, rollouts
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.on_policy import AnswerSettings, AnswerSource, divergence, prompts
from compress.model.distillation.on_policy_params import GkdParams, MiniLlmParams, OnPolicyParams, SpeculativeParams
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.replay import Health, health
from compress.model.distillation.rollouts import Drawing, sample
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.stage import distill
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import train
from compress.stages import find, load_function, params_model
from compress.teachers import open_teacher
from tests.model.distillation.conftest import files
from tests.model.distillation.test_stage import write_source
from tests.tiny import VOCAB, tiny_checkpoint, tiny_conversations, tiny_model, tiny_token_rows

ROOT = Path(__file__).parents[3]
QUICK = {"steps": 8, "batch_tokens": 512, "top_k": 16, "validations": 2, "learning_rate": 3e-3, "layers": 2}
METHODS = {
    "gkd": (GkdParams, {"replay_share": 0.4, "rollout_steps": 3}),
    "minillm": (MiniLlmParams, {}),
    "speculative": (SpeculativeParams, {"accept_top_k": 20, "block": 4}),
}
ROWS = tiny_token_rows(40)
STOPS = (4, 9, 33)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "teacher", layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=64)
    write_source(folder / "data", tiny_conversations(60))
    return folder


@pytest.fixture
def ready(context, place):
    def make(name="run", **more):
        given = {"inputs": {"data": place / "data"}, "teacher": open_teacher(place / "teacher")}
        return context(name, **(given | more))

    return make


def source_of(student, targets, *, rows=ROWS, weights=None, **changes):
    """A source over ``rows`` whose answers the student makes alone."""
    settings = AnswerSettings(share=0.6, seed=3, batch_tokens=96, buffer_rows=30, replay_share=0.4, rollout_steps=3)
    settings = dataclasses.replace(settings, **changes)
    asked = prompts(rows, context=40, max_new_tokens=12, prompt_tokens=None, where="run")
    drawing = Drawing(VOCAB, STOPS, 3)
    return AnswerSource(
        RowTable(rows, vocab=VOCAB),
        asked,
        settings,
        make=lambda asks: sample(student, asks, drawing),
        made_targets=targets,
        made_loss=divergence(weights or LossWeights(1.0)),
        watch=Health(health([row.ids[len(row.prompt) :] for row in rows], STOPS), where="run", stop=settings.stop),
        stops=STOPS,
        target_fn=targets,
    )


SETTINGS = TrainSettings(
    loss=LossWeights(1.0),
    steps=14,
    batch_tokens=96,
    learning_rate=3e-3,
    validations=3,
    checkpoint_every_steps=1,
    log_every=2,
    precision="fp32",
)


def run(ctx, settings=SETTINGS, *, wrap=lambda targets: targets, **changes):
    """Train a tiny student; ``wrap`` may spoil the teacher's targets."""
    student = tiny_model(seed=1)
    targets = wrap(OnlineTargets(tiny_model(seed=9, scale=0.3), vocab=VOCAB))
    source = source_of(student, targets, **changes)
    table = RowTable(ROWS, vocab=VOCAB)
    report = train(student, targets, table, settings, ctx, ctx.work / "log.jsonl", source=source)
    return {name: p.detach().clone() for name, p in student.named_parameters()}, report, source


def same(one, other):
    return all(bool((one[name] == other[name]).all()) for name in one)


def curve(ctx):
    lines = [json.loads(line) for line in (ctx.work / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_share_0_is_distillation_on_the_rows_bit_for_bit(ready, method):
    cls, _ = METHODS[method]
    plain = ready("plain")
    distill(LogitsParams(**QUICK, kd_weight=0.7), plain)
    ctx = ready(method)
    getattr(on_policy_stage, method)(cls(**QUICK, kd_weight=0.7, on_policy_share=0.0), ctx)
    assert files(ctx.out)["model.safetensors"] == files(plain.out)["model.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_stage_trains_on_made_answers_and_saves_the_same_bytes_each_time(ready, method):
    cls, given = METHODS[method]
    stage = getattr(on_policy_stage, method)
    assert params_model(find("model.distillation", method)) is cls
    assert load_function(find("model.distillation", method)) is stage
    made = []
    for name in ("a", "b"):
        ctx = ready(name)
        result = stage(cls(**QUICK, **given, on_policy_share=0.7, max_new_tokens=12), ctx)
        made.append(files(ctx.out))
    assert made[0] == made[1]
    figures = result.metrics
    assert figures["made_steps"] > 0 < figures["made_answers"]
    assert json.loads(json.dumps(figures)) == figures
    assert 0 < figures["own_tokens"] <= 1
    assert (figures["own_tokens"] < 1) == (method == "speculative")
    assert "on_policy_share" in json.loads((ctx.out / "training.jsonl").read_text().splitlines()[-1])
    plain = ready("plain")
    stage(cls(**QUICK, **given, on_policy_share=0.0), plain)
    assert files(plain.out)["model.safetensors"] != made[0]["model.safetensors"]


def test_whole_vocabulary_accepted_is_gkd(ready):
    kept = {**QUICK, "on_policy_share": 1.0, "max_new_tokens": 12}
    a, b = ready("a"), ready("b")
    on_policy_stage.gkd(GkdParams(**kept), a)
    on_policy_stage.speculative(SpeculativeParams(**kept, accept_top_k=1 << 20), b)
    assert files(a.out)["model.safetensors"] == files(b.out)["model.safetensors"]


def test_divergence_on_made_answers_is_that_of_the_rows_unless_chosen(ready):
    kept, found = {**QUICK, "on_policy_share": 1.0, "max_new_tokens": 12}, []
    for name in (None, "forward_kl", "reverse_kl"):
        ctx = ready(str(name))
        on_policy_stage.gkd(GkdParams(**kept, made_divergence=name), ctx)
        found.append(files(ctx.out)["model.safetensors"])
    assert found[0] == found[1] != found[2]


def test_made_answers_count_as_the_students_text(ready):
    kept, found = {**QUICK, "on_policy_share": 1.0, "max_new_tokens": 12}, []
    for name in ("skew_pair", "skew_reverse_kl", "skew_kl"):
        ctx = ready(name)
        on_policy_stage.gkd(GkdParams(**kept, made_divergence=name, made_number=0.2), ctx)
        found.append(files(ctx.out)["model.safetensors"])
    assert found[0] == found[1] != found[2]


def test_several_teachers_cannot_judge_made_answers(ready):
    ctx = ready("mixed")
    with pytest.raises(UserError, match="mixture"):
        on_policy_stage.gkd(GkdParams(**QUICK, mixture={"teacher": 1.0}), ctx)
    with pytest.raises(ValidationError, match="made_number belongs to"):
        GkdParams(made_number=0.2)


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("adaptive", [False, True])
def test_run_is_the_same_after_any_interruption(context, adaptive):
    unbroken, _, source = run(context("whole"), adaptive=adaptive)
    assert source.report()[0]["made_steps"] > 3
    for stop in (4, 9, 13):

        def wrap(targets, stop=stop):
            calls = []

            def stopping(batch):
                calls.append(1)
                if len(calls) > stop:
                    raise Stopped("stop")
                return targets(batch)

            return stopping

        ctx = context(f"cut-{stop}")
        with pytest.raises(Stopped, match="stop"):
            run(ctx, wrap=wrap, adaptive=adaptive)
        resumed, report, again = run(ctx, adaptive=adaptive)
        assert report.resumed_from > 0
        assert same(resumed, unbroken), stop
        assert curve(ctx) == curve(context("whole"))
        assert again.report() == source.report()


def test_kill_9_in_the_middle_then_resume_gives_the_unbroken_result(context):
    ctx = context("killed")
    script = f"""
        import os, signal
        from pathlib import Path
        from compress.context import StageContext
        from compress.progress import Progress
        from tests.model.distillation.test_on_policy import run
        def wrap(targets):
            calls = []
            def deadly(batch):
                calls.append(1)
                if len(calls) == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
                return targets(batch)
            return deadly
        run(StageContext(name={ctx.name!r}, inputs={{}}, out=Path({str(ctx.out)!r}), work=Path({str(ctx.work)!r}),
                         seed=3, threads=1, progress=Progress(quiet=True)), wrap=wrap)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed, report, _ = run(ctx)
    assert report.resumed_from > 0
    unbroken, _, _ = run(context("whole"))
    assert same(resumed, unbroken)
    assert curve(ctx) == curve(context("whole"))


def test_a_checkpoint_of_another_way_is_left_aside(context, caplog):
    run(context())
    _, report, _ = run(context(), replay_share=0.1)
    assert report.resumed_from == 0
    assert "is of another run" in caplog.text


def test_replay_is_bounded_and_used(context):
    _, _, source = run(context("a"))
    assert len(source.replay) == 30
    figures, _ = source.report()
    _, _, fresh = run(context("b"), replay_share=0.0, rollout_steps=1)
    _, _, again = run(context("c"), replay_share=0.9, rollout_steps=1)
    assert fresh.report()[0]["made_steps"] == again.report()[0]["made_steps"] == figures["made_steps"]
    assert fresh.report()[0]["made_answers"] > 2 * again.report()[0]["made_answers"] > 0


def test_adaptive_share_rises_when_the_held_out_loss_does():
    source = source_of(tiny_model(seed=1), None, share=0.0, adaptive=True)
    shares = []
    for loss in (2.0, 1.5, 1.6, 1.6, 1.7, 1.0, *range(2, 14)):
        source.validated(float(loss))
        shares.append(round(source.share, 6))
    assert shares[:6] == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    assert shares[-1] == 1.0
    still = source_of(tiny_model(seed=1), None, share=0.2)
    for loss in (1.0, 2.0, 3.0):
        still.validated(loss)
    assert still.share == 0.2


@pytest.mark.parametrize("logit_of", [STOPS[0], 50])
def test_collapse_is_provoked_and_caught(context, logit_of):
    """A student that writes nothing, or one token for ever."""

    def spoilt(asks):
        many = 1 if logit_of in STOPS else 12
        return [
            rollouts.Rollout(
                ask.row, (*ask.prompt, *[logit_of] * many), len(ask.prompt), (0.0,) * many, many == 1, many
            )
            for ask in asks
        ]

    ctx, student = context(), tiny_model(seed=1)
    targets = OnlineTargets(tiny_model(seed=9, scale=0.3), vocab=VOCAB)
    for stop in (False, True):
        source = source_of(student, targets, stop=stop, rollout_steps=1, replay_share=0.0)
        source.make = spoilt
        text = r"degenerates: since step \d+ \d+% of " + (
            "its answers are empty" if logit_of in STOPS else "the token pairs"
        )
        if stop:
            with pytest.raises(TrainingError, match=text):
                train(
                    student,
                    targets,
                    RowTable(ROWS, vocab=VOCAB),
                    SETTINGS,
                    ctx,
                    ctx.work / "l",
                    source=source,
                    name="b",
                )
            assert (ctx.work / "b.best.safetensors").is_file()
        else:
            train(student, targets, RowTable(ROWS, vocab=VOCAB), SETTINGS, ctx, ctx.work / "l", source=source, name="a")
            assert any(note.startswith("the student's text degenerates") for note in source.report()[1])


def test_nan_in_a_step_on_made_answers_stops_the_run_and_keeps_the_best(context):
    def wrap(targets):
        calls = []

        def poisoned(batch):
            calls.append(1)
            states = targets(batch)
            return dataclasses.replace(states, hidden=states.hidden * float("nan")) if len(calls) == 6 else states

        return poisoned

    ctx = context()
    with pytest.raises(TrainingError, match=r"the loss is nan.*Lower learning_rate.*are kept in"):
        run(ctx, wrap=wrap)
    assert (ctx.work / "training.best.safetensors").is_file()


def test_prompts_need_a_prompt_and_room():
    row = TokenRow("r", (1, 5, 6, 7, 8, 9), (0, 0, 0, 1, 1, 1))
    text = TokenRow("t", (1, 5, 6, 7), (0, 1, 1, 1))
    base = {"context": 8, "max_new_tokens": None, "prompt_tokens": None, "where": "run"}
    assert prompts([row, text], **base) == [((1, 5, 6), 3), ((1,), 3)]
    assert prompts([row], **(base | {"max_new_tokens": 5})) == [((1, 5, 6), 5)]
    assert prompts([text], **(base | {"prompt_tokens": 2})) == [((1, 5), 3)]
    with pytest.raises(DataError, match=r"row r: its prompt of 3 tokens leaves room for 5 of 8; .*6 tokens"):
        prompts([row], **(base | {"max_new_tokens": 6}))
    with pytest.raises(DataError, match=r"leaves room for 0 of 3.*Lower max_new_tokens"):
        prompts([row], **(base | {"context": 3}))
    with pytest.raises(DataError, match=r"row t: has no prompt of 5 tokens, only 4"):
        prompts([row, text], **(base | {"prompt_tokens": 5}))


def test_stage_refuses_what_cannot_work(ready):
    class Endpoint:
        folder = None

    with pytest.raises(ModelError, match="the teacher is not a local model"):
        on_policy_stage.gkd(GkdParams(**QUICK), ready("a", teacher=Endpoint()))
    ctx = ready("b")
    with pytest.raises(DataError, match="leaves room for"):
        on_policy_stage.gkd(GkdParams(**QUICK, max_new_tokens=250), ctx)
    assert not any(ctx.work.iterdir())  # before the teacher has worked


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (GkdParams, {"on_policy_share": 1.1}, "less than or equal to 1"),
        (GkdParams, {"replay_share": 1.0}, "less than 1"),
        (GkdParams, {"teacher_mix": 0.1}, "Extra inputs"),
        (MiniLlmParams, {"teacher_mix": 1.0}, "less than 1"),
        (SpeculativeParams, {"accept_top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_params_refuse_nonsense(cls, given, message):
    with pytest.raises(ValidationError, match=message):
        cls(**given)


def test_every_parameter_has_a_description_and_is_in_the_fingerprint():
    for cls in (OnPolicyParams, GkdParams, MiniLlmParams, SpeculativeParams):
        assert all(field.description for field in cls.model_fields.values())
    one = source_of(tiny_model(seed=1), None)
    assert one.fingerprint == source_of(tiny_model(seed=1), None).fingerprint
    assert one.fingerprint != source_of(tiny_model(seed=1), None, share=0.5).fingerprint


def test_interrupted_stage_goes_on_to_the_same_bytes(ready, monkeypatch):
    params = GkdParams(**QUICK, on_policy_share=0.6, max_new_tokens=12)
    unbroken, ctx = ready("whole"), ready("cut")
    on_policy_stage.gkd(params, unbroken)
    original, calls = module.AnswerSource.work, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped("killed")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module.AnswerSource, "work", dying)
        with pytest.raises(Stopped, match="killed"):
            on_policy_stage.gkd(params, ctx)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    on_policy_stage.gkd(params, ctx)
    assert files(ctx.out) == files(unbroken.out)
