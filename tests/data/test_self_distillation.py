"""Self-data distillation: rewrites with the same result are taken, others leave the reference, no row is lost."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.data.condensation import self_distillation as module
from compress.data.condensation.params import SelfDistillationParams
from compress.data.condensation.self_distillation import chosen, conversation, objection, result, self_distillation
from compress.data.rows import ROWS, Row, chat_row, make_row, read_dropped, read_rows
from compress.endpoint import Reply
from compress.errors import UserError
from tests.data.stages import make_context

STAGE = "data.condensation.self_distillation"


@dataclass
class Scripted:
    """Says what the table holds for the reference answer it is shown; fails after `calls` calls."""

    table: dict[str, Reply]
    calls: int = 10**6
    asked: list[str] = field(default_factory=list)

    def answer(self, conversations: Sequence[Sequence[dict[str, str]]], **_: Any) -> list[Reply]:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        texts = [messages[-1]["content"] for messages in conversations]
        self.asked += texts
        return [self.table[next(a for a in self.table if f"\n\n{a}\n\n" in text)] for text in texts]


POOL = [
    chat_row("2 boxes of 3?", "2 times 3 is 6.", source="sums"),
    chat_row("half of 9?", "It is 4.50"),
    chat_row("dim it", '{"name": "dim", "to": 3}'),
    chat_row("was it good?", "It was a good film: positive", label="positive"),
    chat_row("and this?", "A dull film: negative", label="negative"),
    chat_row("7 and 1?", "8"),
    chat_row("3 and 1?", "That makes 4"),
    chat_row("say hello", "Hello"),
    make_row(text="a text row"),
]
TABLE = {
    "2 times 3 is 6.": Reply("Two threes, hence 6", -0.5, True),
    "It is 4.50": Reply("Nine over two is 4.5", -0.25, True),
    '{"name": "dim", "to": 3}': Reply('{"to":3,"name":"dim"}', math.nan, True),
    "It was a good film: positive": Reply("I call it Positive", -0.1, True),
    "A dull film: negative": Reply("negative, or rather positive", -0.1, True),
    "8": Reply("It is 8 and then it is", -0.1, False),
    "That makes 4": Reply("That makes 5", -0.1, True),
    "Hello": Reply("Hi there", -0.1, True),
}


def test_the_known_answer(tmp_path: Path) -> None:
    done = self_distillation(
        SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE, teacher=Scripted(TABLE))
    )
    rows = read_rows(tmp_path / "out")
    assert [row.answer for row in rows[:4]] == [TABLE[row.answer].text for row in POOL[:4]]
    assert [row.answer for row in rows[4:]] == [row.answer for row in POOL[4:]]
    assert rows[0].scores(STAGE) == {"was": "2 times 3 is 6.", "logprob": -0.5}
    assert rows[2].scores(STAGE) == {"was": '{"name": "dim", "to": 3}'}
    assert [row.scores(STAGE)["kept"] for row in rows[4:8]] == [
        module.OTHER, module.UNENDED, module.OTHER, module.UNCHECKED,
    ]  # fmt: skip
    assert rows[8] == POOL[8]
    assert (rows[0].source, rows[3].label, rows[0].prompt) == ("sums", "positive", POOL[0].prompt)
    assert not read_dropped(tmp_path / "out")
    assert (done.metrics["rows_in"], done.metrics["rows_out"], done.metrics["asked"]) == (9, 9, 8)
    assert done.metrics["rewritten"] + sum(done.metrics["kept_reference"].values()) == done.metrics["asked"]
    assert done.metrics["rewritten"] == 4
    assert done.metrics["cannot_be_asked"] == 1


def test_share_zero_is_the_pool_to_the_byte(tmp_path: Path) -> None:
    teacher = Scripted({})
    self_distillation(SelfDistillationParams(share=0.0), make_context(tmp_path, POOL, name=STAGE, teacher=teacher))
    assert (tmp_path / "out" / ROWS).read_bytes() == (tmp_path / "data" / ROWS).read_bytes()
    assert not teacher.asked


def test_a_teacher_that_is_always_wrong_changes_no_answer(tmp_path: Path) -> None:
    wrong = {answer: Reply("surely 999", -0.01, True) for answer in TABLE}
    done = self_distillation(
        SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE, teacher=Scripted(wrong))
    )
    assert [row.answer for row in read_rows(tmp_path / "out")] == [row.answer for row in POOL]
    assert "no answer was rewritten" in done.notes[-1]


def test_a_killed_run_goes_on_and_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    whole = Scripted(TABLE)
    self_distillation(SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE, teacher=whole, out="whole"))
    first, second = Scripted(TABLE, calls=1), Scripted(TABLE)
    with pytest.raises(KeyboardInterrupt):
        self_distillation(SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE, teacher=first))
    self_distillation(SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE, teacher=second))
    assert (tmp_path / "out" / ROWS).read_bytes() == (tmp_path / "whole" / ROWS).read_bytes()
    assert first.asked + second.asked == whole.asked


def test_the_request_shows_prompt_and_answer_once_each() -> None:
    row = chat_row("what is {answer}?", "a {prompt} 1")
    assert conversation(row, "<{prompt}|{answer}>")[-1] == {
        "role": "user",
        "content": "<what is {answer}?|a {prompt} 1>",
    }


def test_the_last_number_as_by_decimal_arithmetic() -> None:
    draw = random.Random(3)
    for _ in range(300):
        value = round(draw.uniform(-5000, 5000), draw.randrange(3))
        texts = [f"so {value:,.2f}.", f"3 then {value:.4f} in all", f"{value:,.3f}"]
        found = {result(text, "number", (), "") for text in texts}
        assert len(found) == 1
        assert float(found.pop() or "nan") == value
    assert result("none here", "number", (), "") is None


@pytest.mark.parametrize(
    ("reference", "text", "options", "taken"),
    [
        ("x #### a b", "y #### a b ", {"check": "pattern", "pattern": r"####(.*)"}, True),
        ("x #### a", "y #### b", {"check": "pattern", "pattern": r"####(.*)"}, False),
        ("any", "thing", {"check": "none"}, True),
        ("Any", "", {"check": "none"}, False),
        ("{1", "{2", {}, False),
    ],
)
def test_checks(reference: str, text: str, options: dict[str, Any], taken: bool) -> None:
    row: Row = chat_row("q", reference)
    assert (not objection(row, Reply(text, -0.1, True), (), SelfDistillationParams(**options))) == taken


def test_share_picks_about_that_share_whatever_else_is_there() -> None:
    picked = sum(chosen(str(i), 7, 0.3) for i in range(4000))
    assert abs(picked / 4000 - 0.3) < 0.03
    assert all(chosen(str(i), 7, 1.0) for i in range(4000))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a teacher"):
        self_distillation(SelfDistillationParams(), make_context(tmp_path, POOL, name=STAGE))
    refused: tuple[dict[str, Any], ...] = (
        {"request": "say {answer}"},
        {"check": "pattern"},
        {"pattern": "x"},
        {"check": "pattern", "pattern": "("},
    )
    for bad in refused:
        with pytest.raises(ValidationError, match=re.compile("request must|go together|no regular")):
            SelfDistillationParams(**bad)
