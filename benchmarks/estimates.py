"""What `plan` foretells of a stage against what it takes: seconds and peak memory, each stage in a process of its own.

    python -m benchmarks.estimates [--shape smollm2-135m ...] [--stage export ...] [--threads 2]

Random weights of the shapes named, rows of random words. "wall" is what `plan` promises and holds on a quiet machine
only; "cpu" is the processor time of all threads over their number, which other work disturbs less. Memory is the
process's highest resident set, Python and its libraries included, as the run record counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "stories260k": {"layers": 5, "hidden": 64, "heads": 8, "kv": 4, "ffn": 172, "vocab": 512},
    "7m": {"layers": 6, "hidden": 288, "heads": 6, "kv": 6, "ffn": 768, "vocab": 2048},
    "smollm2-6-layers": {"layers": 6, "hidden": 576, "heads": 9, "kv": 3, "ffn": 1536, "vocab": 49152},
    "smollm2-135m": {"layers": 30, "hidden": 576, "heads": 9, "kv": 3, "ffn": 1536, "vocab": 49152},
}
PRUNE = {"prune_ratio": 0.25, "axes": ["ffn"], "calibration_tokens": 2048}
STAGES: Mapping[str, Mapping[str, Any]] = {
    "model.pruning": PRUNE | {"recovery": {"steps": 3, "batch_tokens": 2048}},
    "model.quantization": {"method": "gptq", "calibration_tokens": 4096, "calibration_draws": 1},
    "model.distillation": {"layers": 4, "steps": 3, "batch_tokens": 2048, "validation_rows": 8},
    "deploy.export": {},
}
WORDS = ("the", "a", "cat", "dog", "light", "kitchen", "set", "turn", "on", "off", "timer", "please", "two", "three")


def make_model(shape: Mapping[str, Any], folder: Path) -> None:
    """Write a Llama of ``shape`` with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv"],
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder
    )


def make_rows(path: Path, count: int) -> None:
    """Write rows of about 250 bytes, each a token, as a file for `plan` and as an artifact's folder for a stage."""
    from compress.data.rows import make_row, write_rows

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=50)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    path.with_suffix("").mkdir()
    write_rows(path.with_suffix(""), [make_row(text=text, source="made") for text in texts])


def foretold(folder: Path, stage: str, threads: int) -> tuple[float, float]:
    """Return seconds and bytes that `plan` tells of ``stage``."""
    from compress.estimates import estimate
    from compress.plans import plan
    from compress.profile import load_profile
    from compress.store import Store

    steps = [{stage: dict(STAGES[stage])}] if stage != "deploy.export" else [{"model.quantization": {"method": "rtn"}}]
    profile: dict[str, Any] = {"edgestill": 1, "name": "figures", "teacher": str(folder / "model"), "seed": 1}
    profile |= {"data": {"pool": str(folder / "rows.jsonl")}, "steps": steps, "bench": None}
    if stage == "deploy.export":
        profile["export"] = dict(STAGES[stage])
    path = folder / "profile.yaml"
    path.write_text(json.dumps(profile), encoding="utf-8")
    made = plan(load_profile(path, overrides=[f"hardware.threads={threads}"]), store=Store(folder / "store"))
    found = estimate(made)
    at = next(index for index, node in enumerate(made.nodes) if node.stage.stage == stage)
    return found.seconds[at] or 0.0, float(found.peaks[at] or 0.0)


def work(folder: Path, stage: str, model: Path, out: Path, threads: int) -> dict[str, float]:
    """Run ``stage`` here and return what it took."""
    from compress import stages
    from compress.context import StageContext
    from compress.metering import Meter
    from compress.plans import validated
    from compress.progress import Progress
    from compress.teachers import open_teacher

    values = dict(STAGES.get(stage, {"method": "rtn"}))
    line = stages.find(stage, values.pop("method", None))
    params = validated(line, values, stage)
    for place in (out, out.with_name(out.name + "-work")):
        place.mkdir(parents=True)
    inputs = {"data": folder / "rows"} | ({} if stage == "model.distillation" else {"model": model})
    ctx = StageContext(
        name=stage, inputs=inputs, out=out, work=out.with_name(out.name + "-work"), seed=1,
        progress=Progress(quiet=True), threads=threads, teacher=open_teacher(model, threads=threads),
    )  # fmt: skip
    with Meter() as meter:
        began = time.process_time()
        stages.load_function(line)(params, ctx)
        cpu = time.process_time() - began
    return {"wall": meter.seconds, "cpu": cpu / threads, "peak": float(meter.peak_memory_bytes or 0)}


def child(*words: str) -> dict[str, float]:
    """Run this script with ``words`` in a process of its own and return its last line."""
    command = [sys.executable, "-P", __file__, *words]  # else its neighbours hide modules of libraries
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["stories260k", "7m", "smollm2-135m"])
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=400, help="fewer save time; peaks stay nearly the same")
    parser.add_argument("--work", nargs=4, metavar=("FOLDER", "STAGE", "MODEL", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        folder, stage, model, out = given.work
        print(json.dumps(work(Path(folder), stage, Path(model), Path(out), given.threads)))
        return
    print("| shape | stage | s told | s wall | s cpu | wall / told | MB told | MB peak | peak / told |")
    print("|---|---|---|---|---|---|---|---|---|")
    threads = str(given.threads)
    for shape in given.shape:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_model(SHAPES[shape], folder / "model")
            make_rows(folder / "rows.jsonl", given.rows)
            for stage in given.stage:
                model = folder / "model"
                if stage == "deploy.export":
                    words = (temporary, "model.quantization", str(model), str(folder / "codes"))
                    if not (folder / "codes").exists():
                        child("--work", *words, "--threads", threads)
                    model = folder / "codes"
                told = foretold(folder, stage, given.threads)
                out = folder / "codes" if stage == "model.quantization" else folder / f"out-{stage}"
                took = child("--work", temporary, stage, str(model), str(out), "--threads", threads)
                figures = [told[0], took["wall"], took["cpu"], took["wall"] / max(told[0], 1e-9)]
                memory = [told[1] / 1e6, took["peak"] / 1e6, took["peak"] / max(told[1], 1)]
                cells = [*(f"{value:.1f}" for value in figures[:3]), f"{figures[3]:.2f}"]
                cells += [f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[2]:.2f}"]
                print(f"| {shape} | {stage} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
