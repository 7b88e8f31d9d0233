"""What a teacher with another tokenizer wins for a student of bytes, against its labels alone, at equal steps.

    python -m benchmarks.cross_tokenizer MODEL STORIES [--seeds 3] [--steps 400] [--rows 2000] [--bytes 256]
        [--warm-steps 0] [--only NAME ...]

MODEL is a plain checkpoint (stories260k), STORIES a folder with ``train*.txt`` and ``valid-stories.txt``, stories
parted by lines ``<|endoftext|>``. The student's tokenizer is the 256 bytes, one token before a text and ``--merges``
longer tokens. Every line of the table has the same start, rows, steps and order, all drawn by the seed; with
``--warm-steps`` they start from a student that has learned the labels alone. The controls learn from a teacher whose
answers stand at the wrong places.
Prints a Markdown table: bits per byte on stories that no step saw (the first ``--bytes`` of each), mean, by seed,
and against the first line (labels alone). ``seconds`` are of this process's CPU, for one seed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.context import StageContext
from compress.data.rows import make_row, write_rows
from compress.encoding import load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.cross_tokenizer import stage
from compress.model.distillation.cross_tokenizer.losses import Spans, label_scores
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import Sparse, States
from compress.model.layers import output_head
from compress.progress import Progress
from compress.teachers import open_teacher

WAYS: dict[str, dict[str, Any]] = {
    "labels alone": {"kd_weight": 0.0},
    "spelled": {"loss": "spelled"},
    "spelled, shuffled teacher": {"loss": "spelled"},
    "ALM": {"loss": "alm"},
    "ALM, every chunk": {"loss": "alm", "debias": False},
    "ALM, shuffled teacher": {"loss": "alm"},
    "ULD": {"loss": "uld"},
    "ULD, by index": {"loss": "uld", "uld_pairs": "index"},
    "GOLD": {"loss": "gold"},
    "GOLD, KL alone": {"loss": "gold", "gold_unmatched": 0.0},
    "GOLD, KL alone, shuffled teacher": {"loss": "gold", "gold_unmatched": 0.0},
}
MARK = "<|endoftext|>"


def student_tokenizer(folder: Path, stories: list[str], merges: int) -> None:
    """Save a tokenizer of the 256 bytes, ``<s>``, ``</s>`` and at most ``merges`` longer tokens of the stories."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: index + 2 for index, letter in enumerate(letters)}, merges=[]))
    plain.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    if merges:
        trainer = trainers.BpeTrainer(
            vocab_size=258 + merges, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
        )
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        plain.train_from_iterator(stories, trainer)
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def shuffled(targets: Any) -> Any:
    """What the teacher says, chunk by chunk, at the wrong chunks of the batch."""

    def wrong(batch: Any) -> Any:
        found = targets(batch)
        if isinstance(found, Sparse):
            order = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(len(found.ids)))
            return Sparse(found.ids[order], found.logprobs[order], found.log_tail[order])
        order = torch.randperm(len(found.scores), generator=torch.Generator().manual_seed(len(found.scores)))
        states, spans = found.states, found.spans
        if states is not None:
            states = States(states.hidden[order], states.head, states.temperature)
        if spans is not None:
            spans = Spans(spans.first[order], spans.rest[order])
        return replace(found, scores=found.scores[order], states=states, spans=spans)

    return wrong


def bits_per_byte(folder: Path, texts: list[str], most: int) -> float:
    """Mean surprisal of the tokens of ``texts``, the first ``most`` bytes of each, per byte."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    total, count = 0.0, 0
    for text in texts:
        piece = text.encode()[:most].decode(errors="ignore")
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            hidden = kept_states(model, ids[None, :-1], torch.arange(len(ids) - 1))
            total -= float(label_scores(hidden, output_head(model).weight, ids[1:]).labels.sum())
        count += len(piece.encode())
    return total / count / math.log(2)


def run(
    way: str, given: argparse.Namespace, place: Path, *, seed: int, steps: int, out: Path, start: Path | None = None
) -> dict[str, Any]:
    """Train one student into ``out``, from ``start`` or from scratch, and return the stage's figures."""
    if start is None:
        values: dict[str, Any] = {
            "init": "scratch", "tokenizer": str(place / "bytes"), "layers": given.layers, "hidden": given.hidden,
            "heads": given.heads, "kv_heads": given.heads, "head_dim": given.hidden // given.heads,
            "ffn": 2 * given.hidden, "steps": steps, "learning_rate": given.rate,
        }  # fmt: skip
    else:
        values = {"init": "checkpoint", "steps": steps, "learning_rate": given.rate / 2}
    values |= {
        "batch_tokens": given.batch_tokens, "max_tokens": given.bytes + 1, "truncate": True, "validations": 1,
        "keep": "last", "validation_rows": 8, "kd_weight": given.kd_weight, "optimizer": given.optimizer,
    }  # fmt: skip
    honest = stage._taught
    if "shuffled" in way:

        def wrong(*a: Any, **k: Any) -> Any:
            targets, module, figures = honest(*a, **k)
            return shuffled(targets), module, figures

        stage._taught = wrong
    work = out.with_suffix(".work")
    work.mkdir(parents=True)
    out.mkdir()
    inputs = {"data": place / "data"} | ({} if start is None else {"model": start})
    ctx = StageContext(
        name="model.distillation.cross_tokenizer", inputs=inputs, out=out, work=work, seed=seed,
        progress=Progress(quiet=True), teacher=open_teacher(given.model), threads=given.threads,
    )  # fmt: skip
    try:
        return stage.distill(CrossTokenizerParams(**(values | WAYS[way])), ctx).metrics
    finally:
        stage._taught = honest


def texts(path: Path) -> list[str]:
    """Stories of a file."""
    return [text.strip() for text in path.read_text(encoding="utf-8").split(MARK) if text.strip()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--warm-steps", type=int, default=0, help="steps on the labels before all lines part")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--merges", type=int, default=0, help="longer tokens of the student beside the 256 bytes")
    parser.add_argument("--rows", type=int, default=2000, help="stories to learn from")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--bytes", type=int, default=256, help="of each story")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--kd-weight", type=float, default=0.9)
    parser.add_argument("--held-out", type=int, default=60, help="stories that are scored")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    scored = texts(given.stories / "valid-stories.txt")[: given.held_out]
    learned = [text for path in sorted(given.stories.glob("train*.txt")) for text in texts(path)][: given.rows]
    print(f"teacher: {bits_per_byte(given.model, scored, given.bytes):.4f} bits per byte\n")
    found: dict[str, list[float]] = {way: [] for way in given.only}
    spent: dict[str, float] = dict.fromkeys(given.only, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "data").mkdir()
        write_rows(place / "data", [make_row(text=text) for text in learned])
        student_tokenizer(place / "bytes", learned, given.merges)
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            warm = place / f"warm-{seed}" if given.warm_steps else None
            if warm is not None:
                run("labels alone", given, place, seed=seed, steps=given.warm_steps, out=warm)
                print(f"seed {seed}: starts at {bits_per_byte(warm, scored, given.bytes):.4f}", flush=True)
            for number, way in enumerate(given.only):
                clock = time.process_time()
                out = place / f"{seed}-{number}"
                figures = run(way, given, place, seed=seed, steps=given.steps, out=out, start=warm)
                spent[way] += time.process_time() - clock
                found[way].append(bits_per_byte(out, scored, given.bytes))
                print(f"seed {seed}: {way} {found[way][-1]:.4f}", flush=True)
    names = ("parameters", "aligned_share", "bytes_per_chunk", "student_unaligned_bytes")
    print({name: figures[name] for name in names})
    table(found, spent, given.seeds)


def table(found: dict[str, list[float]], spent: dict[str, float], seeds: int) -> None:
    """Print what came of it."""
    print("\n| way | bits per byte | seed by seed | less labels alone, seed by seed | seconds |\n|---|---|---|---|---|")
    plain = next(iter(found.values()))
    for way, values in found.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        less = ", ".join(f"{one - other:+.4f}" for one, other in zip(values, plain, strict=True))
        print(f"| {way} | {sum(values) / seeds:.4f} | {each} | {less} | {spent[way] / seeds:.0f} |")


if __name__ == "__main__":
    main()
