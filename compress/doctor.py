"""What this machine is and what is missing on it: versions, cores, instruction sets, memory, disk, extras.

`machine` gives the facts that a run record and a benchmark's key hold; `versions` those of the packages; `examine`
adds disk and extras for ``edgestill doctor``; `check_extras` refuses parameters whose package is missing. Nothing is
imported to learn its version, so that all of this takes milliseconds. Knows nothing of profiles.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import MissingExtraError
from compress.version import __version__

if TYPE_CHECKING:
    from compress.context import Params

CORE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "torch-pruning",
    "datasets",
    "numpy",
    "pyarrow",
    "pydantic",
    "rensa",
)

# Instruction sets that decide which kernels onnxruntime and torch choose, by the names of /proc/cpuinfo.
INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "f16c",
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

# extra -> (package that is looked for, what it is needed for)
EXTRAS: dict[str, tuple[str, str]] = {
    "ray": ("ray", "spreading data stages over processes and machines with Ray"),
    "gguf": ("gguf", "export for llama.cpp"),
    "lora": ("peft", "students with adapters"),
    "dev": ("pytest", "tests and checks"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``edgestill doctor``: state is ``ok``, ``warning`` or ``problem``."""

    what: str
    value: str
    state: str = "ok"
    do: str = ""


def cores() -> int:
    """CPU cores that this process may use (affinity and container limits counted), at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _quota_cores() or usable))


def _quota_cores() -> int | None:
    """Cores of the cgroup v2 limit, rounded up; None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))


def memory_bytes() -> int:
    """Memory that this process may fill: the machine's, or the container's limit when that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def _cpuinfo() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def machine(threads: int | None = None) -> dict[str, Any]:
    """Facts of this machine: cpu, cores, threads in use, memory in bytes, instruction sets, system."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    usable = cores()
    return {
        "cpu": info.get("model name") or info.get("Model") or platform.processor() or platform.machine(),
        "cores": usable,
        "threads": threads or usable,
        "memory_bytes": memory_bytes(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def version(package: str) -> str | None:
    """Installed version of ``package``, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python, edgestill and the packages whose figures can change a result."""
    found = {"python": platform.python_version(), "edgestill": __version__}
    found.update({package: installed for package in CORE if (installed := version(package))})
    return found


def check_extras(params: Params, where: str) -> None:
    """Refuse ``params``, those of the step ``where``, when they need a package that is not installed.

    Raises:
        MissingExtraError: names the package and how to install it.
    """
    for extra, name in params.extras.items():
        package, _ = EXTRAS[extra]
        if not _installed(package):
            raise MissingExtraError(package, extra, f"{where}.{name}")


def _installed(package: str) -> bool:
    return find_spec(package.replace("-", "_")) is not None


def _package_findings() -> list[Finding]:
    findings = []
    for package in CORE:
        installed = version(package)
        if installed:
            findings.append(Finding(package, installed))
        else:
            findings.append(Finding(package, "missing", "problem", f"pip install {package}"))
    for extra, (package, purpose) in EXTRAS.items():
        if _installed(package):
            findings.append(Finding(f"extra {extra}", f"{package} {version(package) or ''}".strip()))
        else:
            do = f"for {purpose}: pip install 'edgestill[{extra}]'"
            findings.append(Finding(f"extra {extra}", "not installed", "warning", do))
    return findings


def _disk_finding(store: Path) -> Finding:
    place = store.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    value = f"{free / 1e9:.1f} GB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("store", f"{place} is not writable", "problem", "give another place with --store")
    if free < 2e9:
        return Finding("disk", value, "warning", "a run needs about 2 GB; free some, or give another --store")
    return Finding("disk", value)


def examine(store: Path) -> list[Finding]:
    """Everything that ``edgestill doctor`` shows."""
    facts = machine()
    python = sys.version_info
    good = (3, 11) <= python[:2] < (3, 14)
    findings = [
        Finding("python", platform.python_version(), *(() if good else ("problem", "use Python 3.11 to 3.13"))),
        Finding("cpu", str(facts["cpu"])),
        Finding("cores", f"{facts['cores']} usable"),
        Finding("instruction sets", " ".join(facts["instruction_sets"]) or "unknown"),
        Finding("memory", f"{facts['memory_bytes'] / 2**30:.1f} GiB"),
        _disk_finding(store),
    ]
    if facts["memory_bytes"] < 3 * 2**30:
        findings[4] = Finding("memory", findings[4].value, "warning", "the quickstart needs 3 GiB")
    if not facts["instruction_sets"]:
        findings[3] = Finding("instruction sets", "unknown", "warning", "no /proc/cpuinfo: speed cannot be told")
    return findings + _package_findings()
