"""Every quantizer on the quickstart's own student: exact match on its test, divergence, bits and bytes.

    python -m benchmarks.assistant_bits .edgestill [--bits 2 3 4] [--seeds 3] [--rows 1000] [--calibration]

Takes the pruned student and the rows of a finished quickstart from the store. Exact match is over the first test rows:
the answer that greedy decoding would write. With ``--calibration`` GPTQ alone is run with rows from the end of the data
half, with rows of the raw pool and with answers dealt to other requests: does it matter where calibration comes from?
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from benchmarks.quantizers import MAIN, HeldOut, logprobs, show, study
from benchmarks.quickstart import lines, newest
from compress.data.rows import Row, chat_row, read_rows, write_rows
from compress.encoding import encode_prompt, encode_rows, load_tokenizer, stop_ids
from compress.model.calibration import batches
from compress.model.checkpoint import load_model
from compress.model.runtime import TorchRuntime

ROWS = 2000  # of each calibration set


def exact_match(model: Path, tests: list[Row]) -> Callable[[Path], float]:
    """Return what gives a checkpoint's share of test rows that greedy decoding would answer exactly."""
    tokenizer = load_tokenizer(model)
    prompts = [encode_prompt(row.prompt, tokenizer) for row in tests]
    answers = tokenizer([row.answer for row in tests], add_special_tokens=False)["input_ids"]

    def share(folder: Path) -> float:
        runtime = TorchRuntime(load_model(folder, dtype=torch.float32))
        verdicts = runtime.would_write(prompts, answers, frozenset(stop_ids(tokenizer)))
        return sum(verdicts) / len(verdicts)

    return share


def calibration_sets(condensed: Path, work: Path) -> dict[str, Path]:
    """Name -> folder of rows: the end of the data half, the raw pool, and answers dealt to other requests."""
    selected = Random(0).sample(read_rows(condensed), ROWS)
    raw = [chat_row(row["prompt"], row["response"]) for row in Random(0).sample(lines("pool.jsonl"), ROWS)]
    answers = [row.answer for row in selected]
    Random(1).shuffle(answers)
    dealt = [chat_row(row.messages[0]["content"], answer) for row, answer in zip(selected, answers, strict=True)]
    found = {}
    for name, rows in (("selected rows", selected), ("raw pool", raw), ("answers dealt anew", dealt)):
        found[name] = work / name.replace(" ", "-")
        found[name].mkdir()
        write_rows(found[name], rows)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of a finished quickstart")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=[2, 3, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="test rows")
    parser.add_argument("--calibration", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    folders = newest(args.store)[0]
    model, rows = folders["model.pruning.structured"], folders["data.quality.stabilize"]
    tests = [chat_row(row["prompt"], row["response"]) for row in lines("test.jsonl")][: args.rows]
    scored = batches(encode_rows(tests, load_tokenizer(model), max_tokens=128, truncate=True), tokens=10**9,
                     batch_size=32, seed=0, pad_id=0)  # fmt: skip
    score = HeldOut(scored, list(logprobs(model, scored)), exact_match(model, tests))
    plain = score.score(model)[0]
    print(f"plain perplexity {plain:.4f}, exact match {100 * exact_match(model, tests)(model):.1f} %\n")
    with tempfile.TemporaryDirectory() as folder:
        sets = calibration_sets(rows, Path(folder)) if args.calibration else {"": rows}
        for name, data in sets.items():
            only = ("GPTQ",) if args.calibration else MAIN
            print(f"\n{name}\n" if name else "")
            show(
                study(model, data, score, bits=args.bits, seeds=args.seeds, tokens=16_384, only=only), "exact match, %"
            )


if __name__ == "__main__":
    main()
