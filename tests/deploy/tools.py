"""Checkpoints in the "gptq" format for the export's tests: rounded by the project's own stage, or reordered by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.context import StageContext
from compress.model.quantization.params import RtnParams
from compress.progress import Progress

SOURCES = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp"}


def context(name: str, out: Path, **values: Any) -> StageContext:
    """A quiet stage context on one thread, its folders made."""
    work = out.with_name(out.name + "-work")
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    values.setdefault("inputs", {})
    return StageContext(name=name, out=out, work=work, seed=3, progress=Progress(quiet=True), threads=1, **values)


def rounded(source: Path, out: Path, **params: Any) -> Path:
    """Round ``source`` to nearest into ``out`` with the stage's own code."""
    from compress.model.quantization.gptq_stage import round_to_nearest

    round_to_nearest(RtnParams.model_validate(params), context("model.quantization.rtn", out, inputs={"model": source}))
    return out


def shuffled(source: Path, out: Path, *, seed: int = 0, apart: bool = False) -> Path:
    """Copy a quantized checkpoint with its inputs dealt to the groups at random, as act_order does.

    q, k and v share their order, as do gate and up; with ``apart`` each has its own. The weights become others, which
    is no matter: the copy is a checkpoint of its own.
    """
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name in sorted(tensors):
        if name.endswith(".g_idx"):
            layer, part = name.split(".")[2], name.split(".")[-2]
            kind = part if apart else SOURCES.get(part, part)
            generator = torch.Generator().manual_seed(seed + int(layer) + sum(kind.encode()))
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["desc_act"] = True
    path.write_text(json.dumps(config), encoding="utf-8")
    return out


def changed_config(folder: Path, **values: Any) -> Path:
    """Overwrite entries of ``config.json``; ``quantization_config`` entries are merged."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder
