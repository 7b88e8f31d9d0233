"""Structured pruning, the stage: score by activations, trim width and depth, recover by distillation, repeat.

`slice_model` trims a model in place to a shape, `build_student` makes a trimmed copy (distillation starts its
students so), `prune` is the stage. Source: Minitron (arXiv:2407.14679). The result opens with plain
``from_pretrained``. Scores, slices and training live in their own modules.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from compress.context import StageContext, StageResult
from compress.encoding import TokenRow, load_tokenizer, token_rows
from compress.errors import ModelError
from compress.files import place_folder
from compress.model.calibration import Batch, batches, mean_loss
from compress.model.checkpoint import METADATA_FILE, check_folder, count_parameters, load_model, read_config, save_model
from compress.model.distillation.trainer import threads
from compress.model.layers import attention, decoder_layers
from compress.model.pruning.depth import choose_layers, cut_layers
from compress.model.pruning.importance import Importance, measure, strongest
from compress.model.pruning.params import StructuredParams
from compress.model.pruning.recovery import LOG, merged_log, recover
from compress.model.pruning.schedule import final_shape, rounds
from compress.model.pruning.width import choose_heads, cut_ffn, cut_heads, cut_hidden
from compress.model.shapes import StudentShape, check_shape, parameter_count, shape_of

LOSS_TOKENS = 8192  # tokens on which the losses in the metrics are taken
log = logging.getLogger(__name__)


def slice_model(
    model: PreTrainedModel, importance: Importance, shape: StudentShape, *, rescale_norms: bool = True
) -> dict[str, Any]:
    """Trim ``model`` in place to ``shape``, keeping what scores highest; return what was kept, as JSON values.

    ``importance`` must be of this very model. Raises ModelError when ``shape`` cannot be cut out of it.
    """
    config = model.config.to_dict()
    check_shape(config, shape, where="shape")
    own = shape_of(config)
    hidden = own.hidden if shape.hidden is None else shape.hidden
    # Qwen2's config may leave head_dim out; it would change with the widths that it is derived from.
    model.config.head_dim = int(cast(Any, attention(decoder_layers(model)[0])).head_dim)
    kept_layers = choose_layers(importance.blocks, shape.layers)
    kept: dict[str, Any] = {"layers": kept_layers}
    cut_layers(model, kept_layers)
    if (shape.heads, shape.kv_heads) != (own.heads, own.kv_heads):
        chosen = [
            choose_heads(importance.heads[index], kv_heads=own.kv_heads, keep_heads=shape.heads, keep_kv=shape.kv_heads)
            for index in kept_layers
        ]
        kept["heads"], kept["kv_heads"] = [heads for heads, _ in chosen], [groups for _, groups in chosen]
        cut_heads(model, chosen)
    if shape.ffn != own.ffn:
        cut_ffn(model, [strongest(importance.ffn[index], shape.ffn) for index in kept_layers])
    if hidden is not None and hidden != own.hidden:
        kept["hidden"] = strongest(importance.hidden, hidden)
        moments = _renumbered(importance.moments, kept_layers) if rescale_norms else None
        cut_hidden(model, kept["hidden"], moments=moments)
    return kept


def _renumbered(moments: Mapping[str, torch.Tensor], kept_layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the norms' moments under their names after the other layers went."""
    names = ("input_layernorm", "post_attention_layernorm")
    new = {
        f"model.layers.{now}.{name}": moments[f"model.layers.{before}.{name}"]
        for now, before in enumerate(kept_layers)
        for name in names
    }
    return new | {"model.norm": moments["model.norm"]}


def build_student(teacher: PreTrainedModel, calibration: Sequence[Batch], shape: StudentShape) -> PreTrainedModel:
    """Return a copy of ``teacher`` trimmed to ``shape`` by its activations on ``calibration``.

    In one step whatever the size, because a whole training follows. The teacher stays as it is. Raises ModelError
    when the shape does not fit.
    """
    check_shape(teacher.config.to_dict(), shape, where="student")
    student = copy.deepcopy(teacher).eval()
    slice_model(student, measure(teacher, calibration), shape)
    return student


def prune(params: StructuredParams, ctx: StageContext) -> StageResult:
    """Prune the checkpoint in slot ``model`` with the rows of slot ``data``; the stage ``model.pruning.structured``.

    Each finished round lies in ``ctx.work`` and is not done again after an interruption. Raises ModelError for an
    unusable checkpoint or an impossible size, DataError when no row is left to calibrate with.
    """
    source = ctx.inputs["model"]
    config = read_config(source)
    if config.get("quantization_config"):
        raise ModelError(str(source), "a quantized checkpoint", "plain weights", "Prune before quantization")
    check_folder(source)
    shape, notes = final_shape(config, params, where=ctx.name)
    path = rounds(config, shape, max_step=params.max_step, multiple_of=params.multiple_of)
    for note in notes:
        ctx.progress.say(f"{ctx.name}: {note}")
    run = _Run(params, ctx, source)
    if path:
        with threads(ctx.threads):
            model, records = run.finish(path)
    else:  # nothing to remove, so nothing to recover from: the weights stay byte for byte
        model, records = load_model(source, dtype=_stored_dtype(config)), []
        notes.append("nothing was removed: the model has the wanted shape already")
    notes += dict.fromkeys(note for record in records for note in record.get("notes", []))
    metadata = {"stage": ctx.name, "shape": asdict(shape), "rounds": records}
    save_model(model, ctx.out, tokenizer_from=source, metadata=metadata)
    logs = [run.recovery_work(number) / LOG for number in range(1, len(records) + 1)]
    merged_log(logs, ctx.out / LOG)
    return StageResult(metrics=_metrics(config, model, shape, records), notes=notes)


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return cast(torch.dtype, getattr(torch, name, torch.float32))


def _metrics(
    config: Mapping[str, Any], model: PreTrainedModel, shape: StudentShape, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    before, after = parameter_count(config), count_parameters(model)
    metrics: dict[str, Any] = {
        "parameters_before": before,
        "parameters": after,
        "prune_ratio": 1 - after / before,
        "shape": asdict(shape),
        "rounds": len(records),
    }
    if records:
        metrics["loss_before"] = records[0]["loss_before"]
        metrics["loss_trimmed"] = [record["loss_trimmed"] for record in records]
        metrics["loss"] = records[-1]["loss"]
        metrics["recovery"] = [record["recovery"] for record in records if "recovery" in record]
    return metrics


@dataclass(frozen=True)
class _Run:
    """One pruning run: what its rounds share."""

    params: StructuredParams
    ctx: StageContext
    source: Path

    def resume(self, path: Sequence[StudentShape]) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """Return the model after the last finished round, and the records of the finished rounds."""
        for number in range(len(path), 0, -1):
            folder = self.folder(number)
            if folder.is_dir():
                record = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
                log.info("%s: goes on after round %d", self.ctx.name, number)
                return load_model(folder), cast(list[dict[str, Any]], record["rounds"])
        return load_model(self.source), []

    def finish(self, path: Sequence[StudentShape]) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """Do the rounds that are missing; return the model and all records."""
        model, records = self.resume(path)
        tokenizer = load_tokenizer(self.source)
        max_tokens = min(self.params.max_tokens, int(model.config.max_position_embeddings))
        rows = token_rows(self.ctx.inputs["data"], tokenizer, max_tokens=max_tokens, truncate=True)
        pad = next((i for i in (tokenizer.pad_token_id, model.config.pad_token_id) if i is not None), 0)
        for number in range(len(records) + 1, len(path) + 1):
            record = self.round(model, rows, path, number=number, pad=int(pad))
            records.append(record)
            self.keep(model, number, records)
        return model, records

    def round(
        self, model: PreTrainedModel, rows: Sequence[TokenRow], path: Sequence[StudentShape], *, number: int, pad: int
    ) -> dict[str, Any]:
        """Score, trim and recover ``model`` in place once and return the record.

        The seed follows from the round's number, so that a resumed run draws the same rows.
        """
        params, seed, shape = self.params, self.ctx.seed + number, path[number - 1]
        self.ctx.progress.say(f"{self.ctx.name}: round {number} of {len(path)}: {shape.text()}")
        checked = batches(rows, tokens=LOSS_TOKENS, batch_size=params.batch_size, seed=self.ctx.seed, pad_id=pad)
        drawn = batches(rows, tokens=params.calibration_tokens, batch_size=params.batch_size, seed=seed, pad_id=pad)
        before, importance = mean_loss(model, checked), measure(model, drawn)
        kept = slice_model(model, importance, shape, rescale_norms=params.rescale_norms)
        trimmed = mean_loss(model, checked)
        record = {
            "shape": asdict(shape),
            "calibration_tokens": importance.tokens,
            "block_importance": importance.blocks,
            "kept": kept,
            "loss_before": before,
            "loss_trimmed": trimmed,
            "loss": trimmed,
        }
        steps = _share(params.recovery.steps, number, len(path))
        if steps:
            inner = replace(self.ctx, work=self.recovery_work(number), seed=seed)
            cache = self.ctx.work / "targets"
            found = recover(model, rows, params.recovery, steps=steps, ctx=inner, unpruned=self.source, cache=cache)
            record |= found | {"loss": mean_loss(model, checked)}
        return record

    def folder(self, number: int) -> Path:
        """The folder of a finished round."""
        return self.ctx.work / f"round-{number}"

    def recovery_work(self, number: int) -> Path:
        """The scratch folder of a round's training."""
        work = self.ctx.work / f"recovery-{number}"
        work.mkdir(parents=True, exist_ok=True)
        return work

    def keep(self, model: PreTrainedModel, number: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Store a finished round under another name first: a folder that is there is whole."""
        partial = self.ctx.work / f"round-{number}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial, tokenizer_from=self.source, metadata={"rounds": list(records)})
        place_folder(partial, self.folder(number))


def _share(total: int, number: int, count: int) -> int:
    """Return the steps of round ``number`` of ``count``; the shares differ by at most one and add up to ``total``."""
    return total * number // count - total * (number - 1) // count
