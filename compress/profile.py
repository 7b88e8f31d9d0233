"""A profile: one YAML file that describes the whole way from a teacher and data to a gated bundle.

`load_profile` reads a file or a built-in profile, applies ``--set`` overrides, validates everything (the parameters
of each step against the table of stages) and lists all mistakes in one message with file, line and dotted key.
`stage_params` does the same for a single stage given by overrides alone; `list_profiles` names what is built in.
Loads no heavy package, opens no row and no model, and knows nothing of keys or the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.assessment_params import METRICS, SIZES, LimitParams, unjudgeable
from compress.context import Params
from compress.errors import ProfileError
from compress.ingestion_params import SourceParams
from compress.names import OWN_TEACHER, is_hub_name, nearest
from compress.overrides import apply
from compress.stages import STAGES, Stage, find, params_model
from compress.validation import check, shown
from compress.yaml_reader import Document, KeyPath, raise_problems, read_yaml_file

SUFFIXES = (".yaml", ".yml")
ROLES = ("pool", "test", "reference")
# How the files of a data folder are called, for `data: FOLDER`; the part of the name before the first of "-_." counts.
ROLE_PREFIXES = {
    "pool": ("pool", "train"),
    "test": ("test", "valid", "validation", "dev"),
    "reference": ("reference",),
}
ROW_SUFFIXES = frozenset({".jsonl", ".parquet", ".txt"})

# Sections whose parameters are those of one line of the table; null switches a section off.
SECTIONS = {
    "export": ("deploy.export", "bundle"),
    "evaluate": ("evaluate", "bundle"),
    "gate": ("evaluate", "gate"),
    "bench": ("deploy.bench", "local"),
}
Given = Annotated[str, Field(pattern=r"\S")]  # an empty path would be the current folder
TeacherName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=40)]
STEP_SLOTS = ("data", "model")  # a step replaces one of these


class DataSources(SourceParams):
    """The user's rows: files, folders or hub names, and how they are read.

    A hub name may pin a commit or tag, ``owner/name@revision``. Without one its artifacts are kept by the name alone:
    what its owner changes later is not seen while they stand in the store. Test rows of the hub are its test split.
    """

    pool: Given | None = Field(None, description="rows to learn from")
    test: Given | None = Field(None, description="rows that the result is judged on; never trained on")
    reference: Given | None = Field(None, description="rows with the wanted mix of functions or topics")


class Hardware(Params):
    """What this machine gives to the work."""

    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="CPU threads; auto takes all cores that the process may use"
    )
    processes: int = Field(
        1, ge=1, le=64, description="processes that train a student together, each with its part of every step's rows"
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="full: each process holds its part of the student's weights, gradients and optimizer state, for "
        "students that one cannot hold; needs processes of 2 or more",
    )

    @model_validator(mode="after")
    def _something_to_share_out(self) -> Hardware:
        if self.sharding == "full" and self.processes == 1:
            raise ValueError(
                "sharding: full shares a student out among processes: give processes, 2 or more, also under a launcher"
            )
        return self


class Step(BaseModel):
    """One entry of ``steps``: a line of the table and its parameters, defaults filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    method: str
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """``stage.method``."""
        return f"{self.stage}.{self.method}"


class _Head(Params):
    """The keys of a profile that are no steps and no sections."""

    edgestill: Literal[1] = Field(description="version of the profile format")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80, description="a short name for runs and reports")
    description: str = Field("", description="what it is for, in a sentence or two")
    seed: int = Field(0, ge=0, lt=2**32, description="the only source of randomness")
    teacher: Given | None = Field(None, description="model folder, hub name or endpoint")
    teachers: dict[TeacherName, Given] = Field(
        default_factory=dict,
        description="more teachers by name, for steps that learn from several or from one of these: as teacher, "
        "of the same tokenizer",
    )
    teacher_config: Given | None = Field(
        None, description="a config.json like the teacher's, so that plan can foretell before a hub model is fetched"
    )
    data: DataSources = Field(
        default_factory=lambda: DataSources.model_validate({}),
        description="rows; a bare path is a file or folder of them",
    )
    target: Given | None = Field(None, description="device: a built-in target's name or a target file")
    hardware: Hardware = Field(default_factory=lambda: Hardware.model_validate({}), description="this machine")


class Profile(_Head):
    """A validated profile. Paths are absolute; sections hold all parameters, defaults filled in.

    ``teacher`` and the rows of ``data`` are absolute paths, or as written when nothing of that name lies beside the
    profile and they look like a hub name or a URL. ``path`` is the file the profile came from.
    """

    steps: tuple[Step, ...] = Field((), description="what is done, in order")
    export: dict[str, Any] | None = Field(None, description="how the bundle is written")
    evaluate: dict[str, Any] | None = Field(None, description="what is measured on the test rows")
    gate: list[dict[str, Any]] = Field(default_factory=list, description="limits that the bundle must keep")
    bench: dict[str, Any] | None = Field(None, description="lengths and repeats of the benchmark")
    path: Path = Field(exclude=True, description="the profile's file")

    def canonical_json(self) -> str:
        """All values with defaults as JSON that is blind to the order of keys in the file."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


KEYS = [name for name in Profile.model_fields if name != "path"]


def built_in_profiles() -> Path:
    """Folder of the profiles that come with edgestill, in a checkout and in an installed wheel."""
    return Path(str(resources.files("profiles")))


def list_profiles() -> dict[str, Path]:
    """Name -> file of every built-in profile."""
    return {file.stem: file for file in sorted(built_in_profiles().glob("*.yaml"))}


def find_profile(path_or_name: str | Path) -> Path:
    """The file that ``path_or_name`` means: a file, else a built-in profile of that name.

    Raises:
        ProfileError: there is neither.
    """
    text, path = str(path_or_name), Path(path_or_name)
    if path.is_file():
        return path
    built_in = list_profiles()
    if text in built_in:
        return built_in[text]
    if path.is_dir():
        raise ProfileError(text, "is a folder", "a profile file such as profiles/quickstart.yaml")
    known = ", ".join(built_in) or "none"
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise ProfileError(text, "no such file", f"a profile file, or a built-in profile: {known}",
                           nearest(path.stem, built_in))  # fmt: skip
    raise ProfileError("profile", f"got {text!r}", f"a file, or one of {known}", nearest(text, built_in))


def load_profile(
    path_or_name: str | Path, *, overrides: Sequence[str] = (), table: Sequence[Stage] = STAGES
) -> Profile:
    """Read, override and validate a profile.

    Args:
        path_or_name: a YAML file, or the name of a built-in profile such as ``quickstart``.
        overrides: ``KEY=VALUE`` texts as of ``--set``; relative paths in them start at the current folder.
        table: the stages that exist; tests give their own.

    Raises:
        ProfileError: anything in the file or the overrides is wrong; the message lists all of it.
    """
    path = find_profile(path_or_name)
    document = read_yaml_file(path)
    if not isinstance(document.value, dict):
        got = "the file is empty" if document.value is None else f"got {shown(document.value)}"
        raise ProfileError(document.source, got, "a mapping that begins with edgestill: 1")
    folder = path.absolute().parent
    _place_paths(document, folder, only=None)
    _expand_data(document, {})
    for text in overrides:
        before = document.value.get("data")
        changed = apply(document, text)
        _place_paths(document, Path.cwd(), only=changed, otherwise=folder)
        if ("data",) in changed:
            _expand_data(document, before if isinstance(before, dict) else {})
    profile = _validated(document, path, table)
    raise_problems(document.problems, document.source)
    assert profile is not None, "a profile without problems is validated"
    return profile


def _validated(document: Document, path: Path, table: Sequence[Stage]) -> Profile | None:
    """The profile, or None with the reasons in ``document.problems``."""
    values = document.value
    later = {"steps", *SECTIONS}
    head = check(_Head, document, (), {key: values[key] for key in values if key not in later}, names=KEYS)
    steps = _steps(document, table, path.absolute().parent)
    sections: dict[str, Any] = {name: _section(document, name, table) for name in SECTIONS}
    if head is not None and not document.problems:
        _check_metrics(document, sections["gate"])
        _check_judgement(document, head, sections)
    if head is not None:
        _check_teachers(document, head, steps)
    if head is None or document.problems:
        return None
    gate = [{name: value for name, value in limit.items() if value is not None} for limit in sections.pop("gate")]
    known = {name: getattr(head, name) for name in _Head.model_fields}
    return Profile(**known, **sections, steps=steps, gate=gate, path=path.absolute())


def _steps(document: Document, table: Sequence[Stage], folder: Path) -> tuple[Step, ...]:
    """The entries of ``steps``, each against its line of the table."""
    entries = document.value.get("steps")
    if entries is None:
        return ()
    if not isinstance(entries, list):
        document.complain(("steps",), f"got {shown(entries)}", "a list of steps such as - data.selection: {...}")
        return ()
    steps = (_step(document, index, entry, table, folder) for index, entry in enumerate(entries))
    return tuple(step for step in steps if step is not None)


def _step(document: Document, index: int, entry: Any, table: Sequence[Stage], folder: Path) -> Step | None:
    path: KeyPath = ("steps", index)
    if not isinstance(entry, dict) or len(entry) != 1:
        document.complain(path, f"got {shown(entry)}", "one stage with its parameters: STAGE: {method: ..., ...}")
        return None
    ((stage, values),) = entry.items()
    values = {} if values is None else values
    if not isinstance(values, dict):
        document.complain((*path, stage), f"got {shown(values)}", "a mapping of parameters")
        return None
    method = values.get("method")
    if method is not None and not isinstance(method, str):
        document.complain((*path, stage, "method"), f"got {shown(method)}", "the name of a method")
        return None
    usable = [line for line in table if line.writes in STEP_SLOTS and line.stage != "data.source"]
    if all(line.stage != stage for line in usable):
        owner = next((section for section, (name, _) in SECTIONS.items() if name == stage), None)
        if owner is not None:
            document.complain((*path, stage), "this is no step", do=f"Give its parameters under {owner}, beside steps.")
            return None
    try:
        line = find(stage, method, usable)
    except ProfileError as error:
        tail = (stage, "method") if error.where.endswith(".method") else (stage,)
        document.complain((*path, *tail), error.got, error.allowed, error.do)
        return None
    model = params_model(line)
    given = {key: values[key] for key in values if key != "method"}
    params = check(model, document, (*path, stage), given, names=["method", *model.model_fields])
    return None if params is None else Step(stage=line.stage, method=line.method, params=_placed(params, folder))


def _placed(params: Params, folder: Path) -> dict[str, Any]:
    """All values, with folders below the profile's ``folder``, or else the current one, as absolute paths."""
    values = params.model_dump()
    given = {name: values[name] for name in params.tokenizer_folders if values[name] is not None}
    return values | {name: _absolute(text, folder, Path.cwd()) for name, text in given.items()}


def _section(document: Document, name: str, table: Sequence[Stage]) -> Any:
    """Parameters of one section with defaults; None when it is switched off. ``gate`` is a list of limits."""
    is_gate = name == "gate"
    given = document.value.get(name, [] if is_gate else {})
    if given is None:
        return [] if is_gate else None
    if not isinstance(given, list if is_gate else dict):
        document.complain((name,), f"got {shown(given)}", "a list of limits" if is_gate else "a mapping of parameters")
        return None
    line = find(*SECTIONS[name], table)
    values = {"limits": given} if is_gate else given
    params = check(params_model(line), document, (name,), values, given=given)
    if params is None:
        return None
    return params.model_dump()["limits"] if is_gate else params.model_dump()


def _check_metrics(document: Document, limits: Sequence[dict[str, Any]]) -> None:
    """Complain of metrics that nothing measures: said now, not by the gate at the end of the run."""
    known = [*(name for names in METRICS.values() for name in names), *SIZES]
    for index, limit in enumerate(limits):
        name = limit["metric"]
        if name not in known:
            document.complain(
                ("gate", index, "metric"), f"got {name!r}", "one of " + ", ".join(known), nearest(name, known)
            )


def _check_teachers(document: Document, head: _Head, steps: Sequence[Step]) -> None:
    """Complain of a name that ``teacher`` has already, and of steps that learn from a teacher that nobody named."""
    if OWN_TEACHER in head.teachers:
        document.complain(("teachers", OWN_TEACHER), "is the name of the profile's own teacher", "another name")
    known = [OWN_TEACHER, *head.teachers]
    for index, step in enumerate(steps):
        for name in step.params.get("mixture", {}):
            if name not in known:
                path: KeyPath = ("steps", index, step.stage, "mixture", name)
                document.complain(path, "no teacher of that name", "one of " + ", ".join(known), nearest(name, known))


def _check_judgement(document: Document, head: _Head, sections: dict[str, Any]) -> None:
    """Complain of limits that nothing could answer, and of a bundle that could be neither measured nor timed."""
    if document.problems:
        return
    export, evaluate = sections["export"], sections["evaluate"]
    for index, values in enumerate(sections["gate"]):
        tasks = [] if evaluate is None else evaluate["tasks"]
        wrong = unjudgeable(
            LimitParams.model_validate(values), tasks, bundle=export is not None, teacher=head.teacher is not None
        )
        if wrong is not None:
            key, got, allowed, do = wrong
            document.complain(("gate", index, key), got, allowed, do)
    formats = (export or {}).get("formats")
    users = [name for name in ("evaluate", "bench") if sections[name] is not None]
    if head.data.test is None:
        users = [name for name in users if name != "evaluate"]  # without test rows nothing is evaluated
    if formats and "onnx" not in formats and users:
        off = " and ".join(f"{name}: null" for name in users)
        document.complain(
            ("export", "formats"), f"got {', '.join(formats)}, but {' and '.join(users)} run the ONNX bundle",
            "onnx among them", f"Add onnx, or set {off}.",
        )  # fmt: skip


def stage_params(
    stage: str, *, method: str | None = None, overrides: Sequence[str] = (), table: Sequence[Stage] = STAGES
) -> tuple[Stage, Params]:
    """The table line and parameters of a single stage from overrides such as ``keep=0.5``; ``method=NAME`` chooses.

    Raises:
        ProfileError: unknown stage, method or parameter, or a wrong value.
    """
    document = Document("--set", value={})
    for text in overrides:
        apply(document, text)
    values: dict[str, Any] = document.value
    chosen = values.pop("method", method)
    if chosen is not None and not isinstance(chosen, str):
        document.complain(("method",), f"got {shown(chosen)}", "the name of a method")
        chosen = None
    raise_problems(document.problems, "--set")
    line = find(stage, chosen, table, where="stage")
    model = params_model(line)
    params = check(model, document, (), values, names=["method", *model.model_fields])
    raise_problems(document.problems, "--set")
    assert params is not None, "parameters without problems are validated"
    return line, params


def _place_paths(
    document: Document, folder: Path, *, only: Sequence[KeyPath] | None, otherwise: Path | None = None
) -> None:
    """Make relative paths absolute: those under ``folder`` that exist, else below ``otherwise``; hub names stay.

    ``only`` restricts this to what an override has just set.
    """
    named = document.value.get("teachers")
    teachers = [("teachers", name) for name in named] if isinstance(named, dict) else []
    roles = [("data", role) for role in ROLES]
    for path in (("teacher",), *teachers, ("teacher_config",), ("data",), *roles, ("target",)):
        if only is not None and not any(path[: len(changed)] == changed for changed in only):
            continue
        holder = document.value if len(path) == 1 else document.value.get(path[0])
        text = holder.get(path[-1]) if isinstance(holder, dict) else None
        if isinstance(text, str) and text.strip() and (path != ("target",) or text.endswith(SUFFIXES)):
            holder[path[-1]] = _absolute(text, folder, otherwise)


def _absolute(text: str, folder: Path, otherwise: Path | None) -> str:
    path = Path(text).expanduser()
    if path.is_absolute() or "://" in text:
        return str(path) if "://" not in text else text
    bases = [base for base in (folder, otherwise) if base is not None]
    for base in bases:
        if (base / path).exists():
            return os.path.abspath(base / path)
    return text if is_hub_name(text, *bases) else os.path.abspath((otherwise or folder) / path)


def _expand_data(document: Document, before: dict[str, Any]) -> None:
    """``data: PATH`` as a mapping; what ``before`` says of formats and columns stays.

    A file is the pool, and test and reference stay as they were. In a folder each role is looked for under the file
    name that it had before, then by the prefixes of `ROLE_PREFIXES`; a folder of one data set (``datasets``) or
    without such names is the pool as a whole.
    """
    given = document.value.get("data")
    if not isinstance(given, str):
        return
    place = document.places.get(("data",))
    values = {key: value for key, value in before.items() if key != "pool"}
    folder = Path(given)
    if folder.is_dir():
        values = {key: value for key, value in values.items() if key not in ROLES}
        values |= {role: str(file) for role in ROLES if (file := _role_file(folder, role, before.get(role)))}
    values.setdefault("pool", given)
    document.value["data"] = values
    if place is not None:
        document.places.update({("data", role): place for role in ROLES if role in values})


def _role_file(folder: Path, role: str, before: Any) -> Path | None:
    if isinstance(before, str) and (folder / Path(before).name).is_file():
        return folder / Path(before).name
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in ROW_SUFFIXES)
    for prefix in ROLE_PREFIXES[role]:
        exact = [file for file in files if file.stem == prefix]
        starting = [file for file in files if file.stem.startswith((f"{prefix}-", f"{prefix}_", f"{prefix}."))]
        if exact or starting:
            return (exact or starting)[0]
    return None
