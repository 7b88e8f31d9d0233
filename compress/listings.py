"""What ``edgestill ls`` lists, as heads and rows of text, a target of this machine, and where a run's record lies.

Knows where things are kept; shows nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from compress import run_record
from compress.errors import UserError
from compress.files import write_whole
from compress.scratch import scratch
from compress.stages import STAGES

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]


def rows_of(what: str, root: Path | None) -> Rows:
    """Heads and rows of ``stages``, ``targets``, ``profiles`` or ``runs`` (of the store at ``root``)."""
    if what == "stages":
        lines = [(line.stage, line.method, " ".join(line.reads), line.writes, line.summary) for line in STAGES]
        return ("stage", "method", "reads", "writes", "what it does"), lines
    if what == "targets":
        return _targets()
    if what == "profiles":
        return _profiles()
    assert root is not None, "runs are listed from a store"
    return ("run", "status", "profile", "seconds", "verdict"), [_run(path) for path in run_files(root)]


def _targets() -> Rows:
    from deploy.targets import list_targets, load_target

    found = [load_target(name) for name in list_targets()]
    return ("target", "description"), [(target.name, target.description) for target in found]


def measured_target(name: str, place: Path, threads: int | None) -> str:
    """Measure this machine, write a target file of it as ``place``, and return the file's text.

    Raises:
        UserError: ``place`` is there already, its folder is not, or ``name`` is none.
        EdgestillError: the measuring failed.
    """
    from compress import doctor
    from deploy import machine
    from deploy.targets import NAME, load_target

    if not re.fullmatch(NAME, name):
        raise UserError("--name", f"got {name!r}", "lower-case letters, digits, dots and hyphens")
    if place.exists():
        raise UserError(str(place), "is there already", do="Give another place with --out, or remove it")
    if not place.parent.is_dir():
        raise UserError(str(place.parent), "no such folder", do="Make it, or give another place with --out")
    facts = doctor.machine(threads)
    single, rates = machine.measure_rates(1), machine.measure_rates(int(facts["threads"]))
    target = machine.machine_target(facts, rates, name, place.parent)
    when = datetime.now(UTC).date().isoformat()
    text = machine.target_text(target, single, rates, when=when, versions=doctor.versions())
    with scratch() as temporary:  # nothing is left at the place unless it reads back
        draft = temporary / f"{name}.yaml"
        draft.write_text(text, encoding="utf-8")
        load_target(draft)
    write_whole(place, text)
    return text


def _profiles() -> Rows:
    from compress.profile import list_profiles, load_profile

    found = [(name, load_profile(name).description) for name in list_profiles()]
    return ("profile", "description"), found


def run_files(root: Path) -> list[Path]:
    """``run.json`` of every run of a store, oldest first."""
    return sorted((root / "runs").glob("*/run.json"), key=lambda path: path.parent.name)


def _run(path: Path) -> tuple[str, ...]:
    try:
        record = run_record.read(path)
        shown = f"{float(record['seconds']):.1f}"
        return record["id"], record["status"], record["profile"]["name"], shown, record["verdict"]
    except (UserError, KeyError, ValueError, TypeError, OverflowError):
        return path.parent.name, "unreadable", "", "", ""


def find_run(name: str, root: Path) -> Path:
    """The ``run.json`` that ``name`` means: an id, a folder, a file, or ``latest``.

    Raises:
        UserError: there is none.
    """
    given = Path(name)
    if given.is_file():
        return given
    for folder in (given, root / "runs" / name):
        if (folder / "run.json").is_file():
            return folder / "run.json"
    found = run_files(root)
    if name == "latest" and found:
        return found[-1]
    raise UserError(f"run {name}", f"not found in {root / 'runs'}", do="See: edgestill ls runs")
