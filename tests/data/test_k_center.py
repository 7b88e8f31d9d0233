"""k-center: within twice the optimum, equal to the plain greedy, and honest about its radius."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.condensation.k_center import farthest_points, k_center, shares
from compress.data.condensation.params import KCenterParams
from compress.data.rows import Row, chat_row, make_row, read_dropped, read_rows
from compress.errors import UserError
from tests.data.stages import make_context
from tests.reference import selection as reference


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_radius_is_at_most_twice_the_optimum(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(rng.integers(6, 13), rng.integers(1, 5))).astype(np.float32)
    cover = farthest_points(points, count)
    assert cover.radius <= 2 * reference.best_radius(points, count) + 1e-5
    assert cover.radius == pytest.approx(reference.radius(points, cover.chosen.tolist()), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_plain_greedy(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(60, 6)).astype(np.float32)
    cover = farthest_points(points, 20)
    assert cover.chosen.tolist() == reference.farthest_points(points, 20)
    distances = np.linalg.norm(points[:, None] - points[None, cover.chosen], axis=2)
    assert cover.distance == pytest.approx(distances.min(axis=1), abs=1e-3)
    assert np.array_equal(cover.nearest, cover.chosen[distances.argmin(axis=1)])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), count=st.integers(1, 45), seed=st.integers(0, 99), distinct=st.integers(1, 40))
def test_radius_never_rises_and_no_point_is_taken_twice(n: int, count: int, seed: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(distinct, 3))[rng.integers(0, distinct, size=n)].astype(np.float32)  # with copies
    cover = farthest_points(points, count)
    assert len(cover.chosen) == min(count, n)
    assert len(set(cover.chosen.tolist())) == len(cover.chosen)
    assert np.all(np.diff(cover.radii) <= 0)
    assert set(cover.nearest.tolist()) <= set(cover.chosen.tolist())


def test_covers_better_than_chance() -> None:
    """Skewed clusters: the greedy radius against the mean of random choices of the same size, three seeds."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = (1000 * 0.7 ** np.arange(12)).astype(int) + 3
        points = np.concatenate([rng.normal(size=8) * 4 + rng.normal(size=(s, 8)) * 0.3 for s in sizes])
        ours = farthest_points(points.astype(np.float32), 24).radius
        chance = [reference.radius(points, rng.choice(len(points), 24, replace=False)) for _ in range(2)]
        assert ours < 0.5 * np.mean(chance)


@pytest.mark.parametrize(
    ("sizes", "budget", "how", "expected"),
    [
        ([80, 10, 10], 10, "proportional", [8, 1, 1]),
        ([80, 15, 5], 10, "proportional", [8, 1, 1]),
        ([80, 10, 10], 30, "equal", [10, 10, 10]),
        ([80, 2, 10], 30, "equal", [18, 2, 10]),
        ([5, 9, 7], 2, "equal", [0, 1, 1]),
        ([3, 3], 100, "proportional", [3, 3]),
    ],
)
def test_shares_by_hand(sizes: list[int], budget: int, how: str, expected: list[int]) -> None:
    assert shares(sizes, budget, how) == expected


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 100),
    st.sampled_from(["equal", "proportional"]),
)
def test_shares_spend_the_budget(sizes: list[int], budget: int, how: str) -> None:
    given_out = shares(sizes, budget, how)
    assert sum(given_out) == min(budget, sum(sizes))
    assert all(0 <= g <= s for g, s in zip(given_out, sizes, strict=True))


# ---------------------------------------------------------------------------------- the stage


def skewed_rows() -> list[Row]:
    texts = [f"dim the kitchen lights to {n} percent please" for n in range(40)]
    texts += [f"play {g} music" for g in ("jazz", "folk", "soul")] + ["what is the weather in oslo"]
    return [chat_row(t, "{}", label=t.split()[0]) for t in texts]


def test_stage_keeps_the_budget_and_the_rare(tmp_path: Path) -> None:
    rows = skewed_rows()
    ctx = make_context(tmp_path, rows, name="data.condensation.k_center")
    result = k_center(KCenterParams(rows=8, embedding="hashed"), ctx)
    kept = read_rows(ctx.out)
    assert len(kept) == 8
    assert [r.id for r in kept] == [r.id for r in rows if r.id in {k.id for k in kept}], "order of the file"
    assert {"play", "what"} <= {r.label for r in kept}
    assert sorted(r.scores(ctx.name)["rank"] for r in kept) == list(range(8))
    lost = read_dropped(ctx.out)
    assert {d.reason for d in lost} == {"outside the budget"}
    assert all(d.detail.split(" from ")[1] in {k.id for k in kept} for d in lost)
    assert result.metrics["radius"] == pytest.approx(max(float(d.detail.split()[0]) for d in lost), abs=1e-3)


def test_stage_is_deterministic(tmp_path: Path) -> None:
    for out in ("a", "b"):
        ctx = make_context(tmp_path, skewed_rows(), name="k", out=out)
        k_center(KCenterParams(share=0.3, embedding="hashed"), ctx)
    assert (tmp_path / "a/rows.parquet").read_bytes() == (tmp_path / "b/rows.parquet").read_bytes()


def test_a_budget_for_all_changes_nothing(tmp_path: Path) -> None:
    rows = skewed_rows()
    ctx = make_context(tmp_path, rows, name="k")
    result = k_center(KCenterParams(share=1.0), ctx)
    assert read_rows(ctx.out) == rows
    assert result.metrics["dropped"] == {}
    assert "nothing dropped" in result.notes[0]


@pytest.mark.parametrize(("how", "expected"), [("proportional", [10, 1, 1]), ("equal", [8, 3, 1])])
def test_stratified_by_label(tmp_path: Path, how: Any, expected: list[int]) -> None:
    ctx = make_context(tmp_path, skewed_rows(), name="k")
    result = k_center(KCenterParams(rows=12, embedding="hashed", stratify=how), ctx)
    labels = [r.label for r in read_rows(ctx.out)]
    assert [labels.count(name) for name in ("dim", "play", "what")] == expected
    assert result.metrics["groups"] == 3


def test_stratify_without_labels_and_with_too_small_a_budget(tmp_path: Path) -> None:
    unlabelled = [make_row(text=f"story number {i}") for i in range(10)]
    ctx = make_context(tmp_path, unlabelled, name="k", out="a")
    result = k_center(KCenterParams(rows=4, embedding="hashed", stratify="equal"), ctx)
    assert "no row has a label or calls a function" in result.notes[0]
    ctx = make_context(tmp_path, skewed_rows(), name="k", out="b")
    k_center(KCenterParams(rows=2, embedding="hashed", stratify="equal"), ctx)
    assert "label without a share" in {d.detail for d in read_dropped(ctx.out)}


def test_teacher_is_missing(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, skewed_rows(), name="k")
    with pytest.raises(UserError, match=r"k\.embedding: teacher, but the profile names none; expected hashed"):
        k_center(KCenterParams(rows=3), ctx)


class FakeTeacher:
    """Embeds a row as the counts of its tokens; remembers what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, []  # type: tuple[Any, list[Any]]

    def embed(self, rows: Any) -> np.ndarray:
        self.asked.append(rows)
        return np.array([np.bincount(row.ids, minlength=400)[:400] for row in rows], dtype=np.float64)


@pytest.mark.parametrize("of", ["prompt", "all"])
def test_teacher_embeds_prompt_or_all_and_resumes(tmp_path: Path, of: Any) -> None:
    from tests.tiny import tiny_tokenizer

    (tmp_path / "tok").mkdir()
    teacher = FakeTeacher(tiny_tokenizer(tmp_path / "tok"))
    rows = [*skewed_rows(), make_row(text="once upon a time")]
    ctx = make_context(tmp_path, rows, name="k", teacher=teacher)
    k_center(KCenterParams(rows=5, of=of), ctx)
    lengths = {row.id: len(row.ids) for row in teacher.asked[0]}
    assert len(lengths) == len(rows)
    kept = (ctx.out / "rows.parquet").read_bytes()
    k_center(KCenterParams(rows=5, of=of), ctx)
    assert len(teacher.asked) == 1, "the embeddings in the work folder are used again"
    assert (ctx.out / "rows.parquet").read_bytes() == kept
    targets = {sum(row.answer) for row in teacher.asked[0] if row.id == rows[0].id}
    assert (targets == {0}) == (of == "prompt"), "without the answer, or with it"


def test_the_function_called_stands_in_for_a_missing_label(tmp_path: Path) -> None:
    rows = [chat_row(f"dim to {i} percent", '{"name":"dim"}') for i in range(9)] + [chat_row("stop", '{"name":"stop"}')]
    ctx = make_context(tmp_path, rows, name="k")
    k_center(KCenterParams(rows=2, embedding="hashed", stratify="equal"), ctx)
    assert [row.answer for row in read_rows(ctx.out)] == ['{"name":"dim"}', '{"name":"stop"}']
