"""Checkpoints: Hugging Face folders of safetensors, checked before they are trusted, opened and saved.

`check_folder` says what is wrong with a folder, `load_model` opens it (our int4 checkpoints too, as plain fp32),
`save_model` writes one that anyone opens with plain ``from_pretrained``. `TorchRuntime` is in `runtime` and
offered here too. Never pickle, never remote code, no network. Knows nothing of rows, stages or training.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compress.encoding import load_tokenizer, stop_ids
from compress.errors import EdgestillError, ModelError
from compress.files import json_text, tokenizer_files, write_whole
from compress.json_reader import read_table, required, shown
from compress.model.foreign import refuse_foreign, refuse_tensors, refuse_weights
from compress.model.layers import attention, decoder_layers, embedding, is_tied, output_head
from compress.model.runtime import TorchRuntime
from compress.model.shapes import SUPPORTED, check_config, parameter_count, tensor_shapes
from compress.names import is_plain_name
from compress.tokenizer_files import highest_id, read_tokenizer

__all__ = [
    "SUPPORTED",
    "TorchRuntime",
    "check_folder",
    "check_tokenizer",
    "copy_tokenizer",
    "count_parameters",
    "declare_ends",
    "load_model",
    "parameter_count",
    "read_config",
    "save_model",
]

METADATA_FILE, GENERATION_FILE = "edgestill.json", "generation_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_FORMATS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # of numbers that are read here


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a supported architecture as a dict; ModelError when absent, malformed or unfit."""
    path = folder / "config.json"
    if not path.is_file():
        refuse_weights(folder)
    config = _read_json(path)
    refuse_foreign(folder, config)
    check_config(config, where=str(path))
    return config


def check_folder(folder: Path) -> None:
    """Raise ModelError unless ``folder`` is a whole, finite, supported checkpoint whose tokenizer fits it.

    Found: missing files, pickle-only weights, cut-off or damaged safetensors, tensors missing or of another shape
    than the config says, NaN or infinite weights, unsupported architectures, a tokenizer with more entries than
    the model's vocabulary. Weights are read one tensor at a time.
    """
    config = read_config(folder)
    for path in _check_tensors(folder, config):
        for name in _header(path):
            with safe_open(str(path), framework="pt") as file:  # anew: what is mapped stays resident until it closes
                _check_finite(file.get_tensor(name), name, path)
    check_tokenizer(folder, config)


def check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError when ``tokenizer.json`` is absent or holds ids outside the model's vocabulary."""
    highest = highest_id(read_tokenizer(folder))
    if highest >= int(config["vocab_size"]):
        raise ModelError(
            str(folder / "tokenizer.json"),
            f"token id {highest}",
            f"ids below the model's vocab_size {config['vocab_size']}",
            "Use the tokenizer that the model was trained with",
        )


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """Open a checkpoint in eval mode as ``dtype``; a GPTQ checkpoint of ours opens as plain weights scale * code.

    ``dtype`` is always passed on, because transformers 5 would take the checkpoint's. Raises ModelError as
    `check_folder` does, the tokenizer apart.
    """
    config = read_config(folder)
    paths = _check_tensors(folder, config)
    try:
        with quiet_transformers():
            if config.get("quantization_config"):
                model = _load_quantized(folder, config, paths, attn_implementation)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
    except EdgestillError:
        raise
    except Exception as error:  # a config from outside: transformers and torch raise whatever it leads them to
        raise ModelError(str(folder), f"transformers cannot open it: {_first_line(error)}") from error
    for name, parameter in model.named_parameters():
        _check_finite(parameter, name, folder)
    _settle_tie(model)
    return cast(PreTrainedModel, model.to(dtype).eval())


def save_model(
    model: PreTrainedModel, folder: Path, *, tokenizer_from: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write config, safetensors, tokenizer files and ``edgestill.json`` (``metadata``, sorted); same bytes each time.

    The config gets an explicit ``head_dim``, because after width pruning it no longer follows from the rest.
    Raises ModelError when transformers refuses the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.head_dim = int(cast(Any, attention(decoder_layers(model)[0])).head_dim)
    model.config.architectures = [type(model).__name__]
    original = model.generation_config
    model.generation_config = _savable_generation(original)
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
    except (StrictDataclassError, ValueError) as error:
        raise ModelError(str(folder), f"transformers refuses to save: {_first_line(error)}") from error
    finally:
        model.generation_config = original
    copy_tokenizer(tokenizer_from, folder)
    declare_ends(folder, tokenizer_from=tokenizer_from)
    if metadata is not None:
        write_json(folder / METADATA_FILE, dict(metadata))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files byte for byte, only ``tokenizer_class`` rewritten to the plain fast class.

    transformers 5 writes "TokenizersBackend", which 4 cannot open, and would swap another tokenizer in for some
    model types on loading and saving through AutoTokenizer; so nothing is loaded here. ModelError when absent.
    """
    if not (source / "tokenizer.json").is_file():
        raise ModelError(str(source), "no tokenizer.json", "a checkpoint folder with its tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        if (source / name).resolve() != (folder / name).resolve():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") != "PreTrainedTokenizerFast":
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def declare_ends(folder: Path, *, tokenizer_from: Path) -> None:
    """Name every token that ends an answer in ``generation_config.json``, where plain ``generate`` looks for them.

    They are `stop_ids` of ``folder``, which has its tokenizer by now, and of ``tokenizer_from``, where that came from.
    """
    config, path = _read_json(folder / "config.json"), folder / GENERATION_FILE
    found = {token for place in (folder, tokenizer_from) for token in stop_ids(load_tokenizer(place))}
    ends = sorted(token for token in found if token < int(config["vocab_size"]))
    if path.is_file():
        settings = _read_json(path)
    else:
        settings = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    said = ends[0] if len(ends) == 1 else ends
    if ends and settings.get("eos_token_id") != said:
        settings.pop("_from_model_config", None)  # or transformers may take config.json's again
        write_json(path, settings | {"eos_token_id": said})


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` with sorted keys and a final newline."""
    write_whole(path, json_text(value, indent=2) + "\n")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch transformers' own progress bars and advice off, and back as they were."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    return read_table(path, ModelError, allowed="a JSON object, as in a Hugging Face checkpoint folder")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def weight_files(folder: Path) -> list[Path]:
    """Return the checkpoint's safetensors files, sharded ones from their index; ModelError when there is none."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        listed = required(_read_json(index), "weight_map", dict, str(index), ModelError)
        wrong = [name for name in listed.values() if not isinstance(name, str) or not is_plain_name(name)]
        if wrong:
            raise ModelError(str(index), f"weight_map names the shard {shown(wrong[0])}", "a plain file name")
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            got = f"missing shards {', '.join(missing[:3]) or '(none listed)'}{more}"
            raise ModelError(str(index), got, "every shard")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            str(folder),
            f"only pickled weights ({', '.join(pickles)})",
            "model.safetensors",
            "Pickle can run code when opened. Convert it where you trust it: load there, then save_pretrained(folder)",
        )
    refuse_weights(folder)
    raise ModelError(str(folder), "no weights", "model.safetensors")


def _check_tensors(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Check names and shapes in the files' headers against the config; return the files."""
    if config.get("quantization_config"):
        from compress.model.quantization import packing

        where = f"{folder / 'config.json'}: quantization_config"
        packing.check_quantization_config(config["quantization_config"], where=where)
    expected = tensor_shapes(config)
    paths = weight_files(folder)
    seen: set[str] = set()
    for path in paths:
        for name, shape in _header(path).items():
            seen.add(name)
            if name in expected and shape != expected[name]:
                raise ModelError(str(path), f"{name} of shape {shape}", f"{expected[name]} as config.json says")
    if config.get("quantization_config"):  # a linear is there as codes or, left alone, as weights
        seen |= {name.removesuffix("qweight") + "weight" for name in seen if name.endswith(".qweight")}
    missing = sorted(expected.keys() - seen)
    if missing:
        if not config.get("quantization_config"):
            refuse_tensors(folder, seen)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(str(folder), f"missing tensors {', '.join(missing[:3])}{more}", "all that config.json implies")
    return paths


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            strange = next((name for name, piece in pieces.items() if piece.get_dtype() not in _FORMATS), None)
            if strange is not None:
                got = f"{shown(strange)} of the number format {pieces[strange].get_dtype()}"
                raise ModelError(str(path), got, f"one of {', '.join(_FORMATS)}")
            return {name: tuple(piece.get_shape()) for name, piece in pieces.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            str(path),
            f"damaged or cut off: {_first_line(error)}",
            "a whole safetensors file",
            "Fetch or copy the file again and compare its size",
        ) from error


def _check_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(str(where), f"{bad} NaN or infinite values in {name}", "finite weights")


def _settle_tie(model: PreTrainedModel) -> None:
    """Make the config's word on tying true: transformers 5 keeps a stored head beside a tied config."""
    if is_tied(model) or not model.config.tie_word_embeddings:
        return
    if torch.equal(output_head(model).weight, embedding(model).weight):
        output_head(model).weight = embedding(model).weight
    else:
        model.config.tie_word_embeddings = False


def _savable_generation(config: Any) -> Any:
    """Return a copy without sampling figures that greedy decoding ignores; saving them together is refused."""
    clean = copy.deepcopy(config)
    if clean is not None and not clean.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(clean, name, None) is not None:
                setattr(clean, name, None)
    return clean


def _load_quantized(
    folder: Path, config: Mapping[str, Any], paths: list[Path], attn_implementation: str
) -> PreTrainedModel:
    """Open a GPTQ checkpoint as plain fp32 weights: exactly the values that its codes stand for."""
    from compress.model.quantization import packing

    plain = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del plain.quantization_config
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    opened = packing.dequantize_checkpoint(tensors, config["quantization_config"])
    state = {name: opened[name].float() for name in tensor_shapes(config)}
    model = AutoModelForCausalLM.from_config(plain, attn_implementation=attn_implementation, dtype=torch.float32)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return cast(PreTrainedModel, model)
