"""The tokenizer's files in a bundle: the same content in fewer bytes.

``tokenizer.json`` is saved with indentation by most tools, which makes up to half of it. `write_tokenizer` copies the
files and writes the JSON ones without blanks. Knows nothing of models.
"""

from __future__ import annotations

import json
from pathlib import Path

from compress.errors import ModelError
from compress.json_reader import parse_json
from compress.model.checkpoint import copy_tokenizer

# not needed to run: the model's vocabulary and merges stand in tokenizer.json too
_REDUNDANT = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")


def compact(text: str) -> str:
    """Return JSON ``text`` without blanks between its parts; order and values stay."""
    return json.dumps(parse_json(text), ensure_ascii=False, separators=(",", ":"))


def write_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer of ``source`` into ``out``; ModelError when a file of it is not JSON."""
    copy_tokenizer(source, out)
    for name in _REDUNDANT:
        (out / name).unlink(missing_ok=True)
    for path in sorted(out.glob("tokenizer*.json")):
        try:
            path.write_text(compact(path.read_text(encoding="utf-8")), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(str(source / path.name), f"cannot be read as JSON ({error})") from error
