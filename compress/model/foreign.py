"""Folders of other formats, told by name: whose they are, and what to do with them instead.

`refuse_foreign` looks at a folder's config and file names before anybody looks for tensors; nothing is opened. Knows
nothing of tensors; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import ModelError

OURS = "gptq"
INSTEAD = "Start from the model before quantization, usually the repository that this one was made from"
# keys of config.json under which others keep what was done to the weights
_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = {  # file beside the weights -> format, where config.json is silent
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantize_config.json": "gptq",
}
_SUFFIXES = {  # of tensors
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".trellis": "exl3",
    ".q_weight": "exl2",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".qweight": "gptq or awq",
}
_WEIGHTS = (  # what lies there in the place of safetensors -> format, what to do
    ("*.gguf", "GGUF", "Take the safetensors of the original model; a GGUF holds weights that were rounded already"),
    ("*.onnx", "ONNX", "Take the safetensors of the original model"),
    ("openvino_model.xml", "OpenVINO", "Take the safetensors of the original model"),
    ("adapter_model.*", "a PEFT adapter", "Merge it into its base model first: merge_and_unload, then save_pretrained"),
    ("consolidated*.safetensors", "Mistral's own layout", "Take the folder with model.safetensors"),
    ("tf_model.h5", "TensorFlow", "Convert it where you trust it: from_pretrained(..., from_tf=True)"),
    ("flax_model.msgpack", "Flax", "Convert it where you trust it: from_pretrained(..., from_flax=True)"),
)


def format_of(config: Mapping[str, Any]) -> str | None:
    """Return the format of quantized weights that ``config.json`` names; None for plain ones."""
    for key in _KEYS:
        settings = config.get(key)
        if not settings:
            continue
        if not isinstance(settings, Mapping):
            return f"{key} {str(settings)[:60]!r}"
        method = settings.get("quant_method")
        if method is None:
            method = "mlx" if key == "quantization" else "compressed-tensors" if "config_groups" in settings else None
        if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
            method = "bitsandbytes"
        detail = settings.get("format") or settings.get("checkpoint_format") or settings.get("fmt")
        name = "unnamed" if method is None else str(method)[:60]
        return f"{name} ({str(detail)[:60]})" if detail and name != OURS else name
    return None


def refuse_foreign(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError when the weights of ``folder`` are quantized in a format that is not read here."""
    found = format_of(config)
    if found is not None and found != OURS:
        raise _foreign(folder, found)


def refuse_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise ModelError when tensors are missing in ``folder`` and others of it tell whose format that is.

    ``names`` are the tensors that are there.
    """
    known = (told for name, told in _FILES.items() if (folder / name).is_file())
    kept = list(names)
    suffixes = (told for suffix, told in _SUFFIXES.items() if any(name.endswith(suffix) for name in kept))
    found = next(suffixes, None) or next(known, None)
    if found is not None:
        raise _foreign(folder, f"{found}, which config.json does not tell of")


def _foreign(folder: Path, told: str) -> ModelError:
    return ModelError(
        str(folder / "config.json"),
        f"weights quantized in another format: {told}",
        "plain safetensors, or the format gptq",
        INSTEAD,
    )


def refuse_weights(folder: Path) -> None:
    """Raise ModelError when ``folder``, which has no ``model.safetensors``, has weights of another kind, or is one."""
    if folder.is_file():
        raise ModelError(str(folder), "a file", "a folder with config.json and model.safetensors", _WEIGHTS[0][2])
    for pattern, told, do in _WEIGHTS:
        names = sorted(path.name for path in folder.glob(pattern))
        if names:
            raise ModelError(str(folder), f"only {told} ({', '.join(names[:3])})", "model.safetensors", do)
