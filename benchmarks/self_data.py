"""Does a pruned student recover better on answers that its unpruned teacher wrote than on the original ones?

    python -m benchmarks.self_data MODEL STORIES [--rows FILE] [--seeds 0 1 2] [--steps 80] [--only NAME ...]

MODEL is a plain checkpoint that continues stories, STORIES a folder with ``train.txt`` and ``valid-stories.txt``. A
prompt is a paragraph and its answer the next one, of ``train.txt`` or of another file (``--rows``, paragraphs parted by
blank lines): text that MODEL does not know. ``data.condensation.self_distillation`` replaces the answers; MODEL follows
no request, so that a template shows it the prompt alone, and its answer ends with the line. On each set a copy of MODEL
cut to half its size is trained, from the same start, for equal steps: on the labels alone, and once by the forward KL
on the original answers. The controls have the teacher's answers dealt to other prompts. Printed per seed: loss of
unseen original answers of the kind that was trained on, loss of whole unseen stories (what was forgotten), the
teacher's loss on what the student writes (nats per token), CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.on_policy import teacher_loss, written
from benchmarks.quantizers import shown, texts
from compress.context import StageContext
from compress.data.condensation.params import SelfDistillationParams
from compress.data.condensation.self_distillation import self_distillation
from compress.data.rows import Row, chat_row, make_row, read_rows, write_rows
from compress.encoding import encode_rows, load_tokenizer
from compress.model.checkpoint import load_model, save_model
from compress.model.distillation.packing import RowTable, cut
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.model.distillation.students import start_student
from compress.model.distillation.targets import OnlineTargets
from compress.progress import Progress
from compress.teachers import LocalTeacher

MARK = "|||"  # what stands behind it the teacher is not shown
TEMPLATE = f"{{{{ bos_token }}}}{{% for m in messages %}}{{{{ m['content'].split('{MARK}')[0] }}}}\n{{% endfor %}}"
TOKENS, MADE, COUNT, HELD, CHARS = 256, 128, 1000, 150, 420
ORIGINAL, GREEDY, DRAWN, DEALT = "original answers", "the teacher's, greedy", "the teacher's, drawn", "control: dealt"
DRAWN_DEALT = "control: drawn, dealt"
FORWARD = "original answers, forward KL"
COLUMNS = ("loss, original answers", "loss, stories", "teacher's loss, own text", "CPU s")


def talking(model: Path, folder: Path) -> Path:
    """``model`` with a chat template of lines, in which a line feed ends an answer."""
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(model)
    feed = tokenizer("a\nb", add_special_tokens=False)["input_ids"][1]
    assert tokenizer.decode([feed]) == "\n", "a line feed is a token of its own"
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    ends = {"eos_token_id": sorted({feed, tokenizer.bos_token_id, tokenizer.eos_token_id}), "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def pairs(groups: Sequence[Sequence[str]]) -> list[Row]:
    """Neighbouring paragraphs of a text as prompt and answer, each paragraph used once."""
    found = []
    for parts in groups:
        plain = [" ".join(part.split()) for part in parts]
        for prompt, answer in zip(plain[::2], plain[1::2], strict=False):
            if 20 <= len(answer) <= CHARS and 20 <= len(prompt) <= CHARS:
                found.append(chat_row(prompt, answer))
    return found


class Study:
    """One seed: its rows, its start, and what a set of answers makes of it."""

    def __init__(self, root: Path, args: argparse.Namespace, seed: int) -> None:
        self.root, self.seed, self.steps = root / str(seed), seed, args.steps
        self.root.mkdir()
        self.model = talking(args.model, self.root / "teacher")
        self.teacher, self.tokenizer = load_model(self.model), load_tokenizer(self.model)
        stories, unseen = texts(args.stories / "train.txt"), texts(args.stories / "valid-stories.txt")
        if args.rows is None:
            seen = pairs([story.split("\n")[:2] for story in stories])
            held = pairs([story.split("\n")[:2] for story in unseen])[:HELD]
        else:
            every = pairs([args.rows.read_text(encoding="utf-8").split("\n\n")])
            held, seen = every[:HELD], every[HELD:]
        self.seen = Random(seed).sample(seen, COUNT)
        self.held = {"answers": self._table(held), "stories": self._table([make_row(text=text) for text in unseen])}
        self.begins = [row.ids for row in encode_rows([make_row(text=t) for t in unseen], self.tokenizer,
                                                      max_tokens=8, truncate=True)]  # fmt: skip
        self.start = self.root / "start"
        shape = LogitsParams.model_validate({"prune_ratio": 0.5, "multiple_of": 4, "calibration_tokens": 8192})
        rows = encode_rows(self.seen, self.tokenizer, max_tokens=TOKENS, truncate=True)
        student, _ = start_student(self.teacher, rows, shape, checkpoint=None, seed=seed, where="benchmark")
        save_model(student, self.start, tokenizer_from=self.model)
        self.sets = {ORIGINAL: self._written(self.seen, "original")}

    def _table(self, rows: Sequence[Row]) -> RowTable:
        encoded = encode_rows(rows, self.tokenizer, max_tokens=TOKENS, truncate=True)
        vocab = max(self.tokenizer.get_vocab().values()) + 1
        return RowTable([row for row in encoded if row.targets], vocab=vocab)

    def _written(self, rows: Sequence[Row], name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        write_rows(folder, rows)
        return folder

    def _context(self, name: str, inputs: dict[str, Path]) -> StageContext:
        out, work = (self.root / f"{name}-{kind}" for kind in ("out", "work"))
        for folder in (out, work):
            folder.mkdir()
        teacher = LocalTeacher(self.model, threads=1)
        return StageContext(name, inputs, out, work, self.seed, Progress(quiet=True), teacher=teacher, threads=1)

    def rewrite(self, name: str, temperature: float) -> dict[str, Any]:
        """The set ``name``: the stage's rows."""
        params = SelfDistillationParams(request="{prompt}" + MARK + "{answer}", check="none", max_new_tokens=MADE,
                                        temperature=temperature)  # fmt: skip
        ctx = self._context(f"rewrite-{temperature}", {"data": self.sets[ORIGINAL]})
        figures = self_distillation(params, ctx).metrics
        self.sets[name] = ctx.out
        return figures

    def deal(self, name: str, to: str) -> None:
        """The set ``to``: the answers of ``name`` with other prompts."""
        rows = read_rows(self.sets[name])
        answers = [row.answer for row in rows]
        Random(self.seed).shuffle(answers)
        dealt = [chat_row(row.user, answer) for row, answer in zip(rows, answers, strict=True)]
        self.sets[to] = self._written(dealt, to.replace(" ", "-"))

    def run(self, name: str) -> tuple[float, ...]:
        """Train on a set and measure."""
        ctx = self._context(f"train-{name}".replace(" ", "-"), {"data": self.sets.get(name, self.sets[ORIGINAL]),
                                                     "model": self.start})  # fmt: skip
        params = LogitsParams.model_validate(
            {"init": "checkpoint", "steps": self.steps, "batch_tokens": 2048, "max_tokens": TOKENS, "truncate": True,
             "learning_rate": 3e-3, "kd_weight": 1.0 if name == FORWARD else 0.0, "targets": "online",
             "validation_share": 0.0, "keep": "last"}
        )  # fmt: skip
        began = time.process_time()
        distill(params, ctx)
        seconds = time.process_time() - began
        return *self.measure(load_model(ctx.out)), seconds

    def measure(self, student: Any) -> tuple[float, float, float]:
        """Loss of original answers and of stories, and the teacher's loss on the student's own text."""
        vocab = self.held["answers"].vocab
        made = written(student, self.begins, (1, 2), vocab)  # a line feed does not end a story
        own = teacher_loss(self.teacher, made)
        model = OnlineTargets(student, vocab=vocab)
        return loss_of(model, self.held["answers"]), loss_of(model, self.held["stories"]), own


@torch.no_grad()
def loss_of(model: OnlineTargets, table: RowTable) -> float:
    """Cross-entropy of a table, nats per target."""
    total, count = 0.0, 0
    for piece in cut(np.argsort(table.lengths, kind="stable"), table.lengths, 4096):
        batch = table.batch(piece)
        logprobs = model(batch).narrow(0, len(batch.keep)).logprobs
        total, count = total - float(logprobs.gather(1, batch.labels[:, None]).sum()), count + len(batch.keep)
    return total / count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [ORIGINAL, GREEDY, DRAWN, DEALT, DRAWN_DEALT, FORWARD]
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--rows", type=Path, help="a file of other text to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            study = Study(Path(scratch), args, seed)
            if seed == args.seeds[0]:
                print("the teacher", [round(value, 4) for value in study.measure(study.teacher)], flush=True)
            print("the start", [round(value, 4) for value in study.measure(load_model(study.start))], flush=True)
            for name, control, temperature in ((GREEDY, DEALT, 0.0), (DRAWN, DRAWN_DEALT, 1.0)):
                if {name, control} & {*args.only}:
                    print(seed, name, study.rewrite(name, temperature), flush=True)
                    study.deal(name, control)
            for name in args.only:
                found.setdefault(name, []).append(study.run(name))
                print(seed, name, [round(value, 4) for value in found[name][-1]], flush=True)
    print(f"\n| trained on | {' | '.join(COLUMNS)} |\n|---|---|---|---|---|")
    for name, values in found.items():
        columns = list(zip(*values, strict=True))
        print(f"| {name} | {' | '.join(shown(column, 3) for column in columns[:3])} | {np.mean(columns[3]):.1f} |")


if __name__ == "__main__":
    main()
