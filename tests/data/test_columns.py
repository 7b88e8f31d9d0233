"""Columns beside question and answer: where each goes, what is refused, and that nothing goes in silence."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data.rows import Row, SourceRead, read_source
from compress.data.selection.near_duplicates import Rules, find_duplicates
from compress.errors import DataError

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Bonjour"}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Bonjour"}]
HELLO = "user: Hello | assistant: Bonjour"
TOOL = {"type": "function", "function": {"name": "dim", "parameters": {"to": "int"}}}
LISTED = 'You can call these functions:\n{"function": {"name": "dim", "parameters": {"to": "int"}}, "type": "function"}'
LONG = "The ship sank in 1907 near the cape."


def as_jsonl(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_parquet(folder: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    renamed = folder / "table.parquet"  # rows.parquet is what an artifact calls it
    (folder / "rows.parquet").rename(renamed)
    return renamed


def as_saved(folder: Path, records: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return folder / "saved"


def told(row: Row) -> str:
    return " | ".join(f"{m['role']}: {m['content']}" for m in row.messages) or row.text


def read(folder: Path, *records: dict[str, Any], **how: Any) -> SourceRead:
    return read_source(as_jsonl(folder, list(records)), **how)


# name -> (record, the messages, columns that the note names)
SHAPES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "Dolly": ({"instruction": "When?", "context": "In 1907.", "response": "1907", "category": "qa"},
              "user: When?\n\nIn 1907. | assistant: 1907", ("category",)),
    "question and context": ({"question": "When?", "context": "In 1907.", "answer": "1907"},
                             "user: When?\n\nIn 1907. | assistant: 1907", ()),
    "several contexts": ({"question": "When?", "context": ["In 1907.", "Or not."], "answer": "1907"},
                         "user: When?\n\nIn 1907.\n\nOr not. | assistant: 1907", ()),
    "SQuAD": ({"id": "5", "title": "T", "context": "C", "question": "Q",
               "answers": {"text": ["A", "B"], "answer_start": [1, 2]}},
              "user: Q\n\nC | assistant: A", ("id", "title", "answers")),
    "BoolQ's passage": ({"question": "Q", "passage": "P", "answer": "yes"}, "user: Q\n\nP | assistant: yes", ()),
    "NQ's answers": ({"question": "Q", "answer": ["A", "B"]}, "user: Q | assistant: A", ("answer",)),
    "TriviaQA": ({"question": "Q", "answer": {"value": "V", "aliases": ["W"]}}, "user: Q | assistant: V", ("answer",)),
    "OpenOrca": ({"system_prompt": "In French.", "question": "Hello", "response": "Bonjour"},
                 f"system: In French. | {HELLO}", ()),
    "system and messages": ({"system": "In French.", "messages": TURNS}, f"system: In French. | {HELLO}", ()),
    "two system prompts": ({"system": "S", "messages": [{"role": "system", "content": "T"}, *TURNS]},
                           f"system: S\n\nT | {HELLO}", ()),
    "the same system prompt": ({"system": "T", "messages": [{"role": "system", "content": "T"}, *TURNS]},
                               f"system: T | {HELLO}", ()),
    "history of pairs": ({"instruction": "And then?", "input": "", "output": "Snow.", "system": "S",
                          "history": [["Hello", "Bonjour"]]},
                         f"system: S | {HELLO} | user: And then? | assistant: Snow.", ()),
    "history as JSON": ({"prompt": "And?", "response": "So.", "history": '[["Hello", "Bonjour"]]'},
                        f"{HELLO} | user: And? | assistant: So.", ()),
    "history of messages": ({"prompt": "And?", "response": "So.", "history": TURNS},
                            f"{HELLO} | user: And? | assistant: So.", ()),
    "history in words": ({"prompt": "And?", "response": "So.", "history": "long ago"},
                         "user: And? | assistant: So.", ("history",)),
    "history beside messages": ({"messages": TURNS, "history": [["x", "y"]]}, HELLO, ("history",)),
    "prompt and input": ({"prompt": "Sum up:", "input": "text", "response": "short"},
                         "user: Sum up:\n\ntext | assistant: short", ()),
    "input and output": ({"input": "Hello", "output": "Bonjour"}, HELLO, ()),
    "empty instruction": ({"instruction": "", "input": "Hello", "output": "Bonjour"}, HELLO, ()),
    "instruction and question": ({"instruction": "Be short.", "question": "Why?", "answer": "So."},
                                 "user: Be short.\n\nWhy? | assistant: So.", ()),
    "context within the prompt": ({"prompt": f"{LONG} When?", "context": LONG, "response": "1907"},
                                  f"user: {LONG} When? | assistant: 1907", ()),
    "short input that happens to stand there": ({"prompt": "Is 12 more than", "input": "1", "response": "yes"},
                                                "user: Is 12 more than\n\n1 | assistant: yes", ()),
    "answers of LLM-Adapters": ({"instruction": "Q", "input": "", "output": "the answer is a", "answer": "a"},
                                "user: Q | assistant: the answer is a", ("answer",)),
    "Alpaca's rendered text": ({"instruction": "Hello", "input": "", "output": "Bonjour", "text": "### Hello"},
                               HELLO, ("text",)),
    "tools": ({"tools": [TOOL], "messages": TURNS}, f"system: {LISTED} | {HELLO}", ()),
    "tools as JSON and a system prompt": ({"tools": json.dumps([TOOL]), "system": "S", "conversations": SHAREGPT},
                                          f"system: S\n\n{LISTED} | {HELLO}", ()),
    "tools that the system prompt names": ({"tools": [TOOL], "system": "Call dim(to).", "messages": TURNS},
                                           f"system: Call dim(to). | {HELLO}", ("tools",)),
    "tools that are none": ({"tools": ["hammer"], "messages": TURNS}, HELLO, ("tools",)),
    "ShareGPT with all roles": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "H"},
                           {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "O"},
                           {"from": "gpt", "value": "G"}]},
        "system: S | user: H | assistant: {} | tool: O | assistant: G", ()),
    "conversations as JSON": ({"conversations": json.dumps(SHAREGPT)}, HELLO, ()),
    "preferences": ({"prompt": "Hello", "chosen": "Bonjour", "rejected": "Salut"}, HELLO, ("rejected",)),
    "preferences in whole conversations": ({"prompt": "Hello", "chosen": TURNS, "rejected": TURNS}, HELLO,
                                           ("rejected",)),
    "preferences of LLaMA-Factory": ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
                                     HELLO, ("rejected",)),
    "a question in messages": ({"messages": TURNS[:1], "response": "Bonjour"}, HELLO, ()),
    "prompt of messages with context": ({"prompt": TURNS[:1], "completion": TURNS[1:], "context": "C"},
                                        "user: Hello\n\nC | assistant: Bonjour", ()),
    "text and title": ({"text": "t", "title": "T"}, "t", ("title",)),
    "text and intent": ({"text": "t", "intent": "I"}, "t", ("intent",)),
    "text, context and system": ({"text": "t", "context": "C", "system": "S"}, "t", ("context", "system")),
    "messages and context": ({"messages": TURNS, "context": "C"}, HELLO, ("context",)),
    "other letter case": ({"Instruction": "When?", "CONTEXT": "In 1907.", "Response": "1907", "System Prompt": "S"},
                          "system: S | user: When?\n\nIn 1907. | assistant: 1907", ()),
    "both letter cases": ({"Prompt": "old", "prompt": "Hello", "response": "Bonjour"}, HELLO, ("Prompt",)),
    "other letter case of messages": ({"messages": [{"Role": "User", "Content": "Hello"},
                                                    {"ROLE": "ASSISTANT", "content": "Bonjour"}]}, HELLO, ()),
    "nulls": ({"prompt": None, "question": "Hello", "answer": "Bonjour", "context": None, "system": None,
               "history": None, "tools": None, "messages": None, "text": None}, HELLO, ()),
    "empties": ({"prompt": "", "question": "Hello", "answer": "Bonjour", "context": "", "system": "", "tools": ""},
                HELLO, ()),
    "a choice": ({"question": "Q", "choices": ["a", "b"], "answer": "a"}, "user: Q | assistant: a", ("choices",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_column_goes_into_the_messages_or_is_named(tmp_path: Path, name: str) -> None:
    record, messages, kept = SHAPES[name]
    found = read(tmp_path, record)
    row = found.rows[0]
    assert told(row) == messages
    assert set(row.meta) == set(kept)
    named = next((note for note in found.notes if note.startswith("columns kept in meta")), "")
    assert all(f"{column} (1 rows)" in named for column in kept)
    assert bool(named) == bool(kept)
    backwards = read(tmp_path, dict(reversed(record.items())))
    assert backwards.rows[0].id == row.id
    assert sorted(map(len, backwards.notes)) == sorted(map(len, found.notes))


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved])
def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path, write: Callable[..., Path]) -> None:
    records = [
        {"instruction": "When?", "context": "In 1907.", "response": "1907", "history": [["Hello", "Bonjour"]],
         "system": None, "tools": None},
        {"instruction": "Where?", "context": None, "response": "There.", "history": [], "system": "S",
         "tools": [{"name": "go", "parameters": None}]},
    ]  # fmt: skip
    rows = read_source(write(tmp_path, records)).rows
    assert [told(row) for row in rows] == [
        f"{HELLO} | user: When?\n\nIn 1907. | assistant: 1907",
        'system: S\n\nYou can call these functions:\n{"name": "go"} | user: Where? | assistant: There.',
    ]  # fmt: skip


def test_other_contexts_make_other_rows_which_are_no_duplicates(tmp_path: Path) -> None:
    base = {"question": "When was it founded?", "answer": "In 1907."}
    parts: list[dict[str, Any]] = [
        {}, {"context": "The mill opened then."}, {"context": "A harbour is older."}, {"system": "Be brief."},
        {"history": [["Hello", "Bonjour"]]}, {"tools": [TOOL]}, {"input": "Somewhere else."},
    ]  # fmt: skip
    rows = read(tmp_path, *(base | part for part in parts)).rows
    assert len({row.id for row in rows}) == len(parts)
    assert find_duplicates(rows, Rules(), order=range(len(rows)), seed=0) == [None] * len(parts)


def test_columns_may_be_named(tmp_path: Path) -> None:
    record = {"ask": "When?", "page": "In 1907.", "reply": "1907", "before": [["Hello", "Bonjour"]], "output": "no"}
    columns = {"instruction": "ask", "context": "page", "response": "reply", "history": "before"}
    found = read(tmp_path, record, columns=columns)
    assert told(found.rows[0]) == f"{HELLO} | user: When?\n\nIn 1907. | assistant: 1907"
    assert found.rows[0].meta == {"output": "no"}


def test_notes_count_rows_and_stay_short(tmp_path: Path) -> None:
    many = {f"c{i}": i for i in range(30)}
    found = read(tmp_path, {"text": "a", "title": "x"}, {"text": "b", "title": "y", "n" * 10_000: 1} | many)
    assert "title (2 rows)" in found.notes[0]
    assert "and 20 more" in found.notes[0]
    assert len(found.notes[0]) < 500
    assert not read(tmp_path, {"text": "a", "source": "s", "label": "l", "meta": {"k": 1}}).notes
    said = read(
        tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": False}
    )
    assert "chosen is taken as the answer; no stage learns from rejected (1 rows)" in said.notes
    assert "label is true or false: what is labelled false is learned from like the rest (1 rows)" in said.notes


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "B.JSONL").write_text('{"text": "b"}\n')
    for name in ("more.csv", "rest.jsonl.gz", "README.md", ".hidden"):
        (tmp_path / name).write_text("x,y\n")
    found = read_source(tmp_path)
    assert [row.text for row in found.rows] == ["b", "a"]
    assert found.notes == [
        "files left unread, since only .jsonl, .ndjson, .json, .parquet, .txt, .text are rows: more.csv, rest.jsonl.gz"
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Q", "context": "C", "answers": {"text": [], "answer_start": []}}, "answers holds no text"),
        ({"question": "Q", "answer": []}, "answer holds no text"),
        ({"question": "Q", "answer": {"a": 1}}, "answer is a object; expected text"),
        ({"prompt": "Q", "response": "A", "history": [["x"]]}, r"history\[0\] is no pair"),
        ({"prompt": "Q", "response": "A", "history": [["x", None]]}, r"history\[0\] is a null"),
        ({"prompt": "Q", "chosen": TURNS, "rejected": TURNS}, "the prompt 'Q' does not stand in the conversation"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, "the columns are chosen, rejected"),
        ({"system": ["a"], "messages": TURNS}, "system is a list"),
        ({"messages": [{"role": None, "from": "human", "value": "x", "content": "y"}]}, "has both from and content"),
        ({"messages": 5}, "messages is number"),
        ({"rows": 1}, "the columns are rows"),
    ],
)
def test_shapes_that_are_not_understood_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, record)
    kept = read(tmp_path, record, {"text": "fine"}, on_error="quarantine")
    assert ([row.text for row in kept.rows], len(kept.quarantined)) == (["fine"], 1)


def test_meta_is_not_written_over(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"text": "a", "meta": {"title": 1}, "title": 2},
        {"text": "b", "scores": 5},
        {"text": "c", "meta": {"scores": [1]}},
        {"text": "d", "meta": {"scores": {"s": {"r": 1}}}, "when": str(datetime.date(2026, 1, 2))},
    ).rows
    assert [row.meta for row in rows] == [
        {"title": 1, "title_": 2},
        {"scores_": 5},
        {"scores_": [1]},
        {"scores": {"s": {"r": 1}}, "when": "2026-01-02"},
    ]
    assert rows[1].with_scores("s", r=1).scores("s") == {"r": 1}
