"""A bundle as one file: ``.tar.zst``, the same bytes for the same bundle, and back, with nothing that could do harm.

`pack` writes the files that ship, with ``bundle.json`` first. `unpack` takes plain files of a bundle's own names and
nothing else: no links, no devices, no folders, no path that leads elsewhere, no more bytes than ``bundle.json`` says.
`bundle_folder` opens either form. Digests are checked before and after. Knows nothing of what is in the files.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from compress.errors import ModelError, StoreError, UserError
from compress.files import file_sha256, json_text, whole_file
from compress.json_reader import read_table
from compress.scratch import scratch
from compress.store import check_outside
from deploy.bundle import BUNDLE_FILE, check_info, open_bundle, shipped_folder

SUFFIX = ".tar.zst"
LEVEL = 10  # weights hardly shrink: higher levels cost time and save nothing
MOST_DESCRIBED = 16 << 20  # bytes of bundle.json
MOST_FILES = 1000
MOST_WINDOW = 1 << 27  # bytes that the decompressor may hold; what pack writes needs 4 MiB
MOST_RATIO, LEAST_UNPACKED = 32, 16 << 20  # bytes unpacked of each byte packed, and what any archive may hold
_FRAME = 3 * tarfile.RECORDSIZE  # what a tar pads its end with, and what is read ahead of it
_REPAIR = "Pack the bundle again, or copy the archive again"


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a packed bundle by its name."""
    return path.name.endswith(SUFFIX) and path.is_file()


def pack(folder: Path, out: Path, *, added: Mapping[str, Any] | None = None) -> int:
    """Write the bundle in ``folder`` as the archive ``out``, whole or not at all; return its bytes.

    ``added`` goes into the archive's ``bundle.json``, beside what stands there; the folder stays as it is. The bytes
    follow from the bundle, ``added`` and the version of zstandard.

    Raises:
        ModelError: the bundle is damaged, or ``added`` would replace something in it.
        UserError: ``out`` exists already, or has another ending.
        StoreError: it cannot be written.
    """
    bundle = open_bundle(folder)
    if not out.name.endswith(SUFFIX):
        raise UserError(str(out), "another ending", f"a name that ends in {SUFFIX}")
    if out.exists():
        raise UserError(str(out), "is there already", do="Give another name with --out, or remove it first")
    check_outside(out, [folder])
    taken = sorted(set(added or {}) & set(bundle.info))
    if taken:
        raise ModelError(str(folder / BUNDLE_FILE), f"has {', '.join(taken)} already")
    described = (folder / BUNDLE_FILE).read_bytes()
    if added:
        text = json_text({**bundle.info, **added}, indent=1) + "\n"
        described = text.encode("utf-8")
    prefix = _prefix(bundle.formats)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with scratch(out.absolute().parent) as temporary:
            with whole_file(temporary / out.name) as stream:
                _write(stream, described, {prefix + name: folder / prefix / name for name in sorted(bundle.shipped)})
            os.replace(temporary / out.name, out)
    except OSError as error:
        raise StoreError(str(out), error.strerror or str(error), do="Give another place with --out") from error
    return out.stat().st_size


def _write(stream: IO[bytes], described: bytes, files: Mapping[str, Path]) -> None:
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, threads=0)
    with (
        compressor.stream_writer(stream, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        tar.addfile(_entry(BUNDLE_FILE, len(described)), io.BytesIO(described))
        for name, path in files.items():
            with path.open("rb") as data:
                tar.addfile(_entry(name, path.stat().st_size), data)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """An entry without a time, an owner or a machine's habits."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry


def unpack(archive: Path, out: Path) -> Path:
    """Unpack a bundle into the new or empty folder ``out``, check every digest, and return ``out``.

    Raises:
        ModelError: not such an archive, cut off, damaged, or it holds what a bundle does not.
        StoreError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with archive.open("rb") as stream:
            decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
            with decompressor.stream_reader(stream, read_across_frames=True) as plain:
                limited = _Limited(plain, MOST_DESCRIBED + _FRAME)
                with tarfile.open(fileobj=limited, mode="r|") as tar:  # type: ignore[call-overload]
                    _read(archive, tar, out, limited)
                if plain.read(1):  # also proves the checksum, which stands at the very end
                    raise ModelError(str(archive), "something follows the bundle in it", do=_REPAIR)
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(str(archive), f"cannot be unpacked ({error})", f"a bundle as {SUFFIX}", _REPAIR) from error
    except OSError as error:
        raise StoreError(str(error.filename or archive), error.strerror or str(error)) from error
    open_bundle(out)
    return out


@dataclass(frozen=True)
class Expected:
    """A file that is to come: its size, and its digest."""

    bytes: int
    sha256: str


class _Limited:
    """Reads at most ``left`` bytes: a few bytes of an archive can claim to be gigabytes of headers."""

    def __init__(self, source: IO[bytes], left: int) -> None:
        self.source, self.left = source, left

    def read(self, size: int) -> bytes:
        """The next bytes; TarError when there are more than may come."""
        data = self.source.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.TarError("more bytes than bundle.json announces")
        return data


def _read(archive: Path, tar: tarfile.TarFile, out: Path, limited: _Limited) -> None:
    """Take the entries of ``tar``: ``bundle.json`` first, then each file that it names, once, of the size it says."""
    to_come: dict[str, Expected] = {BUNDLE_FILE: Expected(MOST_DESCRIBED, "")}
    for entry in tar:
        allowed = to_come.pop(entry.name, None)
        if not entry.isreg() or allowed is None:
            kind = "" if entry.isreg() else "not a plain file, "
            got = f"it holds {entry.name!r}, {kind}which bundle.json does not name as a file to come"
            raise ModelError(str(archive), got, "bundle.json and the files that it names", _REPAIR)
        first = entry.name == BUNDLE_FILE
        if entry.size > allowed.bytes or (not first and entry.size != allowed.bytes):
            raise ModelError(str(archive), f"{entry.name} has {entry.size} bytes", f"{allowed.bytes} bytes", _REPAIR)
        data = tar.extractfile(entry)
        assert data is not None, "a plain file has data"
        path = out / entry.name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as target:  # never over what is there
            shutil.copyfileobj(data, target)
        if path.stat().st_size != entry.size:
            raise ModelError(str(archive), f"ends in the midst of {entry.name}", do=_REPAIR)
        if first:
            to_come = _expected(archive, path)
            limited.left = sum(one.bytes for one in to_come.values()) + (len(to_come) + 1) * 1024 + _FRAME
        elif file_sha256(path) != allowed.sha256:  # at once: what follows need not be unpacked then
            raise ModelError(str(archive), f"{entry.name} is not what bundle.json names (SHA-256 differs)", do=_REPAIR)
    if to_come:
        raise ModelError(str(archive), f"{min(to_come)} is not in it", do=_REPAIR)


def _prefix(formats: Sequence[str]) -> str:
    folder = shipped_folder(formats)
    return f"{folder}/" if folder else ""


def _expected(archive: Path, described: Path) -> dict[str, Expected]:
    """What ``bundle.json`` announces by its name: plain names, or plain names in the folder of a format."""
    where = f"{archive}: {BUNDLE_FILE}"
    try:
        info = read_table(described, ModelError, do=_REPAIR)
        check_info(info, where)
    except ModelError as error:
        raise ModelError(where, error.got, error.allowed, error.do) from error
    prefix = _prefix(info["formats"])
    described_files = info[f"{prefix.removesuffix('/')}_files" if prefix else "files"]
    files = {prefix + name: Expected(facts["bytes"], facts["sha256"]) for name, facts in described_files.items()}
    if len(files) > MOST_FILES:
        raise ModelError(f"{archive}: {BUNDLE_FILE}", f"{len(files)} files", f"at most {MOST_FILES}", _REPAIR)
    total, free = sum(one.bytes for one in files.values()), shutil.disk_usage(described.parent).free
    most = LEAST_UNPACKED + MOST_RATIO * archive.stat().st_size
    if total > most:
        got = f"{total / 1e6:.1f} MB are to be unpacked from {archive.stat().st_size / 1e6:.3f} MB"
        raise ModelError(where, got, f"at most {most / 1e6:.1f} MB: weights hardly shrink", _REPAIR)
    if total > free:
        got = f"{total / 1e6:.1f} MB are to be unpacked, {free / 1e6:.1f} MB are free"
        raise StoreError(str(described.parent), got, do="Free some, or set TMPDIR to another place")
    return files


@contextmanager
def bundle_folder(path: Path) -> Iterator[Path]:
    """The folder of the bundle at ``path``: itself, or what the archive holds, in a temporary folder that goes again.

    Raises:
        ModelError, StoreError: as `unpack`.
    """
    if not is_archive(path):
        yield path
        return
    with scratch() as temporary:
        yield unpack(path, temporary / "bundle")
