"""Runs on the device, sent there by `deploy.remote.sync`: says what is there, and lets whole copies take their place.

Two actions, each with one JSON argument ``{"folder": .., "files": {name: sha256}}``. ``look`` prints Python, the
packages, free bytes, and size and SHA-256 of each file and of each unfinished copy (``.NAME.part``). ``settle`` first
renames the unfinished copies whose SHA-256 is right and removes those whose is wrong. Standard library of Python 3.8.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("onnxruntime-genai", "numpy")


def facts_of(path: Path) -> dict[str, Any] | None:
    """Size and SHA-256 of a plain file; None where there is none."""
    if path.is_symlink() or not path.is_file():
        return None
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` holds a bundle: its bundle.json says so."""
    try:
        found = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "edgestill" in found


def part_of(folder: Path, name: str) -> Path:
    """Where an unfinished copy of the file ``name`` lies."""
    return folder / f".{name}.part"


def look(folder: Path, names: list[str]) -> dict[str, Any]:
    """What is in ``folder`` of ``names``, and what can run here."""
    near = next(place for place in (folder, *folder.parents) if place.exists())
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "folder": str(folder),
        "free_bytes": shutil.disk_usage(near).free,
        "files": {name: facts_of(folder / name) for name in names},
        "taken": [name for name in names if os.path.lexists(folder / name)],
        "ours": is_bundle(folder),
        "parts": {name: facts_of(part_of(folder, name)) for name in names},
    }


def settle(folder: Path, files: dict[str, str]) -> None:
    """Give each unfinished copy with the right SHA-256 its name; remove one with another."""
    for name, sha256 in files.items():
        part = part_of(folder, name)
        found = facts_of(part)
        if found is not None and found["sha256"] == sha256:
            with part.open("rb+") as stream:  # on disk before it has its name
                os.fsync(stream.fileno())
            os.replace(part, folder / name)
        elif found is not None:
            part.unlink()


def _version(name: str) -> str | None:
    for known in (name, f"{name}-cuda", f"{name}-directml"):
        try:
            return metadata.version(known)
        except metadata.PackageNotFoundError:
            continue
    return None


def main(action: str, request: str) -> None:
    """Do ``action`` and print one line of JSON."""
    asked = json.loads(request)
    folder = Path(asked["folder"]).expanduser().absolute()
    if action == "settle":
        settle(folder, asked["files"])
    sys.stdout.write(json.dumps(look(folder, list(asked["files"]))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
