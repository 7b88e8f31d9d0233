"""Peak memory and speed of one process, of several, and of several among which the student is cut up.

    python -m benchmarks.sharding --layers 12 --hidden 512 --ffn 1408 --vocab 8192

Trains a random student of the given shape on random rows and made-up targets, once in each way, each in a fresh
process. Peak memory is what a process held at the most (VmHWM of Linux) beyond what the same run with a tiny student
held, so that the libraries are left out; weights are the student's in fp32. Prints a line per way as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 1 << 20
TINY = {"layers": 1, "hidden": 64, "ffn": 128, "vocab": 512}
WAYS = {
    "one process": {"processes": 1},
    "whole": {"processes": 2},
    "whole, layers computed twice": {"processes": 2, "twice": True},
    "cut up": {"processes": 2, "sharding": "full"},
    "cut up, layers computed twice": {"processes": 2, "sharding": "full", "twice": True},
}


class Watching:
    """Made-up targets for a batch that also note, at every call, what this process held at the most so far."""

    def __init__(self, vocab: int, folder: Path) -> None:
        self.vocab, self.folder = vocab, folder

    def __call__(self, batch):
        import torch

        from compress.model.distillation.losses import Sparse

        (self.folder / f"{os.getpid()}.peak").write_text(str(peak()))
        ids = (batch.labels[:, None] * 31 + torch.arange(8)) % self.vocab
        logprobs = torch.arange(9.0).neg().log_softmax(-1).expand(len(ids), 9)
        return Sparse(ids, logprobs[:, :8].contiguous(), logprobs[:, 8].contiguous())


def peak() -> int:
    """Bytes that this process held at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def train_once(job: dict) -> None:
    """Train once as ``job`` says and print figures; runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from compress.context import StageContext
    from compress.model.distillation.losses import LossWeights
    from compress.model.distillation.settings import TrainSettings
    from compress.model.distillation.trainer import train
    from compress.progress import Progress
    from tests.tiny import tiny_config, tiny_token_rows

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    shape = {name: job[name] for name in TINY}
    config = tiny_config(heads=shape["hidden"] // 64 or 1, kv_heads=shape["hidden"] // 64 or 1, **shape)
    student = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    rows = tiny_token_rows(256, tokens=(48, 64), vocab=shape["vocab"])
    settings = TrainSettings(
        loss=LossWeights(kd_weight=0.5),
        steps=job["steps"],
        batch_tokens=job["batch_tokens"],
        precision=job["precision"],
        activation_checkpointing=job.get("twice", False),
        validations=1,
        checkpoint_every_steps=3,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ctx = StageContext(
            name="benchmark", inputs={}, out=folder, work=folder, seed=0, progress=Progress(quiet=True),
            threads=job["threads"], processes=job["processes"], sharding=job.get("sharding", "none"),
        )  # fmt: skip
        report = train(student, Watching(shape["vocab"], folder), rows, settings, ctx, folder / "log.jsonl")
        others = [int(path.read_text()) for path in folder.glob("*.peak") if path.stem != str(os.getpid())]
    weights = sum(p.numel() for p in student.parameters()) * 4
    found = {"weights": weights, "first": peak(), "others": max(others, default=0), "tokens_per_s": report.tokens_per_s}
    sys.stdout.write(json.dumps(found | {"loss": report.validation_loss}) + "\n")


def measured(job: dict) -> dict:
    """Figures of a run in a fresh process, which gives freed memory back at once."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    env |= {"OMP_NUM_THREADS": str(job["threads"])}
    # imported, not run, so that other processes find the same classes
    code = "import json, sys; from benchmarks.sharding import train_once; train_once(json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", code, json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 12, "hidden": 512, "ffn": 1408, "vocab": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"steps": 6, "batch-tokens": 512, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32")
    given = vars(parser.parse_args())
    bare = {"none": measured(given | WAYS["whole"] | TINY), "full": measured(given | WAYS["cut up"] | TINY)}
    print(f"{'MiB':32}{'weights':>9}{'first':>8}{'others':>8}{'tokens/s':>10}{'loss':>10}", flush=True)
    for way, how in WAYS.items():
        base, found = bare[how.get("sharding", "none")], measured(given | how)
        held = [found["weights"], found["first"] - base["first"], max(0, found["others"] - base["others"])]
        sizes = f"{held[0] / MIB:9.0f}{held[1] / MIB:8.0f}{held[2] / MIB:8.0f}"
        print(f"{way:32}{sizes}{found['tokens_per_s']:10.0f}{found['loss']:10.5f}", flush=True)


if __name__ == "__main__":
    main()
