"""What more than one package must know of files in the same way: digests, licences, which ones make a tokenizer.

`file_sha256` digests a file, `licence_of` reads a card, `TOKENIZER_FILES` are the files of a model folder that decide
how it reads and writes text. Imports nothing of ours and no package; knows nothing of stores, models or bundles.
"""

from __future__ import annotations

import hashlib
import re
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
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of more templates, each in a file of its name

NOT_STATED = "not stated"
_CARD_LICENCE = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*(\S.*)\n(?:.*\n)*?---", re.MULTILINE)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of a model ``folder`` that decide how it reads and writes text, those that are there."""
    named = sorted(path.relative_to(folder).as_posix() for path in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    return [name for name in (*TOKENIZER_FILES, *named) if (folder / name).is_file()]


def licence_of(folder: Path) -> str:
    """The licence that the card of a model or data set (README.md) names in its front matter, else "not stated"."""
    card = folder / "README.md"
    if not card.is_file():
        return NOT_STATED
    found = _CARD_LICENCE.search(card.read_text(encoding="utf-8", errors="replace"))
    return found[1].strip() if found else NOT_STATED


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; the file is read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
