"""Does what the data steps do reach the student? Each step on and off, at equal optimizer steps, over several seeds.

    python -m benchmarks.data_ablation .edgestill --steps 400 --seeds 3

Takes the rows of a finished quickstart from the store: what IFD left, the same with the invented rows, 2,000 of these
by k-center and by chance, and the condensed rows before and after the mix was evened out. On each, a student of the
quickstart's shape is trained; printed is the share of test rows that greedy decoding would answer exactly.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from random import Random

import torch

from benchmarks.quickstart import DATA, lines, newest
from compress.context import StageContext
from compress.data.condensation.k_center import k_center
from compress.data.condensation.params import KCenterParams
from compress.data.rows import chat_row, read_rows, write_rows
from compress.encoding import encode_prompt, load_tokenizer, stop_ids
from compress.model.checkpoint import load_model
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.model.runtime import TorchRuntime
from compress.progress import Progress
from compress.teachers import open_teacher

ROWS = 2000  # of the condensed sets


def arms(folders: dict[str, Path], work: Path) -> dict[str, Path]:
    """Name of an arm -> folder of its rows."""
    whole = folders["data.synthesis.magpie"]
    chance, centres = work / "chance", work / "centres"
    for folder in (chance, centres):
        folder.mkdir()
    write_rows(chance, Random(0).sample(read_rows(whole), ROWS))
    ctx = StageContext("k_center", {"data": whole}, centres, work, 7, Progress(quiet=True))
    k_center(KCenterParams(rows=ROWS, embedding="hashed", stratify="proportional"), ctx)
    return {
        "what IFD left": folders["data.selection.ifd"],
        "with the invented rows": whole,
        f"{ROWS} of these by chance": chance,
        f"{ROWS} of these by k-center": centres,
        "condensed, mix as it is": folders["data.condensation.k_center"],
        "condensed, mix evened out": folders["data.quality.stabilize"],
    }


def trained(rows: Path, work: Path, seed: int, steps: int) -> float:
    """Exact match on the test rows of a student trained on ``rows``; the teacher's cache in ``work`` is shared."""
    out = Path(tempfile.mkdtemp(dir=work))
    for path in work.glob("training*"):
        path.unlink()
    teacher = open_teacher(DATA / "teacher")
    ctx = StageContext("ablation", {"data": rows}, out, work, seed, Progress(quiet=True), teacher=teacher)
    params = LogitsParams(
        heads=4, kv_heads=2, ffn=64, steps=steps, batch_tokens=1024, learning_rate=0.002, kd_weight=0.95, learn="all",
        max_tokens=128, validations=1,
    )  # fmt: skip
    distill(params, ctx)
    tokenizer = load_tokenizer(out)
    tests = [chat_row(row["prompt"], row["response"]) for row in lines("test.jsonl")]
    prompts = [encode_prompt(row.prompt, tokenizer) for row in tests]
    answers = tokenizer([row.answer for row in tests], add_special_tokens=False)["input_ids"]
    runtime = TorchRuntime(load_model(out, dtype=torch.float32))
    verdicts = runtime.would_write(prompts, answers, frozenset(stop_ids(tokenizer)))
    shutil.rmtree(out)
    return sum(verdicts) / len(verdicts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of a finished quickstart")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name, rows in arms(newest(args.store)[0], work).items():
            found = [trained(rows, work, seed, args.steps) for seed in range(args.seeds)]
            shown = ", ".join(f"{value:.1%}" for value in found)
            print(
                f"{name:28} {len(read_rows(rows)):5} rows   mean {statistics.mean(found):.1%}   ({shown})", flush=True
            )


if __name__ == "__main__":
    main()
