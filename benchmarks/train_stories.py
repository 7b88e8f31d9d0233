"""Trains the larger model of the quantization tables from scratch: a Llama on short stories, for an hour of CPU.

    python -m benchmarks.train_stories STORIES --out FOLDER [--minutes 60] [--threads 1]

STORIES is a folder with ``train*.txt`` and ``valid-stories.txt``, stories parted by lines ``<|endoftext|>``. The
checkpoint of the lowest validation loss is kept, with the curve in ``training.json``. Head size 64 suits every
runtime as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
BATCH, LENGTH, RATE, WARMUP, EVERY = 16, 128, 2e-3, 100, 200


def stories(path: Path) -> list[str]:
    """The stories of a file."""
    return [part.strip() for part in path.read_text(encoding="utf-8").split(END) if part.strip()]


def tokenizer_of(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [END, "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=END, pad_token=END, model_max_length=512
    )


def stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All stories as one line of token ids, each between its marks."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss in nats per token over windows of ``LENGTH``."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(32)]
    return sum(losses) / len(losses)


def config_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape: all inputs are multiples of 128, so that every group size fits."""
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    """Train until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    texts = [text for path in sorted(args.stories.glob("train*.txt")) for text in stories(path)]
    tokenizer = tokenizer_of(texts, args.vocabulary)
    train, valid = stream(texts, tokenizer), stream(stories(args.stories / "valid-stories.txt"), tokenizer)[:32768]
    model = LlamaForCausalLM(config_of(args, tokenizer))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    print(f"{model.num_parameters():,} parameters, {len(train):,} training tokens", flush=True)
    start, best, step = time.monotonic(), math.inf, 0
    curve: list[dict[str, float]] = []
    while (done := (time.monotonic() - start) / 60 / args.minutes) < 1:
        rate = RATE * min(1, (step + 1) / WARMUP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - LENGTH, (BATCH,))
        ids = torch.stack([train[at : at + LENGTH] for at in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % EVERY == 0:
            best = min(best, judged(model, valid, tokenizer, curve, best, args.out, step))
            print(curve[-1], f"{time.monotonic() - start:.0f} s", flush=True)
    judged(model, valid, tokenizer, curve, best, args.out, step)
    print(curve[-1], flush=True)


def judged(  # noqa: PLR0917 - what the training loop has at hand
    model: LlamaForCausalLM,
    valid: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict[str, float]],
    best: float,
    out: Path,
    step: int,
) -> float:
    """Add the validation loss to the curve; save the model where it is lower than ``best``."""
    found = validation_loss(model, valid)
    curve.append({"step": step, "tokens": step * BATCH * LENGTH, "valid": found})
    if found < best:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "training.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
