"""From a profile to a plan: the list of stages to run, each with its inputs and its artifact key.

`plan` adds to the profile's steps what they imply: reading the sources, evaluating the teacher and the model after
every step that changes it (for the loss ledger), export, evaluation of the bundle in the device's runtime, the gate
and the benchmarks. All keys are known before anything runs, because a key holds the keys of its inputs, not their
contents. Knows no stage by its code: names and slots come from the table. Loads no heavy package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress import doctor, hub, identities, preconditions
from compress.endpoint_address import is_address, parse_address
from compress.errors import ProfileError
from compress.names import OWN_TEACHER
from compress.stages import STAGES, Stage, find, params_model

if TYPE_CHECKING:
    from compress.context import Params
    from compress.profile import Profile
    from compress.store import Store

ROLES = {"pool": "data", "test": "test", "reference": "reference"}  # role in `data` -> slot that it fills
FORMAT = 1  # of the key itself; raise it when what goes into a key changes


@dataclass(frozen=True, slots=True)
class Outside:
    """An input from outside the store: its place, and the digest of its content."""

    path: Path
    key: str


@dataclass(frozen=True, slots=True)
class Node:
    """One stage of a plan.

    ``name`` is unique in its plan. ``inputs`` maps slots to other nodes or outside things. ``step`` is the index
    in the profile's steps, None for the implied stages. ``facts`` is what ``key`` is the digest of.
    """

    name: str
    stage: Stage
    params: Params
    inputs: Mapping[str, Node | Outside]
    step: int | None
    seed: int
    key: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a profile comes down to: ``nodes`` in the order of execution, and the outside facts they use."""

    profile: Profile
    nodes: tuple[Node, ...]
    facts: Facts
    roles: Mapping[str, Node | Outside] = field(default_factory=dict)  # "teacher", "student", "bundle", "verdict", ...


class Facts:
    """The outside facts of a profile and their digests, each looked up when first asked for."""

    def __init__(self, profile: Profile, store: Store, *, fetch: bool = False) -> None:
        self.profile, self.store, self.fetch = profile, store, fetch

    @cached_property
    def teacher(self) -> Outside | None:
        """The teacher's folder (or endpoint) and identity."""
        return None if self.profile.teacher is None else self._outside(self.profile.teacher)

    @cached_property
    def teachers(self) -> dict[str, Outside]:
        """The profile's other teachers by name."""
        return {name: self._outside(spec) for name, spec in self.profile.teachers.items()}

    def _outside(self, spec: str) -> Outside:
        """Place and identity of one teacher."""
        if is_address(spec):
            parse_address(spec)
            return Outside(Path(spec), identities.digest_of({"endpoint": spec}))
        if Path(spec).is_file():  # recorded replies
            return Outside(Path(spec), self.store.file_digest(Path(spec)))
        folder = hub.local_folder(spec)
        if hub.is_hub_name(spec) and not (folder and hub.is_whole(folder)):
            if not self.fetch:
                key = identities.digest_of({"hub": spec})  # nothing more is known of it before it is fetched
                return Outside(folder or Path(spec), key)
            from compress.teachers import fetch_hub_model  # a plan alone never fetches

            folder = fetch_hub_model(spec)
        place = folder or Path(spec)
        return Outside(place, identities.model_identity(place, self.store.file_digest))

    @cached_property
    def target(self) -> Any:
        """The target's facts (``deploy.targets.Target``), or None."""
        if self.profile.target is None:
            return None
        from deploy.targets import load_target  # the package loads when a profile names a target

        return load_target(self.profile.target)

    @cached_property
    def threads(self) -> int:
        """CPU threads that stages use."""
        wanted = self.profile.hardware.threads
        return doctor.cores() if wanted == "auto" else int(wanted)

    @cached_property
    def device(self) -> dict[str, Any]:
        """Facts of this machine."""
        return doctor.machine(self.threads)

    def identity(self, use: str, stage: Stage) -> str | None:
        """Digest of one outside fact that ``stage`` uses; None where the profile has none.

        Raises:
            ProfileError: the stage needs a teacher and the profile names none.
        """
        if use == "teacher?" and self.teacher is None:
            return None
        if use in ("teacher", "teacher?", "tokenizer"):
            if self.teacher is None:
                raise ProfileError("teacher", f"missing; {stage.name} needs it", do="Give a model folder as teacher.")
            if use != "tokenizer":
                return self.teacher.key
            return identities.tokenizer_identity(self.teacher.path, self.store.file_digest)
        if use == "target":
            return None if self.target is None else identities.digest_of(self.target.model_dump(mode="json"))
        if use == "device":
            return identities.device_identity(self.device)
        raise AssertionError(f"table line {stage.name}: unknown use {use!r}")


def validated(stage: Stage, values: Mapping[str, Any], where: str) -> Params:
    """``values`` as the stage's params model.

    Raises:
        ProfileError: unknown key, wrong type or value out of range, named by its dotted key.
    """
    try:
        return params_model(stage).model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([where, *(str(part) for part in first["loc"])])
        allowed = ", ".join(params_model(stage).model_fields) if first["type"] == "extra_forbidden" else ""
        raise ProfileError(place, f"{first['msg']} (got {first['input']!r})", allowed) from error


def named_teachers(params: Params) -> list[str]:
    """Names of the profile's ``teachers`` that a step learns from; its own ``teacher`` is not among them."""
    return [name for name in getattr(params, "mixture", {}) if name != OWN_TEACHER]


class _Builder:
    """Grows the list of nodes; ``data`` and ``model`` are the two slots that steps read and replace."""

    def __init__(self, profile: Profile, store: Store, table: Sequence[Stage], *, fetch: bool) -> None:
        self.profile, self.store, self.table = profile, store, table
        self.facts = Facts(profile, store, fetch=fetch)
        self.nodes: list[Node] = []
        self.slots: dict[str, Node | Outside] = {}
        self.roles: dict[str, Node | Outside] = {}
        self.evaluations: dict[str, Node | Outside] = {}

    def add(
        self,
        stage: Stage,
        params: Params,
        inputs: Mapping[str, Node | Outside],
        *,
        step: int | None = None,
        of: str = "",
    ) -> Node:
        """Append one node; ``of`` tells two nodes of the same stage apart."""
        facts: dict[str, Any] = {
            "format": FORMAT,
            "stage": stage.stage,
            "method": stage.method,
            "version": stage.version,
            "params": identities.params_identity(
                params.model_dump(mode="json"), params.tokenizer_folders, self.store.file_digest
            ),
            "inputs": {slot: source.key for slot, source in inputs.items()},
            "seed": self.profile.seed,
            "uses": {use: self.facts.identity(use, stage) for use in stage.uses},
        }
        others = {name: self.facts.teachers[name].key for name in named_teachers(params)}
        if others:
            facts["teachers"] = others
        key = self.store.key(facts)
        name = f"{stage.name} {of}".strip()
        taken = sum(1 for node in self.nodes if node.name == name or node.name.startswith(f"{name} #"))
        if taken:
            name = f"{name} #{taken + 1}"
        node = Node(name, stage, params, dict(inputs), step, self.profile.seed, key, facts)
        self.nodes.append(node)
        return node

    def implied(self, stage: str, method: str, values: Mapping[str, Any], inputs: Mapping[str, Node | Outside],
                *, where: str, of: str = "") -> Node:  # fmt: skip
        """Append a node that the profile's steps imply."""
        line = find(stage, method, self.table)
        return self.add(line, validated(line, values, where), inputs, of=of)

    def sources(self) -> None:
        """Read pool, test and reference."""
        preconditions.check_sources(self.profile)
        data = self.profile.data
        values = {name: getattr(data, name) for name in type(data).model_fields if name not in ROLES}
        for role, slot in ROLES.items():
            place = getattr(data, role)
            if place is None:
                continue
            source = Outside(Path(place), identities.source_identity(Path(place), self.store.file_digest))
            node = self.implied("data.source", "read", values | self._split(role, place), {"source": source},
                                where="data", of=f"of {role}")  # fmt: skip
            self.slots[slot] = self.roles[role] = node

    def _split(self, role: str, place: str) -> dict[str, str]:
        """The split of a role that the profile's ``data.split`` does not decide: test rows are never trained on."""
        shared = self.profile.data.pool == self.profile.data.test
        if role == "test" and (shared or not Path(place).exists()):
            return {"split": "test"}
        return {"split": "train"} if role == "pool" and shared and self.profile.data.split is None else {}

    def evaluate(self, method: str, slot: str, label: str) -> None:
        """Measure what fills ``slot``; skipped without test rows or without tasks."""
        values = self.profile.evaluate
        if "test" not in self.slots or values is None:
            return
        preconditions.check_measuring(self.profile)
        inputs = {"test": self.slots["test"]}
        if method != "teacher":
            inputs[slot] = self.slots[slot]
        line = find("evaluate", method, self.table)
        inputs |= {name: self.slots[name] for name in line.optional if name in self.slots}
        values = self._held_to_context() | self._table_of_functions() | values
        node = self.implied("evaluate", method, values, inputs, where="evaluate",
                            of="" if method != "model" else f"after {label}")  # fmt: skip
        self.evaluations[f"evaluation.{len(self.evaluations):02d}.{label}"] = node

    def _table_of_functions(self) -> dict[str, Any]:
        """The functions that the bundle is told of, where the profile names them: every model is held against them."""
        functions = (self.profile.export or {}).get("functions")
        return {} if functions is None else {"functions": functions}

    def _held_to_context(self) -> dict[str, int]:
        """The bundle's context, where the profile sets one: every model is measured on what it can take."""
        export, target = self.profile.export, self.facts.target
        context = None if export is None else export.get("context_tokens") or (target and target.context_tokens)
        return {} if context is None else {"context_tokens": int(context)}

    def step(self, index: int, stage: str, method: str | None, values: Mapping[str, Any]) -> None:
        """Append one step of the profile, and the evaluation of the model when it changed."""
        where = f"steps[{index}]"
        line = find(stage, method, self.table, where=where)
        params = validated(line, values, f"{where}.{stage}")
        inputs: dict[str, Node | Outside] = {}
        for slot in line.reads:
            if slot == "model" and slot not in self.slots and self.facts.teacher is not None:
                preconditions.refuse_kind(f"{where}.{stage}", str(self.profile.teacher))
                inputs[slot] = self.facts.teacher  # the first step on a model starts from the teacher itself
            elif slot in self.slots:
                inputs[slot] = self.slots[slot]
            else:
                need = {"data": "data.pool", "model": "teacher"}.get(slot, f"data.{slot}")
                raise ProfileError(where, f"{line.name} reads the slot {slot!r}, which is empty", do=f"Give {need}.")
        inputs.update({slot: self.slots[slot] for slot in line.optional if slot in self.slots})
        self._check_step(f"{where}.{stage}", line, params, inputs)
        node = self.add(line, params, inputs, step=index)
        self.slots[line.writes] = node
        if line.writes == "model":
            self.evaluate("model", "model", node.name)
            if line.stage != "model.quantization":
                self.roles["student"] = node

    def _check_step(self, where: str, line: Stage, params: Params, inputs: Mapping[str, Node | Outside]) -> None:
        """Refuse now what the stage would refuse in the middle of the run."""
        preconditions.check_step(where, line, params, inputs, self.profile)
        before = inputs.get("model")
        changes = line.writes == "model" and ("model" in line.reads or getattr(params, "init", "") == "checkpoint")
        if changes and isinstance(before, Node) and before.stage.stage == "model.quantization":
            got = f"it stands after {before.name}, steps[{before.step}], and codes cannot be changed"
            raise ProfileError(where, got, "plain weights", f"Put it before steps[{before.step}].")
        if getattr(params, "mix", "") == "reference" and "reference" in line.optional and "reference" not in inputs:
            raise ProfileError(f"{where}.mix", "got reference, but the profile names no reference rows",
                               do="Give data.reference, or set mix: uniform.")  # fmt: skip

    def ship(self) -> None:
        """Export and evaluate the bundle, when there is a model and export is not switched off.

        A teacher that only answers is none: a profile of data steps alone ends with their rows.
        """
        model = self.slots.get("model") or self._teacher_model
        if model is None or self.profile.export is None:
            return
        self.slots["model"] = model
        line = find("deploy.export", None, self.table)
        slots = (*line.reads, *line.optional)
        inputs = {slot: self.slots[slot] for slot in slots if slot in self.slots}
        params = validated(line, self.profile.export, "export")
        quantized = isinstance(model, Node) and model.stage.stage == "model.quantization"
        outside = isinstance(model, Outside)
        preconditions.check_export(self.profile, params, quantized_by_step=quantized, from_teacher=outside)
        bundle = self.add(line, params, inputs)
        self.slots["bundle"] = self.roles["bundle"] = bundle
        self.evaluate("bundle", "bundle", "bundle")

    @property
    def _teacher_model(self) -> Outside | None:
        """The teacher, unless it is an endpoint or a file of replies."""
        teacher = self.facts.teacher
        return None if teacher is None or is_address(str(teacher.path)) or teacher.path.is_file() else teacher

    def judge(self) -> None:
        """The gate over all evaluations; without evaluations there must be no limits."""
        limits = list(self.profile.gate)
        if not self.evaluations:
            if limits:
                raise ProfileError(
                    "gate", "there are limits but nothing is evaluated", do="Give data.test and evaluate."
                )
            return
        self.roles["verdict"] = self.implied("evaluate", "gate", {"limits": limits}, self.evaluations, where="gate")

    def time(self) -> None:
        """Benchmarks of the teacher, the student and the bundle."""
        values = self.profile.bench
        if values is None:
            return
        lengths = {name: value for name, value in values.items() if name in ("prompt_tokens", "new_tokens")}
        self._check_lengths(lengths)
        subjects = {"teacher": self._teacher_model, "student": self.roles.get("student")}
        for subject, source in subjects.items():
            if source is not None and (isinstance(source, Node) or self._has_weights()):
                node = self.implied(
                    "deploy.bench", "checkpoint", lengths, {"model": source}, where="bench", of=f"of {subject}"
                )
                self.roles[f"bench of {subject}"] = node
        if "bundle" in self.slots:
            bundle = {"bundle": self.slots["bundle"]}
            self.roles["bench of bundle"] = self.implied("deploy.bench", "local", values, bundle, where="bench")

    def _has_weights(self) -> bool:
        """Whether the teacher is a model that can be timed here."""
        return self.profile.teacher is not None and preconditions.teacher_kind(self.profile.teacher) == "model"

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Refuse a benchmark that is longer than the model's context, where its config is at hand."""
        config = hub.foretelling_config(self.profile.teacher, self.profile.teacher_config)
        known = {"the model's context": (config or {}).get("max_position_embeddings")}
        if "bundle" in self.slots:
            known["export.context_tokens"] = (self.profile.export or {}).get("context_tokens")
        total = sum(lengths.values())
        for what, most in known.items():
            if most is not None and total > int(most):
                told = " and ".join(f"{name} {value}" for name, value in lengths.items())
                raise ProfileError("bench", f"{told} make {total}", f"at most {most} together, {what}",
                                   "Set them lower.")  # fmt: skip


def plan(
    profile: Profile,
    *,
    store: Store,
    table: Sequence[Stage] = STAGES,
    until: str | None = None,
    fetch: bool = False,
) -> Plan:
    """The stages that ``profile`` comes down to, in order, with their keys; nothing is run.

    Args:
        table: the stages that exist; tests give their own.
        fetch: get a teacher that is named by its hub name and not on this machine yet.
        until: the last step to keep: an index in ``steps``, a stage, a stage.method or a group such as ``data``.

    Raises:
        ProfileError: a step is unknown, reads an empty slot or has wrong parameters; ``until`` names no step.
        UserError: an endpoint's address or key cannot be used.
        DataError, ModelError, TargetError: a source, the teacher or the target is not there.
    """
    for name, spec in profile.teachers.items():  # those that no step learns from stand in the record as well
        if is_address(spec):
            parse_address(spec, f"teachers.{name}")
    builder = _Builder(profile, store, table, fetch=fetch)
    builder.sources()
    if builder.facts.teacher is not None:
        builder.evaluate("teacher", "teacher", "teacher")
    for index, step in enumerate(profile.steps):
        builder.step(index, step.stage, step.method, step.params)
    builder.ship()
    builder.judge()
    builder.time()
    if builder.facts.teacher is not None:
        builder.roles["teacher"] = builder.facts.teacher
    nodes = builder.nodes if until is None else _until(builder.nodes, until)
    return Plan(profile, tuple(nodes), builder.facts, builder.roles)


def _until(nodes: list[Node], until: str) -> list[Node]:
    """The nodes up to the last one that ``until`` names, with the evaluation that follows it."""
    last = -1
    for at, node in enumerate(nodes):
        names = {node.name, node.stage.name, node.stage.stage, node.stage.stage.split(".")[0]}
        if until in names or (node.step is not None and until == str(node.step)):
            last = at
    if last < 0:
        known = ", ".join(dict.fromkeys(node.stage.name for node in nodes))
        raise ProfileError("--until", f"no step is called {until!r}", f"one of {known}, or an index of steps")
    if last + 1 < len(nodes) and nodes[last + 1].name == f"evaluate.model after {nodes[last].name}":
        last += 1
    return nodes[: last + 1]
