"""Train the embedded teacher: a Llama-architecture chat model that answers a request with one call.

    python -m profiles.quickstart.train_teacher --out /tmp/first --steps 4500 --lr 8e-4
    python -m profiles.quickstart.train_teacher --out profiles/quickstart/teacher --init /tmp/first \
        --steps 1800 --lr 4e-4 --seed 2 --emphasis

The first command teaches all functions alike; the second goes on from there and asks the hard ones more often.
Rows are drawn afresh from the training side of the grammar, so no row is seen twice on purpose. The loss
covers user turns too (weight 0.3), so that the model can invent requests (Magpie). One file is written per
stage: tokenizer, weights in bf16 safetensors, training log, model card. An interrupted training goes on
from ``OUT/checkpoint``. About an hour on 2 cores; uses a GPU where torch sees one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from profiles.quickstart import grammar

SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 768
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
# Long copied texts and names are learnt last: --emphasis asks these more often.
HARD = ("send_message", "send_message", "send_message", "call_contact", "play_music", "create_event", "set_alarm")
USER_WEIGHT = 0.3  # user turns have entropy that no model can remove: do not let them rule the gradient


def draw_rows(count: int, seed: int, *, test: bool, emphasis: bool = False) -> list[grammar.Request]:
    """``count`` requests, out-of-scope ones at twice the share of a function; ``emphasis`` adds the hard ones."""
    rng = Random(seed)
    names = [*grammar.NAMES, grammar.OUT_OF_SCOPE, *(HARD if emphasis else ())]
    return [grammar.draw(rng.choice(names), rng, test=test) for _ in range(count)]


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stay single tokens (trained so; the saved splitter is plain byte level)."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = draw_rows(60_000, seed=11, test=False)
    tokenizer.train_from_iterator((text for r in rows for text in (r.utterance, r.call)), trainer)
    tokenizer.pre_tokenizer = bytes_  # no merge holds a digit, so the plain splitter gives the same tokens
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[4],
        additional_special_tokens=SPECIAL[2:4], model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that every transformers version opens
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return fast


def copy_tokenizer(source: Path, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier training, taken over."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(rows: list[grammar.Request], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of each row and the position at which its answer begins."""
    users = tokenizer([f"<|bos|><|user|>{r.utterance}<|end|><|assistant|>" for r in rows])["input_ids"]
    calls = tokenizer([f"{r.call}<|end|>" for r in rows])["input_ids"]
    return [(u + c, len(u)) for u, c in zip(users, calls, strict=True)]


def batch(rows: list[tuple[list[int], int]], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T), target weights (B, T-1) and answer mask (B, T-1)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weight, answer = torch.zeros(len(rows), width - 1), torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        weight[i, 1 : start - 1], weight[i, start - 1 : len(tokens) - 1] = USER_WEIGHT, 1.0
        answer[i, start - 1 : len(tokens) - 1] = True
    return ids.to(device), weight.to(device), answer.to(device)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, rows: list[tuple[list[int], int]], device: str) -> float:
    """Share of rows whose every answer token is the model's first choice: what greedy decoding would give."""
    model.eval()
    right = 0
    for at in range(0, len(rows), 100):
        ids, _, answer = batch(rows[at : at + 100], device)
        guess = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += int(((guess == ids[:, 1:]) | ~answer).all(1).sum())
    model.train()
    return right / len(rows)


def step_rows(step: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """The rows of one step, a pure function of the step, so that a resumed training sees the same."""
    rows = draw_rows(args.batch, seed=args.seed * 1_000_003 + step, test=False, emphasis=args.emphasis)
    return encode(rows, tokenizer)


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and optimizer state as safetensors, under a new name first."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, fresh / "weights.safetensors")
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    save_file(moments, fresh / "adam.safetensors")
    (fresh / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote; gives the step to go on from."""
    if not (folder / "step.json").exists():
        return 0
    weights = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    whole = optimizer.state_dict()
    whole["state"] = {}
    for key, value in load_file(folder / "adam.safetensors").items():
        index, name = key.split(".")
        whole["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(whole)
    return int(json.loads((folder / "step.json").read_text())["step"])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 %, cosine to 2 % of the peak."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(args: argparse.Namespace) -> None:
    """Train, log, evaluate on the test side, and write the folder."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.out) if args.init is None else copy_tokenizer(args.init, args.out)
    config = LlamaConfig(
        **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
        pad_token_id=0, bos_token_id=1, eos_token_id=4, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    held = encode(draw_rows(400, seed=5, test=False), tokenizer)
    log = args.out / "training_log.jsonl"
    first, started, seen = load_checkpoint(args.out / "checkpoint", model, optimizer), time.monotonic(), 0
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        ids, weight, answer = batch(step_rows(step, args, tokenizer), device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        token_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        token_loss = token_loss.view_as(weight)
        loss = (token_loss * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += int((weight > 0).sum())
        if step % 50 == 49 or step == args.steps - 1:
            line = {"step": step + 1, "loss": round(loss.item(), 4)}
            line["answer_loss"] = round(token_loss[answer].mean().item(), 5)
            line["tokens_per_s"] = round(seen / (time.monotonic() - started))
            if step % 200 == 199 or step == args.steps - 1:
                line["exact_match_train_side"] = exact_match(model, held, device)
                save_checkpoint(args.out / "checkpoint", model, optimizer, step + 1)
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
    finish(model, tokenizer, args, device)


def finish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, device: str) -> None:
    """Save in bf16, and measure what was saved on the test side."""
    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    score = exact_match(saved, encode(draw_rows(2000, seed=77, test=True), tokenizer), device)
    with (args.out / "training_log.jsonl").open("a") as out:
        out.write(json.dumps({"final": True, "exact_match_test_side": score, "rows": 2000}) + "\n")
    shutil.rmtree(args.out / "checkpoint", ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="folder of a teacher to go on from")
    parser.add_argument("--emphasis", action="store_true", help="ask the hard functions more often")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
