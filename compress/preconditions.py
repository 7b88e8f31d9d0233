"""What a plan refuses because the run would refuse it, perhaps hours later: what a step needs of its surroundings.

`check_step`, `check_measuring`, `check_export` and `check_sources` are called while a plan is made, by ``plan`` and
``run`` alike, and know the profile, the parameters and what fills the slots, no rows and no weights. A stage still
checks for itself what it is given, since `compress.single` runs it without a plan. Loads no heavy package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress import doctor, hub
from compress.errors import ProfileError

if TYPE_CHECKING:
    from compress.context import Params
    from compress.profile import Profile
    from compress.stages import Stage

TEXT_SUFFIXES = (".txt", ".text")
# What reads the teacher's own log-probabilities, states or tokens; an endpoint and a recording have none to show.
WANT_WEIGHTS = {
    *("model.distillation.cross_tokenizer", "model.distillation.classifier", "model.distillation.gkd"),
    *("model.distillation.minillm", "model.distillation.speculative", "data.synthesis.magpie"),
}
MADE_TEXT = ("gkd", "minillm", "speculative")  # they train on answers that the student or both write on the way
ANSWERED = (
    "data.selection.ifd",
    "data.quality.mislabel",
    "model.distillation.classifier",
)  # they want answers or labels


def teacher_kind(spec: str) -> Literal["endpoint", "recording", "model"]:
    """What ``spec`` names: an endpoint, a file of recorded replies, or a model (a folder, a hub name)."""
    if "://" in spec:
        return "endpoint"
    return "recording" if Path(spec).is_file() else "model"


def check_step(where: str, stage: Stage, params: Params, filled: Mapping[str, Any], profile: Profile) -> None:
    """Refuse a step whose parameters ask for what the profile or the steps before it do not give.

    ``filled`` maps the slots that the step will see to what fills them.

    Raises:
        ProfileError: there is no model, weights, target, answers or fitting hardware where the step needs it.
        MissingExtraError: it needs a package that is not installed.
    """
    doctor.check_extras(params, where)
    _check_start(where, stage, params, filled)
    _check_teacher(where, stage, params, profile)
    _check_hardware(where, stage, params, profile)
    if stage.name in ANSWERED and _is_text(profile, profile.data.pool):
        got = f"the rows of {Path(str(profile.data.pool)).name} are texts, without answers or labels"
        raise ProfileError(where, got, "chat rows, with a prompt and an answer", "Take this step out for texts.")
    budgets = [getattr(params, name, 0) for name in ("budget_bits", "budget_bytes")]
    if stage.name == "model.quantization.mixed" and budgets == [None, None] and profile.target is None:
        raise ProfileError(f"{where}.budget_bits", "no budget and no target to take it from",
                           "budget_bits, budget_bytes, or a profile that names a target")  # fmt: skip


def _check_start(where: str, stage: Stage, params: Params, filled: Mapping[str, Any]) -> None:
    """Refuse to go on from a model that is not there, or that is no model."""
    if "model" in filled:
        return
    if stage.stage == "model.distillation" and getattr(params, "init", "") == "checkpoint":
        raise ProfileError(f"{where}.init", "checkpoint, but no step before this one leaves a model",
                           "teacher_layers or scratch, or a step that leaves a model before this one")  # fmt: skip
    if getattr(params, "scorer", "") == "student":
        raise ProfileError(f"{where}.scorer", "student, but no step before this one makes a model", "teacher",
                           "Move this step down.")  # fmt: skip


def _check_teacher(where: str, stage: Stage, params: Params, profile: Profile) -> None:
    """Refuse a teacher of the wrong kind."""
    if profile.teacher is None or not stage.wants_teacher:
        return
    own = teacher_kind(profile.teacher)
    if own == "model":
        return
    wants = stage.name in WANT_WEIGHTS or getattr(params, "embedding", "") == "teacher"
    wants = wants or getattr(params, "scorer", "") == "teacher" or getattr(params, "teacher", "") == "pipeline"
    if stage.name == "model.distillation.logits":
        goes_on = getattr(params, "init", "") == "checkpoint"
        wants = not getattr(params, "mixture", {}) and not (own == "endpoint" and goes_on)
    if wants:
        refuse_kind(where, profile.teacher)


def refuse_kind(where: str, spec: str) -> None:
    """Refuse a teacher that has no weights to show, where they are needed.

    Raises:
        ProfileError: it is an endpoint or a recording.
    """
    kind = teacher_kind(spec)
    if kind != "model":
        raise ProfileError(where, f"it needs the teacher's own weights or tokens, and the teacher is {_said(kind)}",
                           "a teacher given as a model folder or hub name")  # fmt: skip


def _said(kind: str) -> str:
    return "an endpoint" if kind == "endpoint" else "a file of recorded replies"


def _check_hardware(where: str, stage: Stage, params: Params, profile: Profile) -> None:
    """Refuse several processes, or parts of weights, for what one process alone can do."""
    hardware = profile.hardware
    if stage.stage != "model.distillation" or hardware.processes == 1:
        return
    other = "text that the student writes" if stage.method in MADE_TEXT else ""
    other = "a loss on classes" if stage.method == "classifier" else other
    if stage.method == "cross_tokenizer" and getattr(params, "loss", "spelled") != "spelled":
        other = f"loss: {getattr(params, 'loss', '')}"
    if other:
        raise ProfileError("hardware.processes", f"{hardware.processes} processes, and {where} trains on {other}",
                           "1", "Set hardware.processes to 1.")  # fmt: skip
    if hardware.sharding != "full":
        return
    for there, got in (
        (getattr(params, "optimizer", "") == "muon", "optimizer: muon, which steps by whole matrices"),
        (getattr(params, "hidden_weight", 0), "hidden_weight"),
        (getattr(params, "attention_weight", 0), "attention_weight"),
        (getattr(params, "lora_rank", 0), "adapters (lora_rank)"),
    ):
        if there:
            raise ProfileError("hardware.sharding", f"full, and {where} has {got}", "none", "Or change the step.")


def check_measuring(profile: Profile) -> None:
    """Refuse evaluations that cannot be made.

    Raises:
        ProfileError: the teacher cannot be measured, or the test rows are texts where calls are looked for.
    """
    tasks = (profile.evaluate or {}).get("tasks", ())
    if profile.teacher is not None and teacher_kind(profile.teacher) != "model":
        kind = _said(teacher_kind(profile.teacher))
        raise ProfileError("teacher", f"{kind} cannot be measured: it gives no logits of a whole row", "a model folder",
                           "Leave out data.test and gate, or set evaluate: null.")  # fmt: skip
    if "function_call" in tasks and _is_text(profile, profile.data.test):
        got = f"function_call, and the rows of {Path(str(profile.data.test)).name} are texts without answers"
        raise ProfileError("evaluate.tasks", got, "perplexity, agreement", "Take function_call out.")


def check_export(profile: Profile, params: Params, *, quantized_by_step: bool, from_teacher: bool) -> None:
    """Refuse formats that the model, the target or this machine cannot give.

    Raises:
        ProfileError: codes are missing for the format gptq, the target does not run a format, or there are no weights.
        UserError: the environment of the back-end optimum is missing.
    """
    formats = getattr(params, "formats", ())
    if from_teacher and profile.teacher is not None:
        refuse_kind("export", profile.teacher)
    config = hub.config_at_hand(profile.teacher) if from_teacher and profile.teacher is not None else None
    quantized = quantized_by_step or bool((config or {}).get("quantization_config"))
    unknown = from_teacher and config is None  # a hub model that is not here yet
    if "gptq" in formats and not quantized and not unknown:
        raise ProfileError("export.formats", "gptq, and the model is not quantized", "codes, for the format gptq",
                           "Put model.quantization into steps, or leave gptq out of the formats.")  # fmt: skip
    if getattr(params, "backend", "") == "optimum":
        from deploy.export.optimum import interpreter  # loads onnx, for those who ask for this back-end alone

        interpreter()
    if profile.target is None:
        return
    from deploy.targets import load_target  # the package loads when a profile names a target

    target = load_target(profile.target)
    missing = [form for form in formats if form not in target.formats]
    if missing:
        raise ProfileError("export.formats", f"{missing[0]}, which target {target.name} does not run",
                           f"one of {', '.join(target.formats)}")  # fmt: skip


def check_sources(profile: Profile) -> None:
    """Refuse columns of the user's rows that have no meaning, and a teacher's file that is no recording.

    Raises:
        ProfileError: a name in ``data.columns`` is none of ours.
        DataError: the file that a teacher names holds no recorded replies.
    """
    if profile.data.columns:
        from compress.data.records import CANONICAL

        unknown = sorted(set(profile.data.columns) - set(CANONICAL))
        if unknown:
            raise ProfileError("data.columns", f"unknown names {', '.join(unknown)}", ", ".join(CANONICAL))
    for name, spec in {"teacher": profile.teacher or "", **profile.teachers}.items():
        if spec and teacher_kind(spec) == "recording":
            if Path(spec).suffix != ".jsonl":
                raise ProfileError(name, f"{spec} is a file", "a model folder, a hub name, http://HOST/v1#MODEL or a "
                                   ".jsonl file of recorded replies")  # fmt: skip
            from compress.teachers import RecordedTeacher

            RecordedTeacher(Path(spec))


def _is_text(profile: Profile, place: str | None) -> bool:
    """Whether the rows at ``place`` are plain texts, as far as names tell."""
    if place is None:
        return False
    form = profile.data.format
    return form == "text" or (form == "auto" and Path(place).suffix in TEXT_SUFFIXES and Path(place).is_file())
