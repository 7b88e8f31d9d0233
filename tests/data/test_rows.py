"""Rows: every accepted shape, every refusal with its place, and round trips through files."""

from __future__ import annotations

import datetime
import json
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.records import CANONICAL
from compress.data.rows import (
    Dropped,
    Row,
    chat_row,
    content_id,
    folder_files,
    make_row,
    read_dropped,
    read_rows,
    read_source,
    write_jsonl,
    write_quarantine,
    write_rows,
)
from compress.errors import DataError
from compress.files import file_sha256
from compress.identities import source_identity

CHAT = chat_row("dim the lights", '{"name":"set_light"}')


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": list(CHAT.messages)},
        {"messages": json.dumps(list(CHAT.messages))},
        {"conversations": [{"from": "human", "value": CHAT.user}, {"from": "gpt", "value": CHAT.answer}]},
        {"prompt": CHAT.user, "response": CHAT.answer},
        {"prompt": [CHAT.messages[0]], "completion": [CHAT.messages[1]]},
        {"question": CHAT.user, "answer": CHAT.answer},
        {"instruction": CHAT.user, "input": "", "output": CHAT.answer},
        {"instruction": CHAT.user, "output": CHAT.answer, "text": None},
    ],
)
def test_every_chat_shape_gives_the_same_row(tmp_path: Path, record: dict[str, Any]) -> None:
    row = read_source(lines(tmp_path / "a.jsonl", record)).rows[0]
    assert (row.id, row.messages, row.user, row.answer) == (CHAT.id, CHAT.messages, CHAT.user, CHAT.answer)
    assert row.is_chat
    assert row.text == ""
    assert row.source == "a.jsonl"


def test_alpaca_input_and_system_and_extra_columns(tmp_path: Path) -> None:
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "label": 4, "level": 0.5}
    row = read_source(lines(tmp_path / "a.jsonl", record)).rows[0]
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant"]
    assert row.user == "Add\n\n1 2"
    assert (row.label, row.meta) == ("4", {"level": 0.5})
    assert row.prompt == row.messages[:2]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"ask": "a", "reply": "b", "intent": "x", "prompt": "old"})
    row = read_source(path, columns={"prompt": "ask", "response": "reply", "label": "intent"}).rows[0]
    assert (row.user, row.answer, row.label) == ("a", "b", "x")


def test_json_list_text_parquet_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps([{"text": "two"}, {"text": "three"}], indent=1))
    (tmp_path / "c.txt").write_text("four\nmore\n<|endoftext|>\n\nfive\r\n<|endoftext|>\n")
    pq.write_table(pa.table({"text": ["six"], "when": [datetime.date(2026, 1, 2)]}), tmp_path / "d.parquet")
    lines(tmp_path / "a.jsonl", {"text": "one"})
    (tmp_path / "README.txt").write_text("no data")
    read = read_source(tmp_path)
    assert [r.text for r in read.rows] == ["one", "two", "three", "four\nmore", "five", "six"]
    assert [r.source for r in read.rows][3] == "c.txt"
    assert read.rows[-1].meta == {"when": "2026-01-02"}
    assert len(read.notes) == 1
    assert "columns kept in meta, where no model sees them: when (1 rows)" in read.notes[0]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [("\n", ["a", "b", "c"]), ("\n\n", ["a\nb", "c"]), ("auto", ["a\nb", "c"]), ("b", ["a", "c"])],
)
def test_text_separators(tmp_path: Path, separator: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n  \nc\n")
    read = read_source(tmp_path / "a.txt", separator=separator)
    assert [r.text for r in read.rows] == expected
    assert bool(read.notes) == (separator == "auto")


def test_split_takes_only_its_files(tmp_path: Path) -> None:
    for name in ("train.txt", "train-extra.txt", "valid-a.txt", "dev.txt"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in folder_files(tmp_path, "train")] == ["train-extra.txt", "train.txt"]
    assert [p.name for p in folder_files(tmp_path, "valid")] == ["dev.txt", "valid-a.txt"]
    with pytest.raises(DataError, match="no data files of the split 'test'"):
        folder_files(tmp_path, "test")


def test_saved_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    assert read_source(tmp_path / "one").rows[0].answer == "b"
    assert read_source(tmp_path / "both", split="valid").rows[0].user == "a"
    with pytest.raises(DataError, match=r"no split 'test'; found train, validation"):
        read_source(tmp_path / "both", split="test")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/rows", ("owner/rows", None)),
        ("owner/rows-v1.5@main", ("owner/rows-v1.5", "main")),
        ("owner/rows@v1.0", ("owner/rows", "v1.0")),
    ],
)
def test_hub_name_may_pin_a_revision(monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None]) -> None:
    datasets = pytest.importorskip("datasets")
    seen = []

    def load(path: str, *, revision: str | None) -> Any:
        seen.append((path, revision))
        return {"train": [{"prompt": "a", "response": "b"}], "test": [{"prompt": "c", "response": "d"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [read_source(name, split=split).rows[0].user for split in (None, "test")] == ["a", "c"]
    assert seen == [asked, asked]
    assert len({source_identity(Path(text), file_sha256) for text in (name, "owner/rows@other")}) == 2


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: malformed JSON: Expecting value at column 10"),
        (b'{"text": "a"}\n\n{"text": NaN}\n', r"a\.jsonl:3: malformed JSON: NaN is not JSON"),
        (b'{"text": "ok"}\n{"text": "\xe9t\xe9"}\n', r"a\.jsonl:2: byte 0xe9 at position 11 of the line is not valid"),
        (b'"text"\n', r"a\.jsonl:1: a JSON string; expected a JSON object"),
        (b'{"txet": "a"}\n', r"the columns are txet; expected one of.*'txet' looks like 'text'"),
        (b'{"prompt": "a"}\n', r"a\.jsonl:1: the columns are prompt; expected one of the column sets"),
        (b'{"text": 5}\n', r"text is a number; expected text"),
        (b'{"text": null}\n', r"the columns are none"),
        (b'{"messages": []}\n', r"the columns are messages"),
        (b'{"messages": "[1"}\n', r"messages is a string that is not JSON"),
        (b'{"messages": "{}"}\n', r"messages is a object; expected a list"),
        (b'{"messages": [{"role": "user"}]}\n', r"messages\[0\] has the keys role"),
        (b'{"messages": [{"role": "boss", "content": "a"}]}\n', r"messages\[0\].role is 'boss'; expected one of"),
        (b'{"messages": [{"role": "user", "content": null}]}\n', r"messages\[0\].content is a null"),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}\n',
            r"tool_calls is a list; expected only",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "text": "b"}\n', r"both messages and text are filled"),
        (b'{"text": "a\\ud800"}\n', r"half a surrogate pair \(\\ud800\) at character 1"),
        (b'{"text": "a", "label": []}\n', r"label is a list"),
        (b'{"text": "a", "source": 1}\n', r"source is a number"),
        (b'{"text": "a", "meta": "x"}\n', r"meta is a string that is not JSON"),
        (b'{"text": "a", "meta": [1]}\n', r"meta is a list"),
        (b"[" * 100_000, r"malformed JSON"),
        (b'[{"text": "a"},\n {"text": }]', r"a\.jsonl:2: malformed JSON"),
        (b'[{"text": "a"}, 3]', r"a\.jsonl\[1\]: a JSON number"),
        (b"", r"a\.jsonl: no rows; expected at least one row"),
        (b"\n \n", r"no rows"),
    ],
)
def test_bad_input_names_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(path)


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_source(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no data files; expected files ending in"):
        read_source(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"the ending '\.csv' says nothing"):
        read_source(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_source(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns: unknown names prompts; expected messages, prompt"):
        read_source(tmp_path / "a.csv", columns={"prompts": "x"})
    path = lines(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"no column 'questoin' \(mapped to prompt\).*Did you mean 'question'"):
        read_source(path, columns={"prompt": "questoin"})
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="no data files"):
        read_source(tmp_path / "folder.jsonl")


def test_quarantine_puts_bad_lines_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{bad\n{"x": 1}\n{"text": "\xff"}\n{"text": "b"}\n')
    read = read_source(path, on_error="quarantine")
    assert [r.text for r in read.rows] == ["a", "b"]
    assert [q.where.rsplit(":", 1)[1] for q in read.quarantined] == ["2", "3", "4"]
    write_quarantine(tmp_path, read.quarantined)
    stored = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert stored[0]["raw"] == "{bad"
    assert "malformed JSON" in stored[0]["error"]
    path.write_bytes(b"{bad\n{worse\n")
    with pytest.raises(DataError, match=r"all 2 lines are unusable, the first: .*a\.jsonl:1: malformed"):
        read_source(path, on_error="quarantine")


def test_quarantine_of_nothing_writes_nothing(tmp_path: Path) -> None:
    write_quarantine(tmp_path, [])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- artifacts


def test_artifact_round_trip_with_dropped(tmp_path: Path) -> None:
    rows = [CHAT.with_scores("s.t", ratio=0.5), make_row(text="é\x00\n", label="x", source="f", meta={"a": [1, None]})]
    lost = [Dropped(rows[1], "too short", "1 word"), Dropped(rows[0], "odd", stage="other")]
    write_rows(tmp_path, rows, lost, stage="here")
    assert read_rows(tmp_path) == rows
    assert read_dropped(tmp_path) == [Dropped(rows[1], "too short", "1 word", "here"), lost[1]]
    assert read_rows(tmp_path)[0].scores("s.t") == {"ratio": 0.5}
    assert rows[0].scores("none") == {}
    assert not list(tmp_path.glob("*.tmp"))


def test_artifact_comes_back_through_read_source(tmp_path: Path) -> None:
    rows = [chat_row("a", "b", source="f"), make_row(text="t", label="l", source="s", meta={"k": 1})]
    write_rows(tmp_path, rows, [Dropped(CHAT, "never read")])
    assert read_source(tmp_path).rows == rows


def test_same_rows_give_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for name in "ab":
        write_rows(tmp_path / name, [make_row(text="t", meta={"b": 1, "a": 2} if name == "a" else {"a": 2, "b": 1})])
    assert (tmp_path / "a/rows.parquet").read_bytes() == (tmp_path / "b/rows.parquet").read_bytes()


def test_damaged_and_missing_artifacts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file; expected a data artifact folder"):
        read_rows(tmp_path)
    assert read_dropped(tmp_path) == []
    (tmp_path / "rows.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(tmp_path)


def test_id_is_of_the_content_alone() -> None:
    assert make_row(text="a", label="x").id == make_row(text="a", source="y", meta={"z": 1}).id
    assert content_id((), "a") != content_id((), "b")
    swapped = ({"content": "dim the lights", "role": "user"}, CHAT.messages[1])
    assert make_row(messages=swapped).id == CHAT.id
    assert CHAT.id == "5a5fbbd6485e00ee", "ids are stored in artifacts and caches: they must not change"


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT})
ROW = st.builds(
    make_row,
    messages=st.lists(MESSAGE, min_size=1, max_size=4),
    label=st.none() | TEXT,
    source=st.text(string.ascii_letters, min_size=1, max_size=8),
    meta=st.dictionaries(TEXT, JSON, max_size=3),
) | st.builds(make_row, text=TEXT, source=st.just("s"), label=st.none() | TEXT)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_rows_survive_parquet_and_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, rows)
    assert read_rows(folder) == rows
    write_jsonl(folder / "rows.jsonl", rows)
    assert read_source(folder / "rows.jsonl").rows == rows


@settings(max_examples=100, deadline=None)
@given(record=JSON | st.dictionaries(st.sampled_from([*CANONICAL, "answer", "conversations"]), JSON, max_size=4))
def test_any_json_is_a_row_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, record: object) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    try:
        rows = read_source(path).rows
    except DataError as error:
        assert "a.jsonl" in error.where  # noqa: PT017 - either outcome is right, a traceback is not
    else:
        assert len(rows) == 1


@pytest.mark.parametrize("name", ["tinystories", "gsm8k", "instruct/alpaca_en_demo.json"])
def test_real_files(name: str) -> None:
    path = Path(__file__).parents[2] / "../shared/data" / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    rows = read_source(path).rows
    assert len(rows) > 900
    assert len({row.id for row in rows}) > 0.95 * len(rows)
