"""The process in which one contender of `benchmarks/distillation.py` trains a student, in its own environment.

Called with the path of a request as JSON; writes the student's weights and prints times, memory and losses. Imports of
ours stand only where ours is the contender.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

Clocks = list[tuple[float, float]]  # seconds and CPU seconds at the start of each step


def now() -> tuple[float, float]:
    """Seconds and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def roof(bf16: bool, size: int = 1536, tries: int = 5) -> float:
    """Floating-point operations per CPU second of a large square matrix product; the best of ``tries``."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        began = time.process_time()
        left @ right
        best = min(best, time.process_time() - began)
    return 2 * size**3 / best


def our_table(request: dict[str, Any]) -> Any:
    """The rows as our trainer takes them."""
    from compress.encoding import TokenRow
    from compress.model.distillation.packing import RowTable

    rows = [
        TokenRow(str(i), tuple(ids), (0,) * prompt + (1,) * (len(ids) - prompt))
        for i, (ids, prompt) in enumerate(request["rows"])
    ]
    return RowTable(rows, vocab=request["vocab"])


def our_cache(request: dict[str, Any]) -> Any:
    """The cache of the teacher's targets, opened."""
    from compress.model.distillation.cache import CacheHeader, TargetCache

    header = CacheHeader("teacher", "", "", vocab=request["vocab"], top_k=32, temperature=1.0)
    return TargetCache(Path(request["cache"]), header)


def our_teacher(request: dict[str, Any]) -> Any:
    """The running teacher."""
    from compress.model.checkpoint import load_model
    from compress.model.distillation.targets import OnlineTargets

    return OnlineTargets(load_model(Path(request["teacher"])), vocab=request["vocab"], bf16=request["bf16"])


def fill(request: dict[str, Any]) -> dict[str, Any]:
    """Fill the cache with the targets of all rows."""
    from compress.model.distillation.targets import fill_cache
    from compress.progress import Progress

    table, teacher, cache = our_table(request), our_teacher(request), our_cache(request)
    before, began = resident("VmRSS"), now()
    fill_cache(cache, table, teacher, Progress(quiet=True))
    ended = now()
    return {
        "fill_s": ended[0] - began[0],
        "fill_cpu_s": ended[1] - began[1],
        "tokens": int(table.lengths.sum()),
        "bytes_per_target": cache.stored_bytes / cache.positions,
        "grown": resident("VmHWM") - before,
    }


def ours(request: dict[str, Any]) -> dict[str, Any]:
    """Train with our trainer, towards the cache or the running teacher."""
    from compress.context import StageContext
    from compress.model.checkpoint import load_model
    from compress.model.distillation.losses import LossWeights
    from compress.model.distillation.settings import TrainSettings
    from compress.model.distillation.sources import RowSource, Work
    from compress.model.distillation.targets import CachedTargets
    from compress.model.distillation.trainer import train
    from compress.progress import Progress

    clocks: Clocks = []

    class Timed(RowSource):
        def work(self, step: int, order: Any) -> Work:
            clocks.append(now())
            return super().work(step, order)

    student = load_model(Path(request["student"]), dtype=torch.float32)
    table = our_table(request)
    before = resident("VmRSS")
    targets = CachedTargets(our_cache(request), table) if request["cached"] else our_teacher(request)
    settings = TrainSettings(
        loss=LossWeights(kd_weight=1.0),
        steps=request["steps"],
        batch_tokens=request["batch_tokens"],
        learning_rate=request["learning_rate"],
        validation_share=0.0,
        keep="last",
        precision="bf16" if request["bf16"] else "fp32",
        log_every=1,
    )
    scratch = Path(request["scratch"])
    ctx = StageContext("benchmark", {}, scratch, scratch, 0, Progress(quiet=True), threads=request["threads"])
    log = scratch / "log.jsonl"
    train(student, targets, table, settings, ctx, log, source=Timed(table, targets, parts=1))
    found = measured(clocks, before)
    student.save_pretrained(request["out"])
    return found | {"losses": [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()]}


def measured(clocks: Clocks, before: int) -> dict[str, Any]:
    """The clocks of the steps, and by how much the process grew from ``before``, the student's weights included."""
    return {
        "clocks": clocks,
        "grown": resident("VmHWM") - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peer_batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left and answers on the right, as that library lays out what a student wrote."""
    prompts = [item["input_ids"][: item["prompt"]] for item in items]
    answers = [item["input_ids"][item["prompt"] :] for item in items]
    left, right = max(map(len, prompts)), max(map(len, answers))
    return {
        "prompt_ids": torch.tensor([[0] * (left - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (left - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [0] * (right - len(ids)) for ids in answers]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (right - len(ids)) for ids in answers]),
        "num_items_in_batch": torch.tensor(float(sum(map(len, answers)))),
    }


def peer_rows(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, with labels at the answers."""
    longest = max(len(item["input_ids"]) for item in items)
    ids, masks, labels = [], [], []
    for item in items:
        row, prompt = item["input_ids"], item["prompt"]
        rest = longest - len(row)
        ids.append(row + [0] * rest)
        masks.append([1] * len(row) + [0] * rest)
        labels.append([-100] * prompt + row[prompt:] + [-100] * rest)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks), "labels": torch.tensor(labels)}


def peer(request: dict[str, Any]) -> dict[str, Any]:
    """Train with one of trl's trainers on the same rows, the answers given instead of written by the student."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    clocks: Clocks = []

    class Timed(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clocks.append(now())

    words = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    common = {
        "output_dir": f"{request['scratch']}/out",
        "max_steps": request["steps"],
        "per_device_train_batch_size": request["batch_rows"],
        "learning_rate": request["learning_rate"],
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": request["bf16"],
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "beta": 0.0,
        "temperature": 1.0,
    }
    models = [AutoModelForCausalLM.from_pretrained(request[who], dtype=torch.float32) for who in ("student", "teacher")]
    rows = [{"input_ids": request["rows"][i][0], "prompt": request["rows"][i][1]} for i in request["order"]]
    before = resident("VmRSS") - sum(4 * p.numel() for p in models[1].parameters())  # the teacher is counted
    data = Dataset.from_list(rows)
    trainer: Any
    if request["kind"] == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        config = GKDConfig(**common, lmbda=0.0, train_sampling_strategy="sequential")
        trainer = GKDTrainer(
            models[0],
            models[1],
            config,
            data_collator=peer_rows,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Timed()],
        )
    else:
        from trl import DistillationConfig, DistillationTrainer

        class Given(DistillationTrainer):  # type: ignore[misc,unused-ignore]
            def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
                return peer_batch(inputs)

        tokenizer.padding_side = "left"
        config = DistillationConfig(**common, shuffle_dataset=False)
        trainer = Given(models[0], models[1], config, data, processing_class=tokenizer, callbacks=[Timed()])
    trainer.create_optimizer()
    rates = [rate / request["learning_rate"] for rate in request["rates"]]  # theirs would waste the first step on 0
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: rates[min(step, len(rates) - 1)])
    trainer.train()
    found = measured(clocks, before)
    models[0].save_pretrained(request["out"])
    return found | {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def main() -> None:
    """Do what the request says and print what came of it as the last line."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    found = {"roof": roof(request["bf16"])}
    found |= {"fill": fill, "ours": ours}.get(request["kind"], peer)(request)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
