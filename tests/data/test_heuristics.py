"""Heuristics: every rule fires on what it names, with its value, and leaves ordinary rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.data.rows import chat_row, make_row, read_dropped, read_rows, read_source
from compress.data.selection.heuristic_rules import is_odd_word, judge, judge_text, repeated_chars
from compress.data.selection.params import HeuristicsParams
from compress.data.selection.static import heuristics
from compress.errors import DataError
from tests.data.stages import make_context

PROSE = (
    "The lighthouse was built two centuries ago and its keeper still writes a diary every night. "
    "On calm days he rows to the village, buys bread, and listens to what the fishermen tell about the weather. "
    "Nobody has ever read the diary, but everybody in the harbour knows that it exists."
)


@pytest.mark.parametrize(
    ("text", "params", "reason", "detail"),
    [
        ("", {}, "too short", "0 characters, at least 2"),
        ("dim it", {"min_words": 3}, "too short", "2 words, at least 3"),
        ("a" * 11, {"max_chars": 10}, "too long", "11 characters, at most 10"),
        ("a b c", {"max_words": 2}, "too long", "3 words, at most 2"),
        ("the lights\x07", {}, "unreadable characters", "share 0.09, at most 0"),
        ("caf\ufffd lights", {}, "unreadable characters", "share 0.09, at most 0"),
        ("le cafÃ© est fermÃ©", {}, "unreadable characters", "share 0.11, at most 0"),
        ("turn on the свет", {"scripts": ["LATIN"]}, "letters of other scripts", "share 0.31, at most 0.1"),
        ("t#r~ @n ^he l|gh~s", {}, "too many symbols", "share 0.33, at most 0.25"),
        ("12 34 56 lights 78", {}, "too few words with letters", "share 0.20, at least 0.4"),
        ("a b c d e", {}, "words too short", "1.0 letters on average, at least 1.5"),
        ("x" + "ya" * 20, {}, "words too long", "41.0 letters on average, at most 15"),
        ("xkcd qwrt the lights", {}, "odd words", "share 0.50, at most 0.34, such as 'xkcd'"),
        ("lights lights lights lights", {}, "repeated word", "'lights' 4 times in a row, at most 3"),
        ("nooooooo way", {}, "repeated character", "'o' 7 times in a row, at most 5"),
        ("this is Lorem  ipsum", {"forbidden": ["lorem  IPSUM"]}, "forbidden phrase", "'lorem  IPSUM'"),
        (
            "you sooooggy turnip, dim it",
            {"tone": ["soggy turnip"]},
            "abusive tone",
            "1 words, at most 0: sogy turnip",
        ),
        ("dim the lights", {"min_stop_words": 2}, "too few stop words", "1 different ones, at least 2"),
        ("- milk\n- eggs\n* tea", {}, "mostly bullet lines", "share 1.00, at most 0.9"),
        ("milk...\neggs…\ntea", {}, "mostly ellipsis lines", "share 0.67, at most 0.3"),
        (
            "\n".join(["one line that stands here"] * 10),
            {},
            "repeated lines",
            "share 0.90, at most 0.3",
        ),
        (
            " ".join(f"big cat number{chr(97 + i)} runs" for i in range(12)),
            {},
            "one word pair everywhere",
            "share 0.35, at most 0.2, 'big cat'",
        ),
        (f"{PROSE} {PROSE}", {}, "repeated passages", "share 0.49, at most 0.15"),
    ],
)
def test_each_rule_names_what_it_found(text: str, params: dict[str, Any], reason: str, detail: str) -> None:
    found = judge_text(text, HeuristicsParams(**params))
    assert found is not None
    assert (found.reason, found.detail) == (reason, detail)


@pytest.mark.parametrize(
    "text",
    [
        "dim the kitchen lights to 30%",
        "set an alarm for 7:30am tomorrow pls",
        "call mom",
        "lights off",
        "wake me at 06:15, ok?",
        "c'est l'été à la plage",
        "напомни мне завтра",
        "明日の天気を教えて",
        "नमस्ते दुनिया",
        "add mp3 and h2o to the todo list",
        "open https://example.org/a_b?c=d#e",
        "no no no",
        "five five five five five",
        "my email is a.b@example.org 😀",
        PROSE,
        "- milk\n- eggs",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    params = HeuristicsParams(max_word_run=5) if text.startswith("five") else HeuristicsParams()
    assert judge_text(text, params) is None


def test_chats_are_judged_by_the_request_and_by_the_answer() -> None:
    json_answer = '{"name":"x","args":{"a":[1,2,3],"b":{"c":"#~^"}}}'
    assert judge(chat_row("dim the lights", json_answer), HeuristicsParams(answer_format="json")) is None
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("  ", {}, "answer too short"),
        ("long", {"max_answer_chars": 3}, "answer too long"),
        ('{"name":"x', {"answer_format": "json"}, "answer is not JSON"),
        ("3", {"answer_format": "json"}, "answer is not JSON"),
        ("a\ufffd", {}, "answer has unreadable characters"),
        ("you wet sock", {"tone": ["wet sock"]}, "abusive tone"),
    ]
    for answer, params, reason in cases:
        found = judge(chat_row("dim the lights", answer), HeuristicsParams(**params))
        assert found is not None, answer
        assert found.reason == reason
    system = make_row(messages=[{"role": "system", "content": "#~^#~^"}, *chat_row("hello", "hi").messages])
    assert judge(system, HeuristicsParams()) is None, "the system turn is the user's own, not noise"


def test_tone_matches_whole_words_only() -> None:
    params = HeuristicsParams(tone=["ass"])
    assert judge_text("my class assignment", params) is None
    assert judge_text("you ASS!", params) is not None
    assert judge_text("you ass", HeuristicsParams(tone=["ass"], max_tone_words=1)) is None
    assert judge_text("(a+b", HeuristicsParams(tone=["(a+b"])) is None, "a pattern in the list is plain text"


@pytest.mark.parametrize("word", ["xkcd", "brtzk", "li#ht", "a1b", "1a2", "foo_bar"])
def test_odd_words(word: str) -> None:
    assert is_odd_word(word)


@pytest.mark.parametrize("word", ["rhythm", "7am", "2nd", "mp3", "tv", "don't", "well-known", "12:30", "élève", "и"])
def test_fair_words(word: str) -> None:
    assert not is_odd_word(word)


def test_repeated_passages_by_hand() -> None:
    words = list("abcdexabcde")
    assert repeated_chars(words, 5) == 5
    assert repeated_chars(words, 6) == 0
    assert repeated_chars([], 5) == 0


@given(st.text(max_size=80))
def test_any_text_gets_a_verdict(text: str) -> None:
    found = judge_text(text, HeuristicsParams(scripts=["LATIN"], tone=["x y"], repetition_from_words=5))
    assert found is None or (found.reason and found.detail)


@given(st.text(max_size=60))
def test_loosest_limits_keep_everything(text: str) -> None:
    loose = HeuristicsParams(
        min_chars=0, max_unreadable_share=1.0, max_symbol_share=1.0, min_alpha_word_share=0.0, min_mean_word=0.0,
        max_mean_word=1000.0, max_odd_word_share=1.0, max_word_run=1000, max_char_run=1000, max_bullet_share=1.0,
        max_ellipsis_share=1.0, max_line_repeat_share=1.0, max_top_gram_share=1.0, max_gram_repeat_share=1.0,
        forbidden=[], min_words=0,
    )  # fmt: skip
    assert judge_text(text, loose) is None


def test_params_refuse_nonsense() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        HeuristicsParams(max_symbol_share=1.5)
    with pytest.raises(ValidationError, match="Extra inputs"):
        HeuristicsParams(max_symbols=1)  # type: ignore[call-arg]


def test_stage_writes_reasons(tmp_path: Path) -> None:
    rows = [chat_row("dim the lights", "{}"), chat_row("xx xx xx xx xx", "{}"), chat_row("", "{}")]
    ctx = make_context(tmp_path, rows, name="data.selection.heuristics")
    result = heuristics(HeuristicsParams(), ctx)
    assert read_rows(ctx.out) == rows[:1]
    assert [d.reason for d in read_dropped(ctx.out)] == ["repeated word", "too short"]
    assert result.metrics == {"rows_in": 3, "rows_out": 1, "dropped": {"repeated word": 1, "too short": 1}}


def test_nothing_left_says_what_dropped_it(tmp_path: Path) -> None:
    ctx = make_context(tmp_path, [chat_row("hi", "{}"), chat_row("x", "{}")], name="data.selection.heuristics")
    with pytest.raises(DataError, match=r"heuristics: no row is left of 2 \(too short: 2\)\. Loosen the limit"):
        heuristics(HeuristicsParams(min_words=2), ctx)
    assert not list(ctx.out.iterdir())


def test_quickstart_noise_is_told_from_clean_rows() -> None:
    """The pool says which rows are spoilt: garbled text and scolding go, and not one clean row does."""
    folder = Path(__file__).parents[2] / "profiles/quickstart"
    kinds = {
        item["line"] - 1: item["noise"]
        for item in map(json.loads, (folder / "pool_noise.jsonl").read_text().splitlines())
    }
    tone = ["soggy turnip", "wobbly teapot", "mouldy pancake", "grumpy radish", "leaky bucket"]
    params = HeuristicsParams(answer_format="json", tone=tone)
    lost = {i for i, row in enumerate(read_source(folder / "pool.jsonl").rows) if judge(row, params) is not None}
    for kind, least in {"garbled": 0.95, "abusive_tone": 1.0, "off_topic": 1.0}.items():
        members = {i for i, k in kinds.items() if k == kind}
        assert len(members & lost) >= least * len(members), kind
    assert not {i for i in lost if i not in kinds}
