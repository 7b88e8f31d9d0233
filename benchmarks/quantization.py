"""Our quantizers against GPTQModel, HQQ and llama.cpp on one model: quality at equal bits, time and peak memory.

    make peers   # the strangers' environments under build/interop
    python -m benchmarks.quantization MODEL TEXT [--bits 4] [--seeds 3]

MODEL is a plain checkpoint, TEXT holds ``train.txt`` (calibration, drawn anew for each seed, the same rows for all)
and ``valid-stories.txt`` (scored, seen by none). Each contender quantizes the linears of the decoder layers in a
process of its own, contenders in turn within a seed; embedding, head and norms stay plain. What it gives is dequantized
and scored in torch in fp32, so that quality is compared and not kernels. Seconds are those of the quantization alone,
without imports; peak memory is the whole process's. Bits per weight count scales and zero points.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quantizers import HeldOut, held_out, texts
from compress.model.checkpoint import load_model, read_config, save_model
from compress.model.shapes import kv_head_count
from deploy.export.gguf import export_gguf

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("quantization_worker.py")
# title -> (worker's kind, its options, which environment runs it)
CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "ours, RTN": ("ours", {"method": "rtn", "clip_steps": 0}, "own"),
    "ours, RTN with clip": ("ours", {"method": "rtn"}, "own"),
    "ours, GPTQ (default, one draw)": ("ours", {"method": "gptq", "calibration_draws": 1}, "own"),
    "ours, GPTQ without correction": (
        "ours",
        {"method": "gptq", "calibration_draws": 1, "correction_damp": None},
        "own",
    ),
    "ours, GPTQ asymmetric": ("ours", {"method": "gptq", "calibration_draws": 1, "sym": False}, "own"),
    "GPTQModel 7.6, default": ("gptqmodel", {}, "gptqmodel"),
    "GPTQModel 7.6, desc_act": ("gptqmodel", {"desc_act": True}, "gptqmodel"),
    "HQQ 0.2.8": ("hqq", {}, "hqq"),
    "llama.cpp Q4_0": ("llama", {"type": "Q4_0"}, "llama"),
    "llama.cpp Q4_K_M": ("llama", {"type": "Q4_K_M"}, "llama"),
    "llama.cpp Q2_K": ("llama", {"type": "Q2_K"}, "llama"),
}
LLAMA_BITS = {"Q4_0": 4, "Q4_K_M": 4, "Q2_K": 2}


def run_worker(python: str, request: Mapping[str, Any], threads: int) -> dict[str, Any] | None:
    """Run one contender; None where its environment or the contender itself fails, with its last line printed."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GPTQMODEL_CPU_WORKERS": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env |= {"PYTHONPATH": str(ROOT)}
    command = [python, str(WORKER), json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {request['kind']}: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def llama_weights(path: Path, heads: Mapping[str, int]) -> tuple[dict[str, torch.Tensor], float]:
    """Return the dequantized linears of a GGUF file by their names in the checkpoint, and bits per weight."""
    import gguf

    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    weights, bits, count = {}, 0, 0
    for tensor in gguf.GGUFReader(str(path)).tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or parts[2] not in names:
            continue
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if parts[2] in heads:  # llama.cpp interleaves the halves of a Llama head
            rows, columns = values.shape
            count_of = heads[parts[2]]
            values = values.view(count_of, rows // count_of // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        weights[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = values.contiguous()
        bits, count = bits + 8 * int(tensor.n_bytes), count + values.numel()
    return weights, bits / count


def scored(model: Path, weights: Path, score: HeldOut, scratch: Path) -> tuple[float, float]:
    """Put the dequantized linears into the model and score it: perplexity and divergence."""
    opened = load_model(model)
    parameters = dict(opened.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(weights).items():
            rows, columns = parameters[name].shape  # padding of a contender's own is cut off
            parameters[name].copy_(tensor[:rows, :columns].float())
    save_model(opened, scratch, tokenizer_from=model)
    return score.score(scratch)


def row(title: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """One line of the table: means over the seeds, in brackets the largest less the smallest."""

    def mean(key: str, digits: str) -> str:
        values = [float(one[key]) for one in outcomes]
        spread = f" ({max(values) - min(values):{digits}})" if len(values) > 1 and max(values) > min(values) else ""
        return f"{statistics.mean(values):{digits}}{spread}"

    memory = max(int(one["peak_memory_bytes"]) for one in outcomes) / 1e6
    bits = outcomes[0]["bits_per_weight"]
    seconds = statistics.median(float(one["seconds"]) for one in outcomes)
    return (
        f"| {title} | {bits:.2f} | {mean('perplexity', '.3f')} | {mean('divergence', '.4f')} | {seconds:.1f} "
        f"| {memory:.0f} MB |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows, each cut to 128 tokens")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens")
    parser.add_argument("--only", default="", help="contenders whose title holds this")
    for name, place in (("gptqmodel", "stranger"), ("hqq", "hqq"), ("llama", "llama-cpp")):
        parser.add_argument(f"--{name}-python", default=str(ROOT / "build" / "interop" / place / "bin" / "python"))
    args = parser.parse_args()
    pythons = {
        "own": sys.executable,
        "gptqmodel": args.gptqmodel_python,
        "hqq": args.hqq_python,
        "llama": args.llama_python,
    }
    torch.set_num_threads(args.threads)
    stranger = Path(tempfile.mkdtemp())
    if Path(args.llama_python).exists():
        export_gguf(args.model, stranger)
    config = read_config(args.model)
    heads = {"attn_q": int(config["num_attention_heads"]), "attn_k": kv_head_count(config)}
    score = held_out(args.model, args.text / "valid-stories.txt", tokens=args.tokens)
    rows = texts(args.text / "train.txt")
    if len(rows) < args.seeds * args.rows:
        raise SystemExit(f"{len(rows)} texts in train.txt are fewer than {args.seeds} times {args.rows} rows")
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for title, (kind, options, environment) in CONTENDERS.items():
            unfit = args.only not in title or LLAMA_BITS.get(options.get("type", ""), args.bits) != args.bits
            if unfit or not Path(pythons[environment]).exists() or (kind in ("hqq", "llama") and seed):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                request = {
                    "kind": kind,
                    "model": str(args.model.resolve()),
                    "out": f"{scratch}/weights.safetensors",
                    "scratch": scratch,
                    "texts": rows[seed * args.rows : (seed + 1) * args.rows],
                    "bits": args.bits,
                    "group_size": args.group,
                    "seed": seed,
                    "threads": args.threads,
                    "options": dict(options),
                    "gguf": str(stranger / "model.gguf"),
                    "heads": heads,
                }
                found = run_worker(pythons[environment], request, args.threads)
                if found is not None:
                    if kind == "llama":
                        weights, found["bits_per_weight"] = llama_weights(Path(scratch) / "model.gguf", heads)
                        save_file(weights, request["out"])
                    perplexity, divergence = scored(args.model, Path(request["out"]), score, Path(scratch) / "scored")
                    outcomes.setdefault(title, []).append(found | {"perplexity": perplexity, "divergence": divergence})
    plain, _ = score.score(args.model)
    print(
        f"{args.model.name}, {args.bits} bits, groups of {args.group}, {args.seeds} draws; "
        f"plain perplexity {plain:.3f};"
    )
    print(f"load average at the end {os.getloadavg()[0]:.1f}\n")
    print("| quantizer | bits per weight | perplexity | KL, nats per token | seconds | peak memory |")
    print("|---|---|---|---|---|---|")
    for title, found_all in outcomes.items():
        print(row(title, found_all))


if __name__ == "__main__":
    main()
