"""Times a checkpoint in torch, beside which the bundle's speed is told.

`bench` is the stage function. The measurement runs in a process of its own (`main`), so that its peak memory is that
of this model alone and its thread count is set before torch starts. Figures have the same names as the bundle's.
Nothing here is meant for speed: it says what one has before export.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compress import processes
from compress.assessment_params import CheckpointBenchParams
from compress.context import StageContext, StageResult
from compress.errors import EdgestillError
from compress.files import json_text, write_whole

FILE = "bench.json"
RUNTIME = "torch fp32"


def bench(params: CheckpointBenchParams, ctx: StageContext) -> StageResult:
    """Measure prefill and decode tokens/s, first-token time and peak memory of the checkpoint in slot ``model``.

    Raises:
        EdgestillError: the measuring process failed; its last line is told.
    """
    request = {
        "folder": str(ctx.inputs["model"]),
        "threads": ctx.threads,
        "seed": ctx.seed,
        **params.model_dump(),
    }
    with processes.held_input(json.dumps(request)) as given:
        done = subprocess.run(  # noqa: S603 - our own module, arguments as a list
            processes.python("-m", "compress.checkpoint_bench"),
            stdin=given,
            capture_output=True,
            text=True,
            env=processes.environment(OMP_NUM_THREADS=str(ctx.threads), TOKENIZERS_PARALLELISM="false"),
            check=False,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EdgestillError(ctx.name, f"the measuring process failed: {lines[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    write_whole(ctx.out / FILE, json_text(figures, indent=1) + "\n")
    return StageResult(metrics=figures)


def measure(
    folder: Path, *, prompt_tokens: int, new_tokens: int, repeats: int, warmup: int, seed: int
) -> dict[str, Any]:
    """Medians over ``repeats`` of one greedy continuation with a KV cache; the prompt is random token ids."""
    import torch
    from transformers.cache_utils import DynamicCache

    from compress.model.checkpoint import load_model

    model = load_model(folder).eval()
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    firsts, decodes = [], []
    with torch.inference_mode():
        for turn in range(warmup + repeats):
            cache = DynamicCache(config=model.config)
            start = time.perf_counter()
            out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            if turn >= warmup:
                firsts.append(first - start)
                decodes.append((time.perf_counter() - first) / max(new_tokens - 1, 1))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    first_token = statistics.median(firsts)
    decode = statistics.median(decodes)
    return {
        "runtime": RUNTIME,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup,
        "prefill_tokens_per_s": prompt_tokens / first_token,
        "decode_tokens_per_s": 1 / decode if new_tokens > 1 else None,
        "first_token_s": first_token,
        "weight_bytes": weights,
    }


def main() -> None:
    """The measuring process: request on standard input, figures as the last line of standard output."""
    request = json.loads(next(processes.requests()))  # also ends this process with the one that asked
    import torch

    from compress.metering import peak_resident_bytes

    threads = request.pop("threads")
    torch.set_num_threads(threads)
    figures = measure(Path(request.pop("folder")), **request)
    figures |= {"threads": threads, "peak_memory_bytes": peak_resident_bytes()}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
