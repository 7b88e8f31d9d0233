"""The process in which one contender of `benchmarks/quantization.py` quantizes a model, in its own environment.

Called with a request as JSON; writes the dequantized linears and prints seconds, peak memory and bits per weight.
Imports of ours stand only where ours is the contender.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 128  # of a calibration row


def ours(request: dict[str, Any]) -> tuple[float, float]:
    """Run one of our stages; return seconds and bits per weight."""
    import torch
    from safetensors.torch import load_file, save_file

    from compress.context import StageContext
    from compress.data.rows import make_row, write_rows
    from compress.model.quantization.gptq_stage import round_to_nearest, solve
    from compress.model.quantization.packing import dequantize_checkpoint
    from compress.model.quantization.params import GptqParams, RtnParams
    from compress.model.quantization.streaming import calibration_rows, open_job, run
    from compress.progress import Progress

    torch.set_num_threads(request["threads"])
    folders = [Path(request["scratch"]) / name for name in ("data", "quantized", "work")]
    for folder in folders:
        folder.mkdir()
    write_rows(folders[0], [make_row(text=text) for text in request["texts"]])
    options = dict(request["options"])
    method = options.pop("method")
    options |= {"bits": request["bits"], "group_size": request["group_size"], "embedding_bits": 16}
    ctx = StageContext(
        name=f"model.quantization.{method}",
        inputs={"model": Path(request["model"]), "data": folders[0]},
        out=folders[1],
        work=folders[2],
        seed=request["seed"],
        progress=Progress(quiet=True),
        threads=request["threads"],
    )
    start = time.perf_counter()
    if method == "rtn":
        result = round_to_nearest(RtnParams(**options), ctx)
    else:
        params = GptqParams(**options, calibration_tokens=10**9, max_tokens=TOKENS)
        given = calibration_rows(open_job(params, ctx), params)
        # the very rows that the others get: what is checked is calibrated on too, no choice is made by it
        every = [*given.draws[0], *given.check]
        start = time.perf_counter()
        job = open_job(params, ctx)
        rows = given._replace(draws=[every])
        result = run(job, lambda step: solve(step, params), rows, prompt_weight=params.prompt_weight)
    seconds = time.perf_counter() - start
    config = json.loads((folders[1] / "config.json").read_text(encoding="utf-8"))
    opened = dequantize_checkpoint(load_file(folders[1] / "model.safetensors"), config["quantization_config"])
    save_file({name: t for name, t in opened.items() if name.endswith("_proj.weight")}, request["out"])
    return seconds, float(result.metrics["bits_per_weight"])


def gptqmodel(request: dict[str, Any]) -> tuple[float, float]:
    """Run GPTQModel on the CPU with its defaults; its checkpoint is read with our reader of the format."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from compress.model.quantization.packing import dequantize_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    rows = [tokenizer(text, truncation=True, max_length=TOKENS) for text in request["texts"]]
    given = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]
    settings = QuantizeConfig(bits=request["bits"], group_size=request["group_size"], **request["options"])
    model = GPTQModel.load(request["model"], settings, device="cpu", backend=BACKEND.AUTO)
    start = time.perf_counter()
    model.quantize(given, batch_size=16)
    seconds = time.perf_counter() - start
    folder = Path(request["scratch"]) / "theirs"
    model.save(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    opened = dequantize_checkpoint(load_file(folder / "model.safetensors"), config["quantization_config"])
    save_file({name: t for name, t in opened.items() if name.endswith("_proj.weight")}, request["out"])
    return seconds, request["bits"] + 16 / request["group_size"]  # the index of a free order is left out


def hqq(request: dict[str, Any]) -> tuple[float, float]:
    """Quantize every linear with HQQ's own solver, without data."""
    import torch
    from hqq.core.quantize import Quantizer
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    with safe_open(str(Path(request["model"]) / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file, not a mapping
            if name.endswith("_proj.weight"):
                weights[name] = file.get_tensor(name).float()
    done, start = {}, time.perf_counter()
    for name, weight in weights.items():
        codes, meta = Quantizer.quantize(
            weight, nbits=request["bits"], group_size=request["group_size"], axis=1, device="cpu", bitpack=False
        )
        done[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape).float().contiguous()
    seconds = time.perf_counter() - start
    save_file(done, request["out"])
    return seconds, request["bits"] + 32 / request["group_size"]  # scale and zero point, 16 bits each


def llama(request: dict[str, Any]) -> tuple[float, float]:
    """Quantize with llama.cpp from the GGUF file that our export wrote; the caller reads what came out."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['options']['type']}")
    params.nthread = request["threads"]
    out = Path(request["scratch"]) / "model.gguf"
    start = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(request["gguf"].encode(), str(out).encode(), ctypes.byref(params))
    seconds = time.perf_counter() - start
    if failed:
        raise RuntimeError(f"llama_model_quantize gave {failed}")
    return seconds, 0.0


def main() -> None:
    """Do what the request says."""
    request = json.loads(sys.argv[1])
    kinds = {"ours": ours, "gptqmodel": gptqmodel, "hqq": hqq, "llama": llama}
    seconds, bits = kinds[request["kind"]](request)
    # of this process since it began: ru_maxrss would also know the parent that it was forked from
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak, "bits_per_weight": bits}))


if __name__ == "__main__":
    main()
