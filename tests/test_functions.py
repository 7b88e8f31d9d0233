"""The table of functions: where it comes from, what the metric counts, and that run.py passes off no made-up call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.assessment import known_functions
from compress.assessment_params import EvaluateParams
from compress.context import StageContext
from compress.data.rows import Row, chat_row, write_rows
from compress.functions import functions_of
from compress.progress import Progress
from deploy.bundle_runner import run
from deploy.export.stage import _functions
from deploy.params import ExportParams
from evaluators.metrics import functions_in, score_calls, unknown_function

LIGHT = '{"name": "set_light", "args": {"room": "hall", "level": 3}}'
TIMER = '{"name":"set_timer","args":{"minutes":5}}'
MADE_UP = '{"name":"set_weather","args":{}}'
TABLE = {"set_light": ["level", "room"], "set_timer": ["minutes"]}


def artifact(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    write_rows(folder, rows)
    return folder


def test_functions_are_those_that_the_answers_call() -> None:
    assert functions_in([LIGHT, TIMER, '{"name":"set_light","args":{"scene":"x"}}']) == {
        "set_light": ["level", "room", "scene"],
        "set_timer": ["minutes"],
    }
    assert functions_in(["a story", "another", LIGHT]) == {}
    assert functions_in([]) == {}


def test_rows_that_a_model_wrote_add_no_functions(tmp_path: Path) -> None:
    rows = [chat_row("light", LIGHT), chat_row("timer", TIMER), chat_row("rain", MADE_UP, source="magpie")]
    assert functions_of(artifact(tmp_path / "data", rows)) == TABLE


def test_calls_of_unknown_functions_are_counted() -> None:
    wanted = [LIGHT, TIMER, TIMER, LIGHT]
    found = score_calls([LIGHT, MADE_UP, "no call", '{"name":"set_alarm","args":{}}'], wanted, {"set_alarm"})
    np.testing.assert_array_equal(found["unknown_function_rate"], [0, 1, 0, 0])
    assert "unknown_function_rate" not in score_calls([LIGHT], [LIGHT])
    assert unknown_function(MADE_UP, TABLE) == "set_weather"
    assert unknown_function(LIGHT, TABLE) is None
    assert unknown_function("hello", TABLE) is None


def test_names_come_from_test_and_training_rows_or_as_they_are_given(tmp_path: Path) -> None:
    inputs = {
        "test": artifact(tmp_path / "test", [chat_row("light", LIGHT)]),
        "data": artifact(tmp_path / "data", [chat_row("timer", TIMER)]),
    }
    ctx = StageContext("evaluate.model", inputs, tmp_path, tmp_path, 0, Progress(quiet=True))
    assert known_functions(EvaluateParams(), ctx) == {"set_light", "set_timer"}
    assert known_functions(EvaluateParams(functions={"open": []}), ctx) == {"open"}
    assert _functions(ExportParams(), ctx) == {"functions": {"set_timer": ["minutes"]}}
    assert _functions(ExportParams(functions={"b": ["y", "x"], "a": []}), ctx) == {
        "functions": {"a": [], "b": ["x", "y"]}
    }
    chats = artifact(tmp_path / "chats", [chat_row("hello", "how are you?")])
    ctx = StageContext("deploy.export", {"data": chats}, tmp_path, tmp_path, 0, Progress(quiet=True))
    assert _functions(ExportParams(), ctx) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LIGHT, ""),
        (TIMER, ""),
        ('{"name": "set_timer"}', ""),
        ("I cannot do that.", ""),
        ("[1, 2]", ""),
        ('{"name": 3, "args": {}}', ""),
        ("[" * 100_000, ""),
        (MADE_UP, "no such function: set_weather; known: set_light, set_timer"),
        ('{"name": "set_timer", "args": {"hours": 1}}', "no such argument of set_timer: hours; known: minutes"),
        ('{"name": "a\\u001b[2J", "args": {}}', 'no such function: "a\\u001b[2J"; known: set_light, set_timer'),
    ],
)
def test_run_py_says_what_nothing_can_serve(text: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    info: dict[str, Any] = {"functions": TABLE}
    assert run.unserved(text, info) == reason
    assert run.unserved(text, {}) == ""
    assert run.warn_unserved(text, info) == (run.NO_SUCH_FUNCTION if reason else 0)
    assert capsys.readouterr().err == (f"run.py: {reason}\n" if reason else "")


def test_a_damaged_table_is_no_fault() -> None:
    for table in (None, [], 3, "x", {}):
        assert run.unserved(MADE_UP, {"functions": table}) == ""
    assert json.loads(MADE_UP)["name"] not in TABLE
