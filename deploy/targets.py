"""Targets: what is known of a device, read from ``profiles/targets/NAME.yaml`` or from a file of the user's.

`load_target` reads one, `list_targets` names the built-in ones, `find_target` gives the file of one, `unlike` tells in
what a machine is not one. Every figure of a built-in target has its public source in a comment beside it. Knows nothing
of models: what fits a target is `deploy.sizing`'s question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import ProfileError, TargetError
from compress.names import nearest
from compress.yaml_reader import KeyPath, read_yaml_file

NAME = r"^[a-z0-9][a-z0-9.-]*$"
SUFFIXES = (".yaml", ".yml")
Format = Literal["onnx", "gptq", "gguf"]


class Target(BaseModel):
    """Facts of one device. Bytes, bytes per second, operations per second; decimal units as data sheets use them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    edgestill: Literal[1] = Field(description="version of this file's form")
    name: str = Field(pattern=NAME, description="the file's name without .yaml")
    description: str = Field(description="one line: which device, which variant")
    cpu: str = Field(description="processor")
    isa: list[str] = Field(min_length=1, description="architecture, then instruction sets as /proc/cpuinfo names them")
    cores: int = Field(ge=1, description="cores that the runtime should use")
    device_cores: int | None = Field(None, ge=1, description="all cores of the device; left out: as many as cores")
    memory_bytes: int = Field(ge=1, description="RAM of the device")
    usable_memory_bytes: int = Field(ge=1, description="RAM that one application may fill")
    memory_bandwidth_bytes_per_s: float = Field(gt=0, description="peak of the memory bus")
    read_efficiency: float = Field(0.7, gt=0, le=1, description="share of that peak that sequential reading reaches")
    fp32_flops_per_s: float = Field(gt=0, description="peak of all cores together")
    compute_efficiency: float = Field(0.3, gt=0, le=1, description="share of that peak that prefill reaches")
    storage_bytes: int = Field(ge=1, description="storage that a bundle may take")
    storage_read_bytes_per_s: float = Field(gt=0, description="sequential read")
    code_ops_per_s: float | None = Field(
        None, gt=0, description="products of 4-bit codes with a prompt's 8-bit activations, measured; left out: as fp32"
    )
    code_row_ops_per_s: float | None = Field(
        None, gt=0, description="the same with one token; left out: as with a prompt"
    )
    node_seconds: float = Field(2e-6, gt=0, description="time of one small operator in the runtime, with no arithmetic")
    runtime: Literal["onnxruntime-genai", "onnxruntime-web"] = Field(description="what runs the bundle there")
    runtime_note: str | None = Field(None, description="what a bundle for it cannot do there, or needs; is told")
    formats: list[Format] = Field(min_length=1, description="export formats that make sense for it")
    context_tokens: int = Field(2048, ge=16, description="context at which memory is estimated")

    @model_validator(mode="after")
    def _usable_is_part(self) -> Target:
        if self.usable_memory_bytes > self.memory_bytes:
            raise ValueError(f"usable_memory_bytes {self.usable_memory_bytes} exceeds memory_bytes {self.memory_bytes}")
        return self

    @property
    def read_bytes_per_s(self) -> float:
        """Sequential read that a program can expect."""
        return self.memory_bandwidth_bytes_per_s * self.read_efficiency

    @property
    def flops_per_s(self) -> float:
        """Arithmetic that prefill can expect, in fp32 operations per second."""
        return self.fp32_flops_per_s * self.compute_efficiency

    def product_ops_per_s(self, *, coded: bool, rows: int) -> float:
        """Arithmetic that products of ``rows`` tokens can expect, with weights as codes or as they are."""
        found = self.code_row_ops_per_s if rows == 1 else None
        return (found or self.code_ops_per_s or self.flops_per_s) if coded else self.flops_per_s

    @property
    def notes(self) -> list[str]:
        """What whoever plans, exports or times a bundle for it should be told."""
        return [] if self.runtime_note is None else [f"{self.name}: {self.runtime_note}"]


def built_in_targets() -> Path:
    """The folder of the built-in targets, in a checkout and in an installed wheel alike."""
    return Path(__file__).resolve().parents[1] / "profiles" / "targets"


def list_targets() -> list[str]:
    """Names of the built-in targets."""
    return sorted(path.stem for path in built_in_targets().glob("*.yaml"))


def load_target(name_or_path: str | Path) -> Target:
    """Read a built-in target by its name, or a target file.

    Raises:
        TargetError: there is no such target, or its file is wrong (file and line, key, what is allowed).
    """
    path = find_target(str(name_or_path))
    try:
        document = read_yaml_file(path)
    except ProfileError as error:
        raise TargetError(error.where, error.got, error.allowed, error.do) from error
    if document.problems:
        first = document.problems[0]
        raise TargetError(first.where, first.got, first.allowed, first.do)
    if not isinstance(document.value, dict):
        raise TargetError(str(path), "no mapping of keys to values", "a target file", "See profiles/targets")
    try:
        return Target.model_validate(document.value)
    except ValidationError as error:
        first_error = error.errors(include_url=False)[0]
        key: KeyPath = tuple(first_error["loc"])
        where = f"{document.place(key).origin}: {'.'.join(map(str, key))}".removesuffix(": ")
        unknown = first_error["type"] == "extra_forbidden"
        allowed = f"one of {', '.join(Target.model_fields)}" if unknown else ""
        do = nearest(str(key[-1]), Target.model_fields) if unknown else ""
        raise TargetError(where, f"{first_error['msg']} (got {_short(first_error['input'])})", allowed, do) from error


def unlike(target: Target, machine: Mapping[str, Any]) -> list[str]:
    """In what ``machine`` (facts as of ``compress.doctor.machine``) is not ``target``; empty where nothing tells.

    An empty list is no proof: a sister device may give itself the same name. Some boards do not name their processor.
    """
    found = []
    kind, *sets = target.isa
    own = str(machine["system"]).split()[-1]
    if own != kind:
        found.append(f"it is {own}, not {kind}")
    missing = [name for name in sets if name not in machine["instruction_sets"]]
    if missing and own == kind:
        found.append(f"it lacks {', '.join(missing)}")
    device_cores = target.device_cores or target.cores
    if int(machine["cores"]) != device_cores:
        found.append(f"it has {machine['cores']} usable cores, not {device_cores}")
    words = target.cpu.partition(",")[0].lower().split()
    marks = [word for word in words if len(word) >= 3 and any(sign.isdigit() for sign in word)]
    name = str(machine["cpu"]).lower()
    named = name not in ("", own.lower())
    marks += [target.name.replace("-", " ")] * bool(marks)
    if marks and named and not any(re.search(rf"(?<!\w){re.escape(mark)}(?!\w)", name) for mark in marks):
        found.append(f"its processor is {machine['cpu']}, not {target.cpu.partition(',')[0]}")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def find_target(text: str) -> Path:
    """Return the file of a built-in target by its name, or the file ``text``.

    Raises:
        TargetError: there is neither.
    """
    path, known = Path(text), list_targets()
    if text in known:
        return built_in_targets() / f"{text}.yaml"
    if path.is_file():
        return path
    do = nearest(path.stem, known)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise TargetError(text, "no such file", f"a target file, or one of {', '.join(known)}", do)
    raise TargetError("target", f"got {text!r}", f"a target file, or one of {', '.join(known)}", do)
