"""How a student starts: the teacher cut down, random weights, or a given checkpoint.

`start_student` makes it; its shape is chosen by ``student_shapes``.
Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.errors import ModelError
from compress.model.calibration import TokenIds, batches
from compress.model.checkpoint import load_model, quiet_transformers
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.student_shapes import student_shape
from compress.model.pruning.structured import build_student
from compress.model.shapes import StudentShape, check_config, with_shape

CALIBRATION_ROWS = 16  # rows of one calibration batch


def start_student(
    teacher: PreTrainedModel,
    rows: Sequence[TokenIds],
    params: LogitsParams,
    *,
    checkpoint: Path | None,
    seed: int,
    where: str,
) -> tuple[PreTrainedModel, list[str]]:
    """Make the student that ``params.init`` asks for, fp32; returns it and notes. The teacher stays as it is.

    Raises:
        ModelError: no checkpoint where one is asked for, a quantized one, or a shape that does not fit.
    """
    if params.init == "checkpoint":
        if checkpoint is None:
            raise ModelError(
                f"{where}.init",
                "checkpoint, but no step before this one leaves a model",
                "teacher_layers or scratch, or a step that leaves a model before this one",
            )
        return load_model(checkpoint, dtype=torch.float32), []
    config = teacher.config.to_dict()
    shape, notes = student_shape(config, params, where=where)
    if params.init == "scratch":
        return random_student(config, shape, head_dim=params.head_dim, seed=seed, where=where), notes
    pad = 0 if teacher.config.pad_token_id is None else int(teacher.config.pad_token_id)
    drawn = batches(rows, tokens=params.calibration_tokens, batch_size=CALIBRATION_ROWS, seed=seed, pad_id=pad)
    return build_student(teacher, drawn, shape), notes


def random_student(
    teacher: Mapping[str, Any], shape: StudentShape, *, head_dim: int | None, seed: int, where: str
) -> PreTrainedModel:
    """A model of the teacher's architecture and vocabulary with random weights, a function of ``seed``."""
    values = with_shape(teacher, shape)
    if head_dim is not None:
        values["head_dim"] = head_dim
    check_config(values, where=where)
    values.pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return cast(PreTrainedModel, model)
