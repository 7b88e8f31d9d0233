"""Runs one stage alone, outside of the store: from the user's files to a folder or file that the user named.

`run_stage` serves ``edgestill step``, ``export``, ``bench`` and ``eval``. Inputs may be files of rows, artifact
folders, model folders or bundles. The output is written beside its place and moved there when it is whole; what a
long stage checkpointed is kept beside it under a name that holds the digest of all inputs and parameters, so that
the same command goes on after a kill and another one does not take it up. Knows no stage by name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import doctor, identities
from compress.context import Params, StageContext, StageResult
from compress.errors import DataError, StoreError, UserError
from compress.progress import Progress
from compress.stages import Stage, load_function, methods

SLOTS = ("data", "model", "test", "reference", "bundle")
ROW_FILES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Request:
    """One stage to run: where its inputs lie, and where its output goes (None: nowhere, only the figures count)."""

    stage: Stage
    params: Params
    inputs: Mapping[str, Path]
    out: Path | None = None
    teacher: Path | None = None
    target: Any = None
    seed: int = 0
    threads: int | None = None


def guess_slot(path: Path) -> str:
    """The slot that ``path`` fills: a bundle, a model folder, else data.

    Raises:
        DataError: there is nothing at ``path``.
    """
    if not path.exists():
        raise DataError(str(path), "no such file or folder")
    if path.is_dir() and (path / "bundle.json").is_file():
        return "bundle"
    return "model" if path.is_dir() and (path / "config.json").is_file() else "data"


def parse_inputs(given: Sequence[str]) -> dict[str, Path]:
    """``--in`` values as slot -> path: ``PATH``, whose slot is guessed, or ``slot=PATH``.

    Raises:
        UserError: a slot is filled twice.
        DataError: nothing is there.
    """
    inputs: dict[str, Path] = {}
    for text in given:
        slot, separator, rest = text.partition("=")
        named = bool(separator) and slot in SLOTS
        path = Path(rest if named else text)
        if not named:
            slot = guess_slot(path)
        elif not path.exists():
            raise DataError(str(path), "no such file or folder")
        if slot in inputs:
            raise UserError("--in", f"two inputs for the slot {slot!r}", "one path for each of " + ", ".join(SLOTS))
        inputs[slot] = path
    return inputs


def stage_and_params(name: str, overrides: Sequence[str]) -> tuple[Stage, Params]:
    """The table line and parameters for ``STAGE`` or ``STAGE.METHOD`` with ``--set`` texts, later ones winning.

    Raises:
        ProfileError: unknown stage, method or parameter, or a wrong value.
    """
    from compress.profile import stage_params

    stage, method = name, None
    if not methods(name) and methods(name.rpartition(".")[0]):
        stage, _, method = name.rpartition(".")
    return stage_params(stage, method=method, overrides=overrides)


def _identity(path: Path) -> str:
    if path.is_dir() and (path / "config.json").is_file():
        return identities.model_identity(path, identities.plain_digest)
    return identities.source_identity(path, identities.plain_digest)


def _as_rows(slot: str, path: Path, scratch: Path) -> Path:
    """``path`` as an artifact folder of rows; files of rows are read into ``scratch``."""
    if slot not in ("data", "test", "reference") or (path.is_dir() and (path / "rows.parquet").is_file()):
        return path
    from compress.data.rows import read_source, write_rows  # loads pyarrow

    folder = scratch / slot
    folder.mkdir()
    write_rows(folder, read_source(path).rows)
    return folder


def _check_out(out: Path, stage: Stage) -> None:
    if out.suffix in ROW_FILES:
        if stage.writes != "data":
            raise UserError("--out", f"{out.name} is a file of rows; {stage.name} writes a {stage.writes}", "a folder")
        if out.exists():
            raise UserError(str(out), "is there already", do="Give another name, or remove it first.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "is there already and not empty", do="Give another name, or remove it first.")


def _missing(stage: Stage, inputs: Mapping[str, Path]) -> None:
    missing = [slot for slot in stage.reads if slot not in inputs]
    if missing:
        raise UserError("--in", f"{stage.name} reads {', '.join(missing)}, not given",
                        " ".join(f"--in {slot}=PATH" for slot in missing))  # fmt: skip
    extra = [slot for slot in inputs if slot not in (*stage.reads, *stage.optional)]
    if extra:
        wanted = ", ".join((*stage.reads, *stage.optional)) or "nothing"
        raise UserError("--in", f"{stage.name} does not read {', '.join(extra)}", wanted)


def _save(made: Path, out: Path) -> None:
    """Move the finished folder ``made`` to ``out``, or write its rows as one file."""
    if out.suffix not in ROW_FILES:
        if out.is_dir():
            out.rmdir()  # empty, checked before
        os.replace(made, out)
        return
    from compress.data.rows import read_dropped, read_rows, write_jsonl

    dropped = [dropped.row.with_scores("dropped", by=dropped.stage, reason=dropped.reason, detail=dropped.detail)
               for dropped in read_dropped(made)]  # fmt: skip
    if dropped:
        write_jsonl(out.with_name(f"{out.stem}.dropped.jsonl"), dropped)
    if out.suffix == ".parquet":
        os.replace(made / "rows.parquet", out)
    else:
        write_jsonl(out, read_rows(made))


def run_stage(request: Request, progress: Progress) -> StageResult:
    """Run ``request`` and leave its output in place, whole or not at all.

    Raises:
        UserError: an input is missing or not wanted, or the output is there already.
        StoreError: the output cannot be written.
    """
    stage, out = request.stage, request.out
    _missing(stage, request.inputs)
    if "teacher" in stage.uses and request.teacher is None:
        raise UserError("--teacher", f"missing; {stage.name} needs it", "a model folder")
    if out is not None:
        _check_out(out, stage)
    parent = out.absolute().parent if out is not None else Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".edgestill-", dir=parent))
    except OSError as error:
        raise StoreError(str(parent), error.strerror or str(error), do="Give another --out.") from error
    work = parent / f".{stage.name}-{_digest(request)[:16]}.work"
    try:
        result = _run(request, scratch, work, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            work.rmdir()  # empty: there is nothing to go on from
    shutil.rmtree(work, ignore_errors=True)  # only after success: a failed or killed run goes on from it
    return result


def _digest(request: Request) -> str:
    inputs = {slot: _identity(path) for slot, path in request.inputs.items()}
    teacher = None if request.teacher is None else _identity(request.teacher)
    target = None if request.target is None else request.target.model_dump(mode="json")
    return identities.digest_of(
        {
            "stage": request.stage.name,
            "version": request.stage.version,
            "params": request.params.model_dump(mode="json"),
            "inputs": inputs,
            "teacher": teacher,
            "target": target,
            "seed": request.seed,
        }
    )


def _run(request: Request, scratch: Path, work: Path, progress: Progress) -> StageResult:
    stage = request.stage
    made = scratch / "out"
    made.mkdir()
    work.mkdir(exist_ok=True)
    threads = request.threads or doctor.cores()
    teacher = None
    if request.teacher is not None and stage.wants_teacher:
        from compress.teachers import open_teacher  # loads when a stage uses it

        teacher = open_teacher(request.teacher, threads=threads)
    context = StageContext(
        name=stage.name,
        inputs={slot: _as_rows(slot, path, scratch) for slot, path in request.inputs.items()},
        out=made,
        work=work,
        seed=request.seed,
        progress=progress,
        teacher=teacher,
        target=request.target,
        threads=threads,
    )
    result = load_function(stage)(request.params, context)
    if request.out is not None:
        _save(made, request.out)
    return result
