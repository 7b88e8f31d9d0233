"""What a plan will take and give: time and memory here, size and speed on the target, and whether it fits there.

`estimate` follows the model's config through the steps of a plan, from ``config.json`` alone: no weights, no rows
read, no torch. Sizes follow from shapes and are near exact; times are rough (within a factor of two or three) and
say so. `Estimate.refuse_misfit` raises when the target cannot hold what would come out. Knows nothing of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from compress import hub
from compress.errors import TargetError
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.cross_tokenizer.shapes import scratch_config
from compress.model.distillation.student_shapes import student_shape
from compress.model.pruning.schedule import final_shape
from compress.model.quantization.layout import choose, untied_by
from compress.model.quantization.params import MixedParams, QatParams, RtnParams
from compress.model.shapes import check_config, parameter_count, with_shape
from compress.plans import Node, Outside, Plan
from compress.run_record import TIME_OF_ALL, TIME_TO_RUN, EstimateRecord

BYTES_PER_TOKEN = 3.5  # of a file of rows; English in JSON lies between 2.5 and 5
ROW_BYTES = 150.0  # mean row of a chat pool, where nothing better is known
TRAINING_SHARE = 0.6  # of the machine's matrix product that training of a small model reaches (0.66 to 0.88 measured)
FORWARD_SHARE = 0.5
# A process with torch and transformers that has run a teacher over batches: 685 MB after evaluating one of 6 million
# parameters, 950 to 1000 MB after scoring a pool with it; the allocator keeps what batches once took.
BASE_BYTES = 800_000_000
# how often the teacher reads all rows; with and without the prompt for IFD, the prompts alone for embeddings
TEACHER_SCANS = {"mislabel": 1.2, "ifd": 1.6, "k_center": 0.6, "stabilize": 0.6}
LAYER_SECONDS = 0.4e-3  # overhead of one layer in one decoding step of torch on a CPU
IMPORT_SECONDS = 6.0  # torch and transformers, once per run
# Matrix product of one core: 88 GFLOP/s measured with AVX-512 (server, 2.6 GHz), the others by width and clock.
CORE_FLOPS = {"avx512f": 80e9, "avx2": 45e9, "avx": 20e9, "asimd": 20e9}
SLOW_CORE_FLOPS = 8e9
ADAM_BYTES = 16  # per parameter in training: weights, gradient and two moments in fp32


@dataclass
class Estimate:
    """What is foretold. ``seconds`` has one entry per node of the plan, None where nothing can be said."""

    seconds: list[float | None] = field(default_factory=list)
    figures: dict[str, tuple[float, str]] = field(default_factory=dict)  # what -> (value, unit)
    notes: list[str] = field(default_factory=list)
    misfits: list[TargetError] = field(default_factory=list)

    def records(self) -> list[EstimateRecord]:
        """The figures in the run record's form; `compare` fills in what was measured."""
        return [
            {"what": what, "unit": unit, "estimated": value, "measured": None}
            for what, (value, unit) in self.figures.items()
        ]

    def refuse_misfit(self) -> None:
        """Raise when what would come out does not fit the target.

        Raises:
            TargetError: the first reason why not.
        """
        if self.misfits:
            raise self.misfits[0]


@dataclass
class _State:
    """The model as it stands at a point of the plan."""

    config: Mapping[str, Any]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # linears of other bits and groups

    @property
    def parameters(self) -> int:
        return parameter_count(self.config)


def machine_flops(device: Mapping[str, Any]) -> float:
    """Operations per second of a float32 matrix product on ``device``, by its instruction set and threads.

    Not measured: beside other work a measurement would be off by more than this is.
    """
    found = set(device["instruction_sets"])
    per_core = next((rate for name, rate in CORE_FLOPS.items() if name in found), SLOW_CORE_FLOPS)
    return per_core * int(device["threads"])


def estimate(plan: Plan) -> Estimate:
    """Follow ``plan`` and foretell; what cannot be said is left out and noted.

    Raises:
        ModelError: the teacher's architecture is not supported, or a step wants a shape that cannot be cut.
    """
    result = Estimate()
    spec = plan.profile.teacher
    config = hub.config_at_hand(spec) if spec is not None else None
    stand_in = plan.profile.teacher_config
    if config is None and stand_in is not None:
        config = hub.foretelling_config(spec, stand_in)
        result.notes.append(f"The teacher {spec} is not on this machine: foretold from {Path(stand_in).name}.")
    if config is None:
        result.notes.append(f"Nothing can be foretold: the config of the teacher {spec} is not on this machine.")
        result.seconds = [None] * len(plan.nodes)
        return result
    check_config(config, where=f"{spec}: config.json")
    walk = _Walk(plan, config, machine_flops(plan.facts.device))
    result.notes += walk.notes
    result.seconds = [walk.seconds(node) for node in plan.nodes]
    _figures(walk, plan, result)
    return result


class _Walk:
    """Goes through the nodes in order and keeps the model's state and the largest memory need."""

    def __init__(self, plan: Plan, teacher: Mapping[str, Any], flops: float) -> None:
        self.plan, self.flops = plan, flops
        self.teacher = _State(teacher)
        self.states: dict[str, _State] = {}  # artifact key -> model
        self.notes: list[str] = []
        self.rows_known = True
        self.rows = self._pool_rows()
        self.peak = BASE_BYTES + 4 * self.teacher.parameters
        self.last = self.teacher
        self.bundle: _State | None = None

    def _pool_rows(self) -> float:
        pool = self.plan.profile.data.pool
        if pool is None or Path(pool).exists():
            return max((_bytes_of(Path(pool)) if pool else 0) / ROW_BYTES, 1.0)
        told = f"How many rows {pool} has is not known before it is fetched:"
        budgets = (getattr(node.params, "rows", None) for node in self.plan.nodes if "condensation" in node.stage.stage)
        budget = next((rows for rows in budgets if rows), None)
        if budget is None:
            self.rows_known = False
            self.notes.append(f"{told} the time of the steps that read them is left out.")
            return 1.0
        self.notes.append(
            f"{told} times are told for {budget}, the budget of data.condensation; the steps before it take longer."
        )
        return float(budget)

    def _tokens(self) -> float:
        """Tokens of the pool."""
        return self.rows * ROW_BYTES / BYTES_PER_TOKEN

    def model_of(self, node: Node) -> _State:
        """The model that ``node`` reads."""
        source = node.inputs.get("model")
        if isinstance(source, Node):
            return self.states.get(source.key, self.last)
        return self.teacher if isinstance(source, Outside) else self.last

    def forward(self, parameters: float, tokens: float) -> float:
        """Seconds of running ``parameters`` forward over ``tokens``."""
        return 2 * parameters * tokens / (self.flops * FORWARD_SHARE)

    def training(self, parameters: float, tokens: float) -> float:
        """Seconds of training ``parameters`` on ``tokens``: forward and backward are three forwards."""
        return 6 * parameters * tokens / (self.flops * TRAINING_SHARE)

    def generating(self, state: _State, rows: float, new_tokens: float) -> float:
        """Seconds of greedy answers to ``rows`` prompts, 32 at a time."""
        new_tokens = new_tokens / 2  # answers end before the limit
        steps = -(-rows // 32) * new_tokens
        return float(steps * int(state.config["num_hidden_layers"]) * LAYER_SECONDS) + self.forward(
            state.parameters, rows * new_tokens
        )

    def seconds(self, node: Node) -> float | None:
        """Time of ``node``, rough; also moves the state on."""
        stage = node.stage.stage
        if stage.startswith("data."):
            data = self._data(node)
            return data if self.rows_known else None
        follow = {
            "model.distillation": self._distillation,
            "model.pruning": self._pruning,
            "model.quantization": self._quantization,
            "evaluate": self._evaluation,
            "deploy.export": self._export,
        }.get(stage)
        if follow is not None:
            return follow(node)
        return 4.0 if stage == "deploy.bench" else None

    def _becomes(self, node: Node, state: _State) -> None:
        self.states[node.key] = self.last = state

    def _data(self, node: Node) -> float:
        """Time of a data stage; also how many rows it leaves, where its parameters say so."""
        values, before = node.params.model_dump(), self._tokens()
        if "draws" in values:  # invented rows: about three draws for each that is kept
            self.rows += values["rows"]
            return self.generating(self.teacher, 3 * values["rows"], values["max_user_tokens"])
        if node.stage.stage == "data.condensation":
            self.rows = min(self.rows, values.get("rows") or self.rows * values.get("share", 1.0))
        elif node.stage.stage == "data.selection":
            self.rows *= values.get("keep", 1.0) if isinstance(values.get("keep"), float) else 1.0
        scans = TEACHER_SCANS.get(node.stage.method, 0.0) if values.get("embedding") != "hashed" else 0.0
        return 0.3 + self.rows / 20_000 + scans * self.forward(self.teacher.parameters, before)

    def _distillation(self, node: Node) -> float | None:
        params: Any = node.params
        if params.init == "checkpoint":
            state = self.model_of(node)
        elif isinstance(params, CrossTokenizerParams):
            state = _State(scratch_config(self.teacher.config, params))
        else:
            start = params.student if isinstance(params, ClassifierParams) else params
            shape, _ = student_shape(self.teacher.config, start, where=node.name)
            config = with_shape(self.teacher.config, shape)
            if params.head_dim is not None:
                config["head_dim"] = params.head_dim
            check_config(config, where=node.name)
            state = _State(config)
        self._becomes(node, state)
        tokens = params.steps * params.batch_tokens if params.steps else params.epochs * self._tokens()
        seen = self._tokens() if isinstance(params, ClassifierParams) or params.targets == "cache" else tokens
        if isinstance(params, ClassifierParams) and params.attribution_weight:
            seen *= 3 * params.attribution_points  # a backward pass costs two forward ones
        self._training_memory(state, params)
        if not self.rows_known and not params.steps:
            return None
        return 3.0 + self.training(state.parameters, tokens) + self.forward(self.teacher.parameters, seen)

    def _pruning(self, node: Node) -> float:
        params: Any = node.params
        before = self.model_of(node)
        shape, _ = final_shape(before.config, params, where=node.name)
        state = _State(with_shape(before.config, shape))
        self._becomes(node, state)
        tokens = params.recovery.steps * params.recovery.batch_tokens
        self._training_memory(before, params.recovery)
        calibration = self.forward(before.parameters, params.calibration_tokens)
        return (
            3.0 + calibration + self.training(state.parameters, tokens) + self.forward(self.teacher.parameters, tokens)
        )

    def _quantization(self, node: Node) -> float:
        before = self.model_of(node)
        params = cast(RtnParams, node.params)
        if isinstance(params, MixedParams):  # which part gets which bits is known once they are measured
            params = params.model_copy(update={"bits": params.likely_bits})
        values = params.model_dump()
        config = untied_by(before.config, params)
        layout = choose(config, params, where=node.stage.name)
        others = {path: (spec.stored_bits, spec.group_size) for path, spec in layout.linears.items()}
        self._becomes(node, _State(config, values, others))
        draws = int(values.get("calibration_draws", 1))
        seconds = 2.0 + self.forward(before.parameters, 4 * draws * values.get("calibration_tokens", 0))
        if isinstance(params, MixedParams):  # four parts in every way, each through half of the layers on average
            ways = 4 * len(params.candidates) * max(1, len(params.groups)) * int(config["num_hidden_layers"])
            seconds += ways * self.forward(before.parameters, params.sensitivity_tokens) / 2
        if isinstance(params, QatParams):
            self._training_memory(before, params)
            tokens = (params.steps + params.scale_steps) * params.batch_tokens
            seconds += self.training(before.parameters, tokens) + self.forward(before.parameters, tokens)
            seconds += self.training(before.parameters, params.block_steps * params.batch_size * params.max_tokens)
        return seconds

    def _export(self, node: Node) -> float:
        self.bundle = self.model_of(node)
        return 6.0 + self.bundle.parameters / 20e6

    def _training_memory(self, state: _State, params: Any) -> None:
        """Raise the peak to what training ``state`` takes; ``params`` has batch_tokens."""
        config, tokens = state.config, params.batch_tokens
        # per token and layer about 16 hidden-sized and 4 FFN-sized float32 values are kept for the backward pass,
        # and three copies of the logits (student, gradient, targets) at the end
        inner = int(config["num_hidden_layers"]) * (
            16 * int(config["hidden_size"]) + 4 * int(config["intermediate_size"])
        )
        activations = 4 * tokens * (inner + 3 * int(config["vocab_size"]))
        need = BASE_BYTES + ADAM_BYTES * state.parameters + 4 * self.teacher.parameters + activations
        self.peak = max(self.peak, need)

    def _evaluation(self, node: Node) -> float:
        if node.stage.method == "gate":
            return 2.0
        values = node.params.model_dump()
        state = self.teacher if node.stage.method == "teacher" else self.model_of(node)
        total = 1.0
        if "function_call" in values["tasks"]:
            total += self.generating(state, values["rows"], values["max_new_tokens"])
        if {"perplexity", "agreement"} & set(values["tasks"]):
            rows = min(values["perplexity_rows"], values["rows"])
            per_row = int(state.config["num_hidden_layers"]) * LAYER_SECONDS * 3
            total += 2 * rows * per_row + self.forward(state.parameters + self.teacher.parameters, rows * 100)
        return total


def _bytes_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def _figures(walk: _Walk, plan: Plan, result: Estimate) -> None:
    """Totals, and what the target makes of the bundle."""
    known = [seconds or 0.0 for seconds in result.seconds]
    missing = [
        seconds for node, seconds in zip(plan.nodes, known, strict=True) if plan.facts.store.lookup(node.key) is None
    ]
    result.figures[TIME_TO_RUN] = (sum(missing) + IMPORT_SECONDS if missing else 0.0, "s")
    result.figures[TIME_OF_ALL] = (sum(known) + IMPORT_SECONDS, "s")
    result.figures["peak memory of the run"] = (float(walk.peak), "bytes")
    result.figures["teacher parameters"] = (float(walk.teacher.parameters), "parameters")
    result.figures["student parameters"] = (float(walk.last.parameters), "parameters")
    memory = plan.facts.device["memory_bytes"]
    if walk.peak > memory:
        result.notes.append(f"The run needs about {walk.peak / 1e9:.1f} GB; this machine has {memory / 1e9:.1f} GB.")
    if walk.bundle is not None:
        _fit(walk.bundle, plan, result)


def _fit(bundle: _State, plan: Plan, result: Estimate) -> None:
    """Size and speed of the bundle on the target, and whether it fits."""
    from deploy import sizing  # targets are read when a profile names one

    precision = sizing.Precision.of_params(bundle.quantization, bundle.others)
    result.figures["bundle size"] = (float(sizing.bundle_bytes(bundle.config, precision)), "bytes")
    target = plan.facts.target
    if target is None:
        result.notes.append("No target is named: fit and speed on a device are not told.")
        return
    result.notes += target.notes
    context = (plan.profile.export or {}).get("context_tokens")
    drawn = plan.profile.export or {}
    last = drawn.get("backend") != "optimum" and drawn.get("last_logits", True)
    found = sizing.estimate(bundle.config, precision, target, context, last_logits=last)
    result.figures[f"peak memory on {target.name}"] = (float(found.peak_memory_bytes), "bytes")
    result.figures[f"decode on {target.name}"] = (found.decode_tokens_per_s, "tokens/s")
    result.figures[f"prefill on {target.name}"] = (found.prefill_tokens_per_s, "tokens/s")
    try:
        sizing.check_fit(found, target)
    except TargetError as error:
        result.misfits.append(error)
    else:
        result.notes.append(f"It fits {target.name} with {found.context_tokens} tokens of context.")
