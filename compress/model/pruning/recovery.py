"""Recovery: after trimming, the student is trained towards the logits of a whole model (Minitron, section 2.3).

`recover` does it with the trainer of distillation, `merged_log` joins the rounds' training curves. Whose logits:
the profile's teacher, or the model as it was before pruning. Knows nothing of scores and slices.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress.context import StageContext
from compress.encoding import TokenRow, load_tokenizer
from compress.files import json_text
from compress.model.checkpoint import check_folder, load_model
from compress.model.distillation.losses import LossWeights
from compress.model.distillation.monitoring import TIMED
from compress.model.distillation.packing import RowTable
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.targets import check_rows_fit, teacher_targets
from compress.model.distillation.trainer import train
from compress.model.pruning.params import RecoveryParams

LOG = "training.jsonl"
# Of the report, what is the same in every run; the rest is time.
LASTING = ("steps", "tokens", "start_loss", "validation_loss", "validation_ce", "validation_kl", "kept_step")


def recover(
    student: PreTrainedModel,
    rows: Sequence[TokenRow],
    params: RecoveryParams,
    *,
    steps: int,
    ctx: StageContext,
    unpruned: Path,
    cache: Path,
) -> dict[str, Any]:
    """Train ``student`` in place for ``steps`` and return what came of it, as JSON values; the log is in ``ctx.work``.

    ``cache`` is the folder of the teacher's cached targets, the same for all rounds.

    Killed and called again with the same student and ``ctx.work`` it goes on. Raises as `trainer.train` does.
    """
    folder, notes = target_folder(params, ctx, unpruned)
    rows = [row.learning(params.learn) for row in rows]
    tokenizer = load_tokenizer(unpruned)
    vocab = max(tokenizer.get_vocab().values()) + 1
    table = RowTable(rows, vocab=vocab, where=ctx.name)
    target_fn = None
    if params.kd_weight > 0:
        check_folder(folder)
        teacher = load_model(folder)
        check_rows_fit(table, [teacher.config.to_dict()], where=ctx.name)
        named = tokenizer, str(params.target)  # the cache lies in the folder of this very artifact
        target_fn, _ = teacher_targets(teacher, table, params, named=named, folder=cache, progress=ctx.progress)
        del teacher  # with cached targets this frees its memory before training
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    report = train(student, target_fn, table, settings(params, steps, ctx.seed), ctx, ctx.work / LOG, vocab=vocab)
    found = asdict(report)
    return {"recovery": {name: found[name] for name in LASTING}, "notes": notes + report.notes}


def target_folder(params: RecoveryParams, ctx: StageContext, unpruned: Path) -> tuple[Path, list[str]]:
    """Return the folder of the model whose logits are learned, and a note where the wish could not be met."""
    if params.target == "unpruned":
        return unpruned, []
    teacher = None if ctx.teacher is None else ctx.teacher.folder
    if teacher is None:
        return unpruned, ["recovery from the unpruned model: the teacher is not at hand as weights"]
    if load_tokenizer(teacher).get_vocab() != load_tokenizer(unpruned).get_vocab():
        return unpruned, ["recovery from the unpruned model: the teacher has another tokenizer"]
    return teacher, []


def settings(params: RecoveryParams, steps: int, seed: int) -> TrainSettings:
    """What the trainer is told."""
    return TrainSettings(
        loss=LossWeights(params.kd_weight, params.temperature),
        steps=steps,
        batch_tokens=params.batch_tokens,
        learning_rate=params.learning_rate,
        warmup_ratio=params.warmup_ratio,
        optimizer=params.optimizer,
        weight_decay=params.weight_decay,
        precision=params.precision,
        seed=seed,
    )


def merged_log(logs: Sequence[Path], target: Path) -> None:
    """Write the curves of all rounds as one, steps counted on, without timings; nothing when no round has one."""
    lines: list[str] = []
    offset = 0
    for path in logs:
        if not path.is_file():
            continue
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for point in points:
            kept = {name: value for name, value in point.items() if name != TIMED}
            lines.append(json_text(kept | {"step": point["step"] + offset}) + "\n")
        offset += max((point["step"] for point in points), default=0)
    if lines:
        target.write_text("".join(lines), encoding="utf-8")
