"""What the teacher's targets are worth: codecs of the cache against the whole distribution, one teacher against two.

    python -m benchmarks.targets MODEL STORIES --codecs
    python -m benchmarks.targets MODEL STORIES --teachers PLAYS WIKI

MODEL is the folder of stories260k, STORIES a text file of stories, PLAYS and WIKI plain text files that two copies of
MODEL are first trained on. Students are MODEL cut to half its parameters, trained on the teacher's word alone
(kd_weight 1, but for the labels alone). Held-out rows are the same for all. Prints a row per way, one figure per seed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.context import StageContext
from compress.encoding import TokenRow, load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.cache import TargetCache
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import LossWeights, Sparse, fused_loss
from compress.model.distillation.mixtures import MixedTargets, routed, row_scores, shared_out
from compress.model.distillation.packing import RowTable, cut
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import CachedTargets, Codec, OnlineTargets, cache_header, fill_cache
from compress.model.distillation.trainer import train
from compress.progress import Progress

QUIET = Progress(quiet=True)
LENGTH = 96  # tokens of a row


def rows_of(path: Path, tokenizer: Any, count: int, *, name: str) -> list[TokenRow]:
    """The first ``count`` rows of `LENGTH` tokens of a text."""
    text = path.read_text(encoding="utf-8", errors="replace")[: count * LENGTH * 4].replace("<|endoftext|>", "\n")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)][:count]
    answer = (0,) + (1,) * (LENGTH - 1)
    return [TokenRow(f"{name}{at}", tuple(piece), answer) for at, piece in enumerate(pieces)]


class Bench:
    """One setting: a base model, training rows and held-out rows."""

    def __init__(
        self, model: Path, rows: Sequence[TokenRow], held: Sequence[TokenRow], args: argparse.Namespace
    ) -> None:
        self.base, self.tokenizer, self.args = load_model(model), load_tokenizer(model), args
        self.vocab = max(self.tokenizer.get_vocab().values()) + 1
        self.rows, self.table = rows, RowTable(rows, vocab=self.vocab)
        self.held = RowTable(held, vocab=self.vocab)

    def trained(self, student: Any, table: RowTable, target_fn: Any, seed: int, *, steps: int, rate: float) -> Any:
        """``student`` after ``steps`` steps."""
        settings = TrainSettings(
            loss=LossWeights(0.0 if target_fn is None else 1.0),
            steps=steps,
            batch_tokens=2048,
            learning_rate=rate,
            validation_share=0.0,
            keep="last",
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            ctx = StageContext(name="bench", inputs={}, out=place, work=place, seed=seed, progress=QUIET, threads=1)
            train(student, target_fn, table, settings, ctx, place / "log.jsonl", vocab=self.vocab)
        return student

    def student(self, target_fn: Any, seed: int) -> Any:
        """A student of half the size, taught."""
        params = LogitsParams(prune_ratio=0.5, multiple_of=4)
        start, _ = start_student(self.base, self.rows[:300], params, checkpoint=None, seed=seed, where="bench")
        return self.trained(start, self.table, target_fn, seed, steps=self.args.steps, rate=self.args.rate)

    def measure(self, student: Any, table: RowTable, teacher: OnlineTargets | None) -> tuple[float, float]:
        """(loss on the labels, KL from ``teacher``), nats per token of ``table``."""
        sums, head = np.zeros(2), student.get_output_embeddings().weight[: self.vocab]
        with torch.no_grad():
            for piece in cut(np.arange(len(table)), table.lengths, 8192):
                batch = table.batch(piece)
                hidden = kept_states(student, batch.input_ids, batch.keep)
                said = None if teacher is None else teacher(batch)
                parts = fused_loss(hidden, head, batch.labels, said, LossWeights(0.5))
                sums += [float(parts.ce), float(parts.kl)]
        ce, kl = sums / table.counts.sum()
        return float(ce), float(kl)


def shown(title: str, found: Sequence[float]) -> None:
    """One row: mean, and each seed."""
    print(f"{title:34} {statistics.mean(found):.4f}   {'  '.join(f'{value:.4f}' for value in found)}", flush=True)


def without_tail(target_fn: CachedTargets) -> Any:
    """The top k alone, made to add up to 1: what a cache without a tail would say."""

    def cut_off(batch: Any) -> Sparse:
        found: Any = target_fn(batch)
        logprobs = found.logprobs - found.logprobs.logsumexp(-1, keepdim=True)
        return Sparse(found.ids, logprobs, torch.full_like(found.log_tail, -torch.inf))

    return cut_off


def codecs(args: argparse.Namespace) -> None:
    """Students from caches of both codecs, from the running teacher and from the labels alone."""
    tokenizer = load_tokenizer(args.model)
    rows = rows_of(args.stories, tokenizer, args.rows + 400, name="story")
    bench = Bench(args.model, rows[400:], rows[:400], args)
    teacher = OnlineTargets(bench.base, vocab=bench.vocab)
    named = {
        "topk 12": Codec("topk", top_k=12),
        "topk 12 without tail": Codec("topk", top_k=12),
        "sample 12": Codec("sample", samples=12),
    }
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.seeds):
        ways: dict[str, Any] = {"labels alone": None, "dense (running teacher)": teacher}
        with tempfile.TemporaryDirectory() as folder:
            for name, plain in named.items():
                codec = replace(plain, seed=seed)
                about = cache_header((tokenizer, "base"), vocab=bench.vocab, codec=codec, temperature=1.0)
                cache = TargetCache(Path(folder) / name.replace(" ", "-"), about)
                fill_cache(cache, bench.table, teacher, QUIET)
                target_fn = CachedTargets(cache, bench.table)
                ways[name] = without_tail(target_fn) if "without" in name else target_fn
                if seed == 0:
                    stored, most = cache.stored_bytes / cache.positions, cache.header.bytes_per_token
                    print(f"{name}: {stored:.2f} bytes a token on the disk, {most} by the layout", flush=True)
            for name, target_fn in ways.items():
                found = bench.measure(bench.student(target_fn, seed), bench.held, teacher)
                results.setdefault(name, []).append(found)
    for at, title in enumerate(("loss on held-out labels", "KL from the teacher on held-out rows")):
        print(title)
        for name, found in results.items():
            shown(f"  {name}", [one[at] for one in found])


def teachers(args: argparse.Namespace) -> None:
    """Students of two specialists, of each alone, of their even mixture and of routed ones."""
    tokenizer = load_tokenizer(args.model)
    kinds = [rows_of(path, tokenizer, args.rows // 2 + 200, name=path.stem) for path in args.teachers]
    rows, held = [*kinds[0][200:], *kinds[1][200:]], [*kinds[0][:200], *kinds[1][:200]]
    bench = Bench(args.model, rows, held, args)
    mine = torch.tensor([[1.0, 0.0]] * (len(kinds[0]) - 200) + [[0.0, 1.0]] * (len(kinds[1]) - 200)).double()
    results: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        experts = []
        for kind in kinds:
            table = RowTable(kind[200:], vocab=bench.vocab)
            model = bench.trained(copy.deepcopy(bench.base), table, None, seed, steps=args.expert_steps, rate=1e-3)
            experts.append(OnlineTargets(model, vocab=bench.vocab))
        scores = torch.stack([row_scores(expert, bench.table, "loss", QUIET) for expert in experts], dim=1)
        by_loss = routed([1.0, 1.0], scores, 0.1)
        swapped = mine.flip(1)
        ways: dict[str, Any] = {
            "labels alone": None,
            f"{args.teachers[0].stem} expert": experts[0],
            f"{args.teachers[1].stem} expert": experts[1],
            "both, even weights (control)": MixedTargets(experts, shared_out([1.0, 1.0], len(rows))),
            "both, routed by loss": MixedTargets(experts, by_loss),
            "both, routed by the rows": MixedTargets(experts, mine),
            "both, the wrong way (control)": MixedTargets(experts, swapped),
        }
        right = float((by_loss * mine).sum(dim=1).mean())
        print(f"seed {seed}: routing by loss gives the right expert a weight of {right:.3f}", flush=True)
        for name, target_fn in ways.items():
            student = bench.student(target_fn, seed)
            results.setdefault(name, []).append(bench.measure(student, bench.held, None)[0])
            print(f"  {name}: {results[name][-1]:.4f}", flush=True)
    print("loss on held-out labels of both kinds")
    for name, found in results.items():
        shown(f"  {name}", found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--codecs", action="store_true", help="compare the codecs")
    parser.add_argument("--teachers", type=Path, nargs=2, help="compare one teacher with two, of these texts")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--expert-steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.codecs:
        codecs(args)
    if args.teachers:
        teachers(args)


if __name__ == "__main__":
    main()
