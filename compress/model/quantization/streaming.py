"""Quantizing a model one decoder layer at a time: the frame that every weight-only quantizer fills with its maths.

`open_job` checks a checkpoint and lays out its bits. `run` takes the hidden states of calibration rows through the
layers; what the quantized layer puts out feeds the next. A `Solver` turns the linears of one step, which share their
inputs, into codes; a `Prepare` may change a layer before that. Peak memory is one layer, its second moments and the
hidden states. Each finished layer lies in ``ctx.work`` and is not done again after a kill. `finish` writes the folder.
Knows nothing of how codes are chosen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from compress.context import StageContext, StageResult
from compress.encoding import load_tokenizer, token_rows
from compress.errors import ModelError
from compress.model.calibration import Batch, TokenIds, padded, sample
from compress.model.checkpoint import check_folder, parameter_count, read_config
from compress.model.distillation.resume import kept_choice
from compress.model.distillation.settings import choose_bf16
from compress.model.layers import linear_path, linears
from compress.model.quantization.blocks import EMBEDDING, HEAD, NORM, BlockStream, read_tensor, tensor_files
from compress.model.quantization.halves import half, halved, scale_bits
from compress.model.quantization.hessians import corrected, paired_moments, position_weights, second_moment
from compress.model.quantization.layout import PLAIN, Layout, LinearSpec, choose, untied_by
from compress.model.quantization.measuring import Check, bits_per_weight
from compress.model.quantization.packing import ROWS_ENTRIES, QuantizedLinear, dequantize, dequantize_rows
from compress.model.quantization.params import GptqParams, RtnParams
from compress.model.quantization.rotation import Rotated, rotate_checkpoint
from compress.model.quantization.rtn import NF3, round_to_nearest
from compress.model.quantization.writing import (
    OUTER_FILE,
    Parts,
    Report,
    halve_rest,
    outer_tensors,
    save_json,
    save_tensors,
    write_folder,
)

CHECK_TOKENS = 8192  # tokens on which loss and divergence of the result are measured


@dataclass(frozen=True)
class Job:
    """One checkpoint that is to be quantized; ``notes`` say what was done to it before."""

    params: RtnParams
    ctx: StageContext
    stream: BlockStream
    layout: Layout
    notes: Sequence[str] = ()
    bf16: bool = False  # the number format of the products that only calibration sees

    def parts(self, name: str) -> Parts:
        """Where the finished layers of the pass ``name`` lie."""
        return Parts(self.ctx.work / name, self.layout)


class Step(NamedTuple):
    """Linears that share their inputs, by path: weights (out, in) fp32, how each is quantized, E[x x'] (in, in)."""

    weights: Mapping[str, torch.Tensor]
    specs: Mapping[str, LinearSpec]
    moment: torch.Tensor


class Solved(NamedTuple):
    """The codes of one linear, and what the solver says of it (JSON values)."""

    layer: QuantizedLinear
    report: Report


# hidden states (B, T, hidden) of each batch: those of the quantized model, and where they are needed the plain one's
States = list[list[torch.Tensor]]
Moments = tuple[torch.Tensor, torch.Tensor | None]  # E[x x'], and E[z x'] where there are plain inputs z
Solver = Callable[[Step], Mapping[str, Solved]]
# (index of the layer, layer, hidden states, position weights): changes the layer in place, its outputs in full
# precision must stay; returns what is to stand in the reports of linears, by path
Prepare = Callable[[int, nn.Module, Sequence[torch.Tensor], Sequence[torch.Tensor]], Mapping[str, Report]]


class Rows(NamedTuple):
    """Batches of calibration, one list per draw, and those on which the result is checked.

    ``held`` has the ids of the rows that are checked and in no draw; ``notes`` say where that could not be kept.
    """

    draws: list[list[Batch]]
    check: list[Batch]
    held: frozenset[str] = frozenset()
    notes: Sequence[str] = ()


def open_job(params: RtnParams, ctx: StageContext) -> Job:
    """Check the checkpoint in slot ``model`` and lay it out.

    Raises ModelError for an unusable or already quantized checkpoint, and for patterns that fit nothing.
    """
    torch.set_num_threads(ctx.threads)
    source = ctx.inputs["model"]
    config = read_config(source)
    if config.get("quantization_config"):
        raise ModelError(str(source), "a quantized checkpoint", "plain weights", "Start from the model before it")
    check_folder(source)
    _settle_tie(source, config)
    notes: list[str] = []
    if params.rotate != "none":
        choose(untied_by(config, params), params, where=ctx.name)  # what is wrong is said before the work
        turned = rotate_checkpoint(source, config, ctx.work / "rotated", mode=params.rotate, seed=ctx.seed)
        source, config, notes = turned.folder, read_config(turned.folder), [_told(turned, params)]
    layout = choose(config, params, where=ctx.name)
    for note in notes + layout.notes:
        ctx.progress.say(f"{ctx.name}: {note}")
    return Job(params, ctx, BlockStream(source, config, ffn=layout.ffn), layout, notes, _bf16(params, ctx, config))


def _bf16(params: RtnParams, ctx: StageContext, config: Mapping[str, Any]) -> bool:
    """Return whether calibration runs in bf16; a resumed run keeps to what it began with."""
    if not isinstance(params, GptqParams):
        return False
    choice = choose_bf16(params.precision, width=int(config["hidden_size"]), training=False, device="cpu")
    return kept_choice(ctx.work / "precision.json", choice)


def _told(turned: Rotated, params: RtnParams) -> str:
    """Return what a rotation did, for the user."""
    said = (
        f"rotated ({params.rotate}): kurtosis of the weights' rows {turned.kurtosis_before:.2f} before, "
        f"{turned.kurtosis_after:.2f} after"
    )
    if not turned.untied:
        return said
    bits = params.embedding_bits if params.lm_head_bits is None else params.lm_head_bits
    return (
        f"{said}; the output head is no longer the embedding, because it took the final norm's gain: "
        f"{turned.untied:,} weights more, {turned.untied * bits // 8:,} bytes at {bits} bits without their scales"
    )


def _settle_tie(source: Path, config: dict[str, Any]) -> None:
    """Make the config's word on tying true: a head stored beside a tied config counts where it differs."""
    files = tensor_files(source)
    if config.get("tie_word_embeddings") and HEAD in files:
        both = [read_tensor(files[name], name) for name in (EMBEDDING, HEAD)]
        config["tie_word_embeddings"] = torch.equal(*both)


def calibration_rows(job: Job, params: GptqParams) -> Rows:
    """Read rows of slot ``data``: up to ``calibration_draws`` disjoint draws, and check rows that no draw holds.

    At most a quarter of the tokens is checked. A single row is both. Raises DataError when no row is left.
    """
    tokenizer = load_tokenizer(job.stream.folder)
    most = job.stream.longest(params.max_tokens)
    rows = token_rows(job.ctx.inputs["data"], tokenizer, max_tokens=most, truncate=True)
    pad = next((i for i in (tokenizer.pad_token_id, job.stream.config.get("pad_token_id")) if i is not None), 0)

    def batched(drawn: Sequence[TokenIds]) -> list[Batch]:
        ordered = sorted(drawn, key=lambda row: len(row.ids))  # rows of one length share a batch
        size = params.batch_size
        return [padded(ordered[i : i + size], pad_id=int(pad)) for i in range(0, len(ordered), size)]

    seed, whole = job.ctx.seed, sum(len(row.ids) for row in rows)
    check = sample(rows, tokens=min(CHECK_TOKENS, whole // 4), seed=seed + 1) or list(rows)[:1]
    taken = {id(row) for row in check}
    rest = [row for row in rows if id(row) not in taken]
    held = frozenset(row.id for row in rows if id(row) in taken)
    if not rest:
        said = f"{len(rows)} row of calibration is checked too: the divergence told is that of rows that were seen"
        return Rows([batched(rows)], batched(check), notes=[said])
    draws: list[list[Batch]] = []
    for _ in range(params.calibration_draws):
        drawn = sample(rest, tokens=params.calibration_tokens, seed=seed)
        if draws and sum(len(row.ids) for row in drawn) < params.calibration_tokens:
            break
        taken = {id(row) for row in drawn}
        rest = [row for row in rest if id(row) not in taken]
        draws.append(batched(drawn))
    return Rows(draws, batched(check), held)


def run(job: Job, solver: Solver, rows: Rows, *, prompt_weight: float, prepare: Prepare | None = None) -> StageResult:
    """Quantize once per draw of calibration rows and write the result of least divergence on the check rows."""
    result = finish(job, *best_draw(job, solver, rows, prompt_weight=prompt_weight, prepare=prepare))
    result.notes += rows.notes
    return result


def best_draw(
    job: Job, solver: Solver, rows: Rows, *, prompt_weight: float, prepare: Prepare | None = None
) -> tuple[Parts, dict[str, Any]]:
    """Quantize once per draw of calibration rows; return the parts of least divergence on the check rows, figures."""
    measured = []
    for number, drawn in enumerate(rows.draws):
        work = _Pass(job, solver, prepare, drawn, prompt_weight, job.parts(f"draw-{number}"))
        measured.append(work.run(Check(job.stream, rows.check), label=f"draw {number + 1} of {len(rows.draws)}"))
    divergences = [found["kl"] for found in measured]
    best = min(range(len(measured)), key=divergences.__getitem__)
    figures = measured[best] | {"calibration": {"draws": len(measured), "kept": best, "kl": divergences}}
    return job.parts(f"draw-{best}"), figures


@dataclass(frozen=True)
class _Pass:
    """One way through the layers with one draw of rows."""

    job: Job
    solver: Solver
    prepare: Prepare | None
    drawn: Sequence[Batch]
    prompt_weight: float
    parts: Parts

    @property
    def correction(self) -> float | None:
        """Damping of the correction for changed inputs; None: no correction."""
        params = self.job.params
        return params.correction_damp if isinstance(params, GptqParams) else None

    def run(self, check: Check, *, label: str) -> dict[str, Any]:
        """Do the layers that are missing, then embedding and head; return what the check measured."""
        done = self.parts.folder / "measured.json"
        if done.is_file():
            found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return found
        stream, layout = self.job.stream, self.job.layout
        plain = stream.tensor(EMBEDDING)
        outer = {EMBEDDING: outer_codes(plain, self.job, layout.embedding_bits)}
        embedding = outer_values(outer[EMBEDDING], plain)
        tables = [embedding] if self.correction is None else [embedding, plain]
        states = [[nn.functional.embedding(batch.input_ids, table) for batch in self.drawn] for table in tables]
        weights = [position_weights(batch, prompt_weight=self.prompt_weight) for batch in self.drawn]
        check.begin(plain, embedding)
        with self.job.ctx.progress.bar(f"layers quantized, {label}", stream.count) as bar:
            for index in range(stream.count):
                layer = stream.layer(index)
                check.plain(layer)
                self.block(index, layer, states, weights)
                check.quantized(layer)
                bar.advance()
        reports: list[Report] = []
        if not layout.tied:
            plain = stream.tensor(HEAD)
            outer[HEAD], reports = self.head(plain, states, weights)
        head = embedding if layout.tied else outer_values(outer[HEAD], plain)
        self.parts.save_outer(outer, reports)
        found = check.end(plain, head, norm=halved(stream.tensor(NORM), NORM))
        save_json(found, done)
        return found

    def block(self, index: int, layer: nn.Module, states: States, weights: Sequence[torch.Tensor]) -> None:
        """Quantize one layer, or take over what an earlier run left, and take ``states`` through it.

        ``layer`` then has the quantized weights. Norms and biases are those that will be stored from the start, so that
        a resumed run sees the same.
        """
        halve_rest(index, layer)
        if self.parts.has(index):
            for plain in states[1:]:
                self.advance(layer, plain)
            self.parts.load(index, layer)
            self.advance(layer, states[0])
            return
        # a prepared layer gives the plain states what this one gives, but for rounding: they go through this one
        untouched = copy.deepcopy(layer) if self.prepare is not None and len(states) > 1 else None
        found = {} if self.prepare is None else self.prepare(index, layer, states[0], weights)
        halve_rest(index, layer)
        done, reports = self.linears(index, layer, states, weights)
        if untouched is not None:
            self.advance(untouched, states[1])
        self.parts.save(index, layer, done, [report | found.get(report["linear"], {}) for report in reports])

    def advance(self, layer: nn.Module, hidden: list[torch.Tensor]) -> None:
        """Take ``hidden`` through ``layer`` in place, one batch after the other."""
        for i, values in enumerate(hidden):
            hidden[i] = self.job.stream.run(layer, values, bf16=self.job.bf16)

    def linears(
        self, index: int, layer: nn.Module, states: States, weights: Sequence[torch.Tensor]
    ) -> tuple[dict[str, QuantizedLinear], list[Report]]:
        """Quantize the seven linears: each step on what the quantized steps before it put out, or all at once.

        The states are taken through the layer; the plain ones stay where they are if the layer was prepared.
        """
        done: dict[str, QuantizedLinear] = {}
        reports: list[Report] = []

        def replace(names: Sequence[str], moments: Moments) -> None:
            for name, solved in self.solve(index, layer, names, moments).items():
                done[name] = solved.layer
                linears(layer)[name].weight.data = dequantize(*solved.layer)
                reports.append(solved.report)

        params, waiting = self.job.params, list[tuple[Sequence[str], Moments]]()
        sequential = not isinstance(params, GptqParams) or params.true_sequential
        for names, moments in self.steps(layer, states[0] if sequential else list(states[0]), states[1:], weights):
            if sequential:
                replace(names, moments)
            else:
                waiting.append((names, moments))
        for names, moments in waiting:
            replace(names, moments)
        if not sequential:
            self.advance(layer, states[0])
        return done, reports

    def steps(
        self, layer: nn.Module, hidden: list[torch.Tensor], plain: States, weights: Sequence[torch.Tensor]
    ) -> Iterator[tuple[Sequence[str], Moments]]:
        """Walk ``hidden`` through ``layer``, in step with the ``plain`` states through a copy of it as it is now."""
        walk = self.job.stream.walk(layer, hidden, bf16=self.job.bf16)
        if not plain:
            for names, inputs in walk:
                yield names, (second_moment(inputs, weights), None)
            return
        states = plain[0] if self.prepare is None else list(plain[0])
        beside = self.job.stream.walk(copy.deepcopy(layer), states, bf16=self.job.bf16)
        for (names, inputs), (_, wanted) in zip(walk, beside, strict=True):
            yield names, paired_moments(inputs, wanted, weights)

    def solve(self, index: int, layer: nn.Module, names: Sequence[str], moments: Moments) -> dict[str, Solved]:
        """Return the codes of those linears of a step that are quantized at all, by name."""
        specs = {name: self.job.layout.linears[linear_path(index, name)] for name in names}
        coded = {linear_path(index, name): name for name, spec in specs.items() if spec.bits != PLAIN}
        for name, spec in specs.items():
            if spec.bits == PLAIN:  # what the checkpoint will hold is what the next step sees
                linear = linears(layer)[name]
                linear.weight.data = halved(linear.weight.data, linear_path(index, name))
        if not coded:
            return {}
        weights = {path: self.aim(linears(layer)[name].weight.data, moments) for path, name in coded.items()}
        found = self.solver(Step(weights, {path: specs[name] for path, name in coded.items()}, moments[0]))
        for path, solved in found.items():
            if moments[1] is not None and weights[path] is linears(layer)[coded[path]].weight.data:
                solved.report["uncorrected"] = True
        return {coded[path]: solved for path, solved in found.items()}

    def aim(self, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Return the weight that is to be quantized: ``weight``, or that which makes up for changed inputs."""
        moment, cross = moments
        if cross is None or self.correction is None:
            return weight
        return corrected(weight, moment, cross, damp_frac=self.correction)

    def head(
        self, plain: torch.Tensor, states: States, weights: Sequence[torch.Tensor]
    ) -> tuple[QuantizedLinear | None, list[Report]]:
        """Quantize an untied output head on the normed hidden states."""
        layout = self.job.layout
        if layout.lm_head_bits == PLAIN:
            return None, []
        norm, name = self.job.stream.final_norm(), HEAD.removesuffix(".weight")
        normed = [(norm(values) for values in hidden) for hidden in states]
        moments: Moments = (
            paired_moments(normed[0], normed[1], weights) if normed[1:] else (second_moment(normed[0], weights), None)
        )
        spec = outer_spec(plain, self.job, layout.lm_head_bits)
        solved = self.solver(Step({name: self.aim(plain, moments)}, {name: spec}, moments[0]))[name]
        return solved.layer, [solved.report]


def rounded(weight: torch.Tensor, spec: LinearSpec, params: RtnParams) -> QuantizedLinear:
    """Round ``weight`` to nearest as ``spec`` says, with the clip search of ``params``."""
    return round_to_nearest(weight, **grid_of(spec, params.clip_steps), group_size=spec.group_size)


def grid_of(spec: LinearSpec, clip_steps: int) -> dict[str, Any]:
    """Return what the quantizing functions are told of a grid: bits, sym, clip_steps, levels and scale_bits."""
    steps = clip_steps if spec.bits < 8 else 0  # at 8 bits no clip is better than the whole range
    grid: dict[str, Any] = {"bits": spec.bits, "sym": spec.sym, "clip_steps": steps}
    return grid | {"levels": NF3 if spec.nf3 else None, "scale_bits": spec.scale_bits}


def outer_spec(weight: torch.Tensor, job: Job, bits: int) -> LinearSpec:
    """Return how embedding or head are quantized: so that 16 bits hold the values of their codes exactly."""
    sym = job.params.sym
    return LinearSpec(bits, job.layout.group_size, sym, scale_bits=scale_bits(weight, bits=bits, sym=sym))


def outer_codes(weight: torch.Tensor, job: Job, bits: int) -> QuantizedLinear | None:
    """Round the embedding or head, some rows at a time; None at 16 bits."""
    if bits == PLAIN:
        return None
    spec = outer_spec(weight, job, bits)
    step = max(1, ROWS_ENTRIES // weight.shape[1])
    found = [rounded(weight[at : at + step], spec, job.params) for at in range(0, len(weight), step)]
    codes, scales, zero_points = (torch.cat([layer[part] for layer in found]) for part in range(3))
    return QuantizedLinear(codes, scales, zero_points, found[0].g_idx)


def outer_values(layer: QuantizedLinear | None, plain: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values of embedding or head that the checkpoint will hold."""
    return halved(plain) if layer is None else dequantize_rows(layer)


def finish(
    job: Job, parts: Parts, measured: Mapping[str, Any] | None = None, *, norm: torch.Tensor | None = None
) -> StageResult:
    """Write the folder from finished parts, with the figures ``measured``, and return the stage's figures.

    ``norm`` replaces the gains of the final norm.
    """
    ctx, stream, layout = job.ctx, job.stream, job.layout
    outer, reports = parts.load_outer()
    codes: dict[str, torch.Tensor] = {}
    whole = {NORM: half(stream.tensor(NORM) if norm is None else norm, NORM)}
    for name, layer in outer.items():
        tensors = outer_tensors(name, layer, stream.tensor(name))
        whole |= tensors["model.safetensors"]
        codes |= tensors[OUTER_FILE]
    save_tensors(whole, parts.folder / "whole.safetensors")
    files = [*(parts.path(index) for index in range(stream.count)), parts.folder / "whole.safetensors"]
    config = dict(stream.config) | {"intermediate_size": layout.ffn}
    layers = [report for index in range(stream.count) for report in parts.reports(index)] + reports
    metrics: dict[str, Any] = {
        "parameters": parameter_count(config),
        "bits": layout.bits,
        "group_size": layout.group_size,
        "embedding_bits": layout.embedding_bits,
        "lm_head_bits": layout.lm_head_bits,
        **bits_per_weight(files, codes, config, layout, sym=job.params.sym),
        **(measured or {}),
        "layers": layers,
    }
    write_folder(
        ctx.out,
        source=stream.folder,
        config=config,
        layout=layout,
        params=job.params,
        parts=files,
        outer=codes,
        metadata={"stage": ctx.name, "params": job.params.model_dump(mode="json"), "figures": metrics},
    )
    metrics["checkpoint_bytes"] = sum(path.stat().st_size for path in sorted(ctx.out.glob("*.safetensors")))
    return StageResult(metrics=metrics, notes=[*job.notes, *layout.notes, *_notes(layers), *_spread(metrics)])


def _notes(reports: Sequence[Report]) -> list[str]:
    """Return what gave way in the matrices."""
    fallen = [report["linear"] for report in reports if report.get("fell_back")]
    raised = [report for report in reports if report.get("retries") and not report["fell_back"]]
    notes = []
    if fallen:
        notes.append(
            f"{len(fallen)} matrices were rounded to nearest, because their Hessian could not be inverted: "
            + ", ".join(fallen[:5])
            + (" ..." if len(fallen) > 5 else "")
        )
    uncorrected = sum(bool(report.get("uncorrected")) for report in reports)
    if uncorrected:
        notes.append(
            f"{uncorrected} matrices got no correction for earlier layers: their inputs gave no solvable fit; a larger "
            "correction_damp may help"
        )
    if raised:
        most = max(report["damp_frac"] for report in raised)
        notes.append(f"damping raised for {len(raised)} matrices, to {most:g} of the mean diagonal at most")
    return notes


def _spread(metrics: Mapping[str, Any]) -> list[str]:
    """Return how far the draws of calibration rows are apart."""
    found = metrics.get("calibration")
    if found is None or found["draws"] < 2:
        return []
    listed = ", ".join(f"{value:.4g}" for value in found["kl"])
    return [f"divergence with {found['draws']} draws of calibration rows: {listed} nats per token; the least is kept"]
