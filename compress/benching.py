"""The command ``edgestill bench``: one bundle, measured here or on a device, with what is foretold for a target.

`bench` runs the stage ``deploy.bench.local`` on this machine, and the same measurement on the device of `Where`
otherwise; both give the same figures under the same names. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.context import StageResult
from compress.errors import UserError
from compress.progress import Progress
from compress.single import Request, check_new, present, run_stage, stage_and_params
from deploy.bench import OnDevice, bench_on
from deploy.bundle import open_bundle
from deploy.params import BenchParams
from deploy.remote.places import parse_place
from deploy.remote.transport import open_device
from deploy.targets import Target, unlike


@dataclass(frozen=True)
class Where:
    """What the user says of the place: its text, and of a device its Python, its folder and ssh's configuration."""

    place: str = "local"
    python: str = "python3"
    folder: str | None = None
    ssh_config: Path | None = None


def bench(
    bundle: Path,
    where: Where,
    overrides: Sequence[str],
    *,
    target: Target | None,
    threads: int | None,
    out: Path | None,
    progress: Progress,
) -> StageResult:
    """Measure ``bundle`` and write ``bench.json`` into ``out`` if given.

    Raises:
        UserError: a wrong place, parameter, bundle or device.
        EdgestillError: the measurement failed.
    """
    place = parse_place(where.place)
    present(bundle, "a bundle")
    line, params = stage_and_params("deploy.bench.local", overrides)
    if place.kind == "local":
        tuned = open_bundle(bundle, verify=False).tuned.get("threads")
        request = Request(line, params, {"bundle": bundle}, out, target=target, threads=threads or tuned)
        result = run_stage(request, progress)
    else:
        _check_words(where)
        if place.kind == "adb" and (where.folder or "").startswith("~"):
            got = f"got {where.folder!r}, and adb has no home to put it in"
            raise UserError("--remote-folder", got, "an absolute path, such as /data/local/tmp/edgestill/mine")
        if out is not None:
            check_new(out, [bundle])
        on = OnDevice(open_device(place, ssh_config=where.ssh_config), where.python, where.folder)
        found = cast("BenchParams", params)
        result = bench_on(on, bundle, found, threads=threads, target=target, out=out, say=progress.say)
    if target is not None:
        result.notes.append(_against(target, result.metrics["machine"], place.text))
    return result


def _check_words(where: Where) -> None:
    """Refuse what a program on the device would read as an option, or what is no path."""
    for option, text in (("--remote-python", where.python), ("--remote-folder", where.folder)):
        if text is not None and (not text or text.startswith("-") or not text.isprintable()):
            raise UserError(option, f"got {text!r}", "a path, or a name such as python3")
    folder = where.folder
    if folder is not None and (not folder.startswith(("/", "~/")) or ".." in folder.split("/") or folder == "/"):
        raise UserError("--remote-folder", f"got {folder!r}", "an absolute path, or one that begins with ~/")
    if where.ssh_config is not None and not where.ssh_config.is_file():
        raise UserError("--ssh-config", f"no file {where.ssh_config}", "a configuration file of OpenSSH's client")


def _against(target: Target, machine: dict[str, Any], place: str) -> str:
    """Whether the machine that was measured is the target, as far as can be told."""
    name = "this machine" if place == "local" else place
    apart = unlike(target, machine)
    if apart:
        return f"{name} is not {target.name}: {'; '.join(apart)}"
    return f"nothing tells {name} from {target.name}; the estimate remains one"
