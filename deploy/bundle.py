"""The bundle: one folder that is copied to the device, with ``bundle.json`` that says what is in it and vouches for it.

`write_bundle` describes a finished folder, `open_bundle` reads it back and refuses one that is damaged, `bundle_bytes`
is what is copied: what the runtime opens, ``run.py`` and ``bundle.json``. A GGUF file or GPTQ checkpoint of the same
codes may lie beside them in ``gguf/`` and ``gptq/``; they are described too, and the first of them counts in a bundle
without an ONNX model, which nothing here runs. Knows nothing of how a bundle is made or run; imports no torch and no
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Required,  # those of typing are not read by pydantic before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from compress.errors import ModelError
from compress.files import file_sha256, json_text, write_whole
from compress.json_reader import MAX_WHOLE, checked, read_table, required
from compress.names import is_plain_name
from deploy.bundle_runner.run import forbidden, strange_options

BUNDLE_FILE, GENAI_CONFIG = "bundle.json", "genai_config.json"
GGUF_FOLDER, GPTQ_FOLDER = "gguf", "gptq"
BESIDE = (GGUF_FOLDER, GPTQ_FOLDER)  # formats in folders of their own; where there is no ONNX model, the first ships
RUNNER_FILE = "run.py"
RUNNER = Path(__file__).parent / "bundle_runner" / RUNNER_FILE  # copied into every bundle that a runtime opens
FORM = 1
# of a bundle that a runtime opens: whole numbers that running, timing and estimating it read
_NEEDED = {
    "onnx": ("context_tokens", "accuracy_level", "read_per_token_bytes"),
    "model": ("hidden", "vocabulary"),
}
_REPAIR = "Copy the bundle again, or export it again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and what ``bundle.json`` says."""

    folder: Path
    info: Mapping[str, Any]

    @property
    def formats(self) -> list[str]:
        """What is in it: ``onnx``, ``gguf``, ``gptq``."""
        return list(self.info["formats"])

    @property
    def model(self) -> Mapping[str, Any]:
        """Architecture, sizes and bits."""
        found: Mapping[str, Any] = self.info["model"]
        return found

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return int(self.model["parameters"])

    @property
    def tuned(self) -> Mapping[str, Any]:
        """Settings that were found for a device: threads, prefill_chunk, config_entries; empty when none were."""
        found: Mapping[str, Any] = self.info.get("tuned") or {}
        return found

    @property
    def shipped(self) -> Mapping[str, Mapping[str, Any]]:
        """What is copied to the device: the runtime's files; where there are none, those of the first of `BESIDE`."""
        found: Mapping[str, Mapping[str, Any]] = self.info[_shipped_key(self.formats)]
        return found

    @property
    def bytes(self) -> int:
        """Bytes of what is `shipped`, ``bundle.json`` included."""
        files = sum(int(facts["bytes"]) for facts in self.shipped.values())
        return files + (self.folder / BUNDLE_FILE).stat().st_size

    def need(self, form: str) -> None:
        """Raise ModelError unless the bundle holds the format ``form``, and says what running it takes."""
        if form in self.formats:
            for part, names in _NEEDED.items() if form == "onnx" else ():
                for name in names:
                    table, where = self.info.get(part) or {}, f"{self.folder / BUNDLE_FILE}: {part}"
                    required(
                        table, name, int, where, ModelError, least=1 if name != "accuracy_level" else 0, do=_REPAIR
                    )
            return
        got = f"holds the format {', '.join(self.formats)} alone"
        if form == "onnx":
            got += ": no ONNX model, which is what is run and timed here"
        do = f"Export the model again with --format {form} (in a profile: formats: [{', '.join(self.formats)}, {form}])"
        if GPTQ_FOLDER in self.formats:
            do += f"; the checkpoint itself is measured by: edgestill eval {self.folder / GPTQ_FOLDER} --data ROWS"
        raise ModelError(str(self.folder), got, form, do)


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and digest of every file right in ``folder``, ``bundle.json`` apart."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != BUNDLE_FILE)
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}


def write_bundle(folder: Path, facts: Mapping[str, Any]) -> Bundle:
    """Write ``bundle.json`` over the finished files of ``folder`` and of the formats in folders of their own."""
    info = {"edgestill": FORM, **facts, "files": describe(folder)}
    for form in BESIDE:
        if (folder / form).is_dir():
            info[f"{form}_files"] = describe(folder / form)
    write_whole(folder / BUNDLE_FILE, json_text(info, indent=1) + "\n")
    return Bundle(folder, info)


def open_bundle(folder: Path, *, verify: bool = True) -> Bundle:
    """Read a bundle and check its files: sizes always, digests with ``verify``.

    Raises:
        ModelError: no bundle, another form, a file is missing, of another size, or altered; or as `check_safe`, with
            ``verify``.
    """
    path = folder / BUNDLE_FILE
    if not path.exists():
        do = "Make one with: edgestill export MODEL --target TARGET"
        raise ModelError(str(path), "no such file", "a bundle folder", do)
    info = read_table(path, ModelError, allowed="a bundle's JSON", do=_REPAIR)
    check_info(info, str(path))
    shipped = _shipped_key(info["formats"])
    _check_files(folder, info.get("files", {}), verify=verify)
    for form in BESIDE:
        files = f"{form}_files"
        if files == shipped or (form in info["formats"] and (folder / form).is_dir()):
            _check_files(folder / form, info.get(files, {}), verify=verify)
    if verify:
        check_safe(folder)
    return Bundle(folder, info)


class FileFacts(TypedDict):
    """What ``bundle.json`` says of a file."""

    bytes: Annotated[int, Field(ge=0, le=MAX_WHOLE)]
    sha256: Annotated[str, Field(max_length=64)]


_Size = Annotated[int, Field(ge=0, le=MAX_WHOLE)]


class _Model(TypedDict, total=False):
    architecture: str
    parameters: Required[_Size]
    layers: _Size
    hidden: _Size
    vocabulary: _Size
    bits: int | None
    group_size: int | None


class _Onnx(TypedDict, total=False):
    context_tokens: _Size
    accuracy_level: _Size
    read_per_token_bytes: _Size
    products_per_token: _Size
    products_per_prompt: _Size
    last_logits: bool
    backend: str
    runtime: dict[str, str | None]


class _Tuned(TypedDict, total=False):
    threads: Annotated[int, Field(ge=1, le=4096)] | None
    prefill_chunk: Annotated[int, Field(ge=1, le=MAX_WHOLE)] | None
    config_entries: dict[str, str] | None
    was: dict[str, Any] | None


class _Info(TypedDict, total=False):
    """The parts of ``bundle.json`` that are read anywhere; there may be others."""

    edgestill: Required[Literal[1]]
    formats: Required[Annotated[list[Literal["onnx", "gguf", "gptq"]], Field(min_length=1)]]
    model: Required[_Model]
    onnx: _Onnx | None
    tuned: _Tuned | None
    files: dict[str, FileFacts]
    gguf_files: dict[str, FileFacts]
    gptq_files: dict[str, FileFacts]
    parity: dict[str, Any] | None


def check_info(info: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless ``info`` is what a ``bundle.json`` holds: every part that is read here, by its type."""
    if info.get("edgestill") != FORM:
        raise ModelError(where, "not a bundle of this form", f'"edgestill": {FORM}', _REPAIR)
    checked(_Info, dict(info), where, ModelError, do=_REPAIR)
    shipped = _shipped_key(info["formats"])
    if not info.get(shipped):
        raise ModelError(where, f"no {shipped}", "formats, model and files", _REPAIR)
    for key in ("files", "gguf_files", "gptq_files"):
        wrong = [name for name in info.get(key, {}) if not is_plain_name(name) or name == BUNDLE_FILE]
        if wrong:
            raise ModelError(where, f"the file name {wrong[0][:80]!r}", "a plain name", _REPAIR)


def check_safe(folder: Path) -> None:
    """Raise ModelError when the runtime, opening ``folder``, would load code or files that are not the bundle's."""
    path, do = folder / GENAI_CONFIG, "Do not open this bundle unless you know why it asks for that"
    if path.is_file():
        try:
            reason = forbidden(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(str(path), f"cannot be read ({error})", "the runtime's configuration", _REPAIR) from error
        if reason:
            raise ModelError(str(path), reason, "threads, logging and the CPU; files of the bundle", do)
    if strange := strange_options(tuned(folder).get("config_entries") or {}):
        raise ModelError(str(folder / BUNDLE_FILE), f"tuned: {strange[0]}", "entries that edgestill tune writes", do)


def shipped_folder(formats: Sequence[str]) -> str:
    """The folder within a bundle of these formats whose files go to the device; empty: the bundle's own."""
    beside = [form for form in BESIDE if form in formats]
    return beside[0] if beside and "onnx" not in formats else ""


def _shipped_key(formats: Sequence[str]) -> str:
    folder = shipped_folder(formats)
    return f"{folder}_files" if folder else "files"


def _check_files(folder: Path, files: Mapping[str, Any], *, verify: bool) -> None:
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(str(path), "missing from the bundle", do=_REPAIR)
        if path.stat().st_size != facts["bytes"]:
            raise ModelError(str(path), f"{path.stat().st_size} bytes", f"{facts['bytes']} as exported", _REPAIR)
        if verify and file_sha256(path) != facts["sha256"]:
            raise ModelError(str(path), "its content changed since the export (SHA-256 differs)", do=_REPAIR)


def tuned(folder: Path) -> Mapping[str, Any]:
    """Return what `edgestill tune` wrote into the bundle in ``folder``; empty for one that was not, or no bundle."""
    try:
        found = read_table(folder / BUNDLE_FILE, ModelError).get("tuned")
    except ModelError:
        return {}
    return found if isinstance(found, dict) else {}


def bundle_bytes(folder: Path) -> int:
    """Return the bytes of the bundle in ``folder`` that are copied to the device; see `Bundle.shipped`."""
    return open_bundle(folder, verify=False).bytes
