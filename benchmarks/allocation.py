"""Is it the measured sensitivities that make mixed bits better? Against the same budget spent at random.

    python -m benchmarks.allocation MODEL TEXT [--bits 3.5] [--seeds 3]

MODEL and TEXT as in benchmarks/quantizers.py. Each seed draws calibration rows anew. The control solves the same
knapsack with the sensitivities dealt to other parts of the same kind: the same budget, the choice a matter of chance.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantizers import held_out, once, texts
from compress.data.rows import make_row, write_rows
from compress.model.quantization import mixed_stage, sensitivity


def dealt(seed: int) -> Any:
    """The measurement with its results dealt to other layers, part by part."""
    measured = sensitivity.measure

    def wrong(*args: Any, **options: Any) -> dict[str, dict[str, float]]:
        found = measured(*args, **options)
        for kind in sensitivity.PARTS:
            names = [name for name in found if name.endswith(f".{kind}")]
            values = [found[name] for name in names]
            random.Random(seed).shuffle(values)
            found |= dict(zip(names, values, strict=True))
        return found

    return wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=float, default=3.5, help="budget: mean bits of a weight, scales counted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    score = held_out(args.model, args.text / "valid-stories.txt", tokens=16_384)
    values = {"budget_bits": args.bits, "candidates": [2, 4, 8], "group_size": 32, "max_tokens": 256}
    values |= {"calibration_tokens": 16_384, "calibration_draws": 1}
    honest = sensitivity.measure
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [make_row(text=text) for text in texts(args.text / "train.txt")[:2000]])
        for title, control in (("measured", False), ("dealt to other layers", True)):
            found = []
            for seed in range(args.seeds):
                mixed_stage.sensitivity.measure = dealt(seed) if control else honest
                figures = once(args.model, Path(folder), "mixed", values, seed=seed, score=score)
                found.append(figures["divergence"])
                mixed_stage.sensitivity.measure = honest
            shown = ", ".join(f"{value:.4f}" for value in found)
            print(
                f"{title:24} KL {statistics.mean(found):.4f} ({shown}) at {figures['bits_per_weight']:.3f} bits",
                flush=True,
            )


if __name__ == "__main__":
    main()
