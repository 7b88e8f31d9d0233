"""The artifact store: immutable folders found by the SHA-256 of everything that made them.

`Store.key` turns the facts of a stage into a key, `Store.lookup` finds a whole artifact, `Store.begin` makes one:
it holds the key's lock, gives a temporary folder and a scratch folder, and commits or leaves nothing. A folder is
written beside its place, ``manifest.json`` (size and digest of every file) goes in last, all is forced to disk, then
the folder is renamed: without a manifest there is no artifact. `Store.gc` removes what nobody refers to.

    ROOT/artifacts/KEY/   files and manifest.json          ROOT/work/KEY/    checkpoints of unfinished work
    ROOT/artifacts/.new-KEY-*, .old-KEY-*  not artifacts   ROOT/locks/KEY    held while KEY is made
    ROOT/records/KEY.json figures of the making, no part of the artifact    ROOT/digests.jsonl  digests of files

Knows nothing of stages, profiles or rows.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from compress.errors import EdgestillError, StoreError, UserError
from compress.files import file_sha256, json_text, sync, write_whole
from compress.json_reader import JsonFault, parse_json, read_table, required

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1
SETTLED_NS = 2_000_000_000  # a file changed this recently may change again without its time or size showing it
_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.(?:new|old)-([0-9a-f]{64})-")

ADVICE = {
    errno.ENOSPC: "Free some space, run edgestill with --store on another disk; finished stages are kept.",
    errno.EDQUOT: "Your quota is used up: free some space, or choose another place with --store.",
    errno.EACCES: "Give write permission, or choose another place with --store.",
    errno.EPERM: "Give write permission, or choose another place with --store.",
    errno.EROFS: "The file system is read-only: choose another place with --store.",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another place with --store.",
    errno.EEXIST: "A file stands where a folder is needed: choose another place with --store.",
    errno.ENOLCK: "The file system has no locks: choose another place with --store.",
    errno.EOPNOTSUPP: "The file system has no locks: choose another place with --store.",
}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same text for the same value whatever the order of its keys.

    Raises:
        TypeError: a value that JSON does not have (a path, a set), or a key that is no string.
        ValueError: NaN or infinity.
    """
    _check_json(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_json(value: Any) -> None:
    """json.dumps would turn the key 1 into "1", so that two values could share a text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"keys of canonical JSON are strings, got {key!r}")
            _check_json(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(inner)


@dataclass
class Draft:
    """An artifact that is being made; write into ``out``, checkpoint in ``work``.

    Attributes:
        out: empty folder that becomes the artifact.
        work: scratch folder of this key; what a killed attempt left in it is still there.
        cached: another process made the artifact while this one waited for it; write nothing, ``path`` stands.
        record: figures of the making (seconds, peak memory), JSON values; kept beside the artifact, not in it.
        path: where the artifact is after the commit.
    """

    key: str
    out: Path
    work: Path
    path: Path
    cached: bool = False
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """What the inputs of an artifact hold: for each slot that is filled from the store, the input's `Store.content`.

    ``renewed``: one of them was made anew because it was damaged, or came from damage. An artifact whose manifest does
    not say what it was made from, as older versions wrote it, does not count then.
    """

    contents: Mapping[str, str] = field(default_factory=dict)
    renewed: bool = False


@dataclass(frozen=True)
class Swept:
    """What `Store.gc` removed: artifact keys, other leftovers by name, and their bytes."""

    artifacts: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes: int


class Store:
    """The artifacts below one folder. Nothing is written before `begin`, so a look costs no permission."""

    def __init__(self, root: Path | str, *, say: Callable[[str], None] = log.warning) -> None:
        """``say`` is given what the user should know: waiting for another process, a damaged artifact."""
        self.root = Path(root)
        self.say = say
        self._digests: dict[str, list[Any]] | None = None
        self._unwritten: list[str] = []
        self._damaged: set[str] = set()  # now
        self._said: set[str] = set()  # at any time

    @staticmethod
    def key(facts: Mapping[str, Any]) -> str:
        """Key of the artifact that ``facts`` make: SHA-256 of their canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Where the artifact of ``key`` is, once it is made; always inside the root."""
        if not _KEY.fullmatch(key):
            raise StoreError("store", f"{key!r} is no artifact key", "64 hexadecimal digits")
        return self.root / "artifacts" / key

    def keys(self) -> list[str]:
        """Keys of all artifacts, sorted; sizes are not checked."""
        folder = self.root / "artifacts"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if _KEY.fullmatch(p.name) and (p / MANIFEST).is_file())

    def lookup(self, key: str, *, verify: bool = False, read: Read | None = None) -> Path | None:
        """The artifact of ``key``, or None when there is none or it is damaged (which is said).

        The size of every file is compared with the manifest; with ``verify`` the digests too, and that no file was
        added. With ``read`` it must have been made from these contents: what came from a damaged input, or from one
        that has other bytes now, is damaged as well. Such an artifact counts as missing, and the next `begin` replaces
        it.
        """
        folder = self.path(key)
        manifest = self._manifest(folder)
        if manifest is None:
            return None
        damage = _damage(folder, manifest["files"], verify=verify or key in self._damaged)
        damage = damage or ("" if read is None else _other_inputs(manifest["read"], read))
        if damage:
            self._say_damage(folder, damage)
            return None
        return folder

    def content(self, key: str) -> str:
        """Digest of what the artifact of ``key`` holds, as its manifest says: of the names and digests of its files.

        Raises:
            StoreError: there is no such artifact.
        """
        manifest = self._manifest(self.path(key))
        if manifest is None:
            raise StoreError(str(self.path(key)), "no such artifact")
        return self.key({name: facts["sha256"] for name, facts in manifest["files"].items()})

    def was_damaged(self, key: str) -> bool:
        """Whether this object found the artifact of ``key`` damaged, or made from damage, at any time."""
        return key in self._said

    def _say_damage(self, folder: Path, damage: str) -> None:
        """Say it once; the key is remembered, so that `begin` does not take for whole what only ``verify`` found."""
        if folder.name not in self._damaged:
            self.say(f"{folder}: damaged ({damage}); it is made again")
        self._damaged.add(folder.name)
        self._said.add(folder.name)

    def record(self, key: str) -> dict[str, Any] | None:
        """The figures that were kept when the artifact of ``key`` was made; None when there are none."""
        try:
            return read_table(self.root / "records" / f"{key}.json", StoreError)
        except StoreError:
            return None

    def _manifest(self, folder: Path) -> dict[str, Any] | None:
        """As `_read_manifest`; an unreadable one is said, and counts as none."""
        try:
            return _read_manifest(folder)
        except OSError as error:
            raise _store_error(error, folder / MANIFEST) from error
        except ValueError as error:
            self._say_damage(folder, f"its manifest is not readable: {error}")
            return None

    @contextmanager
    def begin(
        self, key: str, facts: Mapping[str, Any] | None = None, *, verify: bool = False, read: Read | None = None
    ) -> Iterator[Draft]:
        """Make the artifact of ``key``: commit when the block ends well, leave nothing of it when it raises.

        One process at a time works on a key; a second one waits and then finds ``draft.cached``. What the block
        put into ``draft.work`` stays after a failure or a kill, for the next attempt.

        Args:
            facts: what the key was made from, kept in the manifest to explain it.
            verify: check digests too when another process has made the artifact meanwhile.
            read: what its inputs hold, kept in the manifest; one that another process has made meanwhile must have
                been made from the same.

        Raises:
            StoreError: the disk is full, there is no permission, or the block left links or odd files.
        """
        path = self.path(key)
        work = self.root / "work" / key
        with self._locked(key):
            self._sweep_temporary(key)
            if self.lookup(key, verify=verify, read=read) is not None:
                _remove(work)
                yield Draft(key, path, work, path, cached=True)
                return
            with _told(path):
                work.mkdir(parents=True, exist_ok=True)
                out = Path(tempfile.mkdtemp(prefix=f".new-{key}-", dir=path.parent))
                out.chmod(0o755)
            draft = Draft(key, out, work, path)
            try:
                with _told(path, body=True):
                    yield draft
                with _told(path):
                    self._commit(draft, facts, read)
            finally:
                _remove(out)
            _remove(work)

    def _commit(self, draft: Draft, facts: Mapping[str, Any] | None, read: Read | None) -> None:
        """Digest and sync every file, write the manifest, rename: after any step a kill leaves no half artifact."""
        files = {}
        for file in _regular_files(draft.out):
            name = file.relative_to(draft.out).as_posix()
            files[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
            sync(file)
        for folder in [path for path in draft.out.rglob("*") if path.is_dir()]:
            sync(folder)
        if draft.record:
            # Lenient, unlike a key: hours of work are not thrown away over a figure that is NaN or numpy's.
            record = json_text(draft.record, default=_plain)
            write_whole(self.root / "records" / f"{draft.key}.json", record)
        manifest: dict[str, Any] = {"schema": SCHEMA, "key": draft.key, "files": files}
        if facts is not None:
            manifest["facts"] = facts
        if read is not None:
            manifest["read"] = dict(read.contents)
        text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(draft.out / MANIFEST, text + "\n")
        if draft.path.exists():  # damaged, or `begin` would have found it
            os.rename(draft.path, tempfile.mkdtemp(prefix=f".old-{draft.key}-", dir=draft.path.parent))
        os.rename(draft.out, draft.path)
        sync(draft.path.parent)
        self._damaged.discard(draft.key)
        self._sweep_temporary(draft.key)

    @contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of ``key``; gives False, without it, when it is taken and ``wait`` is off."""
        file = self.root / "locks" / key
        with _told(file):
            for folder in ("artifacts", "work", "records", "locks"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            handle = _open_lock(file, wait=False)
        self._remember([])
        if handle is None and wait:
            self.say(f"another process is making {key[:12]}; waiting for it")
            with _told(file):
                handle = _open_lock(file, wait=True)
        if handle is None:
            yield False
            return
        try:
            yield True
        finally:
            os.close(handle)

    def _sweep_temporary(self, key: str) -> None:
        """Remove what killed attempts at ``key`` left; its lock is held, so nobody is writing there."""
        for folder in (self.root / "artifacts").glob(f".???-{key}-*"):
            _remove(folder)

    def sweep(self) -> None:
        """Remove the half artifacts that killed processes left; those that a living one is making stay."""
        folder = self.root / "artifacts"
        found = {match[1] for path in folder.glob(".???-*") if (match := _TEMPORARY.match(path.name))}
        for key in sorted(found):
            with self._locked(key, wait=False) as held:
                if held:
                    self._sweep_temporary(key)

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file, in hex; remembered by path, size, times of change and inode.

        Raises:
            OSError: the file cannot be read.
        """
        place = os.path.abspath(path)
        stat = os.stat(place)
        facts = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if self._digests is None:
            self._digests = self._read_digests()
        known = self._digests.get(place)
        if known is not None and known[:4] == facts:
            return str(known[4])
        digest = file_sha256(Path(place))
        # What was changed a moment ago may be changed again within the clock's grain: not remembered (as git does).
        if time.time_ns() - stat.st_ctime_ns > SETTLED_NS:
            self._digests[place] = [*facts, digest]
            self._remember([json.dumps([place, *facts, digest])])
        return digest

    def _read_digests(self) -> dict[str, list[Any]]:
        try:
            lines = (self.root / "digests.jsonl").read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return {}
        found: dict[str, list[Any]] = {}
        for line in lines:
            with suppress(ValueError):  # a line that a kill cut short
                entry = parse_json(line)
                if isinstance(entry, list) and list(map(type, entry)) == [str, int, int, int, int, str]:
                    found[entry[0]] = entry[1:]
        return found

    def _remember(self, lines: list[str]) -> None:
        """Append to the memory of digests, once there is a store; where it cannot be written, it is only slower."""
        self._unwritten += lines
        if not self._unwritten or not self.root.is_dir():
            return
        try:
            # One write in append mode, beginning with a line end: a line cut short by a kill spoils only itself.
            with (self.root / "digests.jsonl").open("ab", buffering=0) as stream:
                stream.write("".join(f"\n{line}" for line in self._unwritten).encode())
        except OSError as error:
            log.debug("digests not remembered: %s", error)
        self._unwritten = []

    def gc(self, keep: Collection[str], *, dry_run: bool = False) -> Swept:
        """Remove every artifact whose key is not in ``keep``, with its scratch, and what killed attempts left.

        Keys that another process works on are left alone. Scratch of unfinished work stays for keys in ``keep``.
        """
        artifacts, leftovers, total = [], [], 0
        for key in sorted(self._all_keys()):
            with self._locked(key, wait=False) as held:
                if not held:
                    continue
                finished = (self.path(key) / MANIFEST).is_file()
                drop = list((self.root / "artifacts").glob(f".???-{key}-*"))
                if key not in keep:
                    drop += [self.path(key), self.root / "work" / key, self.root / "records" / f"{key}.json"]
                elif finished:
                    drop.append(self.root / "work" / key)
                found = [path for path in drop if path.exists()]
                total += sum(_bytes_of(path) for path in found)
                if finished and key not in keep:
                    artifacts.append(key)
                else:
                    leftovers += [path.name for path in found]
                if not dry_run:
                    self._drop(key, found)
        return Swept(tuple(artifacts), tuple(leftovers), total)

    def _drop(self, key: str, paths: list[Path]) -> None:
        """Remove ``paths`` of ``key``; the artifact is renamed first, so that half of it is never found."""
        for path in paths:
            with _told(path):
                if path == self.path(key):
                    aside = tempfile.mkdtemp(prefix=f".old-{key}-", dir=path.parent)
                    os.rename(path, aside)
                    path = Path(aside)  # noqa: PLW2901
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        if not self.path(key).exists():
            (self.root / "locks" / key).unlink(missing_ok=True)  # safe: `_open_lock` notices

    def _all_keys(self) -> set[str]:
        """Every key of which there is a trace."""
        names = [
            path.name.removesuffix(".json")
            for folder in ("artifacts", "work", "records", "locks")
            if (self.root / folder).is_dir()
            for path in (self.root / folder).iterdir()
        ]
        temporary = [match[1] for name in names if (match := _TEMPORARY.match(name))]
        return {name for name in names if _KEY.fullmatch(name)} | set(temporary)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """``files`` and ``read`` (None: not told) of an artifact's manifest; None when there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no manifest of the artifact that is called like ``folder``.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    try:
        manifest = required({"it": parse_json(content)}, "it", dict, "manifest", StoreError)
        files = required(manifest, "files", dict, "manifest", StoreError)
        read = None if manifest.get("read") is None else required(manifest, "read", dict, "manifest", StoreError)
        own = manifest.get("schema") == SCHEMA and manifest.get("key") == folder.name
        if not own or not all(map(_is_inside, files)):
            raise JsonFault("of another store")
        found = {name: required(files, name, dict, "files", StoreError) for name in files}
        return {
            "files": {
                name: {
                    "size": required(facts, "size", int, f"files.{name}", StoreError, least=0),
                    "sha256": required(facts, "sha256", str, f"files.{name}", StoreError),
                }
                for name, facts in found.items()
            },
            "read": None if read is None else {slot: required(read, slot, str, "read", StoreError) for slot in read},
        }
    except StoreError as error:
        raise JsonFault(str(error)) from error


def check_artifact(folder: Path) -> None:
    """Refuse ``folder`` when it is an artifact of a store and not as it was made; any other folder passes.

    Raises:
        StoreError: a file is missing, or its digest is another than the manifest's.
    """
    if not _KEY.fullmatch(folder.resolve().name):
        return
    folder = folder.resolve()
    try:
        manifest = _read_manifest(folder)
        damage = "" if manifest is None else _damage(folder, manifest["files"], verify=True)
    except (OSError, ValueError) as error:
        damage = f"its manifest is not readable: {error}"
    if damage:
        do = "Make it again: edgestill run PROFILE --verify, with the store that it lies in"
        raise StoreError(str(folder), f"damaged ({damage})", "an artifact as it was made", do)


def check_outside(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse to write ``out`` into what it is made from, or into a stored artifact; links are followed.

    Raises:
        UserError: it lies in one of ``inputs`` or in an artifact.
    """
    place = out.resolve()
    for folder in inputs:
        if folder.resolve() in place.parents:
            raise UserError(str(out), f"lies in the input {folder}", "a place outside of it", "Give another --out.")
    for folder in (place, *place.parents):
        if (folder / MANIFEST).is_file():
            got = f"lies in the stored artifact {folder}"
            raise UserError(str(out), got, "a place outside of a store", "Give another one with --out")


def _other_inputs(made_from: Mapping[str, str] | None, read: Read) -> str:
    """Why an artifact that was made from ``made_from`` (None: not told) is none of these inputs; empty when it is."""
    if made_from is None:
        return "it may have been made from a damaged artifact" if read.renewed else ""
    slots = sorted(slot for slot in {*made_from, *read.contents} if made_from.get(slot) != read.contents.get(slot))
    return f"it was made from other content of its input {slots[0]}" if slots else ""


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _is_inside(name: str) -> bool:
    """Whether ``name`` is a relative path that stays in its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and name != MANIFEST


def _damage(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> str:
    """What is wrong with an artifact, in words; empty when nothing is."""
    for name, facts in files.items():
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != facts["size"]:
            return f"{name} has {size} bytes, not {facts['size']}"
        if verify and file_sha256(file) != facts["sha256"]:
            return f"the content of {name} was changed"
    if verify:
        found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
        added = sorted(found - set(files) - {MANIFEST})
        if added:
            return f"{added[0]} was added"
    return ""


def _regular_files(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted; links and other odd things are errors, since they lead out of it.

    Raises:
        StoreError: a link, a socket, or a file that is called like the manifest.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(name, "a link or special file cannot be stored", "regular files")
        if name == MANIFEST:
            raise StoreError(name, "this name belongs to the store", "another name")
        if path.is_file():
            files.append(path)
    return files


def _open_lock(file: Path, *, wait: bool) -> int | None:
    """Descriptor that holds the lock on ``file``; None when it is taken and ``wait`` is off.

    `Store.gc` removes lock files while it holds them; a lock on a file that is no longer there is none, so then
    it is taken anew.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a folder if it is there; what cannot be removed is left to `Store.gc`."""
    shutil.rmtree(folder, ignore_errors=True)


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _store_error(error: OSError, where: Path) -> StoreError:
    return StoreError(str(error.filename or where), error.strerror or str(error), do=ADVICE.get(error.errno or 0, ""))


@contextmanager
def _told(where: Path, *, body: bool = False) -> Iterator[None]:
    """System errors as `StoreError`; of a stage's ``body`` only a full disk and a refusal inside the store."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and isinstance(error.filename, (str, bytes))
        ours = refused and Path(os.fsdecode(error.filename)).is_relative_to(where.parent.parent)
        if body and not full and not ours:
            raise
        raise _store_error(error, where) from error
    except EdgestillError:
        raise
    except Exception as error:
        # Writers in other languages (safetensors) have errors of their own for a full disk; all else goes on as it is.
        if body and ("No space left on device" in str(error) or "os error 28" in str(error)):
            raise StoreError(str(where), "No space left on device", do=ADVICE[errno.ENOSPC]) from error
        raise
