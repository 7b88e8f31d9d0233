"""Prefill and decode beside llama.cpp and onnxruntime-genai's own default, on the shapes of two small models.

    python -m benchmarks.decode --llama-python /tmp/llama/bin/python > table.md

A ratio is the lowest of three runs on a quiet machine (`benchmarks.quiet`); beside load no table is printed.
Makes a seeded random checkpoint of each shape, quantizes and exports it with edgestill, tunes the bundle, builds the
default int4 model with onnxruntime-genai's builder, and Q4_0 and Q4_K_M files with llama.cpp's own quantizer. Then all
contenders stay open, each in a process of its own, and are timed in turn, so that a busy moment hits all alike. Weights
are random: speed and size mean something, quality does not. The llama.cpp rows need a Python that has the packages
llama-cpp-python, gguf, safetensors and numpy (--llama-python); without it they are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.quiet import QuietRuns

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
GROUPS = {"smollm2-135m": 64, "qwen2.5-0.5b": 128}  # the largest that divides all inputs
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@dataclass
class Contender:
    """One row of the table, and how its process is started."""

    name: str
    linears: str
    head: str
    file_bytes: int
    read_bytes: int  # per decoded token
    request: dict[str, Any]
    python: str = sys.executable
    prefill: list[float] = field(default_factory=list)  # seconds until the first token
    decode: list[float] = field(default_factory=list)  # seconds per token after it


def make_checkpoint(shape: str, folder: Path) -> None:
    """Write a random checkpoint in fp16 with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SHAPES[shape], "tie_word_embeddings": True, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.half().save_pretrained(folder)
    letters = {
        token: index
        for index, token in enumerate(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def once(place: Path, make: Callable[[Path], object]) -> Path:
    """Return ``place``, made first where an earlier run did not finish it."""
    if not place.exists():
        made = place.with_name(place.name + ".part")
        make(made)
        made.rename(place)
    return place


def stage(name: str, values: list[str], inputs: dict[str, Path], out: Path) -> None:
    """Run one of edgestill's stages."""
    from compress.progress import Progress
    from compress.single import Request, run_stage, stage_and_params
    from deploy.targets import load_target

    line, params = stage_and_params(name, values)
    run_stage(Request(line, params, inputs, out, target=load_target("x86-laptop-avx2")), Progress(quiet=True))


def our_bundle(shape: str, group: int, head: int, options: argparse.Namespace) -> Contender:
    """Quantize, export and tune; the row of the result."""
    from compress.progress import Progress
    from deploy.bundle import open_bundle
    from deploy.params import TuneParams
    from deploy.tune import tune

    base, mark = options.work / shape, f"g{group}-e{head}"
    rounding = ["bits=4", f"group_size={group}", f"embedding_bits={head}", "clip_steps=0"]
    source = {"model": base / "model"}
    codes = once(base / f"codes-{mark}", lambda out: stage("model.quantization.rtn", rounding, source, out))
    bundle = once(base / f"bundle-{mark}", lambda out: stage("deploy.export", [], {"model": codes}, out))
    params = TuneParams(budget_s=options.budget, prompt_tokens=options.prompt, new_tokens=options.new)
    tuned = base / f"tuned-{mark}"
    if not tuned.exists():
        found = tune(bundle, tuned, params, device="benchmark", progress=Progress(quiet=True))
        print(f"{shape} {mark}: {found.setting}", file=sys.stderr)
    info = open_bundle(tuned).info
    size = sum(path.stat().st_size for path in tuned.glob("model.onnx*"))
    row = Contender(
        "edgestill, tuned", f"int4 g{group}", f"int{head} g{group}", size, info["onnx"]["read_per_token_bytes"], {}
    )
    row.request = {"kind": "edgestill", "folder": str(tuned), "threads": None}
    return row


def builder_default(shape: str, options: argparse.Namespace) -> Contender:
    """The builder's int4 model with its own options and the runtime's own number of threads."""
    base = options.work / shape

    def build(out: Path) -> None:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(base / "model"), "-o", str(out)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(base / "cache")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    folder = once(base / "builder", build)
    size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    name = "onnxruntime-genai, builder's defaults"
    return Contender(name, "int4 g32", "int4 g32", size, size, {"kind": "genai", "folder": str(folder)})


def llama(shape: str, kind: str, options: argparse.Namespace) -> Contender:
    """A GGUF file of the same weights by llama.cpp's own quantizer."""
    base = options.work / shape

    def make(out: Path) -> None:
        command = [options.llama_python, __file__, "--gguf", str(base / "model"), str(out), kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    path = once(base / f"{kind}.gguf", make)
    size, threads = path.stat().st_size, len(os.sched_getaffinity(0))
    row = Contender(f"llama.cpp {kind}", kind, "Q6_K" if kind == "Q4_0" else "Q6_K or Q8_0", size, size, {})
    row.request, row.python = {"kind": "llama", "folder": str(path), "threads": threads}, options.llama_python
    return row


def write_gguf(source: Path, out: Path, kind: str) -> None:
    """Write the checkpoint as F16 GGUF and quantize it. Runs in llama.cpp's environment.

    Rows of q and k stay in Hugging Face's order, which changes what a trained model says and no speed.
    """
    import gguf
    import llama_cpp
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plain = out.with_suffix(".f16")
    writer = gguf.GGUFWriter(str(plain), "llama" if config["model_type"] == "llama" else "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{index}" for index in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    for name, value in load_file(source / "model.safetensors").items():
        parts = name.split(".")
        known = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        short = known.get(name) or f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
        writer.add_tensor(short, value.astype(np.float32 if value.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(bytes(plain), bytes(out), ctypes.byref(params))
    plain.unlink()
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")


def serve(request: dict[str, Any]) -> None:
    """Hold one contender and time a request for every line on standard input."""
    if request["kind"] == "llama":
        request_once = llama_request(request)
    else:
        sys.path.insert(0, str(ROOT))
        request_once = genai_request(request)
    request_once()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(request_once()), flush=True)


def genai_request(request: dict[str, Any]) -> Callable[[], tuple[float, float]]:
    """A function that runs one request in onnxruntime-genai: seconds to the first token, seconds for the others."""
    import onnxruntime_genai as og

    from deploy.runners import GenaiRunner
    from deploy.tune_worker import generate, prompt_ids

    runner = GenaiRunner(
        Path(request["folder"]), verify=False, on_huge_pages=None if request["kind"] == "edgestill" else False
    )
    if request["kind"] == "genai":  # as it comes: the runtime chooses the threads
        config = og.Config(request["folder"])
        config.overlay(json.dumps({"model": {"eos_token_id": []}}))
        runner.model = og.Model(config)
    ids = prompt_ids(runner, request["prompt"])

    def once_() -> tuple[float, float]:
        _, first, rest = generate(runner, ids, request["new"])
        return first, rest / (request["new"] - 1)

    return once_


def llama_request(request: dict[str, Any]) -> Callable[[], tuple[float, float]]:
    """The same in llama.cpp, the most likely token taken from its logits."""
    import llama_cpp
    import numpy as np

    threads, length = request["threads"], request["prompt"] + request["new"]
    model = llama_cpp.Llama(
        request["folder"], n_ctx=length + 8, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))

    def once_() -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval([5 + at for at in range(request["prompt"])])
        token = best()
        first = time.perf_counter()
        for _ in range(request["new"] - 1):
            model.eval([token])
            token = best()
        return first - start, (time.perf_counter() - first) / (request["new"] - 1)

    return once_


def race(rows: list[Contender], options: argparse.Namespace) -> None:
    """Time all contenders in turn."""
    processes: list[subprocess.Popen[str]] = []
    try:
        _race(rows, options, processes)
    finally:
        for process in processes:
            process.communicate()


def _race(rows: list[Contender], options: argparse.Namespace, processes: list[subprocess.Popen[str]]) -> None:
    for row in rows:
        request = row.request | {"prompt": options.prompt, "new": options.new}
        command = [row.python, __file__, "--worker", json.dumps(request)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit(f"{row.name} did not start")
    for _ in range(options.repeats):
        for row, process in zip(rows, processes, strict=True):
            assert process.stdin is not None, "opened with a pipe"
            assert process.stdout is not None, "opened with a pipe"
            process.stdin.write("\n")
            process.stdin.flush()
            first, each = json.loads(process.stdout.readline())
            row.prefill.append(first)
            row.decode.append(each)
            time.sleep(0.1)  # its threads come to rest


def against(row: Contender, base: Contender) -> tuple[float, float]:
    """Speed over that of ``base`` in prefill and decode: medians of the ratios within each round."""
    both = ((row.prefill, base.prefill), (row.decode, base.decode))
    prefill, decode = (statistics.median(b / a for a, b in zip(mine, its, strict=True)) for mine, its in both)
    return prefill, decode


def base_of(rows: Sequence[Contender]) -> Contender | None:
    """The contender that ratios are told against, where it takes part."""
    return next((row for row in rows if row.name == "llama.cpp Q4_0"), None)


def quiet_races(rows: list[Contender], options: argparse.Namespace) -> tuple[list[list[Contender]], QuietRuns]:
    """Three races, each on a quiet machine; the contenders of each with their times."""
    from benchmarks.quiet import RUNS, QuietRuns  # a worker runs in an environment that has no psutil

    runs, found = QuietRuns(options.wait), []
    for _ in range(RUNS):
        these = [replace(row, prefill=[], decode=[]) for row in rows]
        with runs.run():
            race(these, options)
        found.append(these)
    return found, runs


def bandwidth(threads: int) -> float:
    """Bytes per second of a sequential read with so many threads, in a process of its own."""
    code = "from deploy.bundle_runner.run import read_bandwidth; print(read_bandwidth())"
    settings = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | settings)
    return float(done.stdout)


def lines(shape: str, races: Sequence[Sequence[Contender]], read: float, options: argparse.Namespace) -> list[str]:
    """The table of one shape: of each contender the run with the lowest ratio in decode, and the lowest in prefill."""
    from benchmarks.quiet import lowest

    prompt, new = options.prompt, options.new
    heads = "linears | embedding and head | file MB | prefill tok/s | decode tok/s | of the read bound | against Q4_0"
    found = [
        f"\n## {shape}, prompt {prompt}, {new} new tokens, median of {options.repeats}, lowest of {len(races)} runs",
        "",
        f"| | {heads} |",
        "|---" * 8 + "|",
    ]
    for at, row in enumerate(races[0]):
        told = [(run[at], base_of(run)) for run in races]
        ratios = [against(mine, base) for mine, base in told if base is not None]
        slowest = lowest([mine for mine, _ in told], lambda mine: 1 / statistics.median(mine.decode))
        if ratios:
            slowest = told[ratios.index(lowest(ratios, lambda ratio: ratio[1]))][0]
        prefill, decode = prompt / statistics.median(slowest.prefill), 1 / statistics.median(slowest.decode)
        words = "{:.2f} / {:.2f}".format(*(min(ends) for ends in zip(*ratios, strict=True))) if ratios else "-"
        figures = (f"{row.file_bytes / 1e6:.0f}", f"{prefill:.0f}", f"{decode:.0f}")
        share = f"{decode * row.read_bytes / read:.0%}"
        found.append(f"| {' | '.join((row.name, row.linears, row.head, *figures, share, words))} |")
    return found


def main() -> None:
    """Make what is missing, race, and print the tables."""
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--gguf"]:
        write_gguf(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    # the builder imports a module "quantization" of its own: this folder's must not stand in its way
    sys.path[:] = [
        str(ROOT),
        *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent),
    ]
    from benchmarks.quiet import add_option

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma between")
    parser.add_argument("--work", type=Path, default=Path("decode-bench"), help="folder for models, kept between runs")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python, gguf, safetensors and numpy")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of tuning for each of our bundles")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    add_option(parser)
    options = parser.parse_args()
    options.work = options.work.resolve()
    tables: list[str] = []
    for shape in options.shapes.split(","):
        (options.work / shape).mkdir(parents=True, exist_ok=True)
        once(options.work / shape / "model", lambda out, shape=shape: make_checkpoint(shape, out))  # type: ignore[misc]
        rows = [our_bundle(shape, GROUPS[shape], 4, options), our_bundle(shape, GROUPS[shape], 8, options)]
        rows += [our_bundle(shape, 32, 8, options), builder_default(shape, options)]
        if options.llama_python is None:
            print("llama.cpp is left out: no --llama-python", file=sys.stderr)
        else:
            rows += [llama(shape, kind, options) for kind in ("Q4_0", "Q4_K_M")]
        read = bandwidth(len(os.sched_getaffinity(0)))
        races, runs = quiet_races(rows, options)
        tables += lines(shape, races, read, options)
        tables += ["", f"Sequential read {read / 1e9:.1f} GB/s; {runs.told()}. Against Q4_0: prefill / decode,"]
        tables.append(
            "the lowest of the runs, each the median of its rounds' ratios. Weights are random: no quality is"
        )
        tables.append("compared.")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
