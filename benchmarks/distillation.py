"""Our distillation against trl's trainers at equal work: tokens/s, peak memory, share of the matmul roof.

    make peers   # the strangers' environments under build/interop
    python -m benchmarks.distillation MODEL TEXT [--dtype bf16] [--lengths mixed] [--repeats 3]

MODEL is a plain checkpoint, the teacher, whose half-size cut is the student; or ``smollm2-135m``: random weights of
that shape, half of the layers for the student, random tokens for text. TEXT holds ``train.txt`` and
``valid-stories.txt``. Everyone trains the same student on the same rows towards the same teacher: forward KL at
temperature 1, AdamW with one schedule, equal steps, tokens of a step, number format and threads. trl's trainers are
given the answers that they would let the student write (``DistillationTrainer`` with that step replaced,
``GKDTrainer`` with ``lmbda`` 0), without gradient checkpointing, which would slow them down. Rows are of one length,
all their tokens targets, in the same order; or ``mixed``: from an eighth of it up to it, the last two thirds targets,
each trainer making its own batches of as many real tokens.

Each contender has a process of its own, in turn, and the table tells medians of the repeats. Tokens are real ones, and
the first steps are left out. Per CPU second: other work on the machine tips it less. A step's share of the roof is the
student's operations over those of a large square matrix product per CPU second, taken in the same process just before:
6 per weight of the layers and token, 6 per weight of the head and target, and 6 * layers * heads * head size * tokens^2
per row for causal attention; whatever is computed twice, or for padding, or by the teacher, counts nothing. Memory is
what the process grew by beyond its imports and the student's weights, the teacher's weights counted. Two ratios for the
cache: without its filling, and with that spread over ``--epochs`` passes over the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.quantizers import texts
from benchmarks.quiet import QuietRuns, add_option
from compress.data.rows import make_row
from compress.encoding import TokenRow, encode_rows, load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.packing import BatchOrder, RowTable, cut
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings, learning_rate
from compress.model.distillation.students import random_student, start_student
from compress.model.distillation.targets import OnlineTargets
from compress.model.shapes import shape_of

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("distillation_worker.py")
# title -> (worker's kind, what it is told beside the common part)
CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ours, cached teacher": ("ours", {"cached": True}),
    "ours, running teacher": ("ours", {"cached": False}),
    "trl DistillationTrainer": ("distillation", {}),
    "trl GKDTrainer": ("gkd", {}),
}
WARM = 2  # steps left out of the timing
HELD_TOKENS = 16_384
SMOLLM2: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Row = tuple[list[int], int]  # token ids, and how many of them are the prompt


def stream(model: Path, path: Path, count: int) -> list[int]:
    """The first ``count`` tokens of the texts of a file, one text behind the other; raises SystemExit if fewer."""
    tokenizer, ids = load_tokenizer(model), list[int]()
    for text in texts(path):
        if len(ids) >= count:
            return ids[:count]
        ids += encode_rows([make_row(text=text)], tokenizer, max_tokens=1 << 20)[0].ids
    raise SystemExit(f"{path} holds {len(ids)} tokens, fewer than {count}")


def rows_of(ids: Sequence[int], lengths: Sequence[int], mixed: bool) -> list[Row]:
    """Cut ``ids`` into rows of ``lengths``."""
    ends = np.cumsum(lengths).tolist()
    pieces = [list(ids[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return [(piece, len(piece) // 3 if mixed else 1) for piece in pieces]


def table_of(rows: Sequence[Row], vocab: int) -> RowTable:
    """The rows as our trainer takes them."""
    return RowTable(
        [
            TokenRow(str(i), tuple(ids), (0,) * prompt + (1,) * (len(ids) - prompt))
            for i, (ids, prompt) in enumerate(rows)
        ],
        vocab=vocab,
    )


def operations(student: PreTrainedModel, rows: Sequence[Row], vocab: int) -> float:
    """Floating-point operations of one pass forward and back over ``rows``, per token."""
    config: Any = student.config
    heads = int(config.num_attention_heads) * int(config.head_dim)
    layers = cast(Any, student).model.layers
    inner = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    total = sum(
        6 * inner * len(ids)
        + 6 * vocab * int(config.hidden_size) * (len(ids) - prompt)
        + 6 * len(layers) * heads * len(ids) ** 2
        for ids, prompt in rows
    )
    return total / sum(len(ids) for ids, _ in rows)


@torch.no_grad()
def divergence(teacher: Any, student: Any, table: RowTable) -> float:
    """KL(teacher || student) on held-out rows, nats per target."""
    sides = [OnlineTargets(model, vocab=table.vocab) for model in (teacher, student)]
    total = 0.0
    for rows in cut(np.arange(len(table)), table.lengths, 2048):
        batch = table.batch(rows)
        said = [side(batch) for side in sides]
        for start in range(0, len(batch.keep), 512):
            p, q = (one.narrow(start, min(start + 512, len(batch.keep))).logprobs for one in said)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / float(table.counts.sum())


class Task:
    """A teacher, a student and rows, written where the contenders find them."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.mixed = given, folder, given.lengths == "mixed"
        draw = np.random.Generator(np.random.PCG64(0))
        count = given.rows * given.steps
        longest = given.tokens
        lengths = draw.integers(longest // 8, longest + 1, count) if self.mixed else np.full(count, longest)
        held = [longest] * max(1, given.held // longest)
        if str(given.model) == "smollm2-135m":
            shape = shape_of(SMOLLM2)
            self.teacher: PreTrainedModel = random_student(SMOLLM2, shape, head_dim=None, seed=0, where="benchmark")
            self.vocab = int(SMOLLM2["vocab_size"])
            pool, unseen = (draw.integers(3, self.vocab, int(sum(n))).tolist() for n in (lengths, held))
        else:
            self.teacher = load_model(given.model, dtype=torch.float32)
            self.vocab = max(load_tokenizer(given.model).get_vocab().values()) + 1
            pool = stream(given.model, given.text / "train.txt", int(sum(lengths)))
            unseen = stream(given.model, given.text / "valid-stories.txt", int(sum(held)))
        self.rows, self.held = (
            rows_of(pool, lengths.tolist(), self.mixed),
            table_of(rows_of(unseen, held, False), self.vocab),
        )
        self.student = self._student()
        for model, name in ((self.teacher, "teacher"), (self.student, "student")):
            model.save_pretrained(folder / name)

    def _student(self) -> PreTrainedModel:
        if str(self.given.model) == "smollm2-135m":
            half = {**SMOLLM2, "num_hidden_layers": SMOLLM2["num_hidden_layers"] // 2}
            return random_student(half, shape_of(half), head_dim=None, seed=1, where="benchmark")
        rows = [TokenRow(str(i), tuple(ids), (0,) + (1,) * (len(ids) - 1)) for i, (ids, _) in enumerate(self.rows)]
        params = LogitsParams(prune_ratio=0.5, calibration_tokens=8192)
        return start_student(self.teacher, rows, params, checkpoint=None, seed=0, where="benchmark")[0]

    def request(self, kind: str, options: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
        """What a worker is told."""
        given = self.given
        table = table_of(self.rows, self.vocab)
        tokens = round(given.rows * float(table.lengths.mean()))
        everything = np.arange(len(table), dtype=np.int64)
        order = BatchOrder(table.lengths, everything, batch_tokens=tokens, seed=0)
        settings = TrainSettings(learning_rate=given.learning_rate)
        batches = [everything] if self.mixed else [order[step] for step in range(given.steps)]
        return {
            "kind": kind,
            "teacher": str(self.folder / "teacher"),
            "student": str(self.folder / "student"),
            "cache": str(self.folder / "cache"),
            "scratch": str(scratch),
            "out": str(scratch / "student"),
            "rows": self.rows,
            "order": np.concatenate(batches).tolist(),
            "vocab": self.vocab,
            "steps": given.steps,
            "batch_rows": given.rows,
            "batch_tokens": tokens,
            "learning_rate": given.learning_rate,
            "rates": [learning_rate(step, given.steps, settings) for step in range(given.steps)],
            "bf16": given.dtype == "bf16",
            "threads": given.threads,
            **options,
        }

    def run(self, title: str, python: str) -> dict[str, Any] | None:
        """Run one contender; None where it fails, with its last line printed."""
        kind, options = CONTENDERS.get(title, ("fill", {}))
        env = os.environ | {"OMP_NUM_THREADS": str(self.given.threads), "TOKENIZERS_PARALLELISM": "false"}
        env |= {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "request.json"
            path.write_text(json.dumps(self.request(kind, options, Path(name))), encoding="utf-8")
            command = [python, str(WORKER), str(path)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
                print(f"  {title}: {last}", file=sys.stderr)
                return None
            found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            if kind != "fill":
                found["held"] = divergence(self.teacher, load_model(Path(name) / "student"), self.held)
                found |= self._rates(found, ours=kind == "ours")
        return found

    def _rates(self, found: Mapping[str, Any], *, ours: bool) -> dict[str, float]:
        """Real tokens per second and per CPU second of the steps behind the first ones."""
        seconds, cpu = (b - a for a, b in zip(found["clocks"][WARM], found["clocks"][-1], strict=True))
        lengths = np.array([len(ids) for ids, _ in self.rows])
        steps = range(WARM, self.given.steps - 1)
        if ours:
            tokens = round(self.given.rows * float(lengths.mean()))
            order = BatchOrder(lengths, np.arange(len(lengths)), batch_tokens=tokens, seed=0)
            done = sum(int(lengths[order[step]].sum()) for step in steps)
        else:
            done = int(lengths[WARM * self.given.rows : (self.given.steps - 1) * self.given.rows].sum())
        return {"tokens_s": done / seconds, "tokens_cpu_s": done / cpu, "wall_over_cpu": seconds / cpu}


def table_lines(task: Task, outcomes: Mapping[str, list[dict[str, Any]]], filled: Mapping[str, Any]) -> list[str]:
    """The table: medians over the repeats, and the lowest of their ratios."""
    flops = operations(task.student, task.rows, task.vocab)

    def middle(title: str, key: str) -> float:
        return statistics.median(float(one[key]) for one in outcomes[title])

    peers = [title for title in outcomes if title.startswith("trl")]
    lines = [
        "| trainer | tokens/s | per CPU s | of the roof | memory beyond the student | last loss | held-out KL | "
        + " | ".join(f"times {title}" for title in peers) + " |",
        "|---" * (7 + len(peers)) + "|",
    ]  # fmt: skip
    fill_cpu = float(filled["fill_cpu_s"]) / int(filled["tokens"]) / task.given.epochs  # per token trained on
    for title, found in outcomes.items():
        share = statistics.median(flops * one["tokens_cpu_s"] / one["roof"] for one in found)
        rate = middle(title, "tokens_cpu_s")
        ratios = []
        for other in peers:
            pairs = [a["tokens_cpu_s"] / b["tokens_cpu_s"] for a, b in zip(found, outcomes[other], strict=False)]
            ratios.append(f"{min(pairs):.2f}")  # the lowest of the repeats is told
            if title == "ours, cached teacher":
                whole = 1 / (1 / rate + fill_cpu)
                ratios[-1] += f" ({whole / middle(other, 'tokens_cpu_s'):.2f} with the filling)"
        last = statistics.median(float(np.mean(one["losses"][-3:])) for one in found)
        lines.append(
            f"| {title} | {middle(title, 'tokens_s'):,.0f} | {rate:,.0f} | {100 * share:.0f} % "
            f"| {middle(title, 'grown') / 1e6:,.0f} MB | {last:.4f} | {middle(title, 'held'):.4f} | "
            + " | ".join(ratios) + " |"
        )  # fmt: skip
    return lines


def heading(task: Task, outcomes: Mapping[str, list[dict[str, Any]]], filled: Mapping[str, Any], start: float) -> str:
    """What was measured; ``start`` is the divergence before training."""
    given = task.given
    teacher, student = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (task.teacher, task.student))
    roof = statistics.median(one["roof"] / 1e9 for found in outcomes.values() for one in found)
    flops = operations(task.student, task.rows, task.vocab) / 1e6
    return (
        f"{given.model.name}: teacher {teacher:.2f} million weights, student {student:.2f}, vocabulary {task.vocab}; "
        f"{given.dtype}, {given.threads} thread(s), {given.steps} steps of {given.rows} rows, {given.lengths}, up to "
        f"{given.tokens} tokens; {flops:.2f} MFLOP per token, roof {roof:.0f} GFLOP per CPU s; held-out KL of the "
        f"start {start:.4f}; filling the cache {filled['fill_cpu_s']:.1f} CPU s for {filled['tokens']:,} tokens, "
        f"{filled['bytes_per_target']:.0f} bytes a target, {filled['grown'] / 1e6:.0f} MB; "
    )


def repeated(task: Task, titles: Sequence[str], outcomes: dict[str, list[dict[str, Any]]], repeat: int) -> None:
    """Run every contender once more and keep what came of it."""
    for title in titles:
        found = task.run(title, task.given.trl_python if title.startswith("trl") else sys.executable)
        if found is not None:
            outcomes[title].append(found)
            print(repeat, title, f"{found['tokens_cpu_s']:.0f}", f"{found['held']:.4f}", file=sys.stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lengths", choices=("equal", "mixed"), default="equal")
    parser.add_argument("--tokens", type=int, default=256, help="of the longest row")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over which the cache's filling is spread")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held", type=int, default=HELD_TOKENS, help="held-out tokens")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), help="contenders whose title holds one of these")
    parser.add_argument("--trl-python", default=str(ROOT / "build" / "interop" / "trl" / "bin" / "python"))
    add_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    titles = [title for title in CONTENDERS if any(part in title for part in given.only)]
    if not Path(given.trl_python).exists():
        print("no environment of trl; make peers builds it", file=sys.stderr)
        titles = [title for title in titles if title.startswith("ours")]
    outcomes: dict[str, list[dict[str, Any]]] = {title: [] for title in titles}
    with tempfile.TemporaryDirectory() as name:
        task = Task(given, Path(name))
        start = divergence(task.teacher, task.student, task.held)
        filled = task.run("the cache", sys.executable)
        if filled is None:
            raise SystemExit("the cache could not be filled")
        runs = QuietRuns(given.wait)
        for repeat in range(given.repeats):
            with runs.run():
                repeated(task, titles, outcomes, repeat)
        print(heading(task, outcomes, filled, start) + runs.told() + "\n")
        print("\n".join(table_lines(task, {title: found for title, found in outcomes.items() if found}, filled)))


if __name__ == "__main__":
    main()
