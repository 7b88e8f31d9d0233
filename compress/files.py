"""What more than one package must know of files in the same way: digests, licences, which ones make a tokenizer.

`file_sha256` digests a file, `write_whole` writes one that no crash leaves in part, `licence_of` reads a card,
`TOKENIZER_FILES` are the files of a model folder that decide how it reads and writes text. Imports nothing of ours and
no package; knows nothing of stores, models or bundles.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

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

NOT_STATED = "not stated"
_MOST_OF_CARD = 1 << 20  # bytes of a README that are looked at


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


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, and on disk before it has its name.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
        settle(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def settle(temporary: Path, path: Path) -> None:
    """Force the finished file ``temporary`` to disk, then give it the name ``path``, which is forced to disk too."""
    for place in (temporary, path.parent):
        if place == path.parent:
            os.replace(temporary, path)
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; the file is read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
