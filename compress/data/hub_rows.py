"""Records of a Hugging Face data set: a folder that ``datasets`` saved, or a name on the hub.

`open_dataset` opens the split and says which commit it is of. Without a network ``datasets`` gives whatever it
prepared last, of any revision; such a copy is taken only when its commit is the one that the name means. Knows nothing
of rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress import hub_cache
from compress.data.arrow_records import records
from compress.data.plain import RecordError
from compress.errors import DataError
from compress.names import is_hub_name

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test", "eval")}
BATCH = 1000  # rows turned into Python values at once


def is_saved(path: Path) -> bool:
    """A folder that `datasets.save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_dataset(name: str, split: str | None) -> tuple[Any, str]:
    """The split ``split`` (``train`` by default) of a saved folder or hub name, and a note on what was taken.

    Raises:
        DataError: it cannot be loaded, is of another revision than asked for, or has no such split.
    """
    import datasets  # slow to import, and only this branch needs it
    from datasets.exceptions import DatasetsError

    wanted, on_disk = split or "train", is_saved(Path(name))
    try:
        if on_disk:
            found, note = datasets.load_from_disk(name), ""
        else:
            found, note = _from_hub(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        held = "" if on_disk else f"; {hub_cache.held(name, 'datasets')}"
        raise DataError(
            name,
            f"cannot be loaded ({first})"
            if on_disk
            else f"no such file or folder, and as a hub data set it cannot be loaded ({first}){held}",
            "a path, or a hub name owner/name, or owner/name@revision",
            "Check the spelling, and the network if it is a hub name",
        ) from None
    if isinstance(found, Mapping):
        names = SPLITS.get(wanted, (wanted,))
        key = next((k for k in found if str(k) in names), None)
        if key is None:
            raise DataError(name, f"no split {wanted!r}; found {', '.join(map(str, found))}")
        found = found[key]
    return found, note


def dataset_records(found: Any) -> Iterator[object | RecordError]:
    """The records of an opened split, images and the like not decoded."""
    if not hasattr(found, "with_format"):
        yield from found
        return
    for batch in found.with_format("arrow").iter(batch_size=BATCH):
        yield from records(batch)


class _Fallback(logging.Handler):
    """Notices that ``datasets`` could not reach the hub and took what it prepared last."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or "latest cached version" in record.getMessage()


def _from_hub(name: str) -> tuple[Any, str]:
    """The data set ``owner/name[@revision]`` and a note that names its commit."""
    import datasets

    hub_name, _, revision = name.partition("@")
    whole = hub_cache.snapshot(name, "datasets")
    if whole is not None and datasets.config.HF_HUB_OFFLINE:
        return _from_snapshot(name, whole)
    logger, watch = logging.getLogger("datasets.load"), _Fallback()
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.WARNING)
    try:
        found = datasets.load_dataset(hub_name, revision=revision or None)
    finally:
        logger.removeHandler(watch)
        logger.setLevel(level)
    commit = _prepared_commit(found)
    if watch.seen:
        meant = hub_cache.commit_of(name, "datasets") or revision
        if commit is None or not meant or not commit.startswith(meant):
            got = f"the hub cannot be reached, and of {hub_name} only {commit or 'an unknown commit'} is prepared here"
            raise DataError(name, f"{got}; {hub_cache.held(name, 'datasets')}", f"the commit of {revision or 'main'}",
                            f"Name the commit ({hub_name}@{commit}), or run where there is a network"
                            if commit else "Run where there is a network")  # fmt: skip
    return found, f"{hub_name}: read at commit {commit}" if commit else ""


def _from_snapshot(name: str, folder: Path) -> tuple[Any, str]:
    """What lies in the hub's cache, where the hub may not be asked."""
    import datasets

    missing = hub_cache.missing_files(folder)
    if missing:
        raise DataError(name, f"its snapshot {folder} lacks {', '.join(missing[:12])}", "a whole snapshot",
                        "Fetch it again where there is a network")  # fmt: skip
    note = f"{name.partition('@')[0]}: read at commit {folder.name}, the files that the hub's cache holds of it"
    return datasets.load_dataset(str(folder)), note


def _prepared_commit(found: Any) -> str | None:
    """The commit in the path of a prepared data set: ``.../CONFIG/VERSION/COMMIT/NAME.arrow``."""
    first = next(iter(found.values()), None) if isinstance(found, Mapping) else found
    files = getattr(first, "cache_files", None) or [{}]
    commit = Path(str(files[0].get("filename", ""))).parent.name
    return commit if re.fullmatch(hub_cache.COMMIT, commit) else None


def source_name(name: str) -> str:
    """What rows of ``name`` have as their source."""
    return name if is_hub_name(name, Path()) else Path(name).name
