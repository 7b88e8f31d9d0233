"""Runs one stage alone, outside of the store: from the user's files to a folder or file that the user named.

`run_stage` serves ``edgestill step``, ``export``, ``bench`` and ``eval``. Inputs may be files of rows, artifact
folders, model folders, bundles or evaluations. The output is written beside its place and moved there when it is
whole, and a failure leaves nothing behind, but for what a long stage checkpointed: that is kept under a name that
holds the digest of all inputs and parameters, so that the same command goes on after a kill and another one does not
take it up. Knows no stage by name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import doctor, hub, identities
from compress.context import Params, StageContext, StageResult
from compress.endpoint import Refused
from compress.endpoint_address import is_address, parse_address
from compress.errors import DataError, ModelError, ParityError, StoreError, UserError
from compress.files import file_sha256, place_folder, sync
from compress.names import OWN_TEACHER, is_hub_name, nearest
from compress.progress import Progress
from compress.scratch import held, scratch
from compress.stages import Stage, load_function, methods
from compress.store import check_artifact, check_outside

SLOTS = ("data", "source", "test", "reference", "model", "bundle")
ROW_SLOTS = ("data", "source", "test")  # an unnamed file of rows fills the first of these that the stage reads
MANY, ONE_OF_MANY = "evaluations", "evaluation."  # a slot of the table that takes several folders, each with a name
ROW_FILES = (".jsonl", ".parquet")
# The same inputs end the same way, so there is nothing to go on from. A training that diverged is not among them: its
# message promises that its best weights are kept.
FINAL = (UserError, ParityError)


@dataclass(frozen=True)
class Request:
    """One stage to run: where its inputs lie, and where its output goes (None: nowhere, only the figures count).

    ``teacher`` is text, as in a profile: a model folder, a hub name, an endpoint or a file of recorded replies;
    ``teachers`` are more of them by name.
    """

    stage: Stage
    params: Params
    inputs: Mapping[str, Path]
    out: Path | None = None
    teacher: str | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
    target: Any = None
    seed: int = 0
    threads: int | None = None


def guess_slot(path: Path) -> str:
    """The slot that ``path`` fills: a bundle, a model folder, else data.

    Raises:
        DataError: there is nothing at ``path``.
    """
    present(path)
    if path.is_dir() and (path / "bundle.json").is_file():
        return "bundle"
    return "model" if path.is_dir() and (path / "config.json").is_file() else "data"


def present(path: Path, allowed: str = "") -> None:
    """Raise DataError when nothing is at ``path``."""
    if not path.exists():
        do = "" if path.is_absolute() else f"Relative paths start at the current folder, {Path.cwd()}."
        raise DataError(str(path), "no such file or folder", allowed, do)


def parse_inputs(given: Sequence[str], stage: Stage) -> dict[str, Path]:
    """``--in`` values as slot -> path: ``PATH``, whose slot is guessed, or ``slot=PATH``.

    Evaluations are ``evaluation.NAME=PATH``, in the order of the steps that they follow.

    Raises:
        UserError: a slot is filled twice, or a path is empty.
        DataError: nothing is there.
    """
    inputs: dict[str, Path] = {}
    for text in given:
        slot, separator, rest = text.partition("=")
        named = bool(separator) and (slot in SLOTS or (slot.startswith(ONE_OF_MANY) and slot != ONE_OF_MANY))
        if not (rest if named else text):
            raise UserError("--in", f"got {text!r}, an empty path", "PATH or SLOT=PATH")
        path = Path(rest if named else text)
        if not named:
            slot = _guessed(path, stage, misread=slot if separator else "")
        present(path)
        if slot in inputs:
            raise UserError("--in", f"two inputs for the slot {slot!r}", "one path for each of " + ", ".join(SLOTS))
        inputs[slot] = path
    return {_numbered(slot, at): path for at, (slot, path) in enumerate(inputs.items())}


def parse_teachers(given: Sequence[str]) -> dict[str, str]:
    """``--teachers`` values, each ``NAME=TEACHER``, as name -> teacher.

    Raises:
        UserError: not of that form, or a name twice or that of ``--teacher``.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, spec = text.partition("=")
        if not name or not spec or name in found or name == OWN_TEACHER:
            raise UserError("--teachers", f"got {text!r}", f"NAME=TEACHER, each name once and none {OWN_TEACHER!r}")
        found[name] = spec
    return found


def _numbered(slot: str, at: int) -> str:
    """``evaluation.NAME`` as ``evaluation.NN.NAME``, the form in which the order of slots is that of the steps."""
    if not slot.startswith(ONE_OF_MANY):
        return slot
    return f"{ONE_OF_MANY}{at:02d}.{slot.removeprefix(ONE_OF_MANY)}"


def _guessed(path: Path, stage: Stage, *, misread: str) -> str:
    """The slot of a path that was given without one; ``misread`` is what stood before an equals sign in it."""
    if misread and not path.exists():
        allowed = "PATH, or SLOT=PATH with a slot of " + ", ".join(_spelled(slot) for slot in _slots(stage))
        raise DataError(str(path), "no such file or folder", allowed, nearest(misread, SLOTS))
    slot = guess_slot(path)
    if slot != "data":
        return slot
    wanted = [known for slots in (stage.reads, stage.optional) for known in ROW_SLOTS if known in slots]
    return wanted[0] if wanted else slot  # what the stage needs goes before what it may have


def _slots(stage: Stage) -> tuple[str, ...]:
    return (*stage.reads, *stage.optional)


def _spelled(slot: str) -> str:
    return f"{ONE_OF_MANY}NAME" if slot == MANY else slot


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


def _identity(slot: str, path: Path) -> str:
    """Digest of an input; what is not what its slot takes is refused here, before anything is written."""
    if path.is_dir():
        check_artifact(path)  # what comes from damage is damaged too
    present(path, {"model": "a Hugging Face model folder", "bundle": "a bundle"}.get(slot, ""))
    if slot == "bundle":
        from deploy.bundle import open_bundle  # only the stages that read one need the package

        open_bundle(path, verify=False)
    if slot == "model":
        return identities.model_identity(path, file_sha256)
    return identities.source_identity(path, file_sha256)


def _teacher_identity(spec: str) -> str:
    """Digest of the teacher that ``spec`` names; of an endpoint, or of a hub model that is not here, of the name."""
    if is_address(spec):
        parse_address(spec, "--teacher")
        return identities.digest_of({"endpoint": spec})
    if Path(spec).is_file():  # recorded replies
        return identities.source_identity(Path(spec), file_sha256)
    folder = hub.local_folder(spec)
    if folder is not None:
        return identities.model_identity(folder, file_sha256)
    if is_hub_name(spec, Path()):
        return identities.digest_of({"hub": spec})
    allowed = "a model folder, a hub name owner/name, http://HOST/v1#MODEL, or a .jsonl file of recorded replies"
    raise ModelError(f"--teacher {spec}", "no such file or folder", allowed)


def _as_rows(slot: str, path: Path, temporary: Path, notes: list[str]) -> Path:
    """``path`` as an artifact folder of rows; files are read into ``temporary``, the reader's ``notes`` are added."""
    if slot not in ("data", "test", "reference") or (path.is_dir() and (path / "rows.parquet").is_file()):
        return path
    from compress.data.rows import read_source, write_rows  # loads pyarrow

    folder = temporary / slot
    folder.mkdir()
    found = read_source(path)
    write_rows(folder, found.rows)
    notes += found.notes
    return folder


def check_new(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse a folder to write that has something in it, or lies in one of ``inputs`` or in a store.

    Raises:
        UserError: it does.
    """
    check_outside(out, inputs)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "is there already and not empty", do="Give another name, or remove it first.")


def _check_out(out: Path, stage: Stage, inputs: Iterable[Path]) -> None:
    if out.suffix in ROW_FILES:
        if stage.writes != "data":
            raise UserError("--out", f"{out.name} is a file of rows; {stage.name} writes a {stage.writes}", "a folder")
        if out.exists():
            raise UserError(str(out), "is there already", do="Give another name, or remove it first.")
        check_outside(out, inputs)
    else:
        check_new(out, inputs)


def _missing(stage: Stage, inputs: Mapping[str, Path]) -> None:
    """Refuse inputs that are not those of the table's line."""
    kinds = {MANY if slot.startswith(ONE_OF_MANY) else slot for slot in inputs}
    missing = [slot for slot in stage.reads if slot not in kinds]
    if missing:
        do = "Give one for each step, in the order of the steps; the teacher's is evaluation.teacher=PATH."
        raise UserError("--in", f"{stage.name} reads {', '.join(missing)}, not given",
                        " ".join(f"--in {_spelled(slot)}=PATH" for slot in missing),
                        do if MANY in missing else "")  # fmt: skip
    extra = sorted(_spelled(slot) for slot in kinds - set(_slots(stage)))
    if extra:
        wanted = ", ".join(_spelled(slot) for slot in _slots(stage)) or "nothing"
        raise UserError("--in", f"{stage.name} does not read {', '.join(extra)}", wanted)


def _save(made: Path, out: Path) -> None:
    """Move the finished folder ``made`` to ``out``, or write its rows as one file."""
    if out.suffix not in ROW_FILES:
        if out.is_dir():
            out.rmdir()  # empty, checked before
        place_folder(made, out)
        return
    from compress.data.rows import QUARANTINE, read_dropped, read_rows, write_jsonl

    rows, beside = made / "rows.parquet", []
    if out.suffix != ".parquet":
        rows = made / "rows.jsonl"
        write_jsonl(rows, read_rows(made))
    dropped = [dropped.row.with_scores("dropped", by=dropped.stage, reason=dropped.reason, detail=dropped.detail)
               for dropped in read_dropped(made)]  # fmt: skip
    if dropped:
        write_jsonl(made / "dropped.jsonl", dropped)
        beside.append("dropped.jsonl")
    if (made / QUARANTINE).is_file():
        beside.append(QUARANTINE)
    for name in beside:
        sync(made / name)
        os.replace(made / name, out.with_name(f"{out.stem}.{name}"))
    sync(rows)
    os.replace(rows, out)  # last: when it is there, all is


def run_stage(request: Request, progress: Progress) -> StageResult:
    """Run ``request`` and leave its output in place, whole or not at all.

    Raises:
        UserError: an input is missing, not wanted or not there, or the output is there already; a package is missing.
        StoreError: the output cannot be written.
    """
    stage, out = request.stage, request.out
    _missing(stage, request.inputs)
    doctor.check_extras(request.params, stage.name)
    if "teacher" in stage.uses and request.teacher is None:
        raise UserError("--teacher", f"missing; {stage.name} needs it", "a model folder")
    if out is not None:
        _check_out(out, stage, request.inputs.values())
    digest = _digest(request)  # reads all inputs, and so comes before the first folder is made
    parent = out.absolute().parent if out is not None else Path(tempfile.gettempdir())
    with (
        _beside(parent, None if out is None else parent) as temporary,
        _work(parent / f".{stage.name}-{digest[:16]}.work", temporary / "work") as work,
    ):
        return _run(request, temporary, work, progress)


@contextmanager
def _beside(parent: Path, place: Path | None) -> Iterator[Path]:
    """`scratch` in ``place``; ``parent`` and those above it go again where they were made for it and are not used.

    Raises:
        StoreError: it cannot be made.
    """
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        with ExitStack() as stack:
            try:
                parent.mkdir(parents=True, exist_ok=True)
                temporary = stack.enter_context(scratch(place))
            except OSError as error:
                raise StoreError(str(parent), error.strerror or str(error), do="Give another --out.") from error
            yield temporary
    finally:
        for folder in new:  # the deepest first; one that is not empty holds the output
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _work(place: Path, spare: Path) -> Iterator[Path]:
    """The folder of checkpoints: kept after a failure or a kill from which the same command can go on.

    While another process runs that command, this one works in ``spare``, which nobody goes on from.
    """
    with held(place) as ours:
        work = place / "files" if ours else spare
        work.mkdir(exist_ok=True)
        try:
            yield work
        except Refused:
            raise  # an endpoint that is out of credit or wants another key: the answers before that are paid for
        except FINAL:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            with suppress(OSError):
                work.rmdir()  # empty: there is nothing to go on from
            raise
        else:
            shutil.rmtree(work, ignore_errors=True)
        finally:
            if ours and not work.exists():
                shutil.rmtree(place, ignore_errors=True)


def _digest(request: Request) -> str:
    inputs = {slot: _identity(slot, path) for slot, path in request.inputs.items()}
    teacher = None if request.teacher is None else _teacher_identity(request.teacher)
    target = None if request.target is None else request.target.model_dump(mode="json")
    others = {name: _teacher_identity(request.teachers[name]) for name in _named(request)}
    return identities.digest_of(
        {
            **({"teachers": others} if others else {}),
            "stage": request.stage.name,
            "version": request.stage.version,
            "params": identities.params_identity(
                request.params.model_dump(mode="json"), request.params.tokenizer_folders, file_sha256
            ),
            "inputs": inputs,
            "teacher": teacher,
            "target": target,
            "seed": request.seed,
        }
    )


def _named(request: Request) -> list[str]:
    """Those of ``teachers`` that the parameters name; a name that is not given is the stage's to refuse."""
    return [name for name in getattr(request.params, "mixture", {}) if name in request.teachers]


def _run(request: Request, temporary: Path, work: Path, progress: Progress) -> StageResult:
    stage = request.stage
    made = temporary / "out"
    made.mkdir()
    threads = request.threads or doctor.cores()
    teacher, teachers = None, {}
    if request.teacher is not None and stage.wants_teacher:
        from compress.teachers import open_teacher  # loads when a stage uses it

        teacher = open_teacher(request.teacher, threads=threads)
        teachers = {name: open_teacher(request.teachers[name], threads=threads) for name in _named(request)}
    notes: list[str] = []
    context = StageContext(
        name=stage.name,
        inputs={slot: _as_rows(slot, path, temporary, notes) for slot, path in request.inputs.items()},
        out=made,
        work=work,
        seed=request.seed,
        progress=progress,
        teacher=teacher,
        teachers=teachers,
        target=request.target,
        threads=threads,
    )
    result = load_function(stage)(request.params, context)
    result.notes[:0] = notes
    if request.out is not None:
        _save(made, request.out)
    return result
