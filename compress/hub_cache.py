"""The Hugging Face hub's cache on this machine: which commit a name means, and whether its files are all there.

The layout is the hub client's own: ``models--OWNER--NAME`` with a file per branch or tag below ``refs`` that holds a
commit, and a folder per commit below ``snapshots``. A name without a revision means ``main``, as everywhere else.
Looked up by hand, because importing the client takes long; never touches the network and imports no package.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

Kind = Literal["models", "datasets"]
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\..*)")
INDEX = "model.safetensors.index.json"
MOST_SHARDS = 10_000


def cache_folder() -> Path:
    """The folder that the hub's client uses, by the environment variables that it reads."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if cache:
        return Path(os.path.expandvars(cache)).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def repository(name: str, kind: Kind = "models") -> Path:
    """The cache's folder of ``owner/name``, whether it exists or not."""
    return cache_folder() / f"{kind}--{name.replace('/', '--')}"


def commit_of(spec: str, kind: Kind = "models") -> str | None:
    """The commit that ``owner/name[@revision]`` means: a branch, a tag, a commit, or seven digits of one and more.

    None where the cache does not say, or several commits begin so.
    """
    name, _, revision = spec.partition("@")
    folder, revision = repository(name, kind), revision or "main"
    ref = folder / "refs" / revision
    if ref.is_file():
        try:
            return ref.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None
    snapshots = _names(folder / "snapshots")
    if revision in snapshots or COMMIT.fullmatch(revision):
        return revision
    begun = [commit for commit in snapshots if SHORT_COMMIT.fullmatch(revision) and commit.startswith(revision)]
    return begun[0] if len(begun) == 1 else None


def snapshot(spec: str, kind: Kind = "models") -> Path | None:
    """The folder of the commit that ``spec`` means; None where the cache does not hold it."""
    commit = commit_of(spec, kind)
    if commit is None or "/" in commit or commit.startswith("."):
        return None
    folder = repository(spec.partition("@")[0], kind) / "snapshots" / commit
    return folder if folder.is_dir() else None


def commit_of_folder(folder: Path) -> str | None:
    """The commit of a snapshot's folder; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def held(spec: str, kind: Kind = "models") -> str:
    """What the cache holds of the name in ``spec``, in words: its revisions, and commits that none of them names."""
    name = spec.partition("@")[0]
    folder = repository(name, kind)
    refs = sorted(p for p in (folder / "refs").rglob("*") if p.is_file())
    named = {p.relative_to(folder / "refs").as_posix(): commit_of(f"{name}@{p.relative_to(folder / 'refs')}", kind)
             for p in refs}  # fmt: skip
    commits = _names(folder / "snapshots")
    parts = [
        f"{ref} ({commit[:7]}{'' if commit in commits else ', not fetched'})" for ref, commit in named.items() if commit
    ]
    parts += [f"commit {commit[:12]}" for commit in commits if commit not in named.values()]
    return f"the cache {cache_folder()} holds of {name}: {', '.join(parts) or 'nothing'}"


def missing_files(folder: Path) -> list[str]:
    """Files that ``folder`` names and lacks: links to nothing, and parts of files that are cut into numbered ones."""
    missing = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.exists():
            missing.add(name)
        if match := SHARD.fullmatch(name):
            start, number, count, end = match.groups()
            first = 0 if (folder / f"{start}00000-of-{count}{end}").exists() else 1  # models count from 1
            last = int(count) - 1 + first
            if int(number) <= last < MOST_SHARDS:
                parts = (f"{start}{at:05d}-of-{count}{end}" for at in range(first, last + 1))
                missing.update(part for part in parts if not (folder / part).exists())
    return sorted(missing)


def missing_of_model(folder: Path) -> list[str]:
    """What a model's folder lacks: links to nothing, and weights, by its index where it has one."""
    broken = sorted(path.name for path in folder.iterdir() if not path.exists())
    index = folder / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted({*broken, *(name for name in shards if not (folder / name).is_file())})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return broken  # a damaged index: who opens the model says so
    found = sorted(folder.glob("*.safetensors"))
    return broken if found else [*broken, "model.safetensors"]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
