"""Training: equal to a plain loop, the same after any interruption, stopped when it runs away."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from compress.errors import ModelError, StoreError, TrainingError
from compress.model.distillation import settings as settings_module
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import DivergenceGuard, check_learned
from compress.model.distillation.packing import BatchOrder, RowTable, split_rows
from compress.model.distillation.settings import TrainSettings, choose_bf16, learning_rate
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import train
from tests.tiny import VOCAB, tiny_model, tiny_token_rows

ROOT = Path(__file__).parents[3]
ROWS = tiny_token_rows(60, tokens=(6, 10, 16))
BASE = TrainSettings(
    steps=12,
    batch_tokens=96,
    learning_rate=3e-3,
    validations=4,
    checkpoint_every_steps=5,
    log_every=3,
    precision="fp32",
)


def make(**changes):
    loss = {name: changes.pop(name) for name in ("kd_weight", "temperature", "label_smoothing") if name in changes}
    return dataclasses.replace(BASE, loss=LossWeights(**loss), **changes)


def teacher(temperature=1.0, **shape):
    return OnlineTargets(tiny_model(seed=9, scale=0.3, **shape), vocab=VOCAB, temperature=temperature)


def run(ctx, settings, target_fn=None, *, rows=ROWS, seed=1, **more):
    student = tiny_model(seed=seed)
    report = train(student, target_fn, rows, settings, ctx, ctx.work / "training.jsonl", **more)
    return student, report


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(found, expected):
    """Equal up to rounding; AdamW divides by the gradient's size, which blows it up where the gradient is tiny."""
    difference = (found - expected).abs()
    assert difference.mean() < 1e-5
    assert difference.max() < 1e-3


def lines(ctx):
    read = [json.loads(line) for line in (ctx.work / "training.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in read]


class Interrupted(Exception):
    """Stands for a kill at a chosen step."""


class Interrupting:
    """Targets that stop the run at a chosen call."""

    def __init__(self, inner, calls):
        self.inner, self.left = inner, calls

    def __call__(self, batch):
        self.left -= 1
        if self.left < 0:
            raise Interrupted("stop")
        return self.inner(batch)


def plain_loop(settings, teacher_model):
    """The same training with no cleverness: row by row, all logits, the library's losses and optimizer."""
    student = tiny_model(seed=1)
    table = RowTable(ROWS, vocab=VOCAB)
    training, _ = split_rows(
        table, validation_share=settings.validation_share, validation_rows=settings.validation_rows, seed=settings.seed
    )
    order = BatchOrder(table.lengths, training, batch_tokens=settings.batch_tokens, seed=settings.seed)
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, foreach=False)
    w, t, smoothing = settings.loss.kd_weight, settings.loss.temperature, settings.loss.label_smoothing
    for step in range(settings.steps):
        total, positions = 0.0, 0
        for index in order[step]:
            row = ROWS[index]
            ids = torch.tensor([row.ids])
            at = [i - 1 for i, bit in enumerate(row.answer) if bit and i]
            logits = student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, at]
            loss = (1 - w) * cross_entropy(
                logits, ids[0, [i + 1 for i in at]], reduction="sum", label_smoothing=smoothing
            )
            if w:
                with torch.no_grad():
                    p = log_softmax(teacher_model(input_ids=ids).logits[0, at] / t, -1)
                loss = loss + w * t**2 * (p.exp() * (p - log_softmax(logits / t, -1))).sum()
            total, positions = total + loss, positions + len(at)
        optimizer.zero_grad()
        (total / positions).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings)
        optimizer.step()
    return student


@pytest.mark.parametrize(
    "loss",
    [{"kd_weight": 0.0}, {"kd_weight": 1.0}, {"kd_weight": 0.4, "temperature": 2.0, "label_smoothing": 0.1}],
)
def test_training_equals_a_plain_loop(context, loss):
    settings = make(**loss, keep="last", validation_share=0.1)
    targets = teacher(loss.get("temperature", 1.0))
    student, report = run(context(), settings, targets)
    plain = plain_loop(settings, targets.teacher)
    start = tiny_model(seed=1)
    for name, value in weights(plain).items():
        assert_near(weights(student)[name], value)
        assert not torch.equal(value, weights(start)[name])
    assert report.validation_loss < report.start_loss


def test_kd_weight_zero_is_bit_for_bit_training_without_a_teacher(context):
    with_teacher, _ = run(context("a"), make(kd_weight=0.0), teacher())
    without, report = run(context("b"), make(kd_weight=0.0))
    assert same(with_teacher, without)
    assert report.validation_kl == 0


def test_teacher_is_needed_where_its_kl_is(context):
    with pytest.raises(ModelError, match=r"kd_weight 0\.5 without a teacher"):
        run(context(), make(kd_weight=0.5))


def test_frozen_weights_stay_and_a_wholly_frozen_student_is_refused(context):
    ctx, student = context(), tiny_model(seed=1)
    student.model.layers[0].requires_grad_(False)
    before = weights(student)
    train(student, teacher(), ROWS, make(), ctx, ctx.work / "log.jsonl")
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("model.layers.0.")}
    with pytest.raises(ModelError, match="no weight of the student is trainable"):
        train(student.requires_grad_(False), teacher(), ROWS, make(), ctx, ctx.work / "log.jsonl")


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_accumulated_parts_equal_one_big_batch(context, parts):
    whole, _ = run(context("a"), make(keep="last"), teacher())
    split, _ = run(context("b"), make(keep="last", accumulate=parts), teacher())
    for name, value in weights(whole).items():
        assert_near(weights(split)[name], value)


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_run_is_the_same_after_any_interruption(context, average_decay):
    settings = make(average_decay=average_decay)
    unbroken, expected = run(context("whole"), settings, teacher())
    calls = 12 + (1 + 4)  # steps, and the held-out rows (one batch) at the start and four times after
    for stop in (4, 8, 13) if average_decay else (0, 7, calls):
        ctx = context(f"cut-{stop}")
        with pytest.raises(Interrupted, match="stop"):
            run(ctx, settings, Interrupting(teacher(), stop))
        resumed, report = run(ctx, settings, teacher())
        assert same(resumed, unbroken), stop
        assert lines(ctx) == lines(context("whole")), stop
        changing = {"seconds", "tokens_per_s", "resumed_from"}
        found, wanted = dataclasses.asdict(report), dataclasses.asdict(expected)
        assert {k: v for k, v in found.items() if k not in changing} == {
            k: v for k, v in wanted.items() if k not in changing
        }
        assert report.resumed_from % 5 == 0 or report.resumed_from == 12


def test_a_finished_run_is_not_trained_again(context):
    first, _ = run(context(), make(), teacher())
    again, report = run(context(), make(), Interrupting(teacher(), 1))  # one call, for the held-out rows
    assert report.resumed_from == report.steps == 12
    assert same(first, again)


def test_kill_9_in_the_middle_then_resume_gives_the_unbroken_result(context):
    ctx = context("killed")
    script = f"""
        import os, signal
        from pathlib import Path
        from compress.context import StageContext
        from compress.progress import Progress
        from tests.model.distillation.test_trainer import make, run, teacher
        inner, calls = teacher(), 0
        def deadly(batch):
            global calls
            calls += 1
            if calls == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(batch)
        ctx = StageContext(name={ctx.name!r}, inputs={{}}, out=Path({str(ctx.out)!r}), work=Path({str(ctx.work)!r}),
                           seed=3, threads=1, progress=Progress(quiet=True))
        run(ctx, make(), deadly)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (ctx.work / ".training.checkpoint.safetensors.tmp").write_bytes(b"half a checkpoint")
    resumed, report = run(ctx, make(), teacher())
    assert report.resumed_from == 5
    unbroken, _ = run(context("whole"), make(), teacher())
    assert same(resumed, unbroken)
    assert lines(ctx) == lines(context("whole"))


@pytest.mark.parametrize("change", ["settings", "rows", "student"])
def test_checkpoint_of_another_run_is_left_aside(context, caplog, change):
    ctx = context()
    run(ctx, make(), teacher())
    settings = make(learning_rate=1e-3) if change == "settings" else make()
    rows = ROWS[:-1] if change == "rows" else ROWS
    _, report = run(ctx, settings, teacher(), rows=rows, seed=2 if change == "student" else 1)
    assert report.resumed_from == 0
    assert "is of another run" in caplog.text


def test_a_checkpoint_over_other_frozen_weights_is_left_aside(context, caplog):
    ctx = context()
    for change in (0.0, 0.1):
        student = tiny_model(seed=1)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("mlp" in name)
        with torch.no_grad():
            student.model.layers[0].self_attn.q_proj.weight += change
        report = train(student, teacher(), ROWS, make(), ctx, ctx.work / "log.jsonl")
        assert report.resumed_from == 0
    assert "is of another run" in caplog.text


def test_damaged_checkpoint_is_left_aside(context, caplog):
    ctx = context()
    unbroken, _ = run(ctx, make(), teacher())
    path = ctx.work / "training.checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    again, report = run(ctx, make(), teacher())
    assert report.resumed_from == 0
    assert "is damaged" in caplog.text
    assert same(again, unbroken)


def test_two_runs_of_one_stage_keep_apart(context):
    ctx = context()
    first, _ = run(ctx, make(), teacher(), name="one")
    second, report = run(ctx, make(), teacher(), name="two")
    assert report.resumed_from == 0
    assert same(first, second)
    assert {path.name for path in ctx.work.glob("*.safetensors")} == {
        f"{name}.{kind}.safetensors" for name in ("one", "two") for kind in ("best", "checkpoint")
    }


def test_best_weights_are_kept_when_training_goes_too_far(context):
    few = [*ROWS[:6], *tiny_token_rows(8, seed=5)]
    settings = make(kd_weight=0.0, steps=60, validation_share=0.5, learning_rate=2e-2, validations=12)
    kept, report = run(context("best"), settings, rows=few)
    last, after = run(context("last"), dataclasses.replace(settings, keep="last"), rows=few)
    curve = {line["step"]: line["validation_loss"] for line in lines(context("best")) if "validation_loss" in line}
    assert report.kept_step == min(curve, key=curve.get) < 60
    assert report.validation_loss == min(curve.values())
    assert after.validation_loss == curve[60] > report.validation_loss
    assert not same(kept, last)
    assert any("made the held-out loss worse" in note for note in after.notes)


def test_without_held_out_rows_the_last_weights_are_kept_and_said_so(context):
    _, report = run(context(), make(validation_share=0.0), teacher())
    assert report.validation_rows == 0
    assert report.validation_loss is None
    assert report.kept_step == 12
    assert report.notes == ["no rows are held out, so the last weights were kept, not the best"]


def test_log_has_the_curve(context):
    ctx = context()
    _, report = run(ctx, make(), teacher())
    found = lines(ctx)
    assert [line["step"] for line in found] == [0, 3, 6, 9, 12]
    assert set(found[1]) == {
        "step", "loss", "ce", "kl", "learning_rate", "validation_loss", "validation_ce", "validation_kl"
    }  # fmt: skip
    assert found[1]["loss"] == pytest.approx(0.5 * found[1]["ce"] + 0.5 * found[1]["kl"], rel=1e-5)
    assert found[-1]["loss"] < found[1]["loss"]
    assert report.start_loss == found[0]["validation_loss"]
    raw = [json.loads(line) for line in (ctx.work / "training.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] > 0 for line in raw[1:])


@pytest.mark.parametrize(("call", "value"), [(6, float("nan")), (6, float("inf"))])
def test_nan_stops_the_run_and_keeps_the_best(context, call, value):
    inner, calls = teacher(), 0

    def poisoned(batch):
        nonlocal calls
        calls += 1
        states = inner(batch)
        return dataclasses.replace(states, hidden=states.hidden * value) if calls == call else states

    ctx = context()
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*Lower learning_rate.*are kept in") as caught:
        run(ctx, make(), poisoned)
    assert str(ctx.work / "training.best.safetensors") in str(caught.value)
    assert (ctx.work / "training.best.safetensors").is_file()


def test_divergence_stops_the_run_and_keeps_the_best(context):
    inner, calls = teacher(), 0

    def turning(batch):
        nonlocal calls
        calls += 1
        states = inner(batch)
        return states if calls < 8 else dataclasses.replace(states, hidden=states.hidden * -30)

    ctx = context()
    with pytest.raises(TrainingError, match=r"the run diverges.*Lower learning_rate \(now 0\.003\).*are kept in"):
        run(ctx, make(kd_weight=1.0, steps=40, validations=1), turning)
    assert (ctx.work / "training.best.safetensors").is_file()


def test_a_rate_that_spoils_the_student_is_caught_though_the_curve_is_flat(context):
    ctx = context()
    settings = make(kd_weight=1.0, learning_rate=0.012, steps=60, validations=6)
    student = tiny_model(seed=9, scale=0.3)  # the teacher itself: nothing to win, all to lose
    with pytest.raises(TrainingError, match=r"never was below the .* of the start.*Lower learning_rate .*are kept in"):
        train(student, teacher(), ROWS, settings, ctx, ctx.work / "log.jsonl")
    assert (ctx.work / "training.best.safetensors").is_file()


def test_a_rise_is_let_pass_where_it_is_small_or_the_rows_are_learned_by_heart():
    guards = {}
    for name, last in (("risen", 5.0), ("fallen", 1.0)):
        guards[name] = DivergenceGuard("run")
        for loss in (4.0, *[last] * 40):
            guards[name].check(1, loss, 1.0, "advice")
        fresh = DivergenceGuard("run")
        fresh.restore(guards[name].state())
        assert fresh.state() == guards[name].state()
        older = {key: value for key, value in guards[name].state().items() if key != "first"}
        fresh.restore(older)
        assert fresh.first == fresh.smooth
    check_learned("run", loss=9.0, start=2.0, guards=[guards["fallen"]], advice="advice")
    check_learned("run", loss=9.0, start=2.0, guards=guards.values(), advice="advice")
    check_learned("run", loss=2.6, start=2.0, guards=[guards["risen"]], advice="advice")
    with pytest.raises(TrainingError, match=r"run: the held-out loss is 2\.7000.*advice"):
        check_learned("run", loss=2.7, start=2.0, guards=[guards["risen"]], advice="advice")


def test_guard_lets_noise_pass_and_stops_a_climb():
    guard = DivergenceGuard("run")
    noisy = [4.0 * 0.97**i * (1.3 if i % 2 else 0.7) for i in range(200)]
    for step, loss in enumerate(noisy):
        guard.check(step, loss, 1.0, "advice")
    fresh = DivergenceGuard("run")
    fresh.restore(guard.state())
    for step in range(200, 202):  # a spike of two steps is no divergence
        fresh.check(step, 2.0, 1.0, "advice")
    with pytest.raises(TrainingError, match=r"run: step 2\d\d: the loss has climbed to .*advice"):
        assert [fresh.check(step, 2.0, 1.0, "advice") for step in range(202, 300)] == []
    with pytest.raises(TrainingError, match="the gradient's norm is inf"):
        guard.check(1, 0.1, float("inf"), "advice")


def test_padded_vocabulary_of_the_student_is_not_trained_and_takes_no_probability(context):
    ctx = context()
    student = tiny_model(seed=1, vocab=VOCAB + 16, tied=False)
    before = copy.deepcopy(student)
    settings = make(weight_decay=0.0, keep="last")
    train(student, teacher(), ROWS, settings, ctx, ctx.work / "log.jsonl", vocab=VOCAB)
    assert torch.equal(student.lm_head.weight[VOCAB:], before.lm_head.weight[VOCAB:])
    assert not torch.equal(student.lm_head.weight[:VOCAB], before.lm_head.weight[:VOCAB])
    with pytest.raises(ModelError, match="the student's vocabulary has 320 entries; expected at least 336"):
        run(context(), make(), teacher(), vocab=VOCAB + 16)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture_learns(context, arch, tied):
    ctx = context()
    student = tiny_model(arch, seed=1, tied=tied)
    targets = teacher(arch=arch, tied=tied)
    report = train(student, targets, ROWS, make(), ctx, ctx.work / "log.jsonl")
    assert report.validation_loss < report.start_loss
    assert not student.training
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied


def test_full_disk_or_no_rights_is_one_clear_error(context):
    ctx = context()
    blocked = ctx.work / ".training.best.safetensors.tmp"
    blocked.mkdir()
    with pytest.raises(StoreError, match=r"training\.best\.safetensors: cannot be written"):
        run(ctx, make(), teacher())


def test_threads_and_random_state_of_the_caller_are_left_alone(context):
    before, random = torch.get_num_threads(), torch.get_rng_state()
    run(context(threads=before + 1), make(steps=2), teacher())
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_schedule_rises_then_falls():
    settings = make(learning_rate=1.0, warmup_ratio=0.1, final_lr_ratio=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(0, 1, make(learning_rate=1.0)) == 1.0


@pytest.mark.parametrize(
    ("precision", "has", "width", "expected"),
    [
        ("bf16", False, 4, True),
        ("fp32", True, 4096, False),
        ("auto", False, 4096, False),
        ("auto", True, 4096, True),
        ("auto", True, 64, False),
    ],
)
def test_bf16_is_taken_where_the_cpu_has_it_and_the_model_is_wide_enough(monkeypatch, precision, has, width, expected):
    monkeypatch.setattr(settings_module, "cpu_has_bf16", lambda: has)
    assert choose_bf16(precision, width=width) is expected


def test_bf16_trains_and_then_fp32_in_the_same_process(context):
    _, low = run(context("a"), make(precision="bf16"), teacher())
    _, full = run(context("b"), make(), teacher())
    assert (low.precision, full.precision) == ("bf16", "fp32")
    assert low.validation_loss == pytest.approx(full.validation_loss, rel=0.02)
    assert low.validation_loss != full.validation_loss
    assert low.validation_loss < low.start_loss


@pytest.mark.parametrize("seed", range(3))
def test_kd_beats_cross_entropy_alone_on_few_rows(context, seed):
    """Answers are samples of the teacher: its whole distribution says more than the one token that was drawn."""
    world, count = tiny_model(seed=20 + seed, scale=0.2, vocab=24, layers=1), 40
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 24, (count + 60, 2), generator=generator)
    with torch.no_grad():
        for _ in range(8):
            probabilities = torch.softmax(world(input_ids=ids).logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    rows = [dataclasses.replace(ROWS[0], ids=tuple(line), answer=(0, 0) + (1,) * 8) for line in ids.tolist()]
    targets = OnlineTargets(world, vocab=24)
    unseen = RowTable(rows[count:], vocab=24).batch(np.arange(60))
    exact = targets(unseen).narrow(0, len(unseen.keep)).logprobs
    divergence = {}
    for kd_weight in (0.0, 0.9):
        student = tiny_model(seed=seed, vocab=24)
        ctx = context(f"{kd_weight}")
        settings = make(kd_weight=kd_weight, steps=60, batch_tokens=128, learning_rate=5e-3, validation_share=0.15)
        train(student, targets, rows[:count], settings, ctx, ctx.work / "log.jsonl")
        with torch.no_grad():
            learned = log_softmax(student(input_ids=unseen.input_ids).logits.reshape(-1, 24)[unseen.keep], -1)
        divergence[kd_weight] = float((exact.exp() * (exact - learned)).sum(-1).mean())
    assert divergence[0.9] < 0.8 * divergence[0.0], divergence


def test_a_plateau_ends_the_run_and_keeps_the_best(context):
    few = [*ROWS[:6], *tiny_token_rows(8, seed=5)]
    settings = make(kd_weight=0.0, steps=60, validation_share=0.5, learning_rate=2e-2, validations=20)
    whole, long = run(context("whole"), settings, rows=few)
    stopping = dataclasses.replace(settings, patience=3)
    kept, report = run(context("stopped"), stopping, rows=few)
    assert report.steps < long.steps == 60
    assert report.steps == report.kept_step + 9
    assert (report.kept_step, report.validation_loss) == (long.kept_step, long.validation_loss)
    assert same(kept, whole)
    assert any("did not fall in 3 validations; its lowest is" in note for note in report.notes)
    assert not any("did not fall" in note for note in long.notes)
    again, resumed = run(context("stopped"), stopping, rows=few)
    assert resumed.resumed_from == resumed.steps == report.steps
    assert same(again, kept)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_learning_rate_is_caught_and_the_best_kept(context, optimizer):
    ctx = context()
    with pytest.raises(TrainingError, match=r"(diverges|is nan|is inf).*Lower learning_rate \(now 1\).*are kept in"):
        run(ctx, make(learning_rate=1.0, steps=120, optimizer=optimizer), teacher())
    assert (ctx.work / "training.best.safetensors").is_file()
    # where the loss climbs too slowly for that, the plateau guard ends it; what is kept is no worse than the start
    settings = make(learning_rate=0.2, steps=200, optimizer=optimizer, validations=10, patience=3)
    _, report = run(context("hovering"), settings, teacher())
    assert report.steps < 200
    assert report.validation_loss <= report.start_loss
    assert any("the held-out loss did not fall in 3 validations" in note for note in report.notes)
    _, report = run(context("good"), make(steps=40, patience=3), teacher())
    assert report.validation_loss < report.start_loss
