"""Export of the common GPTQ checkpoint: a folder that other toolchains open, proven to hold the source's codes.

`export_gptq` copies a quantized checkpoint, writes its model card, opens the copy again and compares every code,
scale and zero point with the source; `read_codes` lists them. Knows nothing of how the codes came about, of targets
or of other formats.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.errors import ModelError, ParityError
from compress.model.checkpoint import (
    GENERATION_FILE,
    check_folder,
    copy_tokenizer,
    declare_ends,
    load_model,
    read_config,
    weight_files,
    write_json,
)
from compress.model.quantization import packing
from compress.model.quantization.layout import stored_as
from compress.model.shapes import architecture

CARD = "README.md"


def export_gptq(source: Path, folder: Path, *, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the quantized checkpoint ``source`` into ``folder`` as others read it; return figures for the run record.

    ``facts`` are lines for the model card (name -> value): origin, licence, measured quality. The folder has no
    file of ours beside the common ones. Raises ModelError when ``source`` is not quantized in the format "gptq",
    ParityError when the copy does not hold the same codes.
    """
    check_folder(source)
    config = read_config(source)
    settings = config.get("quantization_config")
    if not settings:
        raise ModelError(
            str(source), "plain weights", "a quantized checkpoint", "Quantize it first: model.quantization"
        )
    packing.check_quantization_config(settings, where=str(source / "config.json"))
    folder.mkdir(parents=True, exist_ok=True)
    common = common_config(config)
    write_json(folder / "config.json", common)
    write_json(folder / "quantize_config.json", common["quantization_config"])  # where AutoGPTQ looks for it
    if (source / GENERATION_FILE).is_file():
        shutil.copyfile(source / GENERATION_FILE, folder / GENERATION_FILE)
    for path in weight_files(source):
        shutil.copyfile(path, folder / path.name)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, folder / index.name)
    copy_tokenizer(source, folder)
    declare_ends(folder, tokenizer_from=source)
    (folder / CARD).write_text(card(config, facts or {}), encoding="utf-8")
    matrices = verify(source, folder)
    return {
        "format": "gptq",
        "bits": int(settings["bits"]),
        "group_size": int(settings["group_size"]),
        "matrices": matrices,
        "bytes": sum(path.stat().st_size for path in sorted(folder.iterdir())),
    }


def common_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` with what older and stricter readers ask for; ours read the same from it.

    transformers 4 knows no ``rope_parameters`` and without ``rope_theta`` silently takes 10000. GPTQModel, AutoGPTQ and
    transformers refuse a ``damp_percent`` of 0, which rounding to nearest has; nobody needs it to open a folder.
    """
    settings = dict(config["quantization_config"])
    if not 0 < float(settings.get("damp_percent") or 0) < 1:
        settings.pop("damp_percent", None)
    return older_rotary({**config, "quantization_config": settings})


def older_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` with the rotary settings under their names of transformers 4 beside those of 5."""
    new, rope = dict(config), dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        new["rope_theta"] = theta
        if rope.get("rope_type", "default") != "default":
            new["rope_scaling"] = rope
    return new


def read_codes(folder: Path) -> Iterator[tuple[str, packing.QuantizedLinear]]:
    """Yield every quantized linear of a checkpoint by name, in the order of names; one at a time is in memory."""
    settings = read_config(folder)["quantization_config"]
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            names = sorted(name for name in file.keys() if name.endswith(".qweight"))  # noqa: SIM118
            for name in names:
                prefix = name.removesuffix(".qweight")
                wanted = (f"{prefix}.{suffix}" for suffix in packing.SUFFIXES)
                parts = {part: file.get_tensor(part) for part in wanted}
                yield prefix, packing.read_layer(parts, prefix, bits=stored_as(settings, prefix)[0])


def verify(source: Path, folder: Path) -> int:
    """Open the export as a model and compare it with its source; return the number of matrices compared.

    Codes, scales, zero points and groups must be the same, and every parameter of the opened model must be what the
    source's codes stand for. Raises ParityError that names the first difference.
    """
    model = load_model(folder)
    weights = dict(model.named_parameters())
    count = 0
    for (name, ours), (other, theirs) in zip(read_codes(source), read_codes(folder), strict=True):
        same = name == other and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if not same or not torch.equal(weights[f"{name}.weight"], packing.dequantize(*ours)):
            raise ParityError(str(folder), f"{other} does not hold the codes of its source", name)
        count += 1
    if not count:
        raise ParityError(str(folder), "no quantized matrix", "the codes of its source")
    return count


def card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the model card: what it is, how to open it, and ``facts``."""
    settings = config["quantization_config"]
    grouping = "one scale per output" if settings["group_size"] == -1 else f"groups of {settings['group_size']} inputs"
    lines = [
        "---",
        "tags: [gptq, quantized]",
        "---",
        "",
        "# Quantized language model",
        "",
        f"A {config['architectures'][0]} whose linear layers are stored in {settings['bits']} bits, {grouping}, "
        f"{'symmetric' if settings['sym'] else 'asymmetric'}. Made by edgestill.",
        "",
        "Layout: GPTQ, checkpoint format `gptq` (int32 `qweight` and `qzeros`, stored zero = zero point - 1, fp16",
        "`scales`, int32 `g_idx`). Other tensors are plain.",
        "",
        "Readers that edgestill's tests prove:",
        "",
        *(f"- {line}" for line in _readers(config)),
        "",
        "The builder is called like this:",
        "",
        "    python -m onnxruntime_genai.models.builder -i FOLDER -o OUT -p int4 -e cpu -c CACHE \\",
        "        --extra_options nodes_to_exclude=/lm_head/MatMul shared_embeddings=false",
        "",
        "Without these options the builder rounds the output head to 4 bits as well.",
    ]
    if facts:
        lines += ["", "| fact | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(facts[name])} |" for name in sorted(facts)]
    return "\n".join(lines) + "\n"


def _readers(config: Mapping[str, Any]) -> list[str]:
    """Who opens such a folder, as ``tests/interop`` and ``tests/deploy/test_export_gptq.py`` show."""
    settings = config["quantization_config"]
    lines = [
        "edgestill itself;",
        "the onnxruntime-genai model builder 0.18: the same logits within 4e-4 in fp32 arithmetic;",
        "GPTQModel 7.6: the same codes, logits to the rounding of fp16."
        + ("" if settings["sym"] else " It refuses asymmetric codes that it did not write itself;"),
    ]
    if settings.get("dynamic"):
        return [*lines, "not transformers alone and not AutoGPTQ: they know no widths for single linears (`dynamic`)."]
    if settings["group_size"] != -1:  # for some of these the kernel that it picks on a CPU, TorchFusedLinear, gave NaN
        lines.append("transformers 5.23 with GPTQModel and optimum installed: logits to the rounding of bf16;")
    older = architecture(config) in ("LlamaForCausalLM", "Qwen2ForCausalLM") and not config.get("tie_word_embeddings")
    return [*lines, "AutoGPTQ 0.7.1 with transformers 4.57: logits within 1e-3."] if older else lines


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
