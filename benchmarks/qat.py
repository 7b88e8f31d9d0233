"""What training through the rounding wins at 2 and 3 bits, against rounding, clip and GPTQ, on a model of stories.

    python -m benchmarks.qat MODEL STORIES [--bits 2 3] [--seeds 3] [--steps 100] [--batch-tokens 4096]
        [--rows N] [--only NAME ...]

MODEL is a plain checkpoint, STORIES a folder with ``train*.txt`` and ``valid-stories.txt``, stories parted by lines
``<|endoftext|>``. Every trained row has the same steps, tokens and start; the seed draws calibration rows, training
order and held-out rows. The control learns from a teacher whose answers stand at the wrong positions. Prints a
Markdown table: perplexity on stories that no row saw, mean and range over the seeds, KL to the plain model there,
bits per weight as stored, CPU minutes of this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantizers import HeldOut, held_out, once, texts
from compress.data.rows import make_row, write_rows
from compress.model.distillation.losses import States
from compress.model.quantization import qat_stage

TOKENS = 128  # of a training row
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"start": "rtn", "clip_steps": 0, "steps": 0},
    "RTN, symmetric clip": {"start": "rtn", "steps": 0},
    "asymmetric clip (BitDistiller)": {"start": "clip", "steps": 0},
    "GPTQ": {"steps": 0},
    "QAT, labels alone (CE)": {"loss": "ce"},
    "QAT, KL": {"loss": "kl"},
    "QAT, CAKLD": {"loss": "cakld"},
    "QAT, CAKLD, shuffled teacher": {"loss": "cakld"},
    "QAT, CAKLD, from the clip": {"loss": "cakld", "start": "clip"},
    "QAT, KL, lsq": {"rule": "lsq", "sym": True},
    "QAT, KL, elastic (4-bit container)": {"rule": "elastic", "sym": True, "start": "clip"},
    "QAT, KL, ternary": {"rule": "ternary", "sym": True, "start": "clip"},
    "blocks alone": {"steps": 0, "block_steps": 100},
    "blocks, then QAT, KL": {"block_steps": 100},
    "QAT, KL, then scales alone": {"scale_steps": 30},
}
USUAL = list(METHODS)[:8]


def shuffled(targets: Any) -> Any:
    """The teacher's states with their positions mixed up: what it says is true of another place."""

    def wrong(batch: Any) -> States:
        states = targets(batch)
        order = torch.randperm(len(states.hidden), generator=torch.Generator().manual_seed(len(states.hidden)))
        return States(states.hidden[order], states.head, states.temperature)

    return wrong


def run(
    name: str, model: Path, data: Path, *, bits: int, seed: int, score: HeldOut, common: dict[str, Any]
) -> dict[str, Any]:
    """Quantize by a method; returns the stage's figures with perplexity and divergence on unseen stories."""
    given = common | {"bits": bits, "max_tokens": TOKENS, "calibration_draws": 1, "learn": "all"}
    given["learning_rate"] = 3e-3 if bits == 2 else 1e-3
    honest = qat_stage.teacher_targets
    if "shuffled" in name:
        qat_stage.teacher_targets = lambda *a, **k: (shuffled(honest(*a, **k)[0]), {})  # type: ignore[assignment]
    try:
        return once(model, data, "qat", given | METHODS[name], seed=seed, score=score)
    finally:
        qat_stage.teacher_targets = honest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=None, help="stories to learn from (default: all)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=USUAL)
    parser.add_argument("--held-out", type=int, default=32_768, help="tokens that are scored")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    score = held_out(given.model, given.stories / "valid-stories.txt", tokens=given.held_out)
    plain = score.score(given.model)[0]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        learned = [text for path in sorted(given.stories.glob("train*.txt")) for text in texts(path)]
        write_rows(data, [make_row(text=text) for text in learned[: given.rows]])
        budget = f"{given.steps} steps of {given.batch_tokens} tokens, {given.seeds} seeds"
        print(f"plain model: perplexity {plain:.3f}; {budget}\n")
        print("| bits | method | perplexity | gap to plain | range over seeds | KL | bits per weight | CPU min |")
        print("|---|---|---|---|---|---|---|---|")
        for bits in given.bits:
            for name in given.only:
                show(name, bits, plain, data, given, score=score)


def show(name: str, bits: int, plain: float, data: Path, given: argparse.Namespace, *, score: HeldOut) -> None:
    """Run one method with all seeds and print its row."""
    start = time.process_time()
    common = {"steps": given.steps, "batch_tokens": given.batch_tokens}
    found = [
        run(name, given.model, data, bits=bits, seed=seed, score=score, common=common) for seed in range(given.seeds)
    ]
    minutes = (time.process_time() - start) / 60 / given.seeds
    values = [figures["perplexity"] for figures in found]
    mean = sum(values) / len(values)
    kl = sum(figures["divergence"] for figures in found) / len(found)
    print(
        f"| {bits} | {name} | {mean:.3f} | {mean - plain:.3f} | {min(values):.3f} to {max(values):.3f} | {kl:.4f} "
        f"| {found[0]['bits_per_weight']:.3f} | {minutes:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
