"""Awkward values: whatever stands in a row, it is read, put aside or refused by its place, and can be written again."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data.rows import read_rows, read_source, write_jsonl, write_quarantine, write_rows
from compress.errors import DataError
from compress.files import file_sha256
from compress.identities import source_identity

HALF, WHOLE = "\\ud83d", "\\ud83d\\ude00"
CHAT = '"prompt":"a","response":"b"'
FINE = '{"text":"fine"}'

# name -> (a line of JSON, what the reader makes of it: a part of meta as JSON, or of the refusal)
LINES: dict[str, tuple[str, str]] = {
    "half a pair in a title": (f'{{{CHAT},"title":"cut {HALF}"}}', '"title":"cut \ufffd"'),
    "half a pair in a key": (f'{{{CHAT},"k{HALF}":1}}', '"k\ufffd":1'),
    "half a pair deep in meta": (
        f'{{{CHAT},"meta":{{"tags":["ok",{{"a":"{HALF}"}}]}}}}', '"tags":["ok",{"a":"\ufffd"}]'),
    "half a pair in meta as JSON": (f'{{{CHAT},"meta":"{{\\"a\\":\\"\\{HALF}\\"}}"}}', '"a":"\ufffd"'),
    "the other half": ('{"text":"a","t":"\\udcb2"}', '"t":"\ufffd"'),
    "half a pair in the source": (f'{{{CHAT},"source":"{HALF}"}}', "{}"),
    "a whole pair": (f'{{{CHAT},"t":"{WHOLE}"}}', '"t":"😀"'),
    "two keys that become one": (f'{{{CHAT},"k{HALF}":1,"k\ufffd":2}}', '"k\ufffd_":2'),
    "two keys that become one, inside": (f'{{{CHAT},"m":{{"k{HALF}":1,"k\ufffd":2}}}}', "two keys of one object"),
    "half a pair in the text": (f'{{"text":"{HALF}"}}', "half a surrogate pair (\\ud83d) at character 0"),
    "half a pair in the label": (f'{{"text":"a","label":"x{HALF}"}}', "half a surrogate pair (\\ud83d) at character 1"),
    "half a pair in a role": (f'{{"messages":[{{"role":"{HALF}","content":"x"}}]}}', "role is '\\\\ud83d'"),
    "half a pair in a message": (f'{{"messages":[{{"role":"user","content":"{HALF}"}}]}}', "half a surrogate pair"),
    "half a pair in a message's key": (
        f'{{"messages":[{{"role":"user","content":"x","{HALF}":"z"}}]}}', "half a surrogate pair"),
    "half a pair in a message's number": (
        f'{{"messages":[{{"role":"user","content":"x","{HALF}":1}}]}}', "messages[0].\\ud83d is a number"),
    "half a pair in a tool": (
        f'{{"messages":[{{"role":"user","content":"x"}}],"tools":[{{"name":"{HALF}"}}]}}', "half a surrogate pair"),
    "half a pair in the history": (f'{{{CHAT},"history":[["{HALF}","b"]]}}', "half a surrogate pair"),
    "half a pair in the only column": (f'{{"te{HALF}":"a"}}', "the columns are te\\ud83d"),
    "NUL": ('{"text":"a\\u0000b","t":"\\u0000"}', '"t":"\\u0000"'),
    "line separators": ('{"text":"a\u2028b\u2029c\x85d","t":"\u2028"}', '"t":"\u2028"'),
    "a byte order mark inside": ('{"text":"\ufeffx","t":"\ufeff"}', '"t":"\ufeff"'),
    "an escape sequence in a name": (f'{{{CHAT},"\\u001b[31mred":1}}', '"\\u001b[31mred":1'),
    "an empty name": (f'{{{CHAT},"":1}}', '"":1'),
    "a long name": (f'{{{CHAT},"{"k" * 300_000}":1}}', f'"{"k" * 300_000}":1'),
    "99 levels": (f'{{{CHAT},"m":{"[" * 99}{"]" * 99}}}', f'"m":{"[" * 99}{"]" * 99}'),
    "900 levels": (f'{{{CHAT},"m":{"[" * 900}{"]" * 900}}}', "m: nested deeper than 100 levels"),
    "900 levels of meta": (f'{{{CHAT},"meta":{{"a":{"[" * 900}{"]" * 900}}}}}', "meta: nested deeper than 100"),
    "90,000 levels": (f'{{{CHAT},"m":{"[" * 90_000}{"]" * 90_000}}}', "malformed JSON: nested too deeply"),
    "meta of 9,000 levels as JSON": (
        f'{{{CHAT},"meta":"{"[" * 9000}{"]" * 9000}"}}', "meta is a string that is not JSON"),
    "an integer of 4,000 digits": (f'{{{CHAT},"m":{"9" * 4000}}}', f'"m":{"9" * 4000}'),
    "an integer of 5,000 digits": (f'{{{CHAT},"m":{"9" * 5000}}}', "malformed JSON: Exceeds the limit (4300 digits)"),
    "a number beyond floats": (f'{{{CHAT},"m":1e999}}', '"m":null'),
    "a label beyond floats": ('{"text":"a","label":-1e999}', "{}"),
    "NaN": (f'{{{CHAT},"m":NaN}}', "malformed JSON: NaN is not JSON"),
    "NaN in meta as JSON": (f'{{{CHAT},"meta":"{{\\"a\\":NaN}}"}}', '"a":null'),
    "a key twice": ('{"prompt":"a","prompt":"c","response":"b"}', "the key 'prompt' stands twice"),
    "a key twice, inside": (f'{{{CHAT},"m":{{"k":1,"k":2}}}}', "the key 'k' stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_read_or_refused_by_its_place_and_quarantine_helps(tmp_path: Path, name: str) -> None:
    line, expected = LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n{FINE}\n", encoding="utf-8")
    found = read_source(path, on_error="quarantine")
    assert [row.text for row in found.rows][-1] == "fine"
    try:
        rows = read_source(path).rows
    except DataError as error:
        assert error.where == f"{path}:1"  # noqa: PT017 - the table says which outcome is right
        assert expected in str(error)  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
        str(error).encode()
        assert [put.where for put in found.quarantined] == [f"{path}:1"]
    else:
        assert expected in json.dumps(rows[0].meta, ensure_ascii=False, separators=(",", ":"))
        assert not found.quarantined
    "".join(found.notes).encode()
    write_rows(tmp_path, found.rows)
    write_quarantine(tmp_path, found.quarantined)
    assert read_rows(tmp_path) == found.rows
    write_jsonl(tmp_path / "again.jsonl", found.rows)
    assert read_source(tmp_path / "again.jsonl").rows == found.rows


def test_replacements_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{{CHAT},"title":"{HALF}"}}\n{{"text":"a","meta":{{"n":1e999}}}}\n')
    assert read_source(path).notes[1:] == [
        "half a surrogate pair in a value that is only kept along became U+FFFD (1 rows)",
        "NaN or an infinity in meta became null (1 rows)",
    ]


# ---------------------------------------------------------------------------------- Parquet

BAD_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
VALUES: dict[str, tuple[Any, Any]] = {
    "a time beyond Python's": (pa.array([2**62], pa.timestamp("us")), "4611686018427387904 timestamp[us]"),
    "a time of day beyond Python's": (pa.array([2**61], pa.time64("us")), "2305843009213693952 time64[us]"),
    "a date beyond Python's": (pa.array([2**30], pa.date32()), "1073741824 date32[day]"),
    "a duration beyond Python's": (pa.array([2**62], pa.duration("s")), "4611686018427387904 duration[s]"),
    "an unknown time zone": (pa.array([1], pa.timestamp("us", tz="Mars/Base")), "1 timestamp[us, tz=Mars/Base]"),
    "a time inside": (pa.array([{"a": [2**62, None]}], pa.struct([("a", pa.list_(pa.timestamp("us")))])),
                      {"a": ["4611686018427387904 timestamp[us]", None]}),
    "nanoseconds": (pa.array([2**60 + 1], pa.timestamp("ns")), "2006-07-14 23:58:24.606846977"),
    "a date": (pa.array([datetime.date(2026, 1, 2)]), "2026-01-02"),
    "a decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
    "half precision": (pa.array([1.5], pa.float16()), 1.5),
    "NaN": (pa.array([float("nan")]), None),
    "a map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [["a", 1]]),
    "a dictionary": (pa.array(["a"]).dictionary_encode(), "a"),
    "bytes": (pa.array([b"a\xff"]), "a\ufffd"),
    "two fields of one name": (pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
                               DataError("", "t: two fields of a struct have one name")),
    "text that is no UTF-8": (BAD_UTF8, DataError("", "t: text that is not valid UTF-8")),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_of_parquet(tmp_path: Path, name: str) -> None:
    array, expected = VALUES[name]
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one"], "t": array})
    pq.write_table(pa.concat_tables([table, pa.table({"text": ["fine"], "t": pa.nulls(1, array.type)})]), path)
    found = read_source(path, on_error="quarantine")
    assert found.rows[-1].text == "fine"
    if isinstance(expected, DataError):
        with pytest.raises(DataError, match="row 0: " + expected.got):
            read_source(path)
        assert len(found.quarantined) == 1
    else:
        assert found.rows[0].meta.get("t") == expected
    write_rows(tmp_path, found.rows)
    assert read_rows(tmp_path) == found.rows


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are called 'text'"):
        read_source(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["hello world"] * 50}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            read_source(tmp_path / "a.parquet")
        except DataError as error:
            assert "a.parquet" in error.where  # noqa: PT017 - either outcome is right, a traceback is not


# ---------------------------------------------------------------------------------- artifacts and names


@pytest.mark.parametrize(
    "changed",
    [
        *({"messages": value} for value in (
            "{", "5", None, "", "null", "true", '"x"', "[5]", "[null]", '[{"role":"user"}]',
            '[{"role":"user","content":5}]', '[{"role":"user","content":"x","k":[1]}]', "[" * 90_000,
            '[{"role":"user","content":"\\ud83d"}]',
        )),
        *({"meta": value} for value in (
            "{", "5", None, "[]", '{"scores":5}', '{"scores":{"a":1}}', "[" * 90_000, '{"a":NaN}', '{"a":1e999}',
            '{"a":"\\ud83d"}', '{"a":' * 900 + "1" + "}" * 900,
        )),
        {"text": None}, {"id": None}, {"source": None}, {"text": ["x"]}, {"source": b"\xff"},
    ],
    ids=lambda changed: str(changed)[:40],
)  # fmt: skip
def test_a_damaged_artifact_is_a_data_error(tmp_path: Path, changed: dict[str, Any]) -> None:
    row = {"id": "x", "source": "s", "messages": "[]", "text": "x y z", "label": None, "meta": "{}"} | changed
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read_rows(tmp_path)


def test_an_artifact_without_a_column_is_a_data_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "text": ["y"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="no column source, messages, label, meta"):
        read_rows(tmp_path)


def test_a_file_name_that_is_no_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    try:
        path.write_text('{"text":"a"}\n{bad\n')
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    found = read_source(path, on_error="quarantine")
    assert found.rows[0].source == "caf\ufffd.jsonl"
    write_rows(tmp_path, found.rows)
    write_quarantine(tmp_path, found.quarantined)
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["raw"] == "{bad"
    assert len(source_identity(path, file_sha256)) == 64


@pytest.mark.parametrize("content", ["[1]", "{}", "[" * 90_000, '{"_data_files": 5}'], ids=lambda text: text[:20])
def test_a_damaged_datasets_folder_is_a_data_error(tmp_path: Path, content: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(content)
    with pytest.raises(DataError, match="cannot be loaded"):
        read_source(tmp_path / "saved")


def test_a_filtered_and_shuffled_datasets_folder_keeps_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"text": str(i), "when": datetime.datetime(2026, 1, 2)} for i in range(9)])
    made = made.filter(lambda row: int(row["text"]) % 2 == 1).shuffle(seed=1)
    made.save_to_disk(tmp_path / "saved")
    rows = read_source(tmp_path / "saved").rows
    assert [row.text for row in rows] == made["text"][:]
    assert rows[0].meta == {"when": "2026-01-02 00:00:00"}
