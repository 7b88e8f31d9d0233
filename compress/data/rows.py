"""Rows: what every data stage reads and writes, and how they come in from a user's files.

`Row` is one chat or one text. `read_source` reads what a user has (JSONL, JSON, Parquet, text, a folder of
these, a `datasets` folder or hub name); `write_rows` and `read_rows` are the artifact folder between stages:
``rows.parquet``, ``dropped.parquet`` and, when lines were put aside, ``quarantine.jsonl``. A line that cannot be
read is an error with file and line, never skipped in silence. Knows nothing of stages, tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from compress.data.arrow_records import doubled, records
from compress.data.hub_rows import SPLITS, dataset_records, is_saved, open_dataset, source_name
from compress.data.plain import DEEPEST, RecordError, plain_json, plain_text, shown
from compress.data.records import CANONICAL, parse_record
from compress.data.turns import Message
from compress.errors import DataError
from compress.files import whole_file, write_whole
from compress.names import is_hub_name

logger = logging.getLogger(__name__)

Format = Literal["auto", "jsonl", "parquet", "text", "datasets"]
SEPARATOR = "<|endoftext|>"
FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
UNUSUAL = re.compile(r"\\u|\d[eE]\+?\d{3}")  # in stored JSON: perhaps half a surrogate pair, or a number beyond floats
NAMED = 12  # columns that a note names
ROWS, DROPPED, QUARANTINE = "rows.parquet", "dropped.parquet", "quarantine.jsonl"

# Made once: json.dumps with settings makes a new encoder on every call.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "source", "messages", "text", "label", "meta")])
_DROPPED_SCHEMA = pa.schema([*_SCHEMA, *((name, pa.string()) for name in ("stage", "reason", "detail"))])


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: a chat (``messages`` filled) or a text (``text`` filled).

    ``id`` is the first 16 hex digits of the SHA-256 of the content alone, so two rows with the same content have
    the same id. ``meta`` holds JSON values; scores stand under ``meta["scores"][STAGE NAME]``.
    """

    id: str
    source: str = ""
    messages: tuple[Message, ...] = ()
    text: str = ""
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether this row has messages rather than a text."""
        return bool(self.messages)

    @property
    def user(self) -> str:
        """Content of the last user message; the empty string for text rows."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def answer(self) -> str:
        """Content of the last message if the assistant said it, else the empty string."""
        last = self.messages[-1] if self.messages else None
        return last["content"] if last is not None and last["role"] == "assistant" else ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the answer."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[:-1]
        return self.messages

    def scores(self, stage: str) -> dict[str, Any]:
        """The scores that ``stage`` left on this row; empty when it left none."""
        found: dict[str, Any] = self.meta.get("scores", {}).get(stage, {})
        return dict(found)

    def with_scores(self, stage: str, **scores: Any) -> Row:
        """A copy with ``scores`` (JSON values) added under ``meta["scores"][stage]``."""
        every = dict(self.meta.get("scores", {}))
        every[stage] = {**every.get(stage, {}), **scores}
        return replace(self, meta={**self.meta, "scores": every})


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that a stage took out. ``reason`` is a fixed phrase that can be counted, ``detail`` the measured value."""

    row: Row
    reason: str
    detail: str = ""
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An input line that could not become a row: ``where`` (``file:line``), the message, and the raw line."""

    where: str
    error: str
    raw: str


@dataclass(frozen=True)
class SourceRead:
    """Rows in the order of the files, what was put aside, and what the reader decided on its own."""

    rows: list[Row]
    quarantined: list[Quarantined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_row(
    *,
    messages: Sequence[Mapping[str, str]] = (),
    text: str = "",
    label: str | None = None,
    source: str = "",
    meta: Mapping[str, Any] | None = None,
) -> Row:
    """A row with its content id worked out."""
    kept = tuple(dict(message) for message in messages)
    return Row(content_id(kept, text), source, kept, text, label, dict(meta or {}))


def chat_row(user: str, answer: str, *, label: str | None = None, source: str = "", **meta: Any) -> Row:
    """A row of one user turn and one answer."""
    turns = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return make_row(messages=turns, label=label, source=source, meta=meta)


def content_id(messages: Sequence[Mapping[str, str]], text: str) -> str:
    """First 16 hex digits of the SHA-256 over the canonical JSON of the content."""
    content: object = [dict(message) for message in messages] if messages else text
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces and plain Unicode: equal values give equal bytes."""
    return _ENCODER.encode(value)


# ---------------------------------------------------------------------------------- artifact folders


def write_rows(folder: Path, rows: Iterable[Row], dropped: Sequence[Dropped] = (), *, stage: str = "") -> None:
    """Write ``rows.parquet`` and ``dropped.parquet``; ``stage`` names the dropper where `Dropped.stage` does not."""
    _write_table(folder / ROWS, [_record(row) for row in rows], _SCHEMA)
    lost = [{**_record(d.row), "stage": d.stage or stage, "reason": d.reason, "detail": d.detail} for d in dropped]
    _write_table(folder / DROPPED, lost, _DROPPED_SCHEMA)


def read_rows(folder: Path) -> list[Row]:
    """Rows of an artifact folder; raises `DataError` when there is none or it is damaged."""
    path = folder / ROWS
    return [_row(record, f"{path}: row {number}") for number, record in enumerate(_read_table(path, _SCHEMA))]


def read_dropped(folder: Path) -> list[Dropped]:
    """Dropped rows of an artifact folder; empty when the stage dropped none."""
    path = folder / DROPPED
    if not path.exists():
        return []
    return [
        Dropped(_row(r, f"{path}: row {number}"), r["reason"] or "", r["detail"] or "", r["stage"] or "")
        for number, r in enumerate(_read_table(path, _DROPPED_SCHEMA))
    ]


def write_quarantine(folder: Path, items: Sequence[Quarantined]) -> None:
    """Write ``quarantine.jsonl``; nothing when ``items`` is empty."""
    if items:
        lines = [canonical_json({"where": q.where, "error": q.error, "raw": q.raw}) for q in items]
        # a file's name may hold bytes that are no UTF-8; their escape is also JSON's
        write_whole(folder / QUARANTINE, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL that `read_source` reads back unchanged."""
    lines = []
    for row in rows:
        record: dict[str, Any] = {"messages": list(row.messages)} if row.is_chat else {"text": row.text}
        extra = {"source": row.source or None, "label": row.label, "meta": row.meta or None}
        record.update({name: value for name, value in extra.items() if value is not None})
        lines.append(canonical_json(record) + "\n")
    write_whole(path, "".join(lines).encode())


def _record(row: Row) -> dict[str, str | None]:
    return {
        "id": row.id,
        "source": row.source,
        "messages": canonical_json(list(row.messages)),
        "text": row.text,
        "label": row.label,
        "meta": canonical_json(row.meta),
    }


def _row(record: Mapping[str, Any], where: str) -> Row:
    """The row of a line of our own table; raises `DataError` when it holds something else."""
    messages, meta = (_stored_json(record[name], f"{where}, {name}") for name in ("messages", "meta"))
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise _damaged(f"{where}, messages", "no list of messages")
    scores = meta.get("scores", {}) if isinstance(meta, dict) else None
    if not isinstance(scores, dict) or not all(isinstance(of_stage, dict) for of_stage in scores.values()):
        raise _damaged(f"{where}, meta", "no object, or its scores are none")
    for name in ("id", "source", "text"):
        if record[name] is None:
            raise _damaged(f"{where}, {name}", "null")
    return Row(record["id"], record["source"], tuple(messages), record["text"], record["label"], meta)


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and {"role", "content"} <= value.keys()
        and all(isinstance(part, str) for part in value.values())
    )


def _stored_json(text: str | None, where: str) -> Any:
    try:
        value = json.loads(text or "", parse_constant=_no_constant)
        if UNUSUAL.search(text or "") or (text or "").count("{") + (text or "").count("[") > DEEPEST:
            plain_json(value, [])  # nested deeper than we write
            canonical_json(value).encode()  # what we could not write again
    except (ValueError, RecursionError):
        raise _damaged(where, f"{shown(text)!r} is not JSON" if text else "empty") from None
    return value


def _damaged(where: str, got: str) -> DataError:
    do = "The artifact is damaged or was not written by edgestill: make it anew"
    return DataError(where, got, "what edgestill writes", do)


def _write_table(path: Path, records: list[dict[str, Any]], schema: pa.Schema) -> None:
    with whole_file(path) as stream:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), stream, compression="zstd")


def _read_table(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
        missing = [name for name in schema.names if name not in table.schema.names]
        if missing or doubled(table.schema):
            got = f"no column {', '.join(missing)}" if missing else f"two columns {doubled(table.schema)}"
            raise DataError(str(path), got, "the columns " + ", ".join(schema.names))
        stored: list[dict[str, Any]] = table.select(schema.names).cast(schema).to_pylist()
    except FileNotFoundError:
        raise DataError(str(path), "there is no such file", "a data artifact folder") from None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(str(path), f"cannot be read as Parquet ({_first_line(error)})") from None
    return stored


# ---------------------------------------------------------------------------------- a user's files


@dataclass
class _Reader:
    """Gathers rows and puts bad lines aside or stops, as told."""

    columns: Mapping[str, str]
    quarantine: bool
    separator: str
    out: SourceRead = field(default_factory=lambda: SourceRead([]))
    kept: Counter[str] = field(default_factory=Counter)  # columns that went to meta -> rows
    said: Counter[str] = field(default_factory=Counter)  # what else was decided -> rows

    def add(self, record: object, where: str, source: str, raw: str | None = None) -> None:
        """Make a row of ``record``; ``raw`` is its line, where it has one."""
        try:
            if isinstance(record, RecordError):
                raise record
            found = parse_record(record, self.columns)
        except RecordError as error:
            self.bad(DataError(where, error.got, error.allowed, error.do), _raw(record) if raw is None else raw)
            return
        row = make_row(
            messages=found.messages,
            text=found.text,
            label=found.label,
            source=found.source or source,
            meta=found.meta,
        )
        kept = found.kept
        if row.meta.get("id") == row.id:  # our own column coming back
            del row.meta["id"]
            kept = tuple(name for name in kept if name != "id")
        self.out.rows.append(row)
        self.kept.update(kept)
        self.said.update(found.said)

    def bad(self, error: DataError, raw: str) -> None:
        if not self.quarantine:
            raise error
        self.out.quarantined.append(Quarantined(error.where, str(error), raw))

    def add_notes(self) -> None:
        """Say what the rows do not show: which columns no model sees, and what was decided."""
        if self.kept:
            named = [f"{shown(name)} ({count} rows)" for name, count in list(self.kept.items())[:NAMED]]
            more = f" and {len(self.kept) - NAMED} more" if len(self.kept) > NAMED else ""
            hint = "data.columns can name the part that one is, such as {label: intent, context: page}"
            self.out.notes.append(f"columns kept in meta, where no model sees them: {', '.join(named)}{more}; {hint}")
        self.out.notes.extend(f"{phrase} ({count} rows)" for phrase, count in self.said.items())


def _raw(record: object) -> str:
    """What is put aside of a record that has no line of its own."""
    try:
        return json.dumps(record, default=str)
    except (RecursionError, TypeError, ValueError):
        return ""


def read_source(
    path: Path | str,
    *,
    format: Format = "auto",
    columns: Mapping[str, str] | None = None,
    on_error: Literal["stop", "quarantine"] = "stop",
    separator: str = "auto",
    split: str | None = None,
) -> SourceRead:
    """Read a file, a folder of files, a `datasets` folder, or a hub name (``owner/name[@revision]``) into rows.

    Args:
        columns: canonical column -> name in the files, such as ``{"prompt": "question"}``.
        on_error: stop at the first bad line, or put bad lines aside and count them.
        separator: text files only. A mark between rows such as ``<|endoftext|>``; a line feed gives a row per line,
            two a row per paragraph. ``auto``: the mark ``<|endoftext|>`` where the file has it, else paragraphs.
        split: of a folder only the files called so (``train``, ``valid``, ``test``); of a hub data set that split.

    Raises `DataError` with file and line for what cannot be read, and when no row is found at all.
    """
    unknown = sorted(set(columns or {}) - set(CANONICAL))
    if unknown:
        raise DataError("columns", f"unknown names {', '.join(unknown)}", ", ".join(CANONICAL))
    reader = _Reader(columns or {}, on_error == "quarantine", separator)
    place = Path(path)
    if format == "datasets" or is_saved(place) or (not place.exists() and is_hub_name(str(path), Path())):
        _read_datasets(reader, str(path), split)
    elif place.is_dir():
        for file in folder_files(place, split):
            _read_file(reader, file, format, source=plain_text(file.relative_to(place).as_posix(), []))
        _note_left_out(reader, place)
    else:
        _read_file(reader, place, format, source=plain_text(place.name, []))
    if not reader.out.rows:
        put_aside = reader.out.quarantined
        got = f"all {len(put_aside)} lines are unusable, the first: {put_aside[0].error}" if put_aside else "no rows"
        raise DataError(str(path), got, "at least one row", "" if put_aside else "Check that the file is not empty")
    reader.add_notes()
    return reader.out


def folder_files(folder: Path, split: str | None = None) -> list[Path]:
    """Data files of ``folder`` in name order; only those of ``split`` when given.

    A file belongs to a split when its name, or its folder's, begins with one of the split's names, as in
    ``train-extra.txt`` or ``valid/part-0.jsonl``. A data artifact gives its ``rows.parquet`` only.
    """
    if (folder / ROWS).exists():
        return [folder / ROWS]
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _format(p) and not _hidden(p.relative_to(folder)))
    if split is not None:
        names = SPLITS.get(split, (split,))
        found = [p for p in found if any(part.startswith(names) for part in p.relative_to(folder).parts)]
    if not found:
        wanted = f" of the split {split!r}" if split else ""
        raise DataError(str(folder), f"no data files{wanted}", "files ending in " + ", ".join(FORMATS))
    return found


def _format(path: Path) -> str:
    """The format that the ending says; empty for an unknown one."""
    return FORMATS.get(path.suffix.lower(), "")


def _note_left_out(reader: _Reader, folder: Path) -> None:
    """Name the files beside those that were read, such as tables of other formats."""
    if (folder / ROWS).exists():
        return
    found = sorted(
        p.relative_to(folder) for p in folder.rglob("*")
        if p.is_file() and not _format(p) and not _hidden(p.relative_to(folder))
    )  # fmt: skip
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        named = ", ".join(shown(path.as_posix()) for path in found[:NAMED])
        reader.out.notes.append(f"files left unread, since only {', '.join(FORMATS)} are rows: {named}{more}")


def _hidden(path: Path) -> bool:
    """Dot files, and the papers that come with data sets."""
    return any(part.startswith(".") for part in path.parts) or path.name.upper().startswith(("README", "LICENSE"))


def _read_file(reader: _Reader, path: Path, format: Format, *, source: str) -> None:
    if not path.exists():
        raise DataError(str(path), "there is no such file or folder", do="Check the path under data in the profile")
    kind = _format(path) if format == "auto" else format
    readers: dict[str, Callable[[_Reader, Path, str], None]] = {
        "jsonl": _read_json, "parquet": _read_parquet, "text": _read_text,
    }  # fmt: skip
    if kind not in readers:
        raise DataError(
            str(path),
            f"the ending {path.suffix or '(none)'!r} says nothing of its format",
            "an ending of " + ", ".join(FORMATS),
            "Set data.format to jsonl, parquet or text",
        )
    try:
        readers[kind](reader, path, source)
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror or _first_line(error)})") from None


def _lines(reader: _Reader, path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers from 1; a line that is not UTF-8 is a bad line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reader.bad(
                    DataError(
                        f"{path}:{number}",
                        f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line is not valid UTF-8",
                        "UTF-8 text",
                        "Convert the file, such as: iconv -f latin1 -t utf-8",
                    ),
                    line.decode("utf-8", errors="replace").rstrip("\r\n"),
                )


def _read_json(reader: _Reader, path: Path, source: str) -> None:
    """JSONL, or a JSON file that holds one list of objects."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        _read_json_list(reader, path, source)
        return
    for number, line in _lines(reader, path):
        if not line.strip():
            continue
        try:
            record = _loads(line)
        except (ValueError, RecursionError) as error:
            reader.bad(_bad_json(f"{path}:{number}", error), line)
            continue
        reader.add(record, f"{path}:{number}", source, line)


def _read_json_list(reader: _Reader, path: Path, source: str) -> None:
    stopper = replace(reader, quarantine=False)  # a broken list has no lines that could be put aside
    text = "\n".join(line for _, line in _lines(stopper, path))
    try:
        listed = _loads(text)
    except json.JSONDecodeError as error:
        raise _bad_json(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _bad_json(str(path), error) from None
    for index, record in enumerate(listed):
        reader.add(record, f"{path}[{index}]", source)


def _loads(text: str) -> Any:
    """Strict JSON: no NaN, and no key twice in one object, of which one value would be lost."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shown(next(key for key in counts if counts[key] > 1))!r} stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad_json(where: str, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        got = f"malformed JSON: {error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        got = "malformed JSON: nested too deeply"
    else:
        got = f"malformed JSON: {str(error).partition('; use sys.')[0]}"  # an integer of more than 4,300 digits
    return DataError(where, got, "one JSON object per line", "Correct the line, or set data.on_error: quarantine")


def _read_parquet(reader: _Reader, path: Path, source: str) -> None:
    try:
        file = pq.ParquetFile(path)
        if (name := doubled(file.schema_arrow)) is not None:
            raise DataError(str(path), f"two columns are called {shown(name)!r}", "different names", "Rename one")
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for record in records(batch):
                reader.add(record, f"{path}: row {number}", source)
                number += 1
    except pa.ArrowException as error:
        raise DataError(str(path), f"not a readable Parquet file ({_first_line(error)})", "Parquet") from None


def _read_text(reader: _Reader, path: Path, source: str) -> None:
    lines = list(_lines(reader, path))
    separator = reader.separator
    if separator == "auto":
        separator = SEPARATOR if any(SEPARATOR in line for _, line in lines) else "\n\n"
        if separator != SEPARATOR:
            note = f"{source}: no {SEPARATOR} mark, so every paragraph is a row"
            reader.out.notes.append(note)
            logger.info(note)
    if separator == "\n":
        pieces = [line for _, line in lines]
    elif separator == "\n\n":
        pieces = "\n".join(line if line.strip() else "" for _, line in lines).split("\n\n")
    else:
        pieces = "\n".join(line for _, line in lines).split(separator)
    for piece in pieces:
        if piece.strip():
            reader.out.rows.append(make_row(text=piece.strip(), source=source))


def _read_datasets(reader: _Reader, name: str, split: str | None) -> None:
    found, note = open_dataset(name, split)
    if note:
        reader.out.notes.append(note)
    source = plain_text(source_name(name), [])
    for index, record in enumerate(dataset_records(found)):
        reader.add(record, f"{name}[{index}]", source)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
