"""Every quantizer at 2, 3 and 4 bits on one model: held-out perplexity, divergence, bits and bytes, as Markdown.

    python -m benchmarks.quantizers MODEL TEXT [--bits 2 3 4] [--seeds 3] [--only AWQ GPTQ] [--tokens 32768]

MODEL is a plain checkpoint folder. TEXT holds ``train.txt``, from which calibration rows are drawn anew with each
seed, and ``valid-stories.txt`` (or the file of ``--valid``), which no quantizer sees; texts are parted by lines
``<|endoftext|>``, or by blank lines where there are none. A value is the mean over the seeds, behind it the largest
less the smallest. Bits per weight are those of the linears, scales counted; bytes those of the whole model as a
runtime keeps it. 3 bits count as 4, the container they are stored in. A quantizer is one line of `METHODS`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.context import StageContext
from compress.data.rows import make_row, write_rows
from compress.encoding import encode_rows, load_tokenizer
from compress.model.calibration import Batch, batches
from compress.model.checkpoint import load_model
from compress.progress import Progress
from compress.stages import find, load_function, params_model

END = "<|endoftext|>"
# title -> (method of model.quantization, its parameters, the bits that it has; None: all)
METHODS: Mapping[str, tuple[str, Mapping[str, Any], tuple[int, ...] | None]] = {
    "RTN, full range": ("rtn", {"clip_steps": 0}, None),
    "RTN": ("rtn", {}, None),
    "RTN, asymmetric": ("rtn", {"sym": False}, None),
    "RTN, NF3": ("rtn", {"grid": "nf3"}, (3,)),
    "RTN, heads rotated": ("rtn", {"rotate": "heads"}, None),
    "RTN, rotated": ("rtn", {"rotate": "full"}, None),
    "AWQ, scales alone": ("awq", {"clip_steps": 0, "correction_damp": None}, None),
    "AWQ, clip alone": ("awq", {"grid_points": 1, "correction_damp": None}, None),
    "AWQ, q and k not clipped": ("awq", {"clip_attention": False, "correction_damp": None}, None),
    "AWQ, no correction": ("awq", {"correction_damp": None}, None),
    "AWQ": ("awq", {}, None),
    "AWQ, asymmetric": ("awq", {"sym": False}, None),
    "AWQ, NF3": ("awq", {"grid": "nf3"}, (3,)),
    "AWQ, rotated": ("awq", {"rotate": "full"}, None),
    "GPTQ": ("gptq", {}, None),
    "GPTQ, asymmetric": ("gptq", {"sym": False}, None),
    "GPTQ, NF3": ("gptq", {"grid": "nf3"}, (3,)),
    "AWQ scales + GPTQ": ("awq", {"rounding": "gptq", "clip_steps": 40}, None),
    "AWQ scales + GPTQ, asymmetric": ("awq", {"rounding": "gptq", "clip_steps": 40, "sym": False}, None),
    "GPTQ, heads rotated": ("gptq", {"rotate": "heads"}, None),
    "GPTQ, rotated": ("gptq", {"rotate": "full"}, None),
    "GPTQ, no correction": ("gptq", {"correction_damp": None}, None),
    "GPTQ, mixed bits": ("mixed", {"candidates": [2, 4, 8], "groups": [16, 32, 64]}, (3, 4)),
    "QAT": ("qat", {"steps": 240, "batch_tokens": 2048, "learn": "all", "learning_rate": 2e-3}, (2, 3)),
}
MAIN = ("RTN, full range", "RTN", "AWQ", "GPTQ, no correction", "GPTQ", "GPTQ, asymmetric", "GPTQ, mixed bits", "QAT")
BUDGETS = {3: 3.5, 4: 4.5}  # mean bits of a weight that mixed may spend, scales counted: 4.5 is what 4 bits take


@dataclass(frozen=True)
class Line:
    """One quantizer at one width: values of each seed, and what does not depend on it."""

    title: str
    bits: int
    perplexity: list[float]
    divergence: list[float]
    bits_per_weight: float
    bytes: int
    task: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOut:
    """The texts that are scored, and the plain model's log-probabilities (targets, V) at each batch's targets.

    ``task`` is a further score of a checkpoint folder, where there is one.
    """

    batches: list[Batch]
    plain: list[torch.Tensor]
    task: Callable[[Path], float] | None = None

    def score(self, folder: Path) -> tuple[float, float]:
        """Return perplexity and KL(plain, quantized) in nats per token of the checkpoint in ``folder``."""
        loss = divergence = 0.0
        count = 0
        for batch, before, after in zip(self.batches, self.plain, logprobs(folder, self.batches), strict=True):
            wanted = batch.input_ids[:, 1:][batch.answer[:, 1:].bool()]
            loss -= float(after.gather(1, wanted.unsqueeze(1)).double().sum())
            divergence += float((before.exp() * (before - after)).sum(1).double().sum())
            count += len(wanted)
        return math.exp(loss / count), divergence / count


def logprobs(folder: Path, scored: Sequence[Batch]) -> Iterator[torch.Tensor]:
    """Yield a checkpoint's log-probabilities (targets, V) at the targets of each batch."""
    model = load_model(folder)
    for batch in scored:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        yield logits[:, :-1][batch.answer[:, 1:].bool()].log_softmax(-1)


def texts(path: Path) -> list[str]:
    """The texts of a file."""
    whole = path.read_text(encoding="utf-8")
    return [part.strip() for part in whole.split(END if END in whole else "\n\n") if part.strip()]


def held_out(model: Path, path: Path, *, tokens: int) -> HeldOut:
    """Take ``tokens`` tokens of the file ``path`` and score them with the plain model."""
    rows = encode_rows([make_row(text=text) for text in texts(path)], load_tokenizer(model), max_tokens=256,
                       truncate=True)  # fmt: skip
    scored = batches(rows, tokens=tokens, batch_size=8, seed=0, pad_id=0)
    return HeldOut(scored, list(logprobs(model, scored)))


def once(
    model: Path, data: Path, method: str, values: Mapping[str, Any], *, seed: int, score: HeldOut
) -> dict[str, Any]:
    """Run a stage once; return its figures with perplexity and divergence on the held-out texts."""
    line = find("model.quantization", method)
    params = params_model(line)(**values)
    with tempfile.TemporaryDirectory() as scratch:
        out, work = Path(scratch) / "out", Path(scratch) / "work"
        out.mkdir()
        work.mkdir()
        inputs = {"model": model, "data": data}
        ctx = StageContext(line.name, inputs, out, work, seed, Progress(quiet=True), threads=torch.get_num_threads())
        figures = load_function(line)(params, ctx).metrics
        perplexity, divergence = score.score(out)
        task = {} if score.task is None else {"task": score.task(out)}
    return figures | {"perplexity": perplexity, "divergence": divergence} | task


def study(
    model: Path,
    data: Path,
    score: HeldOut,
    *,
    bits: Sequence[int],
    seeds: int,
    tokens: int,
    only: Sequence[str] = tuple(METHODS),
) -> Iterator[Line]:
    """Yield one line per quantizer of `METHODS` and width; ``data`` is a folder of rows, ``only`` their titles."""
    for width in bits:
        for title, (method, values, widths) in METHODS.items():
            if title not in only or (widths is not None and width not in widths):
                continue
            drawn: dict[str, Any] = {"bits": width, "group_size": 32} | dict(values)
            if method != "rtn":
                drawn |= {"calibration_tokens": tokens, "calibration_draws": 1, "max_tokens": 256}
            if method == "mixed":
                drawn["budget_bits"] = BUDGETS[width]
            found = [once(model, data, method, drawn, seed=seed, score=score) for seed in range(seeds)]
            whole = found[0]["bits_per_weight_model"] * found[0]["parameters"] / 8
            yield Line(
                title=title,
                bits=width,
                perplexity=[each["perplexity"] for each in found],
                divergence=[each["divergence"] for each in found],
                bits_per_weight=found[0]["bits_per_weight"],
                bytes=round(whole),
                task=[each["task"] for each in found if "task" in each],
            )


def shown(values: Sequence[float], digits: int) -> str:
    """Mean, and the largest less the smallest behind it."""
    return f"{statistics.mean(values):.{digits}f} ({max(values) - min(values):.{digits}f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="folder of train.txt and the held-out file")
    parser.add_argument("--valid", default="valid-stories.txt")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=[2, 3, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration")
    parser.add_argument("--held-out", type=int, default=32_768, help="tokens that are scored")
    parser.add_argument("--rows", type=int, default=2000, help="texts of train.txt that calibration draws from")
    parser.add_argument("--only", choices=METHODS, nargs="+", help="these quantizers alone")
    parser.add_argument("--main", action="store_true", help="the few that a choice is made between")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    score = held_out(args.model, args.text / args.valid, tokens=args.held_out)
    plain = score.score(args.model)[0]
    print(f"plain perplexity {plain:.4f}\n")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [make_row(text=text) for text in texts(args.text / "train.txt")[: args.rows]])
        lines = study(args.model, Path(folder), score, bits=args.bits, seeds=args.seeds, tokens=args.tokens,
                      only=MAIN if args.main else args.only or tuple(METHODS))  # fmt: skip
        show(lines)


def show(lines: Iterator[Line], task: str = "") -> None:
    """Print the table; ``task`` is the head of the further score's column."""
    extra = f" {task} |" if task else ""
    print(f"| quantizer | bits | perplexity | KL, nats per token |{extra} bits per weight | bytes |")
    print(f"|---|---|---|---|{'---|' if task else ''}---|---|")
    for line in lines:
        figures = f"{shown(line.perplexity, 3)} | {shown(line.divergence, 4)} |"
        if task:
            figures += f" {shown([100 * value for value in line.task], 1)} |"
        print(f"| {line.title} | {line.bits} | {figures} {line.bits_per_weight:.2f} | {line.bytes:,} |", flush=True)


if __name__ == "__main__":
    main()
