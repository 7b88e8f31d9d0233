"""Files that a kill cannot spoil: tensors and JSON values written whole or not at all, read back with checks.

`save_tensors` writes safetensors under a temporary name, flushes it to disk and renames it; `read_tensors` gives
back what was saved, or ``None`` when the file is absent, cut short or of something else. No pickle.
Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import StoreError

logger = logging.getLogger(__name__)
_VALUES = "values"  # the one metadata entry: JSON text
FREE = "Free disk space, or correct the rights of the folder"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON ``values`` as one file, atomically; an older file is replaced.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    text = json.dumps(values, sort_keys=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {_VALUES: text})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(str(path), f"cannot be written ({error})", do=FREE) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, values) as saved; ``None`` when there is no such file or it is damaged (logged)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_VALUES])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and left aside (%s)", path, error)
        return None
    return tensors, values


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON with sorted keys, atomically; raises StoreError as `save_tensors`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, sort_keys=True, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StoreError(str(path), f"cannot be written ({error})", do=FREE) from error


def value_digest(value: object) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def kept_choice(path: Path, choice: bool) -> bool:
    """The choice that stands in ``path``, else ``choice``, which is written there: a resumed run keeps to it.

    Raises:
        StoreError: it cannot be written.
    """
    if path.is_file():
        return bool(json.loads(path.read_text(encoding="utf-8"))["bf16"])
    write_json(path, {"bf16": choice})
    return choice
