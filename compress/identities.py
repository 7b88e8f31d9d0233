"""Digests of what comes from outside the store: files of rows, the teacher, its tokenizer, the target, this machine.

An artifact's key holds these, so that a changed file, tokenizer, chat template or target makes new artifacts.
Digests are of contents, never of paths or times; those of files are remembered by the store. Imports neither torch
nor transformers, because a run that is all hits must not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import DataError, ModelError
from compress.files import NOT_STATED, TOKENIZER_FILES, licence_of
from compress.names import is_hub_name

FileDigest = Callable[[Path], str]

# A model's README or training log is no part of what it computes.
MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``: blind to the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # a file's name may be no UTF-8


def source_identity(path: Path, file_digest: FileDigest) -> str:
    """Digest of a file of rows or of all files below a folder; a hub name (no such path) stands for itself.

    What a hub name without ``@REVISION`` gives may change: its key does not follow.

    Raises:
        DataError: the path does not exist and does not look like a hub name, or is an empty folder.
    """
    if path.is_file():
        return digest_of({"file": file_digest(path), "name": path.name})  # rows carry the name of their file
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(str(path), "an empty folder", "a file or folder of rows")
        return digest_of({"folder": {str(file.relative_to(path)): file_digest(file) for file in files}})
    if is_hub_name(path.as_posix()):
        return digest_of({"hub": path.as_posix()})
    do = "Relative paths start at the profile's folder, those of --set at the current folder as well."
    raise DataError(str(path), "no such file or folder", do=do)


def model_identity(folder: Path, file_digest: FileDigest) -> str:
    """Digest of a model folder: configuration, weights, tokenizer, chat template, and the licence that its card names.

    Raises:
        ModelError: the folder does not exist or holds no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        got = "no such folder" if not folder.is_dir() else "no config.json in it"
        raise ModelError(str(folder), got, "a Hugging Face model folder with config.json and model.safetensors")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_SUFFIXES)
    licence = licence_of(folder)  # it goes into bundle.json; the rest of a card does not
    stated = {} if licence == NOT_STATED else {"licence": licence}
    return digest_of({file.name: file_digest(file) for file in files} | stated)


def tokenizer_identity(folder: Path, file_digest: FileDigest) -> str:
    """Digest of the tokenizer and chat template of a model folder."""
    files = sorted(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return digest_of({file.name: file_digest(file) for file in files})


def params_identity(values: Mapping[str, Any], folders: Sequence[str], file_digest: FileDigest) -> dict[str, Any]:
    """A stage's parameters for a key: the values of ``folders``, paths of tokenizers, are replaced by their digests.

    Raises:
        ModelError: there is no tokenizer in such a folder.
    """
    named = dict(values)
    for name in folders:
        if named[name] is not None:
            folder = Path(named[name])
            if not (folder / "tokenizer.json").is_file():
                got = "no tokenizer.json in it" if folder.is_dir() else "no such folder"
                raise ModelError(str(folder), got, "the folder of a fast tokenizer")
            named[name] = tokenizer_identity(folder, file_digest)
    return named


def device_identity(facts: Mapping[str, Any]) -> str:
    """Digest of what a benchmark's figures depend on: cpu, cores, threads, memory, instruction sets."""
    return digest_of(dict(facts))
