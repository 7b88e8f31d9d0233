"""``tokenizer.json`` as a file, checked before the tokenizers library sees it, which dies of some malformed ones.

`read_tokenizer` gives the file's rules, `highest_id` the largest id in them. Opening one to cut texts is the business
of ``compress.encoding``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.json_reader import read_table, required, shown

FILE = "tokenizer.json"
MAX_IDS = 1 << 22  # 16 times the largest vocabulary in use: an id is a place in tables that are allocated whole
_OF_LIBRARY = "a tokenizer of the tokenizers library"


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The rules in ``tokenizer.json`` of ``folder``: ``model`` with its ``vocab``, ``added_tokens``, and the rest.

    Raises:
        ModelError: absent, no JSON, no vocabulary, or an entry without text or a usable id.
    """
    path = folder / FILE
    data = read_table(path, ModelError, allowed=_OF_LIBRARY)
    where = str(path)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list) or not vocab:
        raise ModelError(where, "no model.vocab", _OF_LIBRARY)
    if isinstance(vocab, dict):
        wrong = next(((token, index) for token, index in vocab.items() if not _is_id(index)), None)
        if wrong is not None:
            raise ModelError(where, f"model.vocab gives {shown(wrong[0])} the id {shown(wrong[1])}", _ids())
    else:
        for at, pair in enumerate(vocab):
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _is_number(pair[1])):
                raise ModelError(where, f"model.vocab[{at}] is {shown(pair)}", "a list of a text and its score")
    _check_merges(model.get("merges"), where)
    added = data.get("added_tokens")
    for at, token in enumerate([] if added is None else required(data, "added_tokens", list, where, ModelError)):
        if not isinstance(token, dict) or not _is_id(token.get("id")) or not isinstance(token.get("content"), str):
            raise ModelError(where, f"added_tokens[{at}] is no object with id and content", _ids())
    if highest_id(data) >= MAX_IDS:
        raise ModelError(where, f"token id {highest_id(data)}", _ids())
    return data


def _check_merges(merges: Any, where: str) -> None:
    if merges is None:
        return
    if not isinstance(merges, list):
        raise ModelError(where, f"model.merges is {shown(merges)}", "a list of pairs")
    for at, pair in enumerate(merges):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            raise ModelError(where, f"model.merges[{at}] is {shown(pair)}", "a pair of texts")


def highest_id(data: dict[str, Any]) -> int:
    """The largest token id of rules as of `read_tokenizer`."""
    vocab = data["model"]["vocab"]
    highest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
    return int(max([highest, *(token["id"] for token in data.get("added_tokens") or [])]))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_IDS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids() -> str:
    return f"text with a whole number from 0 to {MAX_IDS - 1} as its id"
