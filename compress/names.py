"""Names that users write: the nearest known one for a misspelt name, and what counts as a name on the hub or of a file.

`closest` and `nearest` find the known name, `is_hub_name` tells ``owner/name`` from a path, `is_plain_name` the name of
a file from a way out of its folder. Imports nothing of ours
and no package, since everything down to the error messages of a plan uses it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

# The hub's own rule: letters, digits, "-", "_" and "."; an owner does not begin with a dot, which would be a path.
# A revision (branch, tag or commit; branches such as refs/pr/1 hold slashes) may follow; who cannot take one says so.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9_][\w.-]*)(?:@[\w-][\w.-]*(?:/[\w-][\w.-]*)*)?", re.ASCII)
# Endings of files that users name; a hub name may hold dots (Qwen/Qwen2.5-0.5B), but it does not end like a file.
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".text", ".yaml", ".yml", ".safetensors")
_UNFIT = re.compile(r"[/\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]")
OWN_TEACHER = "teacher"  # how steps that learn from several teachers call the profile's own


def closest(got: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name in ``known`` that is most like ``got``; None when none is like it by ``cutoff`` (0 to 1)."""
    found = difflib.get_close_matches(got, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest(got: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'?`` for the name in ``known`` that is closest to ``got``; empty when none is close."""
    found = closest(got, known)
    return f"Did you mean {found!r}?" if found else ""


def is_hub_name(text: str, *starts: Path) -> bool:
    """Whether ``text`` is a name such as ``owner/name[@revision]`` on the Hugging Face hub, rather than a path.

    ``starts`` are the folders where a relative path would begin: when one of them has a folder called like the
    owner, ``text`` is a misspelt path, and asking the hub for it would only take time.
    """
    match = _HUB_NAME.fullmatch(text)
    if match is None or match[2].lower().endswith(FILE_ENDINGS):
        return False
    return not any((start / match[1]).exists() for start in starts)


def is_plain_name(text: str) -> bool:
    """Whether ``text`` is the name of one file right in a folder, on every system and in every archive."""
    return text not in ("", ".", "..") and len(text.encode("utf-8", "replace")) <= 255 and not _UNFIT.search(text)
