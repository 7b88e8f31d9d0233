"""Where a model that a profile names lies on this machine: a folder, or the local cache of the Hugging Face hub.

`local_folder` and `config_at_hand` never touch the network, so that a plan works from a cached config alone.
Fetching is the teacher's business (``compress.teachers``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress import hub_cache
from compress.errors import ModelError
from compress.json_reader import read_table
from compress.model.shapes import check_context
from compress.names import is_hub_name

__all__ = ["config_at_hand", "is_hub_name", "is_whole", "local_folder", "read_config"]


def local_folder(spec: str) -> Path | None:
    """The folder with ``config.json`` that ``spec`` means on this machine, weights or not; None when there is none.

    A hub name without a revision means ``main``, never what was fetched last.
    """
    folder = Path(spec)
    if folder.is_dir():
        return folder
    found = hub_cache.snapshot(spec) if is_hub_name(spec) else None
    return found if found is not None and (found / "config.json").is_file() else None


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds all safetensors that it should, and no link in it leads to nothing."""
    return not hub_cache.missing_of_model(folder)


def config_at_hand(spec: str) -> dict[str, Any] | None:
    """The model's ``config.json`` if it is on this machine.

    Raises:
        ModelError: it is there and is no model's config.
    """
    folder = local_folder(spec)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_config(folder / "config.json")


def foretelling_config(spec: str | None, stand_in: str | None) -> dict[str, Any] | None:
    """The config of the model ``spec`` if it is on this machine, else the one in the file ``stand_in``, else None.

    Raises:
        ModelError: it is there and is no model's config.
    """
    config = config_at_hand(spec) if spec is not None else None
    return read_config(Path(stand_in)) if config is None and stand_in is not None else config


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``; whether the model is supported is asked by who needs more of it than its context.

    Raises:
        ModelError: it cannot be read, or its context is no size.
    """
    config = read_table(path, ModelError, allowed="a model's config.json")
    check_context(config, where=str(path))
    return config
