"""Impossible Distillation: a toy grammar with known paraphrases, filtered pairs are right, raw ones are not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.data.rows import ROWS, chat_row, make_row, read_rows
from compress.data.synthesis import impossible as module
from compress.data.synthesis.impossible import impossible, misfit, overlap, says_yes
from compress.data.synthesis.params import ImpossibleParams
from compress.endpoint import Reply
from compress.errors import UserError
from tests.data.stages import make_context

STAGE = "data.synthesis.impossible"
POOL = [chat_row(f"lamp {i}", "ok") for i in range(30)] + [make_row(text="a text")]
# every meaning in two wordings, and a second meaning that lies near
MEANINGS = {
    "on": ("please switch the lamp on now", "make it bright here at once"),
    "off": ("please switch the lamp off now", "let there be darkness here immediately"),
}
MEANING = {text: name for name, texts in MEANINGS.items() for text in texts}


class Weak:
    """Samples any sentence of the grammar; as a judge it is wrong in a known share of the questions."""

    def __init__(self, wrong: float = 0.0, calls: int = 10**6) -> None:
        self.wrong, self.calls, self.made = wrong, calls, 0

    def answer(self, conversations: Sequence[Sequence[dict[str, str]]], **options: Any) -> list[Reply]:
        if self.made == self.calls:
            raise KeyboardInterrupt
        self.made += 1
        draw = random.Random(options.get("seed", 0))
        return [self._reply(c[-1]["content"], draw) for c in conversations]

    def _reply(self, text: str, draw: random.Random) -> Reply:
        if not text.startswith('"'):
            return (
                Reply(draw.choice([*MEANING, "no end in"]), -1.0, True) if draw.random() < 0.9 else Reply("a", 0, False)
            )
        one, two = text.split('"')[1], text.split('"')[3]
        same = MEANING.get(one) == MEANING.get(two)
        wrong = random.Random(text).random() < self.wrong
        return Reply("Yes." if same != wrong else "No, it does not", -1.0, True)


def run(folder: Path, teacher: Any, out: str = "out", **options: Any) -> Any:
    ctx = make_context(folder, POOL, name=STAGE, teacher=teacher, out=out)
    done = impossible(ImpossibleParams(**options), ctx)
    return done, read_rows(folder / out)[len(POOL) :]


def precision(rows: Sequence[Any]) -> float:
    firsts = [row.user.removeprefix("Say this in other words: ") for row in rows]
    return sum(MEANING.get(a) == MEANING.get(row.answer) for a, row in zip(firsts, rows, strict=True)) / len(rows)


def test_filtered_pairs_are_paraphrases_where_raw_pairs_mostly_are_not(tmp_path: Path) -> None:
    pairs = [(a, b) for a, b in product(MEANING, MEANING) if a != b]
    assert sum(MEANING[a] == MEANING[b] for a, b in pairs) / len(pairs) < 0.5
    done, rows = run(tmp_path, Weak())
    assert rows
    assert precision(rows) == 1.0
    assert {row.source for row in rows} == {"impossible"}
    assert done.metrics["pairs"] == len(rows) + sum(done.metrics["rejected"].values())
    assert {module.ONE_WAY, "too alike", module.KNOWN} <= set(done.metrics["rejected"])
    assert read_rows(tmp_path / "out")[: len(POOL)] == POOL
    assert (tmp_path / "out" / module.REJECTED).read_text(encoding="utf-8").count("\n") > 3


def test_a_judge_that_is_always_wrong_finds_no_paraphrase(tmp_path: Path) -> None:
    _, rows = run(tmp_path, Weak(wrong=1.0))
    assert rows
    assert precision(rows) == 0.0


def test_no_pairs_wanted_is_the_pool_to_the_byte(tmp_path: Path) -> None:
    teacher = Weak()
    run(tmp_path, teacher, pairs_per_row=0)
    assert (tmp_path / "out" / ROWS).read_bytes() == (tmp_path / "data" / ROWS).read_bytes()
    assert teacher.made == 0


def test_a_killed_run_goes_on_and_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    whole = Weak()
    run(tmp_path, whole, out="whole")
    first, second = Weak(calls=13), Weak()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    run(tmp_path, second)
    assert (tmp_path / "out" / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()
    assert second.made < whole.made


def slow_overlap(first: str, second: str) -> float:
    one, two = tuple(first.lower().split()), tuple(second.lower().split())

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(two):
            return 0
        if one[i] == two[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return 2 * longest(0, 0) / (len(one) + len(two)) if one and two else 0.0


def test_overlap_as_by_the_definition() -> None:
    draw = random.Random(1)
    for _ in range(400):
        a, b = (" ".join(draw.choices("xyzW", k=draw.randrange(9))) for _ in range(2))
        assert overlap(a, b) == slow_overlap(a, b) == overlap(b, a)
    assert overlap("a B c", "A b C") == 1.0


def test_misfits_and_judgements() -> None:
    params = ImpossibleParams()
    assert misfit("a b", "c d e", params) == "side too short"
    assert misfit("a b c", "d e f g h i j", params) == "lengths differ"
    assert misfit("a b c d", "a b c e", params) == "too alike"
    assert misfit("a b c d", "e f g h", params) == ""
    assert [says_yes(t) for t in ("Yes.", '"yes" it is', "no", "", "yesterday")] == [True, True, False, False, False]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a teacher"):
        run(tmp_path, None)
    with pytest.raises(ValidationError, match="judge must hold"):
        ImpossibleParams(judge="{premise}?")
