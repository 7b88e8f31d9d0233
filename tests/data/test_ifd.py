"""IFD: both definitions by hand, neutral when the prompt is ignored, and shuffled pairs told from true ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data.answer_loss import mark
from compress.data.rows import Row, chat_row, make_row, read_dropped, read_rows
from compress.data.selection.difficulty import Scored, auroc, bare, first_targets, mean_losses, ratio, select
from compress.data.selection.params import IfdParams
from compress.data.selection.static import ifd
from compress.encoding import TokenRow
from compress.errors import DataError, UserError
from tests.data.stages import make_context
from tests.reference import selection as reference
from tests.tiny import tiny_conversations, tiny_model, tiny_tokenizer

ROW = TokenRow("r", (1, 5, 6, 3, 7, 8), (0, 0, 0, 0, 1, 1))


class FakeTeacher:
    """Scores tokens by a rule of its own: ``rule(context ids, token, place in the answer) -> probability``."""

    def __init__(self, tokenizer: Any, rule: Any) -> None:
        self.tokenizer, self.rule = tokenizer, rule
        self.calls, self.rows, self.identity = 0, 0, "0" * 64

    def score(self, rows: Sequence[TokenRow], progress: object = None) -> list[Any]:
        self.calls += 1
        self.rows += len(rows)
        return [SimpleNamespace(logprob=np.log(np.array(self._row(row), dtype=np.float32))) for row in rows]

    def _row(self, row: TokenRow) -> list[float]:
        start = len(row.prompt)
        return [self.rule(row.ids[:start], token, place) for place, token in enumerate(row.ids[start:])]


def ignores_prompt(_context: object, token: int, place: int) -> float:
    return 1 / (2 + (token * 7 + place * 3) % 11)


def copies(context: Sequence[int], token: int, place: int) -> float:
    return 0.5 if token in context else 0.05 + 0.01 * (token % 5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chats(count: int, seed: int = 0) -> list[Row]:
    return [make_row(messages=talk) for talk in tiny_conversations(count, seed=seed)]


def shuffled(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], np.ndarray]:
    """``share`` of the rows get the answer of another request; which ones."""
    rng = random.Random(seed)
    wrong = np.zeros(len(rows), dtype=bool)
    out = list(rows)
    for i in rng.sample(range(len(rows)), round(share * len(rows))):
        other = rng.choice([row.answer for row in rows if row.answer != rows[i].answer])
        out[i], wrong[i] = chat_row(rows[i].user, other), True
    return out, wrong


# ---------------------------------------------------------------------------------- maths


def test_both_definitions_by_hand_and_they_differ() -> None:
    with_prompt, alone = np.array([1.0, 3.0]), np.array([2.0, 2.0])
    assert ratio(with_prompt, alone, definition="loss") == pytest.approx([0.5, 1.5], rel=1e-5)
    assert ratio(with_prompt, alone, definition="perplexity") == pytest.approx([math.exp(-1), math.exp(1)])
    with pytest.raises(DataError, match="definition: 'ppl'; expected loss or perplexity"):
        ratio(with_prompt, alone, definition="ppl")


@given(st.floats(0, 50), st.sampled_from(["loss", "perplexity"]))
def test_ratio_is_one_when_the_prompt_changes_nothing(loss: float, definition: str) -> None:
    assert ratio(np.array([loss]), np.array([loss]), definition=definition)[0] == 1.0


def test_mean_losses_and_rows_without_targets() -> None:
    scores = [SimpleNamespace(logprob=np.log([0.5, 0.125])), SimpleNamespace(logprob=np.zeros(0))]
    losses = mean_losses(scores)
    assert losses[0] == pytest.approx(2 * math.log(2))
    assert np.isnan(losses[1])


def test_bare_and_cut_rows() -> None:
    assert bare(ROW) == TokenRow("r", (1, 7, 8), (0, 1, 1))
    text = TokenRow("t", (1, 5), (0, 1))
    assert bare(text) is text
    assert first_targets(ROW, 1) == TokenRow("r", (1, 5, 6, 3, 7), (0, 0, 0, 0, 1))
    assert first_targets(ROW, 2) is ROW


def test_select_by_hand() -> None:
    items = [Scored(i, r) for i, r in enumerate([0.9, 1.2, 0.1, 0.5, 0.5])]
    reasons = select(items, max_ratio=1.0, keep=0.4)
    assert reasons == {
        1: ("prompt does not help", "ratio 1.200, at most 1"),
        4: ("too easy", "ratio 0.500, place 3 of 2 kept"),
        2: ("too easy", "ratio 0.100, place 4 of 2 kept"),
    }
    assert select(items, max_ratio=2.0, keep=1.0) == {}, "neutral"


def test_the_share_is_of_the_rows_given() -> None:
    """Superfiltering's script takes a share of 52,002, however many rows there are."""
    for count in (10, 100, 1000):
        items = [Scored(i, i / count) for i in range(count)]
        assert count - len(select(items, max_ratio=1.0, keep=0.1)) == count // 10


def test_share_within_groups() -> None:
    items = [Scored(i, 0.1 * i, "a" if i < 5 else "b") for i in range(10)]
    dropped = select(items, max_ratio=1.0, keep=0.4)
    assert sorted(set(range(10)) - set(dropped)) == [3, 4, 8, 9]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_reference(pairs: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([float(s) for s, _ in pairs]), np.array([p for _, p in pairs])
    if positive.all() or not positive.any():
        with pytest.raises(DataError, match="expected some of either kind"):
            auroc(scores, positive)
    else:
        assert auroc(scores, positive) == pytest.approx(reference.auroc(scores.tolist(), positive.tolist()))


# ---------------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("alone", ["empty_turn", "bare"])
@pytest.mark.parametrize("definition", ["loss", "perplexity"])
def test_a_model_that_ignores_the_prompt_gives_one(tmp_path: Path, tokenizer: Any, alone: Any, definition: Any) -> None:
    rows = chats(20)
    ctx = make_context(tmp_path, rows, name="data.selection.ifd", teacher=FakeTeacher(tokenizer, ignores_prompt))
    result = ifd(IfdParams(alone=alone, definition=definition, keep=1.0), ctx)
    kept = read_rows(ctx.out)
    assert [row.id for row in kept] == [row.id for row in rows], "a ratio of exactly 1 is not above the limit"
    assert {row.scores(ctx.name)["ratio"] for row in kept} == {1.0}
    assert result.metrics["definition"] == definition


@pytest.mark.parametrize("alone", ["empty_turn", "bare"])
def test_shuffled_pairs_are_told_apart(tmp_path: Path, tokenizer: Any, alone: Any) -> None:
    for seed in range(3):
        rows, wrong = shuffled(chats(200, seed), 0.2, seed)
        ctx = make_context(tmp_path, rows, name="i", teacher=FakeTeacher(tokenizer, copies), out=f"{seed}")
        ifd(IfdParams(alone=alone, max_ratio=100.0, keep=1.0), ctx)
        scores = np.array([row.scores("i")["ratio"] for row in read_rows(ctx.out)])
        assert auroc(scores, wrong) > 0.8


def test_stage_drops_with_reasons_and_scores(tmp_path: Path, tokenizer: Any) -> None:
    rows = chats(40)
    ctx = make_context(tmp_path, rows, name="data.selection.ifd", teacher=FakeTeacher(tokenizer, copies))
    result = ifd(IfdParams(max_ratio=0.95, keep=0.25), ctx)
    kept, lost = read_rows(ctx.out), read_dropped(ctx.out)
    ratios = {row.id: row.scores(ctx.name)["ratio"] for row in [*kept, *(d.row for d in lost)]}
    assert len(kept) == 10
    assert max(ratios[row.id] for row in kept) <= 0.95
    easy = [ratios[d.row.id] for d in lost if d.reason == "too easy"]
    assert max(easy) <= min(ratios[row.id] for row in kept)
    scores = kept[0].scores(ctx.name)
    assert scores["ratio"] == pytest.approx(scores["loss"] / scores["loss_alone"], rel=1e-4)
    assert result.metrics["scored"] == 40
    assert result.metrics["ratio_p5"] <= result.metrics["ratio_p50"] <= result.metrics["ratio_p95"]


def test_rows_without_prompt_or_answer_stay(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*chats(5), make_row(text="once"), chat_row("", "{}"), make_row(messages=[{"role": "user", "content": "a"}])]
    ctx = make_context(tmp_path, rows, name="i", teacher=FakeTeacher(tokenizer, ignores_prompt))
    result = ifd(IfdParams(keep=1.0), ctx)
    assert len(read_rows(ctx.out)) == 8
    assert result.notes == ["3 rows have no prompt and answer to score; they stay"]
    only_texts = make_context(tmp_path, rows[5:6], name="i", teacher=FakeTeacher(tokenizer, copies), out="b")
    with pytest.raises(DataError, match="i: no row has a prompt and an answer; expected chat rows"):
        ifd(IfdParams(), only_texts)


def test_a_loss_that_an_earlier_stage_left_is_taken_over(tmp_path: Path, tokenizer: Any) -> None:
    teacher = FakeTeacher(tokenizer, copies)
    rows, params = chats(12), IfdParams(keep=1.0, max_ratio=100.0)
    plain = make_context(tmp_path, rows, name="i", teacher=teacher, out="plain")
    ifd(params, plain)
    assert teacher.rows == 24
    losses = {row.id: row.scores("i")["loss"] for row in read_rows(plain.out)}
    marked = [
        row.with_scores("m", mean_logprob=-losses[row.id], scored=mark(teacher.identity, row, params.max_tokens))
        for row in rows
    ]
    marked[0] = rows[0].with_scores("m", mean_logprob=-9.0, scored=mark("another", rows[0], params.max_tokens))
    marked[1] = rows[1].with_scores("m", mean_logprob=-9.0, scored=mark(teacher.identity, rows[2], params.max_tokens))
    marked[2] = rows[2].with_scores("m", mean_logprob=-9.0, scored=mark(teacher.identity, rows[2], 7))
    teacher.rows = 0
    taken = make_context(tmp_path, marked, name="i", teacher=teacher, out="taken")
    ifd(params, taken)
    assert teacher.rows == 12 + 3, "the three marks of another scorer, row and cut are not believed"
    assert {row.id: row.scores("i")["loss"] for row in read_rows(taken.out)} == losses


def test_cut_rows_compare_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    long_answer = " ".join(f"word{i}" for i in range(200))
    rows = [chat_row("dim the hall lights", long_answer), chat_row(long_answer, "beyond the cut")]
    ctx = make_context(tmp_path, rows, name="i", teacher=FakeTeacher(tokenizer, ignores_prompt))
    ifd(IfdParams(max_tokens=64), ctx)
    kept = read_rows(ctx.out)
    assert kept[0].scores("i")["ratio"] == 1.0
    assert kept[1].scores("i") == {}, "its answer lies behind the cut: not scored"


def test_nothing_left_and_no_scorer(tmp_path: Path, tokenizer: Any) -> None:
    ctx = make_context(tmp_path, chats(5), name="i", teacher=FakeTeacher(tokenizer, ignores_prompt))
    with pytest.raises(DataError, match=r"no row is left of 5 \(prompt does not help: 5\)\. Raise max_ratio or keep"):
        ifd(IfdParams(max_ratio=0.5), ctx)
    with pytest.raises(UserError, match=r"i\.scorer: student, but no earlier step made a model; expected teacher"):
        ifd(IfdParams(scorer="student"), ctx)
    with pytest.raises(UserError, match=r"i\.scorer: teacher, but the profile names none"):
        ifd(IfdParams(), make_context(tmp_path, chats(5), name="i", out="b"))


def test_a_killed_run_goes_on(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.selection.static.CHUNK", 8)
    rows = chats(30)
    whole = make_context(tmp_path, rows, name="i", teacher=FakeTeacher(tokenizer, copies), out="a")
    ifd(IfdParams(), whole)
    dying = FakeTeacher(tokenizer, copies)

    def killed(context: Sequence[int], token: int, place: int) -> float:
        if dying.calls > 4:
            raise KeyboardInterrupt
        return copies(context, token, place)

    dying.rule = killed
    ctx = make_context(tmp_path, rows, name="i", teacher=dying, out="b")
    with pytest.raises(KeyboardInterrupt):
        ifd(IfdParams(), ctx)
    again = FakeTeacher(tokenizer, copies)
    ifd(IfdParams(), make_context(tmp_path, rows, name="i", teacher=again, out="b"))
    assert again.calls == whole.teacher.calls - 4  # type: ignore[union-attr]
    assert (tmp_path / "a/rows.parquet").read_bytes() == (tmp_path / "b/rows.parquet").read_bytes()


def test_a_real_model_scores_as_student_and_as_teacher(tmp_path: Path, tokenizer: Any) -> None:
    from compress.teachers import LocalTeacher
    from tests.tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "model")
    rows = chats(12)
    student = make_context(tmp_path, rows, name="i", out="a", model=folder)
    ifd(IfdParams(scorer="student", max_ratio=10.0), student)
    teacher = make_context(tmp_path, rows, name="i", teacher=LocalTeacher(folder, threads=2), out="b")
    ifd(IfdParams(max_ratio=10.0), teacher)
    assert (student.out / "rows.parquet").read_bytes() == (teacher.out / "rows.parquet").read_bytes()
    assert all(row.scores("i")["loss"] > 0 for row in read_rows(student.out))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_trained_model_finds_shuffled_pairs(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    """A small model trained on the domain: AUROC above 0.8 for a fifth of the pairs shuffled; untrained: chance."""
    import torch

    from compress.encoding import encode_rows
    from compress.teachers import LocalTeacher

    model = tiny_model(seed=seed, hidden=64, ffn=128, scale=0.05)
    encoded = encode_rows(chats(2000, 100 + seed), tokenizer, max_tokens=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(300):
        batch = encoded[(step * 32) % 2000 :][:32]
        width = max(len(row.ids) for row in batch)
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in batch])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows, wrong = shuffled(chats(300, seed), 0.2, seed)
    found = {}
    for name, candidate in (("trained", model.eval()), ("random", tiny_model(seed=seed, scale=0.05))):
        candidate.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        teacher = LocalTeacher(tmp_path / name, threads=1)
        ctx = make_context(tmp_path, rows, name="i", teacher=teacher, out=f"out-{name}")
        ifd(IfdParams(max_ratio=1000.0, keep=1.0), ctx)
        scores = np.array([row.scores("i")["ratio"] for row in read_rows(ctx.out)])
        found[name] = auroc(scores, wrong)
    assert found["trained"] > 0.8, found
    assert abs(found["random"] - 0.5) < 0.15, found
