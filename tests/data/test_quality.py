"""Wrong answers planted and found, and mixes brought to a reference; teachers here are made up and exactly known."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.answers import TokenScores
from compress.data.quality import disagreement, mixes
from compress.data.quality.params import MislabelParams, StabilizeParams
from compress.data.quality.stabilization import mislabel, stabilize
from compress.data.rows import Row, chat_row, make_row, read_dropped, read_rows, write_rows
from compress.encoding import TokenRow, load_tokenizer
from compress.endpoint import Reply
from compress.errors import DataError, UserError
from tests.data.stages import make_context
from tests.reference import quality as slow
from tests.tiny import tiny_conversations, tiny_tokenizer

MISLABEL, STABILIZE = "data.quality.mislabel", "data.quality.stabilize"


# ---------------------------------------------------------------------------------- a teacher that knows


@dataclass
class Knowing:
    """Believes ``truth`` (request -> answer), firmly, but for the requests in ``doubts``, where it is lukewarm."""

    tokenizer: Any
    truth: dict[str, str]
    doubts: frozenset[str] = frozenset()
    can: frozenset[str] = frozenset({"score", "answer", "embed"})
    calls: int = 0
    logprobs: bool = True

    def score(self, rows: Sequence[TokenRow], progress: Any = None) -> list[TokenScores]:
        self.calls += 1
        return [self._score(row) for row in rows]

    def _score(self, row: TokenRow) -> TokenScores:
        ask = self.tokenizer.decode(row.prompt[2:-2])
        belief = self.tokenizer(self.truth[ask] + "<|end|>", add_special_tokens=False)["input_ids"]
        told = row.ids[len(row.prompt) :]
        same = np.array([at < len(belief) and token == belief[at] for at, token in enumerate(told)])
        best = np.full(len(told), -0.7 if ask in self.doubts else -0.01, dtype=np.float32)
        own = np.where(same, best, best - (0.5 if ask in self.doubts else 8.0)).astype(np.float32)
        return TokenScores(own, best, same)

    def answer(self, conversations: Sequence[Any], **_: Any) -> list[Reply]:
        self.calls += 1
        asks = [messages[-1]["content"] for messages in conversations]
        means = [-0.7 if ask in self.doubts else -0.01 for ask in asks]
        return [
            Reply(self.truth[ask], mean if self.logprobs else math.nan, True)
            for ask, mean in zip(asks, means, strict=True)
        ]


@dataclass(frozen=True)
class Planted:
    rows: list[Row]
    wrong: set[str]  # requests whose answer was exchanged
    truth: dict[str, str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def planted() -> Planted:
    """Half of the wrong answers belong to another request, half have one value changed."""
    draw = random.Random(3)
    truth = {talk[0]["content"]: talk[1]["content"] for talk in tiny_conversations(900)}
    rows, wrong = [], set()
    for ask, answer in truth.items():
        told = answer
        if draw.random() < 0.27:
            call = json.loads(answer)
            if "args" in call and draw.random() < 0.5:
                name = sorted(call["args"])[0]
                call["args"][name] = "cellar" if isinstance(call["args"][name], str) else call["args"][name] + 1
                told = json.dumps(call, separators=(",", ":"))
            else:
                told = draw.choice([other for other in truth.values() if other != answer])
            wrong.add(ask)
        rows.append(chat_row(ask, told))
    assert 30 < len(wrong) < len(rows) / 3
    return Planted(rows, wrong, truth)


def test_planted_wrong_answers_are_found(tmp_path: Path, tokenizer: Any, planted: Planted) -> None:
    doubts = frozenset(random.Random(5).sample(sorted(planted.truth), len(planted.truth) // 20))
    teacher = Knowing(tokenizer, planted.truth, doubts)
    ctx = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher)
    result = mislabel(MislabelParams(), ctx)
    lost = {d.row.user for d in read_dropped(ctx.out)}
    assert lost == planted.wrong - doubts  # precision 1; recall is all but what the teacher itself doubts
    assert len(lost & planted.wrong) / len(planted.wrong) > 0.85
    assert result.metrics["dropped"] == {"teacher contradicts the answer": len(lost)}
    assert result.metrics["rows_unsure"] == len(planted.wrong & doubts)
    assert result.metrics["rows_agrees"] == len(planted.rows) - len(planted.wrong)
    first = read_dropped(ctx.out)[0]
    assert first.detail.startswith("another token by 8.00 nats at answer token ")
    assert f"teacher says {planted.truth[first.row.user]!r}" in first.detail
    scores = [row.scores(MISLABEL) for row in read_rows(ctx.out)]
    assert all(score["agrees"] or score["margin"] < 3 for score in scores)


def test_relabelled_answers_are_the_truth(tmp_path: Path, tokenizer: Any, planted: Planted) -> None:
    labelled = [replace(row, label=mixes.function_name(row.answer)) for row in planted.rows]
    ctx = make_context(tmp_path, labelled, name=MISLABEL, teacher=Knowing(tokenizer, planted.truth))
    result = mislabel(MislabelParams(action="relabel"), ctx)
    found = read_rows(ctx.out)
    assert [row.answer for row in found] == [planted.truth[row.user] for row in found]
    assert result.metrics["relabelled"] == len(planted.wrong)
    assert len(found) == len(planted.rows)
    for before, after in zip(labelled, found, strict=True):
        assert after.label == mixes.function_name(after.answer)
        if after.user in planted.wrong:
            assert after.scores(MISLABEL)["was"] == before.answer
            assert after.id != before.id


def test_a_new_answer_needs_confidence(tmp_path: Path, tokenizer: Any, planted: Planted) -> None:
    doubts = frozenset(planted.truth)
    teacher = Knowing(tokenizer, planted.truth, doubts)
    ctx = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher)
    result = mislabel(MislabelParams(action="relabel", min_margin=0.4, max_entropy=0.1), ctx)
    assert result.metrics["relabelled"] == 0
    assert set(result.metrics["dropped"]) == {"contradicted, and the teacher's own answer is unsure"}
    loose = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher, out="loose")
    assert mislabel(MislabelParams(action="relabel", min_margin=0.4, max_entropy=0.8), loose).metrics["relabelled"] > 30


def test_the_margin_at_its_neutral_value_drops_nothing_but_disagreement(
    tmp_path: Path, tokenizer: Any, planted: Planted
) -> None:
    teacher = Knowing(tokenizer, planted.truth)
    strict = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher)
    mislabel(MislabelParams(min_margin=0.0, same_call=False), strict)
    assert {d.row.user for d in read_dropped(strict.out)} == planted.wrong
    never = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher, out="never")
    assert mislabel(MislabelParams(min_margin=99.0), never).metrics["dropped"] == {}
    assert [row.id for row in read_rows(never.out)] == [row.id for row in planted.rows]


def test_the_same_call_in_another_layout_stays(tmp_path: Path, tokenizer: Any) -> None:
    truth = {"dim it": '{"name":"dim","args":{"room":"hall","level":3}}', "lock": '{"name":"lock"}'}
    rows = [
        chat_row("dim it", '{"args": {"level": 3, "room": "hall"}, "name": "dim"}'),
        chat_row("lock", '{"name":"x"}'),
    ]
    teacher = Knowing(tokenizer, truth)
    ctx = make_context(tmp_path, [*rows, chat_row("lock", truth["lock"])], name=MISLABEL, teacher=teacher)
    result = mislabel(MislabelParams(), ctx)
    assert [d.row.id for d in read_dropped(ctx.out)] == [rows[1].id]
    assert result.metrics["rows_same_in_other_layout"] == 1
    off = make_context(tmp_path, [*rows, chat_row("lock", truth["lock"])], name=MISLABEL, teacher=teacher, out="off")
    assert len(read_dropped(off.out)) == 0
    mislabel(MislabelParams(same_call=False), off)
    assert len(read_dropped(off.out)) == 2


def test_a_teacher_that_only_answers(tmp_path: Path, tokenizer: Any, planted: Planted) -> None:
    doubts = frozenset(list(planted.wrong)[:5])
    teacher = Knowing(tokenizer, planted.truth, doubts, can=frozenset({"answer"}))
    ctx = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher)
    result = mislabel(MislabelParams(), ctx)
    assert {d.row.user for d in read_dropped(ctx.out)} == planted.wrong - doubts
    assert result.metrics["rows_unsure"] == 5
    mute = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=replace(teacher, logprobs=False), out="mute")
    assert mislabel(MislabelParams(), mute).metrics["dropped"] == {}  # no confidence, no drop


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, tokenizer: Any, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data.quality.stabilization.CHUNK", 50)
    teacher = Knowing(tokenizer, planted.truth)
    whole = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=teacher)
    mislabel(MislabelParams(), whole)
    assert teacher.calls >= 3

    class Killed(Knowing):
        def answer(self, conversations: Sequence[Any], **options: Any) -> list[Reply]:
            raise KeyboardInterrupt

    broken = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=Killed(tokenizer, planted.truth), out="broken")
    with pytest.raises(KeyboardInterrupt):
        mislabel(MislabelParams(), broken)
    again = Knowing(tokenizer, planted.truth)
    mislabel(MislabelParams(), replace(broken, teacher=again))
    assert again.calls < teacher.calls
    for name in ("rows.parquet", "dropped.parquet"):
        assert (broken.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_rows_that_cannot_be_checked_stay(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        make_row(text="just a text"),
        make_row(messages=[{"role": "user", "content": "no answer"}]),
        chat_row("dim " * 80, "{}"),
        chat_row("lock", '{"name":"lock"}'),
    ]
    teacher = Knowing(tokenizer, {"lock": '{"name":"lock"}'})
    teacher._score = lambda row: Knowing._score(teacher, row) if row.targets else TokenScores.empty()  # type: ignore[method-assign]
    ctx = make_context(tmp_path, rows, name=MISLABEL, teacher=teacher)
    result = mislabel(MislabelParams(max_tokens=60), ctx)
    assert [row.id for row in read_rows(ctx.out)] == [row.id for row in rows]
    assert result.metrics["rows_unmeasured"] == 1
    assert result.notes == ["2 rows have no prompt and answer to check; they stay"]


def test_a_teacher_that_contradicts_most_is_doubted(tmp_path: Path, tokenizer: Any, planted: Planted) -> None:
    nonsense = dict.fromkeys(planted.truth, "blue")
    ctx = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=Knowing(tokenizer, nonsense))
    with pytest.raises(DataError, match=r"no row is left of \d+ \(teacher contradicts.*Raise min_margin"):
        mislabel(MislabelParams(), ctx)
    ctx = make_context(tmp_path, planted.rows, name=MISLABEL, teacher=Knowing(tokenizer, nonsense), out="relabel")
    assert "is it the right teacher" in mislabel(MislabelParams(action="relabel"), ctx).notes[0]


def test_mislabel_needs_answers_and_a_teacher(tmp_path: Path, tokenizer: Any) -> None:
    ctx = make_context(tmp_path, [make_row(text="a story")], name=MISLABEL, teacher=Knowing(tokenizer, {}))
    with pytest.raises(DataError, match="no row has a prompt and an answer"):
        mislabel(MislabelParams(), ctx)
    with pytest.raises(UserError, match="needs a teacher, but the profile names none"):
        mislabel(MislabelParams(), replace(ctx, teacher=None))


# ---------------------------------------------------------------------------------- figures and gates


def test_measure_by_hand() -> None:
    scores = TokenScores(
        np.array([-0.5, -3.0, -1.0], np.float32),
        np.array([-0.5, -1.0, -0.25], np.float32),
        np.array([True, False, False]),
    )
    figures = disagreement.measure(scores)
    assert figures == (0.0, pytest.approx(-1.5), pytest.approx(2.0), 1.0)
    judged = {limit: disagreement.judge(figures, min_margin=limit, max_mean_logprob=0.0) for limit in (1.9, 2.0, 2.1)}
    assert judged == {1.9: "contradicts", 2.0: "contradicts", 2.1: "unsure"}
    assert disagreement.judge(figures, min_margin=0.0, max_mean_logprob=-1.6) == "unsure"


@pytest.mark.parametrize(
    ("gate", "limit", "expected"),
    [
        ("limit", 0.2, [True, True, False, False]),
        ("limit", 0.05, [False, False, False, False]),
        ("median", 9.0, [True, True, False, False]),  # median of 0.1, 0.2, 0.4 is 0.2
    ],
)
def test_confidence_gate(gate: Any, limit: float, expected: list[bool]) -> None:
    found = disagreement.confident([0.1, 0.2, 0.4, math.nan], gate=gate, max_entropy=limit)
    assert found.tolist() == expected
    assert disagreement.confident([], gate=gate, max_entropy=limit).tolist() == []


# ---------------------------------------------------------------------------------- mixes


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=2, max_size=3),
    weights=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    total=st.integers(1, 12),
    max_repeat=st.integers(1, 2),
)
def test_allocation_is_the_nearest_mix(counts: list[int], weights: list[int], total: int, max_repeat: int) -> None:
    names = [f"g{k}" for k in range(len(counts))]
    held = dict(zip(names, counts, strict=True))
    if not any(weights[: len(counts)]):
        return
    wanted = mixes.wanted_shares(dict(zip(names, map(float, weights), strict=False)))
    taken = mixes.allocate(held, wanted, total=total, max_repeat=max_repeat)
    room = sum(n * max_repeat for name, n in held.items() if wanted[name] > 0)
    assert sum(taken.values()) == min(total, room)
    for name in names:
        assert 0 <= taken[name] <= held[name] * max_repeat
        assert wanted[name] > 0 or taken[name] == 0
    if sum(taken.values()):
        best = slow.best_allocation(held, wanted, sum(taken.values()), max_repeat)
        # rounding by largest remainder may miss the best whole numbers by one row in a group
        assert mixes.kl_divergence(taken, wanted) <= best + 0.5 / sum(taken.values())


def test_allocation_by_hand() -> None:
    wanted = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert mixes.allocate({"a": 10, "b": 80, "c": 10}, wanted, total=100, max_repeat=3) == {"a": 30, "b": 40, "c": 30}
    assert mixes.allocate({"a": 60, "b": 80, "c": 60}, wanted, total=100, max_repeat=1) == {"a": 50, "b": 25, "c": 25}
    # a can give 20 only; b and c share the other 80 alike
    assert mixes.allocate({"a": 20, "b": 80, "c": 60}, wanted, total=100, max_repeat=1) == {"a": 20, "b": 40, "c": 40}


def test_the_present_mix_as_the_wanted_one_changes_nothing() -> None:
    counts = {"a": 7, "b": 91, "c": 13, "d": 1}
    wanted = mixes.wanted_shares(counts)
    assert mixes.allocate(counts, wanted, total=112, max_repeat=3) == counts
    assert mixes.kl_divergence(counts, wanted) == pytest.approx(0.0, abs=1e-12)


def test_kl_and_tempering() -> None:
    wanted = mixes.wanted_shares({"a": 8.0, "b": 2.0, "c": 0.0})
    assert wanted == pytest.approx({"a": 0.8, "b": 0.2, "c": 0.0})
    assert mixes.kl_divergence({"a": 5, "b": 5}, wanted) == pytest.approx(slow.kl([5, 5], [0.8, 0.2]))
    assert mixes.kl_divergence({"a": 5, "c": 1}, wanted) == math.inf
    assert mixes.wanted_shares({"a": 8.0, "b": 2.0, "c": 0.0}, tempering=0.0) == {"a": 0.5, "b": 0.5, "c": 0.0}
    half = mixes.wanted_shares({"a": 16.0, "b": 1.0}, tempering=0.5)
    assert half == pytest.approx({"a": 0.8, "b": 0.2})


def test_kmeans_finds_planted_clusters() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    points = (np.eye(4)[truth] * 5 + rng.normal(0, 0.3, (200, 4))).astype(np.float32)
    found, centers = mixes.kmeans(points, 4, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 4
    np.testing.assert_array_equal(mixes.nearest_centers(points, centers), found)
    few, centers = mixes.kmeans(np.zeros((9, 2), np.float32), 4, seed=1)
    assert len(centers) == 1
    assert set(few.tolist()) == {0}


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ('{"name":"dim","args":{}}', "dim"),
        ('{"name": 3}', mixes.NO_FUNCTION),
        ('["name"]', mixes.NO_FUNCTION),
        ("{ cut", mixes.NO_FUNCTION),
        ("[" * 5000, mixes.NO_FUNCTION),
    ],
)
def test_function_name(answer: str, name: str) -> None:
    assert mixes.function_name(answer) == name


# ---------------------------------------------------------------------------------- the stage


def calls(counts: dict[str, int], *, start: int = 0) -> list[Row]:
    rows = [
        chat_row(f"request {name} {start + k}", json.dumps({"name": name, "args": {"n": k}}), label=name.upper())
        for name, count in counts.items()
        for k in range(count)
    ]
    random.Random(1).shuffle(rows)
    return rows


def functions(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(mixes.function_name(row.answer) for row in rows))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    folder.mkdir()
    write_rows(folder, calls({"dim": 40, "lock": 40, "timer": 20}, start=900))
    return folder


@pytest.mark.parametrize("by", ["function", "label"])
def test_the_mix_nears_the_reference(tmp_path: Path, reference: Path, by: Any) -> None:
    rows = calls({"dim": 300, "lock": 60, "timer": 40})
    ctx = make_context(tmp_path, rows, name=STABILIZE, reference=reference)
    result = stabilize(StabilizeParams(by=by, smoothing=0.0), ctx)
    kept = read_rows(ctx.out)
    assert functions(kept) == {"dim": 160, "lock": 160, "timer": 80}
    assert result.metrics["kl_before"] == pytest.approx(slow.kl([300, 60, 40], [0.4, 0.4, 0.2]), abs=1e-5)
    assert result.metrics["kl_after"] == 0.0
    assert (result.metrics["rows_in"], result.metrics["rows_out"]) == (400, 400)
    assert result.metrics["dropped"] == {"group over its share": 140}
    assert result.metrics["repeated"] == 140
    counted = Counter(row.id for row in kept)
    assert max(counted.values()) == 3
    assert sum(row.meta.get("repeat", 1) > 1 for row in kept) == 140
    assert {d.row.id for d in read_dropped(ctx.out)} | set(counted) == {row.id for row in rows}
    assert read_dropped(ctx.out)[0].detail.endswith("300 rows, 160 wanted")
    originals = [row.id for row in kept if "repeat" not in row.meta]
    assert originals == [row.id for row in rows if row.id in counted]  # in the order of the file


def test_the_limit_on_repeats_is_told(tmp_path: Path, reference: Path) -> None:
    rows = calls({"dim": 300, "lock": 5, "timer": 40})
    ctx = make_context(tmp_path, rows, name=STABILIZE, reference=reference)
    result = stabilize(StabilizeParams(max_repeat=2), ctx)
    assert functions(read_rows(ctx.out))["lock"] == 10
    assert result.metrics["kl_after"] < result.metrics["kl_before"]
    assert "lock, timer: every row stands 2 times and the share is still not reached" in result.notes


def test_equal_to_the_reference_nothing_changes(tmp_path: Path, reference: Path) -> None:
    rows = calls({"dim": 80, "lock": 80, "timer": 40})
    ctx = make_context(tmp_path, rows, name=STABILIZE, reference=reference)
    result = stabilize(StabilizeParams(smoothing=0.0), ctx)
    assert read_rows(ctx.out) == rows
    assert result.metrics["kl_before"] == result.metrics["kl_after"] == 0.0


def test_groups_that_the_reference_lacks(tmp_path: Path, reference: Path) -> None:
    rows = [*calls({"dim": 100, "lock": 100, "timer": 50, "song": 250}), chat_row("x", "no call")]
    hard = make_context(tmp_path, rows, name=STABILIZE, reference=reference, out="hard")
    result = stabilize(StabilizeParams(smoothing=0.0, max_repeat=1), hard)
    assert set(functions(read_rows(hard.out))) == {"dim", "lock", "timer"}
    assert result.metrics["kl_before"] is None
    soft = make_context(tmp_path, rows, name=STABILIZE, reference=reference, out="soft")
    stabilize(StabilizeParams(smoothing=0.5, max_repeat=1, rows=250), soft)
    assert functions(read_rows(soft.out))["song"] == 1  # 0.5 of 102.5, times 250


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"mix": "uniform", "rows": 90}, {"dim": 30, "lock": 30, "timer": 30}),
        ({"mix": "weights", "weights": {"dim": 1.0, "timer": 3.0}, "rows": 80}, {"dim": 20, "timer": 60}),
        ({"mix": "weights", "weights": {"dim": 1.0, "lock": 9.0}, "tempering": 0.5, "rows": 8}, {"dim": 2, "lock": 6}),
        ({"mix": "uniform", "max_repeat": 1, "rows": 9999}, {"dim": 300, "lock": 60, "timer": 40}),
    ],
)
def test_other_mixes(tmp_path: Path, settings_: dict[str, Any], expected: dict[str, int]) -> None:
    rows = calls({"dim": 300, "lock": 60, "timer": 40})
    ctx = make_context(tmp_path, rows, name=STABILIZE)
    result = stabilize(StabilizeParams(**settings_), ctx)
    assert functions(read_rows(ctx.out)) == expected
    assert bool(result.notes) == (settings_["rows"] == 9999)


def test_rows_without_a_function_are_not_levelled_up(tmp_path: Path) -> None:
    rows = [*calls({"dim": 30, "lock": 30}), chat_row("x", "no call")]
    ctx = make_context(tmp_path, rows, name=STABILIZE)
    stabilize(StabilizeParams(mix="uniform"), ctx)
    assert set(functions(read_rows(ctx.out))) == {"dim", "lock"}


def test_keep_best_scores(tmp_path: Path) -> None:
    rows = [row.with_scores("s", x=k) for k, row in enumerate(calls({"dim": 20}))] + calls({"lock": 5})
    ctx = make_context(tmp_path, rows, name=STABILIZE)
    stabilize(StabilizeParams(mix="uniform", rows=10, keep="score", score="s.x"), ctx)
    assert [row.scores("s")["x"] for row in read_rows(ctx.out) if row.scores("s")] == [15, 16, 17, 18, 19]
    with pytest.raises(UserError, match=r"no row has a score 's\.y'"):
        stabilize(StabilizeParams(mix="uniform", keep="score", score="s.y"), ctx)


def test_keep_diverse_covers_more_than_random(tmp_path: Path) -> None:
    kinds = ["open the garage", "play some jazz", "what is the weather", "call my mother", "wake me at dawn"]
    rows = [chat_row(f"dim the lights to {k}", '{"name":"a"}') for k in range(95)]
    rows += [chat_row(kind, '{"name":"a"}') for kind in kinds] + [
        chat_row(f"lock {k}", '{"name":"b"}') for k in range(8)
    ]
    found = {}
    for keep in ("diverse", "random"):
        ctx = make_context(tmp_path, rows, name=STABILIZE, out=keep)
        stabilize(StabilizeParams(mix="uniform", rows=16, keep=keep), ctx)
        found[keep] = len({row.user for row in read_rows(ctx.out)} & set(kinds))
    assert found["diverse"] == 5
    assert found["random"] < 3


def test_clusters_are_levelled(tmp_path: Path, reference: Path) -> None:
    rows = [chat_row(f"dim the lights please {k}", "{}") for k in range(90)]
    rows += [chat_row(f"weather forecast tomorrow {k}", "{}") for k in range(10)]
    ctx = make_context(tmp_path, rows, name=STABILIZE)
    stabilize(StabilizeParams(by="cluster", clusters=2, mix="uniform", rows=20), ctx)
    assert Counter(row.user.split()[0] for row in read_rows(ctx.out)) == {"dim": 10, "weather": 10}
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_rows(
        mixed, [chat_row("dim the lights please", "{}"), *[chat_row(f"forecast weather {k}", "{}") for k in range(3)]]
    )
    ctx = make_context(tmp_path, rows, name=STABILIZE, out="mix", reference=mixed)
    stabilize(StabilizeParams(by="cluster", clusters=2, rows=12, smoothing=0.0), ctx)
    assert Counter(row.user.split()[0] for row in read_rows(ctx.out)) == {"dim": 3, "weather": 9}


def test_the_seed_decides_what_stays(tmp_path: Path) -> None:
    rows = calls({"dim": 100, "lock": 10})
    found = []
    for number, seed in enumerate((1, 1, 2)):
        ctx = make_context(tmp_path, rows, name=STABILIZE, seed=seed, out=f"out{number}")
        stabilize(StabilizeParams(mix="uniform", rows=20), ctx)
        found.append((ctx.out / "rows.parquet").read_bytes())
    assert found[0] == found[1] != found[2]


def test_stabilize_refuses_what_is_not_there(tmp_path: Path, reference: Path) -> None:
    ctx = make_context(tmp_path, calls({"dim": 9}), name=STABILIZE)
    with pytest.raises(UserError, match=r"mix: reference, but the profile names no reference rows"):
        stabilize(StabilizeParams(), ctx)
    with pytest.raises(UserError, match="weights: no rows of song; expected dim"):
        stabilize(StabilizeParams(mix="weights", weights={"song": 1.0}), ctx)
    with pytest.raises(UserError, match="needs a teacher"):
        stabilize(StabilizeParams(by="cluster", mix="uniform", embedding="teacher"), ctx)
    other = make_context(tmp_path, calls({"song": 9}), name=STABILIZE, reference=reference)
    with pytest.raises(DataError, match=r"no group of the rows \(song\) is wanted \(dim, lock, timer, song|dim, lock"):
        stabilize(StabilizeParams(smoothing=0.0), other)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"mix": "weights"}, "weights and mix: weights go together"),
        ({"weights": {"a": 1.0}}, "weights and mix: weights go together"),
        ({"mix": "weights", "weights": {"a": -1.0}}, "0 or more"),
        ({"mix": "weights", "weights": {"a": 0.0}}, "one of them above 0"),
        ({"keep": "score"}, "score and keep: score go together"),
        ({"max_repeat": 0}, "greater than or equal to 1"),
        ({"by": "topic"}, "function"),
    ],
)
def test_parameters_that_contradict(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StabilizeParams(**settings_)
