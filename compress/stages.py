"""The literal table of every stage: what it is called, what it reads and writes, and where its code lives.

`find` looks a line up by stage and method, `params_model` and `load_function` import what the line names, on
use. Adding a method is one function, one params model, one line here, one test and one row in docs/methods.md.
There is no discovery and no registration by import. This module imports neither torch nor pydantic, and knows
nothing of profiles, keys or the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from compress.errors import ProfileError
from compress.names import nearest

if TYPE_CHECKING:
    from compress.context import Params, StageContext, StageResult


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the table.

    Attributes:
        stage: the kind of work, as written in a profile: ``data.selection``.
        method: which way of doing it: ``dedup``.
        params: ``module:Class`` of the pydantic model of its parameters; the module must not import torch.
        function: ``module:function``, called with ``(params, context)``.
        version: part of the artifact key; raise it when the same inputs give another result than before.
        reads: slots that must be there.
        optional: slots that are handed over when they are there.
        writes: the slot that the artifact fills.
        uses: outside facts that the stage sees and its key therefore holds: ``teacher`` (weights, tokenizer and
            chat template), ``tokenizer`` (those two alone), ``target``, ``device`` (this machine and its threads).
            ``teacher?`` where there is one.
        default: whether it is the method of its stage where none is named.
        summary: one line for ``edgestill ls stages``.
    """

    stage: str
    method: str
    params: str
    function: str
    version: int = 1
    reads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    writes: str = "data"
    uses: tuple[str, ...] = ()
    default: bool = False
    summary: str = ""

    @property
    def wants_teacher(self) -> bool:
        """Whether the stage is given the teacher when there is one."""
        return "teacher" in self.uses or "teacher?" in self.uses

    @property
    def name(self) -> str:
        """``stage.method``, the name in run records and in reasons of dropped rows."""
        return f"{self.stage}.{self.method}"


STAGES: tuple[Stage, ...] = (
    Stage(
        "data.source",
        "read",
        "compress.ingestion_params:SourceParams",
        "compress.ingestion:read",
        version=2,
        reads=("source",),
        summary="read JSONL, Parquet, text or a datasets folder into canonical rows",
    ),
    Stage(
        "data.selection",
        "dedup",
        "compress.data.selection.params:DedupParams",
        "compress.data.selection.static:dedup",
        version=2,
        reads=("data",),
        summary="drop exact and MinHash near duplicates",
    ),
    Stage(
        "data.selection",
        "heuristics",
        "compress.data.selection.params:HeuristicsParams",
        "compress.data.selection.static:heuristics",
        version=2,
        reads=("data",),
        summary="drop rows by length, repetition and character set, each with its reason",
    ),
    Stage(
        "data.selection",
        "ifd",
        "compress.data.selection.params:IfdParams",
        "compress.data.selection.static:ifd",
        version=3,
        reads=("data",),
        optional=("model",),
        uses=("teacher",),
        summary="keep rows by instruction-following difficulty (Cherry, Superfiltering)",
    ),
    Stage(
        "data.quality",
        "mislabel",
        "compress.data.quality.params:MislabelParams",
        "compress.data.quality.stabilization:mislabel",
        version=3,
        reads=("data",),
        uses=("teacher",),
        summary="find rows whose answer the teacher contradicts; drop or relabel them",
    ),
    Stage(
        "data.quality",
        "stabilize",
        "compress.data.quality.params:StabilizeParams",
        "compress.data.quality.stabilization:stabilize",
        version=2,
        reads=("data",),
        optional=("reference",),
        uses=("teacher?",),
        summary="bring the mix of functions or clusters towards a reference mix",
    ),
    Stage(
        "data.synthesis",
        "magpie",
        "compress.data.synthesis.params:MagpieParams",
        "compress.data.synthesis.instruction:magpie",
        reads=("data",),
        uses=("teacher",),
        default=True,
        summary="let the teacher invent requests from its bare template and answer them",
        version=2,
    ),
    Stage(
        "data.synthesis",
        "impossible",
        "compress.data.synthesis.params:ImpossibleParams",
        "compress.data.synthesis.impossible:impossible",
        reads=("data",),
        uses=("teacher",),
        summary="pair a weak model's samples and keep pairs that say the same in other words",
        version=2,
    ),
    Stage(
        "data.condensation",
        "k_center",
        "compress.data.condensation.params:KCenterParams",
        "compress.data.condensation.k_center:k_center",
        version=2,
        reads=("data",),
        uses=("teacher?",),
        default=True,
        summary="k-center greedy on embeddings down to a row budget",
    ),
    Stage(
        "data.condensation",
        "self_distillation",
        "compress.data.condensation.params:SelfDistillationParams",
        "compress.data.condensation.self_distillation:self_distillation",
        reads=("data",),
        uses=("teacher",),
        summary="let the unpruned model rewrite the answers, kept where the result is the same",
        version=2,
    ),
    Stage(
        "model.distillation",
        "logits",
        "compress.model.distillation.params:LogitsParams",
        "compress.model.distillation.stage:distill",
        version=4,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        default=True,
        summary="train a student on the teacher's logits: cross-entropy and KL",
    ),
    Stage(
        "model.distillation",
        "cross_tokenizer",
        "compress.model.distillation.cross_tokenizer.params:CrossTokenizerParams",
        "compress.model.distillation.cross_tokenizer.stage:distill",
        version=3,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        summary="train a student with another tokenizer on the teacher: spelled tokens, ALM, GOLD or ULD",
    ),
    Stage(
        "model.distillation",
        "classifier",
        "compress.model.distillation.classifier.params:ClassifierParams",
        "compress.model.distillation.classifier.stage:distill",
        version=3,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        summary="train a small student to answer with a class: labels, teacher's classes, attributions",
    ),
    Stage(
        "model.distillation",
        "gkd",
        "compress.model.distillation.on_policy_params:GkdParams",
        "compress.model.distillation.on_policy_stage:gkd",
        version=3,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        summary="train also on the student's own answers, towards the teacher's logits",
    ),
    Stage(
        "model.distillation",
        "minillm",
        "compress.model.distillation.on_policy_params:MiniLlmParams",
        "compress.model.distillation.on_policy_stage:minillm",
        version=3,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        summary="reverse KL of whole answers of the student, by policy gradient",
    ),
    Stage(
        "model.distillation",
        "speculative",
        "compress.model.distillation.on_policy_params:SpeculativeParams",
        "compress.model.distillation.on_policy_stage:speculative",
        version=3,
        reads=("data",),
        optional=("model",),
        writes="model",
        uses=("teacher",),
        summary="train also on answers that the student proposes and the teacher corrects",
    ),
    Stage(
        "model.pruning",
        "structured",
        "compress.model.pruning.params:StructuredParams",
        "compress.model.pruning.structured:prune",
        version=4,
        reads=("data", "model"),
        writes="model",
        uses=("teacher",),
        summary="remove heads, FFN channels and layers by activation importance, then recover",
    ),
    Stage(
        "model.quantization",
        "gptq",
        "compress.model.quantization.params:GptqParams",
        "compress.model.quantization.gptq_stage:quantize",
        version=5,
        reads=("data", "model"),
        writes="model",
        summary="GPTQ: round weights with the error pushed into those not yet rounded",
    ),
    Stage(
        "model.quantization",
        "awq",
        "compress.model.quantization.params:AwqParams",
        "compress.model.quantization.awq_stage:quantize",
        version=3,
        reads=("data", "model"),
        writes="model",
        summary="AWQ: finer weights for large inputs, then rounding to nearest or GPTQ",
    ),
    Stage(
        "model.quantization",
        "mixed",
        "compress.model.quantization.params:MixedParams",
        "compress.model.quantization.mixed_stage:quantize",
        version=3,
        reads=("data", "model"),
        writes="model",
        uses=("target",),
        summary="GPTQ with bits per part chosen by measured sensitivity under a budget of bytes",
    ),
    Stage(
        "model.quantization",
        "rtn",
        "compress.model.quantization.params:RtnParams",
        "compress.model.quantization.gptq_stage:round_to_nearest",
        version=4,
        reads=("model",),
        writes="model",
        summary="round weights to the nearest code, no data needed",
    ),
    Stage(
        "model.quantization",
        "qat",
        "compress.model.quantization.params:QatParams",
        "compress.model.quantization.qat_stage:quantize",
        version=4,
        reads=("data", "model"),
        writes="model",
        uses=("teacher?",),
        summary="train the weights through their rounding, with the model itself as teacher (2 and 3 bits)",
    ),
    Stage(
        "deploy.export",
        "bundle",
        "deploy.params:ExportParams",
        "deploy.export.stage:export",
        version=6,
        reads=("model",),
        optional=("data",),
        writes="bundle",
        uses=("target",),
        summary="write the ONNX bundle, the GPTQ checkpoint and the GGUF file from the same codes; prove parity",
    ),
    Stage(
        "evaluate",
        "teacher",
        "compress.assessment_params:EvaluateParams",
        "compress.assessment:evaluate_teacher",
        version=3,
        reads=("test",),
        writes="evaluation",
        uses=("teacher",),
        summary="measure the teacher on the test rows",
    ),
    Stage(
        "evaluate",
        "model",
        "compress.assessment_params:EvaluateParams",
        "compress.assessment:evaluate_model",
        version=3,
        reads=("model", "test"),
        optional=("data",),
        writes="evaluation",
        uses=("teacher?",),
        summary="measure a checkpoint on the test rows, and its agreement with the teacher",
    ),
    Stage(
        "evaluate",
        "bundle",
        "compress.assessment_params:EvaluateParams",
        "compress.assessment:evaluate_bundle",
        version=2,
        reads=("bundle", "test"),
        optional=("data",),
        writes="evaluation",
        uses=("teacher?",),
        summary="measure the bundle in the runtime that the device uses",
    ),
    Stage(
        "evaluate",
        "gate",
        "compress.assessment_params:GateParams",
        "compress.judgement:judge",
        version=3,
        reads=("evaluations",),
        writes="verdict",
        summary="intervals row by row against the teacher, the loss ledger, the verdict",
    ),
    Stage(
        "deploy.bench",
        "local",
        "deploy.params:BenchParams",
        "deploy.bench:bench",
        version=4,
        reads=("bundle",),
        writes="bench",
        uses=("target", "device"),
        summary="prefill and decode tokens/s, first-token time and peak memory on this machine",
    ),
    Stage(
        "deploy.bench",
        "checkpoint",
        "compress.assessment_params:CheckpointBenchParams",
        "compress.checkpoint_bench:bench",
        version=2,
        reads=("model",),
        writes="bench",
        uses=("device",),
        summary="the same figures of a checkpoint in torch, for comparison",
    ),
)


def methods(stage: str, table: Sequence[Stage] = STAGES) -> list[str]:
    """Names of the methods that ``stage`` has, in table order; empty when the stage is unknown."""
    return [line.method for line in table if line.stage == stage]


def find(stage: str, method: str | None = None, table: Sequence[Stage] = STAGES, *, where: str = "steps") -> Stage:
    """The table line of ``stage`` and ``method``; the method may be left out when the stage has only one, or a default.

    Raises:
        ProfileError: unknown stage or method (the nearest name is given), or the method is needed and missing.
    """
    known = methods(stage, table)
    if not known:
        stages = list(dict.fromkeys(line.stage for line in table))
        raise ProfileError(where, f"unknown stage {stage!r}", "one of " + ", ".join(stages), nearest(stage, stages))
    if method is None:
        known = [line.method for line in table if line.stage == stage and line.default] or known
        if len(known) > 1:
            raise ProfileError(f"{where}.{stage}", "no method given", "method: " + " | ".join(known))
        method = known[0]
    for line in table:
        if line.stage == stage and line.method == method:
            return line
    raise ProfileError(
        f"{where}.{stage}.method", f"got {method!r}", "one of " + ", ".join(known), nearest(method, known)
    )


def _load(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(import_module(module), name)


def params_model(stage: Stage) -> type[Params]:
    """The pydantic model of the stage's parameters; imports its torch-free module."""
    return cast("type[Params]", _load(stage.params))


def load_function(stage: Stage) -> Callable[[Params, StageContext], StageResult]:
    """The stage's function; imports its module, which may import torch."""
    return cast("Callable[[Params, StageContext], StageResult]", _load(stage.function))
