"""What more than one package must know of files in the same way: how they are written, digests, licences, tokenizers.

`write_whole` and `whole_file` write a file that is there whole or not at all, `json_text` is the JSON that we write.
`file_sha256` digests a file, `licence_of` reads a card, `TOKENIZER_FILES` are the files of a model folder that decide
how it reads and writes text. Imports nothing of ours and no package; knows nothing of stores, models or bundles.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# The chat template stands in a file of its own, in ``chat_template.json`` (older tools) or in tokenizer_config.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of more templates, each in a file of its name

NOT_STATED = "not stated"
_MOST_OF_CARD = 1 << 20  # bytes of a README that are looked at


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of a model ``folder`` that decide how it reads and writes text, those that are there."""
    named = sorted(path.relative_to(folder).as_posix() for path in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    return [name for name in (*TOKENIZER_FILES, *named) if (folder / name).is_file()]


def licence_of(folder: Path) -> str:
    """The licence that the card of a model or data set (README.md) names in its front matter, else "not stated"."""
    card = folder / "README.md"
    if not card.is_file():
        return NOT_STATED
    with card.open("rb") as stream:
        text = stream.read(_MOST_OF_CARD).decode("utf-8", errors="replace")
    head, *lines = text.splitlines() or [""]
    if head != "---" or "---" not in lines:
        return NOT_STATED
    front = lines[: lines.index("---")]
    named = (line.removeprefix("license:").strip() for line in front if line.startswith("license:"))
    found = next((name for name in named if name), "")
    return found[:200] if found.isprintable() and found else NOT_STATED


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; the file is read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A stream under another name, ``.NAME.tmp``, that takes the place of ``path`` when the block ends well.

    It is on disk before it is renamed: after a loss of power the old file stands there or the new one, never an empty
    one. What a kill left of it is written over by the next, and two writers take turns. The folder is made.

    Raises:
        OSError: the folder cannot be written, the disk is full, or ``path`` is a device or a pipe.
    """
    if path.exists() and not path.is_file():  # root could put a file in the place of /dev/null
        raise OSError(errno.EINVAL, "is no plain file, and so is not replaced", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with _turn(temporary) as stream:
        try:
            yield stream
            stream.flush()
            sync(temporary)  # by its name: some writers take a name alone
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    sync(path.parent)


@contextmanager
def _turn(temporary: Path) -> Iterator[IO[bytes]]:
    """``temporary`` opened and emptied, once no other process writes it."""
    while True:
        stream = open(temporary, "wb", opener=_untouched)  # noqa: SIM115 - with an opener; closed below
        try:
            with suppress(OSError):  # a file system without locks: the writers hope for the best
                fcntl.flock(stream, fcntl.LOCK_EX)
            found = os.stat(temporary).st_ino == os.fstat(stream.fileno()).st_ino
        except FileNotFoundError:  # the other one has renamed it
            found = False
        except BaseException:
            stream.close()
            raise
        if found:
            break
        stream.close()
    with stream:
        stream.truncate(0)
        yield stream


def _untouched(path: str, _flags: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)  # not emptied: it may be another's


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text: UTF-8) as `whole_file` does.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force a folder with all that is in it to disk, as must be before it is renamed."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
    sync(folder)


def place_folder(made: Path, out: Path) -> None:
    """Rename the finished folder ``made`` to ``out``, where at most an empty one is, once it is on disk.

    Raises:
        OSError: it cannot be written, or ``out`` is there.
    """
    sync_folder(made)
    os.replace(made, out)
    sync(out.parent)


def plain_numbers(value: Any) -> Any:
    """``value`` with None for NaN and infinities, which JSON does not have, and 0 for -0; containers are copied."""
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain_numbers(inner) for key, inner in value.items()}
    return [plain_numbers(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_text(
    value: Any, *, indent: int | None = None, ascii_only: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """``value`` as JSON with sorted keys that any reader takes: see `plain_numbers`; ``default`` as of json.dumps."""
    if default is not None:
        value = json.loads(json.dumps(value, default=default))  # what it gives may be no number either
    return json.dumps(plain_numbers(value), sort_keys=True, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
