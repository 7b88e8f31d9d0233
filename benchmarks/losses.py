"""What each loss of distillation leaves of the divergence from the teacher, at equal steps, on a model of stories.

    python -m benchmarks.losses MODEL STORIES [--seeds 3] [--steps 150] [--batch-tokens 1024] [--only NAME ...]

MODEL is a plain checkpoint, STORIES a folder with ``train.txt`` and ``valid-stories.txt``, stories parted by lines
``<|endoftext|>``. The student is MODEL cut to half its parameters. Every row of a seed has the same start, rows, order,
steps and learning rate; 1 - kd_weight is 0.1 but for the labels alone. The controls learn from a teacher whose answers
stand at the wrong positions. "own text" rows see stories and samples of a student of labels alone, half and half.
"X, time of Y" is X for as many steps as fit into the CPU time of Y. "LoRA" rows train adapters of that rank at a
larger rate. Prints a Markdown table: KL(teacher || student), KL(student || teacher) and cross-entropy in nats per token
on stories that no row saw, mean and, in brackets, the largest less the smallest over the seeds; CPU seconds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quantizers import shown, texts
from compress.context import StageContext
from compress.data.rows import make_row
from compress.encoding import TokenRow, encode_rows, load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.confidence import confidence
from compress.model.distillation.features import feature_targets, projected
from compress.model.distillation.losses import LossWeights, log_softmax_at
from compress.model.distillation.packing import Batch, RowTable, cut
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import OnlineTargets
from compress.model.distillation.trainer import train
from compress.model.lora import add_adapters
from compress.progress import Progress

TOKENS, ROWS, HELD, SAMPLES = 128, 1500, 160, 400
KD = LossWeights(0.9)
LORA_RATE = 1e-2  # adapters start from zero and need larger steps
LOSSES: dict[str, LossWeights] = {
    "labels alone (CE)": LossWeights(0.0),
    "forward_kl": KD,
    "reverse_kl": dataclasses.replace(KD, divergence="reverse_kl"),
    "cakld, measured share": dataclasses.replace(KD, divergence="cakld"),
    "jsd, beta 0.5": dataclasses.replace(KD, divergence="jsd", number=0.5),
    "skew_kl, 0.1": dataclasses.replace(KD, divergence="skew_kl", number=0.1),
    "skew_reverse_kl, 0.1": dataclasses.replace(KD, divergence="skew_reverse_kl", number=0.1),
    "skew_kl, at most 0.5, adaptive": dataclasses.replace(KD, divergence="skew_kl", number=0.5, adaptive=True),
    "skew_kl, 0.5": dataclasses.replace(KD, divergence="skew_kl", number=0.5),
    "forward_kl, temperature 2": dataclasses.replace(KD, temperature=2.0),
    "forward_kl + hidden 0.3": dataclasses.replace(KD, hidden_weight=0.3),
    "forward_kl + attention 0.3": dataclasses.replace(KD, attention_weight=0.3),
    "hidden 0.3, no logits": LossWeights(0.0, hidden_weight=0.3),
    "own text: skew_kl, 0.1": dataclasses.replace(KD, divergence="skew_kl", number=0.1),
    "own text: skew_reverse_kl, 0.1": dataclasses.replace(KD, divergence="skew_reverse_kl", number=0.1),
    "own text: skew_pair, 0.1": dataclasses.replace(KD, divergence="skew_pair", number=0.1),
    "LoRA 4: forward_kl": KD,
    "LoRA 8: forward_kl": KD,
    "shuffled: LoRA 8: forward_kl": KD,
    "shuffled: forward_kl": KD,
    "shuffled: jsd, beta 0.5": dataclasses.replace(KD, divergence="jsd", number=0.5),
    "shuffled: hidden 0.3, no logits": LossWeights(0.0, hidden_weight=0.3),
}

SAME_TIME = {  # name -> the loss, and the one whose CPU time it gets
    "labels alone (CE), time of forward_kl": ("labels alone (CE)", "forward_kl"),
    "forward_kl, time of hidden": ("forward_kl", "forward_kl + hidden 0.3"),
    "forward_kl, time of attention": ("forward_kl", "forward_kl + attention 0.3"),
}


class Shuffled:
    """A teacher whose answers, logits and features, stand at the wrong positions."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, batch: Batch) -> Any:
        found = self.inner(batch)
        order = torch.randperm(len(batch.keep), generator=torch.Generator().manual_seed(len(batch.keep)))
        if not hasattr(found, "features"):
            return dataclasses.replace(found, hidden=found.hidden[order])
        states = dataclasses.replace(found.states, hidden=found.states.hidden[order])
        hidden = tuple(layer[order] for layer in found.features.hidden)
        return dataclasses.replace(found, states=states, features=dataclasses.replace(found.features, hidden=hidden))


class Study:
    """One seed: its student, its rows, and what a loss makes of them."""

    def __init__(self, model: Path, stories: Path, seed: int, given: argparse.Namespace) -> None:
        self.tokenizer, self.seed, self.given = load_tokenizer(model), seed, given
        self.teacher = load_model(model)
        draw = np.random.Generator(np.random.PCG64(seed))
        pool = texts(stories / "train.txt")
        self.rows = self._encoded([pool[i] for i in draw.permutation(len(pool))[:ROWS]])
        self.held = RowTable(self._encoded(texts(stories / "valid-stories.txt")[:HELD]), vocab=self.vocab)
        params = LogitsParams(prune_ratio=0.5, calibration_tokens=8192)
        self.start, _ = start_student(self.teacher, self.rows, params, checkpoint=None, seed=seed, where="benchmark")
        self.online = OnlineTargets(self.teacher, vocab=self.vocab)
        self.share = confidence(self.teacher, RowTable(self.rows, vocab=self.vocab), seed)
        self.samples: list[TokenRow] = []

    @property
    def vocab(self) -> int:
        """Tokens that both models can produce."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def _encoded(self, found: Sequence[str]) -> list[TokenRow]:
        return encode_rows([make_row(text=text) for text in found], self.tokenizer, max_tokens=TOKENS, truncate=True)

    def run(self, name: str, steps: int) -> tuple[float, float, float, float]:
        """Train by the loss called ``name``: both divergences and the cross-entropy afterwards, and CPU seconds."""
        loss = LOSSES[name]
        if loss.divergence == "cakld":
            loss = dataclasses.replace(loss, number=self.share)
        rows, own = self.rows, frozenset[str]()
        if name.startswith("own text"):
            rows = [*self.rows[: len(self.samples)], *self.samples]
            own = frozenset(row.id for row in self.samples)
        student, adapters = copy.deepcopy(self.start), None
        if "LoRA" in name:
            rank = int(name.partition("LoRA ")[2].partition(":")[0])
            adapters = add_adapters(student, rank, alpha=None, targets="all", seed=self.seed, where="benchmark")
        settings = TrainSettings(
            loss=loss,
            steps=steps,
            batch_tokens=self.given.batch_tokens,
            learning_rate=LORA_RATE if adapters else 3e-3,
            validation_share=0.0,
            keep="last",
            precision="fp32",
            seed=self.seed,
        )
        table = RowTable(rows, vocab=self.vocab, own=own)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder, projected(student, self.teacher, loss, seed=self.seed):
            targets: Any = self.online
            if loss.wants_features:
                targets = feature_targets(self.online, student, loss, where="benchmark")
            if name.startswith("shuffled"):
                targets = Shuffled(targets)
            ctx = StageContext("benchmark", {}, Path(folder), Path(folder), self.seed, Progress(quiet=True), threads=1)
            train(student, targets, table, settings, ctx, Path(folder) / "log.jsonl", vocab=self.vocab)
        seconds = time.process_time() - began
        if adapters is not None:
            adapters.merge()
        if name == "labels alone (CE)" and not self.samples:
            self.samples = sampled(student, self.tokenizer.bos_token_id, self.seed)
        return *self.measure(student), seconds

    @torch.no_grad()
    def measure(self, student: Any) -> tuple[float, float, float]:
        """KL(teacher || student), KL(student || teacher) and cross-entropy on the held-out stories."""
        sums, count = np.zeros(3), 0
        own = OnlineTargets(copy.deepcopy(student), vocab=self.vocab)  # it freezes what it is given
        order = np.argsort(self.held.lengths, kind="stable")
        for rows in cut(order, self.held.lengths, 4096):
            batch = self.held.batch(rows)
            p, q = (model(batch).narrow(0, len(batch.keep)).logprobs.double() for model in (self.online, own))
            labels = -q.gather(1, batch.labels[:, None])
            sums += [float(x.sum()) for x in (p.exp() * (p - q), q.exp() * (q - p), labels)]
            count += len(batch.keep)
        kl, back, ce = (sums / count).tolist()
        return kl, back, ce


@torch.no_grad()
def sampled(student: Any, bos: int, seed: int) -> list[TokenRow]:
    """Texts that ``student`` writes from the start of a story, at temperature 1."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.full((SAMPLES, 1), bos)
    cache = None
    for _ in range(TOKENS - 1):
        found = student(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        probabilities = log_softmax_at(found.logits[:, -1], 1.0).exp()
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=draw)], dim=1)
    answer = (0,) + (1,) * (TOKENS - 1)
    return [TokenRow(f"own-{index}", tuple(row), answer) for index, row in enumerate(ids.tolist())]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=[*LOSSES, *SAME_TIME], default=[*LOSSES, *SAME_TIME])
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {*given.only, *(name for late in given.only for name in SAME_TIME.get(late, ())), "labels alone (CE)"}
    names = [name for name in [*LOSSES, *SAME_TIME] if name in wanted]  # the labels alone write the own text
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    start = []
    for seed in range(given.seeds):
        study = Study(given.model, given.stories, seed, given)
        start.append(study.measure(study.start))
        for name in names:
            what, whose = SAME_TIME.get(name, (name, name))
            longer = 1.0 if what == name else found[whose][-1][-1] / found[what][-1][-1]
            found[name].append(study.run(what, round(longer * given.steps)))
            print(seed, name, *(f"{value:.4f}" for value in found[name][-1]), file=sys.stderr, flush=True)
    print("| loss | KL(teacher, student) | KL(student, teacher) | cross-entropy | CPU s |\n|---|---|---|---|---|")
    print("| the start | " + " | ".join(shown(column, 3) for column in zip(*start, strict=True)) + " | |")
    for name, rows in found.items():
        *columns, seconds = zip(*rows, strict=True)
        cells = [shown(column, 4) for column in columns] + [f"{np.mean(seconds):.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
