"""Brings a bundle to a device: what is there and right is not sent, what broke off goes on, what is damaged is renewed.

`look_at` asks a device what it has, `copy_bundle` makes its folder equal to the bundle's. Nothing on the device is
trusted by its name: a file counts when its SHA-256 there is that of ``bundle.json``, and a copy has another name until
it is whole. What runs there is edgestill's own runner, never code that came in a bundle, and it lies beside the
bundle's folder, so that no file of a bundle can pass for a module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field
from typing_extensions import TypedDict  # that of typing is not read by pydantic before Python 3.12

from compress.errors import EdgestillError, TargetError
from compress.files import file_sha256
from compress.json_reader import MAX_WHOLE, JsonFault, checked, parse_json
from deploy.bundle import BUNDLE_FILE, RUNNER, Bundle
from deploy.remote import device_side
from deploy.remote.transport import Device

DEVICE_SIDE = Path(device_side.__file__)
_LOOK_TIME_S = 600.0  # digests of a bundle of gigabytes on a slow card
_NO_PYTHON = (126, 127)  # how a shell says that there is no such program


class _Facts(TypedDict):
    """Size and SHA-256 of a file on the device."""

    bytes: Annotated[int, Field(ge=0, le=MAX_WHOLE)]
    sha256: str


class _Looked(TypedDict):
    """What `device_side` answers; a device may say anything."""

    python: str
    executable: str
    packages: dict[str, str | None]
    folder: str
    free_bytes: Annotated[int, Field(ge=0, le=MAX_WHOLE)]
    files: dict[str, _Facts | None]
    taken: list[str]
    ours: bool
    parts: dict[str, _Facts | None]


@dataclass
class Copied:
    """What a copy did: files that were sent whole, files of which the rest was sent, files that were right; bytes."""

    sent: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    bytes: int = 0


@dataclass(frozen=True)
class Remote:
    """A folder on a device, the Python that runs there, and where edgestill's own files go."""

    device: Device
    folder: str
    python: str = "python3"
    chosen: bool = True  # by the user, who may keep files of other kinds there; else one of edgestill's own

    @property
    def tools(self) -> str:
        """The folder beside it for what edgestill runs there."""
        return f"{self.folder}.edgestill-tools"

    @property
    def runner(self) -> str:
        """The runner on the device."""
        return f"{self.tools}/{RUNNER.name}"

    def put_tools(self) -> None:
        """Send the runner and `device_side`; they are small and always the ones of this edgestill."""
        for source in (RUNNER, DEVICE_SIDE):
            self.device.send(source, f"{self.tools}/{source.name}")

    def ask(self, action: str, files: Mapping[str, str]) -> dict[str, Any]:
        """Run an action of `device_side`.

        Raises:
            TargetError: no Python, or one that is too old.
            EdgestillError: it failed.
        """
        request = json.dumps({"folder": self.folder, "files": dict(files)})
        script = f"{self.tools}/{DEVICE_SIDE.name}"
        done = self.device.run([self.python, script, action, request], timeout=_LOOK_TIME_S)
        if done.returncode in _NO_PYTHON:
            do = "Name one with --remote-python PATH, such as ~/venv/bin/python"
            if self.device.where.startswith("adb:"):
                do += "; a Python of Termux is reached over its own sshd: --on ssh://USER@PHONE:8022"
            raise TargetError(self.device.where, f"no Python called {self.python!r} there ({done.last_line})", do=do)
        if done.returncode:
            raise EdgestillError(self.device.where, f"looking at the device failed: {done.last_line}")
        try:
            found = parse_json(done.stdout.strip().splitlines()[-1])
        except (JsonFault, IndexError) as error:
            got = f"the device's answer is not JSON: {done.stdout[-200:]!r}"
            raise EdgestillError(self.device.where, got) from error
        checked(_Looked, found, f"the answer of {self.device.where}", EdgestillError)
        return cast(dict[str, Any], found)


def check_packages(remote: Remote, found: Mapping[str, Any], bundle: Bundle) -> None:
    """Raise TargetError with the command to run on the device when the runtime is missing there."""
    missing = [name for name, version in found["packages"].items() if version is None]
    if not missing:
        return
    made_with = ((bundle.info.get("onnx") or {}).get("runtime") or {}).get("onnxruntime-genai")
    wanted = [f"{name}=={made_with}" if made_with and name.startswith("onnx") else name for name in missing]
    raise TargetError(
        remote.device.where,
        f"its Python {found['python']} ({found['executable']}) has no {' and no '.join(missing)}",
        do=f"Run there: {found['executable']} -m pip install {' '.join(wanted)}; or name another Python with "
        "--remote-python",
    )


def copy_bundle(remote: Remote, bundle: Bundle, say: Callable[[str], None] = lambda _: None) -> Copied:
    """Make the device's folder hold the bundle, every SHA-256 checked there.

    Raises:
        TargetError: the device cannot be reached, has no Python, no runtime or not enough room, or other files lie
            under the names of the bundle's in a folder that the user chose and that holds no bundle.
        EdgestillError: a copy broke off, or arrived damaged twice.
    """
    digests = {name: str(facts["sha256"]) for name, facts in bundle.shipped.items()}
    digests[BUNDLE_FILE] = file_sha256(bundle.folder / BUNDLE_FILE)
    remote.put_tools()
    found = remote.ask("look", digests)
    check_packages(remote, found, bundle)
    copied = Copied(kept=_right(found, digests))
    _check_foreign(remote, found, [name for name in found["taken"] if name not in copied.kept])
    _check_room(remote, bundle, found, [name for name in digests if name not in copied.kept])
    for attempt in range(2):
        wrong = [name for name in digests if name not in _right(found, digests)]
        if not wrong:
            return copied
        if attempt:
            say(f"{', '.join(wrong)} arrived damaged and will be sent again")
        for name in wrong:
            _send(remote, bundle.folder / name, found["parts"].get(name), copied, say)
        found = remote.ask("settle", digests)
    wrong = [name for name in digests if name not in _right(found, digests)]
    if wrong:
        do = "Check its disk, and the network on the way"
        raise EdgestillError(remote.device.where, f"{', '.join(wrong)} arrived damaged twice (SHA-256 differs)", do=do)
    return copied


def _right(found: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    return [name for name, sha in digests.items() if (found["files"].get(name) or {}).get("sha256") == sha]


def _check_foreign(remote: Remote, found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse to write over files that no bundle brought."""
    if names and remote.chosen and not found["ours"]:
        got = f"{', '.join(names)} there would be overwritten, and no bundle.json of edgestill's lies beside"
        do = "Give another --remote-folder, or remove them there"
        raise TargetError(f"{remote.device.where} {found['folder']}", got, "a new folder, or one with a bundle", do)


def _check_room(remote: Remote, bundle: Bundle, found: Mapping[str, Any], names: Sequence[str]) -> None:
    there = sum((found["parts"].get(name) or {}).get("bytes", 0) for name in names)
    need = sum((bundle.folder / name).stat().st_size for name in names) - there
    if need > found["free_bytes"]:
        got = f"{need / 1e6:.1f} MB are to be copied and {found['free_bytes'] / 1e6:.1f} MB are free"
        raise TargetError(f"{remote.device.where} {found['folder']}", got, do="Free some, or give --remote-folder")


def _send(
    remote: Remote, source: Path, part: Mapping[str, Any] | None, copied: Copied, say: Callable[[str], None]
) -> None:
    """Send one file under the name of an unfinished copy; go on where ``part`` is its true beginning."""
    size, offset = source.stat().st_size, 0
    if part is not None and 0 < part["bytes"] <= size and _sha256_of_beginning(source, part["bytes"]) == part["sha256"]:
        offset = int(part["bytes"])
    if offset < size or size == 0:
        say(f"copying {source.name}: {(size - offset) / 1e6:.1f} MB" + (f" of {size / 1e6:.1f}" if offset else ""))
        target = device_side.part_of(Path(), source.name).name
        remote.device.send(source, f"{remote.folder}/{target}", offset=offset)
    (copied.resumed if offset else copied.sent).append(source.name)
    copied.bytes += size - offset


def _sha256_of_beginning(path: Path, length: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while length > 0 and (piece := stream.read(min(length, 1 << 20))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()
