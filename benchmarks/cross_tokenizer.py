"""What a teacher with another tokenizer wins for a student of bytes, against its labels alone, at equal steps.

    python benchmarks/cross_tokenizer.py MODEL STORIES [--seeds 3] [--steps 300] [--batch-tokens 2048] [--bytes 256]
        [--rows N] [--only NAME ...]

MODEL is a plain checkpoint (stories260k), STORIES a folder with ``train*.txt`` and ``valid-stories.txt``, stories
parted by lines ``<|endoftext|>``. The student starts from scratch with a tokenizer of the 256 bytes and one token
before a text. Every line has the same start, rows, steps and order; the seed draws all three. The control learns from a
teacher whose answers stand at the wrong chunks. Prints a Markdown table: bits per byte on stories that no step saw
(``--bytes`` of each), mean and by seed, and what the first line (labels alone) has more. ``seconds`` are of this
process's CPU, for one seed.
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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.context import StageContext
from compress.data.rows import make_row, write_rows
from compress.encoding import load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.cross_tokenizer import stage
from compress.model.distillation.cross_tokenizer.losses import Spans, label_scores
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.forward import kept_states
from compress.model.distillation.losses import States
from compress.model.layers import output_head
from compress.progress import Progress
from compress.teachers import open_teacher

WAYS: dict[str, dict[str, Any]] = {
    "labels alone": {"kd_weight": 0.0},
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


def byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of the 256 bytes, ``<s>`` and ``</s>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: index + 2 for index, letter in enumerate(letters)}, merges=[]))
    plain.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def shuffled(targets: Any) -> Any:
    """What the teacher says, chunk by chunk, at the wrong chunks of the batch."""

    def wrong(batch: Any) -> Any:
        found = targets(batch)
        order = torch.randperm(len(found.scores), generator=torch.Generator().manual_seed(len(found.scores)))
        states, spans = found.states, found.spans
        if states is not None:
            states = States(states.hidden[order], states.head, states.temperature)
        if spans is not None:
            spans = Spans(spans.first[order], spans.rest[order])
        return replace(found, scores=found.scores[order], states=states, spans=spans)

    return wrong


def bits_per_byte(folder: Path, texts: list[str], most: int) -> float:
    """Mean surprisal of a byte of ``texts``, the first ``most`` of each."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"][:most]])
        with torch.no_grad():
            hidden = kept_states(model, ids[None, :-1], torch.arange(len(ids) - 1))
            total -= float(label_scores(hidden, output_head(model).weight, ids[1:]).labels.sum())
        count += len(ids) - 1
    return total / count / math.log(2)


def teacher_bits(folder: Path, texts: list[str], most: int) -> float:
    """The teacher's surprisal of its own tokens of the same bytes, per byte."""
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


def run(way: str, given: argparse.Namespace, data: Path, *, tokenizer: Path, seed: int, scored: list[str]) -> float:
    """Train one student and return its bits per byte."""
    shape = {"layers": given.layers, "hidden": given.hidden, "heads": given.heads, "kv_heads": given.heads}
    values = {
        "init": "scratch", "tokenizer": str(tokenizer), **shape, "head_dim": given.hidden // given.heads,
        "ffn": 2 * given.hidden, "steps": given.steps, "batch_tokens": given.batch_tokens,
        "max_tokens": given.bytes + 1, "truncate": True, "learning_rate": given.rate, "validations": 1, "keep": "last",
        "validation_rows": 16, "kd_weight": given.kd_weight,
    }  # fmt: skip
    honest = stage._targets
    if "shuffled" in way:
        stage._targets = lambda *a, **k: (shuffled(honest(*a, **k)[0]), {})  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as place:
            work, out = Path(place) / "work", Path(place) / "out"
            work.mkdir()
            out.mkdir()
            ctx = StageContext(
                name="model.distillation.cross_tokenizer", inputs={"data": data}, out=out, work=work, seed=seed,
                progress=Progress(quiet=True), teacher=open_teacher(given.model), threads=given.threads,
            )  # fmt: skip
            result = stage.distill(CrossTokenizerParams(**(values | WAYS[way])), ctx)
            if seed == 0 and way == "labels alone":
                names = ("parameters", "aligned_share", "bytes_per_chunk", "student_unaligned_bytes", "tokens")
                print("<!--", {name: result.metrics[name] for name in names}, "-->", flush=True)
            return bits_per_byte(out, scored, given.bytes)
    finally:
        stage._targets = honest


def texts(path: Path) -> list[str]:
    """Stories of a file."""
    return [text.strip() for text in path.read_text(encoding="utf-8").split(MARK) if text.strip()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=None, help="stories to learn from (default: all)")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--bytes", type=int, default=256, help="of each story")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    parser.add_argument("--held-out", type=int, default=100, help="stories that are scored")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    scored = texts(given.stories / "valid-stories.txt")[: given.held_out]
    learned = [text for path in sorted(given.stories.glob("train*.txt")) for text in texts(path)][: given.rows]
    print(f"teacher: {teacher_bits(given.model, scored, given.bytes):.4f} bits per byte\n")
    print("| way | bits per byte | seed by seed | less labels alone, seed by seed | seconds |\n|---|---|---|---|---|")
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer = Path(folder) / "data", Path(folder) / "bytes"
        data.mkdir()
        write_rows(data, [make_row(text=text) for text in learned])
        byte_tokenizer(tokenizer)
        for way in given.only:
            start = time.process_time()
            found = [
                run(way, given, data, tokenizer=tokenizer, seed=seed, scored=scored) for seed in range(given.seeds)
            ]
            plain = plain or found
            each = ", ".join(f"{one:.4f}" for one in found)
            less = ", ".join(f"{one - other:+.4f}" for one, other in zip(found, plain, strict=True))
            seconds = (time.process_time() - start) / given.seeds
            mean = sum(found) / len(found)
            less = less if way != given.only[0] else ""
            print(f"| {way} | {mean:.4f} | {each} | {less} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
