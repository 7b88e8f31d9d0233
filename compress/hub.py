"""Where a model that a profile names lies on this machine: a folder, or the local cache of the Hugging Face hub.

`local_folder` and `config_at_hand` never touch the network, so that a plan works from a cached config alone.
Fetching is the teacher's business (``compress.teachers``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.json_reader import read_table
from compress.model.shapes import check_config
from compress.names import is_hub_name

__all__ = ["config_at_hand", "has_weights", "is_hub_name", "local_folder", "read_config"]


def _cached(spec: str) -> Path | None:
    """Newest snapshot of ``spec`` in the hub's cache; looked up by hand, because importing the client takes long."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    name, _, revision = spec.partition("@")
    models = cache / ("models--" + name.replace("/", "--"))
    if revision:  # a branch or tag stands in refs with its commit, a commit names its folder
        ref = models / "refs" / revision
        folder = models / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
        return folder if (folder / "config.json").is_file() else None
    snapshots = models / "snapshots"
    found = [folder for folder in snapshots.glob("*") if (folder / "config.json").is_file()]
    return max(found, key=lambda folder: (folder.stat().st_mtime, folder.name), default=None)


def local_folder(spec: str) -> Path | None:
    """The folder with ``config.json`` that ``spec`` means on this machine, weights or not; None when there is none."""
    folder = Path(spec)
    if folder.is_dir():
        return folder
    return _cached(spec) if is_hub_name(spec) else None


def has_weights(folder: Path) -> bool:
    """Whether ``folder`` holds safetensors."""
    return next(folder.glob("*.safetensors"), None) is not None


def config_at_hand(spec: str) -> dict[str, Any] | None:
    """The model's ``config.json`` if it is on this machine.

    Raises:
        ModelError: it is there and is no config of a supported model.
    """
    folder = local_folder(spec)
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_config(folder / "config.json")


def foretelling_config(spec: str | None, stand_in: str | None) -> dict[str, Any] | None:
    """The config of the model ``spec`` if it is on this machine, else the one in the file ``stand_in``, else None.

    Raises:
        ModelError: it is there and is no config of a supported model.
    """
    config = config_at_hand(spec) if spec is not None else None
    return read_config(Path(stand_in)) if config is None and stand_in is not None else config


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` of a supported model.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    config = read_table(path, ModelError, allowed="a model's config.json")
    check_config(config, where=str(path))
    return config
