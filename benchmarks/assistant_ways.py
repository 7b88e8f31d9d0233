"""Every way to distill on the quickstart's task: exact match and divergence at equal steps and at equal time.

    python -m benchmarks.assistant_ways .edgestill [--steps 200] [--more 60] [--long 800] [--seeds 0 1 2]

Takes the rows of a finished quickstart from the store. First part: all ways start from the same student of the
quickstart's first shape and take ``--steps`` steps of 1,024 tokens; the labels alone also take two and four times as
many and the forward KL twice, from which the baseline at a dearer way's time is read. Second part: ways in which the
student writes, from the student that the forward KL left, ``--more`` steps; the forward KL gets as many, and as many as
fit into the time of each. Third part: the forward KL for ``--long`` steps, and the labels for its time. Printed after
each seed: exact match on the first test rows (every answer token the first choice, so that greedy decoding would write
it), KL(teacher || student) on their answers in nats per token, and CPU seconds of one thread, the filling of the
teacher's cache included. The control is a teacher whose layers stand in another order.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.assistant_bits import exact_match
from benchmarks.on_policy import shuffled
from benchmarks.quickstart import DATA, lines, newest
from compress.context import StageContext
from compress.data.rows import chat_row, read_rows
from compress.encoding import encode_rows, load_tokenizer
from compress.model.checkpoint import load_model, save_model
from compress.model.distillation.on_policy_params import GkdParams, MiniLlmParams, SpeculativeParams
from compress.model.distillation.on_policy_stage import gkd, minillm, speculative
from compress.model.distillation.packing import RowTable, cut
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import OnlineTargets
from compress.progress import Progress
from compress.teachers import open_teacher

Way = tuple[Callable[..., Any], type[LogitsParams], Mapping[str, Any]]
COMMON = {"init": "checkpoint", "batch_tokens": 1024, "learning_rate": 0.002, "learn": "all", "max_tokens": 128,
          "validation_share": 0.0, "keep": "last", "kd_weight": 0.95}  # fmt: skip
ONLINE = {"targets": "online"}
CONTROL = "control: forward KL, shuffled teacher"
LABELS, FORWARD, ALONE = "labels alone", "forward KL, cached top 32", "forward KL alone (kd_weight 1)"
WAYS: dict[str, Way] = {
    LABELS: (distill, LogitsParams, {"kd_weight": 0.0}),
    FORWARD: (distill, LogitsParams, {}),
    ALONE: (distill, LogitsParams, {"kd_weight": 1.0}),
    "forward KL, half labels": (distill, LogitsParams, {"kd_weight": 0.5}),
    "forward KL, cached sample of 12": (distill, LogitsParams, {"codec": "sample"}),
    "forward KL, running teacher": (distill, LogitsParams, ONLINE),
    "reverse KL": (distill, LogitsParams, {"divergence": "reverse_kl"}),
    "JSD 0.5": (distill, LogitsParams, {"divergence": "jsd"}),
    "skewed KL 0.1": (distill, LogitsParams, {"divergence": "skew_kl"}),
    "skewed KL 0.1, adaptive": (distill, LogitsParams, {"divergence": "skew_kl", "adaptive_skew": True}),
    "skewed reverse KL 0.1": (distill, LogitsParams, {"divergence": "skew_reverse_kl"}),
    "CAKLD, measured share": (distill, LogitsParams, {"divergence": "cakld"}),
    "forward KL and hidden states 0.3": (distill, LogitsParams, ONLINE | {"hidden_weight": 0.3}),
    "forward KL and attention 0.3": (distill, LogitsParams, ONLINE | {"attention_weight": 0.3}),
    CONTROL: (distill, LogitsParams, {}),
}
PARTS = ("ways", "writing", "long")
MADE = ONLINE | {"kd_weight": 1.0}
WRITING: dict[str, Way] = {
    ALONE: (distill, LogitsParams, MADE),
    "GKD": (gkd, GkdParams, MADE),
    "speculative": (speculative, SpeculativeParams, MADE),
    "MiniLLM": (minillm, MiniLlmParams, MADE),
}


class Study:
    """One seed: its start, what is measured, and the runs."""

    def __init__(self, rows: Path, work: Path, seed: int, test: int) -> None:
        self.rows, self.work, self.seed, self.start = rows, work, seed, work / f"start-{seed}"
        teacher, tokenizer = load_model(DATA / "teacher"), load_tokenizer(DATA / "teacher")
        self.vocab = max(tokenizer.get_vocab().values()) + 1
        self.teacher = OnlineTargets(teacher, vocab=self.vocab)
        tests = [chat_row(row["prompt"], row["response"]) for row in lines("test.jsonl")][:test]
        self.exact = exact_match(DATA / "teacher", tests)
        self.held = RowTable(encode_rows(tests, tokenizer, max_tokens=128), vocab=self.vocab)
        self.broken, self.cache = work / "shuffled", work / "cache"
        if not self.broken.is_dir():
            shuffled(DATA / "teacher", self.broken)
        shape = LogitsParams.model_validate({"heads": 4, "kv_heads": 2, "ffn": 64})
        encoded = [row.learning("all") for row in encode_rows(read_rows(rows), tokenizer, max_tokens=128)]
        student, _ = start_student(teacher, encoded, shape, checkpoint=None, seed=seed, where="benchmark")
        save_model(student, self.start, tokenizer_from=DATA / "teacher")

    def fill(self) -> float:
        """Fill the cache that most ways share, the same for every seed; CPU seconds of it."""
        if not self.cache.is_dir():
            self.cache.mkdir()
            first, again = (self.trained(WAYS[FORWARD], 1, self.cache)[1] for _ in range(2))
            (self.cache / "filling.json").write_text(json.dumps(first - again))
            for path in self.cache.glob("training*"):
                path.unlink()
        return float(json.loads((self.cache / "filling.json").read_text()))

    @torch.no_grad()
    def divergence(self, folder: Path) -> float:
        """KL(teacher || student) on the test rows' answers, nats per token."""
        student, total, count = OnlineTargets(load_model(folder), vocab=self.vocab), 0.0, 0
        for piece in cut(np.argsort(self.held.lengths, kind="stable"), self.held.lengths, 4096):
            batch = self.held.batch(piece)
            p, q = (model(batch).narrow(0, len(batch.keep)).logprobs.double() for model in (self.teacher, student))
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(batch.keep)
        return total / count

    def trained(self, way: Way, steps: int, work: Path, **more: Any) -> tuple[Path, float, dict[str, Any]]:
        """The student's folder, CPU seconds and figures of one run in the folder ``work``."""
        function, kind, chosen = way
        out = Path(tempfile.mkdtemp(dir=self.work))
        inputs = {"data": self.rows, "model": more.pop("start", self.start)}
        teacher = open_teacher(more.pop("teacher", DATA / "teacher"))
        ctx = StageContext("benchmark", inputs, out, work, self.seed, Progress(quiet=True), teacher=teacher, threads=1)
        began = time.process_time()
        result = function(kind.model_validate(COMMON | dict(chosen) | more | {"steps": steps}), ctx)
        return out, time.process_time() - began, result.metrics

    def run(self, name: str, way: Way, steps: int, **more: Any) -> dict[str, Any]:
        """Train; the figures of a line, and the student's folder."""
        work, seconds = Path(tempfile.mkdtemp(dir=self.work)), 0.0
        if name.startswith("control"):
            more["teacher"] = self.broken
        elif not {"targets", "codec"} & way[2].keys() and way[2].get("kd_weight", 1.0):
            seconds = self.fill()
            shutil.copytree(self.cache, work, dirs_exist_ok=True)
        out, took, figures = self.trained(way, steps, work, **more)
        shutil.rmtree(work)
        line = {"way": name, "seed": self.seed, "steps": steps, "exact": self.exact(out), "kl": self.divergence(out)}
        line["seconds"] = seconds + took
        extra = {key: value for key, value in figures.items() if key.startswith("made_") or key == "confidence"}
        print(json.dumps(line | extra), flush=True)
        return line | {"folder": out}


def from_the_start(study: Study, steps: int) -> list[dict[str, Any]]:
    """All ways at equal steps, and the baselines at more."""
    found = [study.run(name, way, steps) for name, way in WAYS.items()]
    for name, times in ((LABELS, 2), (FORWARD, 2), (LABELS, 4)):
        found.append(study.run(f"{name}, {times} x the steps", WAYS[name], times * steps))
    return found


def then_writing(study: Study, more: int, start: Path) -> list[dict[str, Any]]:
    """Ways in which the student writes, each beside the forward KL for the same time."""
    found: list[dict[str, Any]] = []
    for name, way in WRITING.items():
        found.append(study.run(f"then: {name}", way, more, start=start, learning_rate=0.001))
        longer = round(more * found[-1]["seconds"] / found[0]["seconds"])
        if longer > 1.1 * more:
            title = f"then: {ALONE}, time of {name}"
            found.append(study.run(title, WRITING[ALONE], longer, start=start, learning_rate=0.001))
    return found


def long(study: Study, steps: int, short: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The forward KL for longer, where the teacher's cache weighs little, and the labels for the same time."""
    forward = study.run(f"long: {FORWARD}", WAYS[FORWARD], steps)
    rate = statistics.mean(line["seconds"] / line["steps"] for line in short if line["way"].startswith(LABELS))
    return [forward, study.run(f"long: {LABELS}, time of the forward KL", WAYS[LABELS],
                               round(forward["seconds"] / rate))]  # fmt: skip


def one_seed(study: Study, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts of a seed; without the first, what the others need of it."""
    if "ways" in args.parts:
        found = from_the_start(study, args.steps)
    else:
        needed = [name for name, part in ((LABELS, "long"), (FORWARD, "writing")) if part in args.parts]
        found = [study.run(name, WAYS[name], args.steps) for name in needed]
    if "writing" in args.parts:
        start = next(line["folder"] for line in found if line["way"] == FORWARD)
        found += then_writing(study, args.more, start)
    if "long" in args.parts:
        found += long(study, args.long, found)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The table so far."""
    print("\n| way | steps | exact match | seeds | KL, nats per token | seeds | CPU s |\n|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(line["way"] for line in found):
        rows = [line for line in found if line["way"] == name]
        exact, kl, seconds, steps = ([row[key] for row in rows] for key in ("exact", "kl", "seconds", "steps"))
        print(
            f"| {name} | {statistics.mean(steps):.0f} | {statistics.mean(exact):.1%} "
            f"| {' '.join(f'{100 * value:.1f}' for value in exact)} | {statistics.mean(kl):.4f} "
            f"| {' '.join(f'{value:.4f}' for value in kl)} | {statistics.mean(seconds):.0f} |",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of a finished quickstart")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--more", type=int, default=60)
    parser.add_argument("--long", type=int, default=800)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = newest(args.store)[0]["data.quality.stabilize"]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            study = Study(rows, Path(scratch), seed, args.rows)
            print(f"seed {seed}, the start: exact match {study.exact(study.start):.1%}, "
                  f"KL {study.divergence(study.start):.4f}", flush=True)  # fmt: skip
            found += one_seed(study, args)
            show(found)


if __name__ == "__main__":
    main()
