"""The ONNX graph as optimum-onnx draws it: plain operators in fp32, another back-end than the builder's graph.

optimum-onnx needs an older transformers than edgestill, so it lives in an environment of its own and is run there as
`optimum_worker`. It reads no codes: a quantized checkpoint goes in as the values that its codes stand for, in fp32. The
runtime config is written here, so that the bundle is opened, judged and timed like any other. Knows nothing of stages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx

from compress import processes
from compress.errors import EdgestillError, UserError
from compress.model.checkpoint import load_model, read_config, save_model, write_json
from compress.model.shapes import head_size, kv_head_count, parameter_count
from compress.scratch import scratch
from deploy.export.gptq import older_rotary
from deploy.export.graph import count_nodes
from deploy.export.onnx import COUNTED, GENAI_CONFIG, MODEL_FILE, OnnxOptions, OnnxReport, end_tokens
from deploy.export.skeleton import check_attention

VARIABLE = "EDGESTILL_OPTIMUM_PYTHON"
_PLACE = Path(__file__).resolve().parents[2] / "build" / "optimum" / "bin" / "python"
_MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"  # in a checkout
PACKAGES = (  # the Makefile's OPTIMUM
    *("transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "accelerate==1.15.0"),
    *("onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2"),
)
_WORKER = Path(__file__).with_name("optimum_worker.py")


def write_optimum(checkpoint: Path, out: Path, *, options: OnnxOptions) -> OnnxReport:
    """Write ``model.onnx`` and ``genai_config.json`` of ``checkpoint`` into ``out`` and say what is in them.

    ``options.accuracy_level`` has no meaning here: nothing is rounded.

    Raises:
        UserError: the environment of optimum-onnx is missing.
        ModelError: the checkpoint is damaged or not supported.
        EdgestillError: optimum-onnx failed.
    """
    python = interpreter()
    config = read_config(checkpoint)
    check_attention(config, where=str(checkpoint / "config.json"))
    longest = int(config.get("max_position_embeddings") or 2048)
    context = longest if options.context_tokens is None else min(longest, options.context_tokens)
    report = OnnxReport(head_size=head_size(config), context_tokens=context)
    report.notes.append("the back-end optimum computes in fp32: accuracy_level has no meaning")
    if config.get("quantization_config"):
        report.notes.append(
            "the back-end optimum stores the values of the codes in fp32: the graph computes the same, and is as "
            "large as before the quantization; the back-end builder keeps the codes"
        )
    with scratch() as temporary:
        plain, drawn = temporary / "model", temporary / "onnx"
        save_model(load_model(checkpoint), plain, tokenizer_from=checkpoint)
        write_json(plain / "config.json", older_rotary(read_config(plain)))
        _run(python, plain, drawn)
        for path in sorted(drawn.glob(f"{MODEL_FILE}*")):
            shutil.move(path, out / path.name)
    model = onnx.load(str(out / MODEL_FILE), load_external_data=False)
    report.nodes = count_nodes(model, COUNTED)
    report.read_per_token_bytes = 4 * (parameter_count(config) - _unread(config))
    write_json(out / GENAI_CONFIG, _genai_config(config, model, checkpoint, context))
    return report


def interpreter() -> Path:
    """Return the Python of the environment that has optimum-onnx; UserError says how to make it."""
    named = os.environ.get(VARIABLE)
    if named is not None and not named.strip():
        raise UserError(VARIABLE, f"got {named!r}", "the path of a Python", "Give one, or unset it.")
    python = Path(named) if named else _PLACE
    if not python.is_file():
        raise UserError(
            "backend optimum",
            f"no interpreter at {python}",
            "an environment with optimum-onnx, which needs an older transformers than edgestill (below 4.58)",
            _how_to_make_it(),
        )
    return python


def _how_to_make_it() -> str:
    """How its environment is made: by make in a checkout, by pip where edgestill is an installed package."""
    if _MAKEFILE.is_file():
        return f"Make it with: make optimum-env. One that lies elsewhere is named by {VARIABLE}"
    packages = f"torch==2.13.0 {' '.join(PACKAGES)}"
    return (
        f"Make it with: python3 -m venv optimum && optimum/bin/pip install {packages}; then set "
        f"{VARIABLE}=$PWD/optimum/bin/python"
    )


def _run(python: Path, source: Path, out: Path) -> None:
    """Run the worker; it sees no network and nothing of this environment's packages."""
    # -I: neither PYTHONPATH nor the folder of the worker, where modules of ours have the names of packages
    command = [str(python), "-I", str(_WORKER), str(source), str(out)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with processes.held_input() as given:
            ended = subprocess.run(  # noqa: S603 - a list
                command, stdin=given, capture_output=True, text=True, check=False, env=variables
            )
    except OSError as error:
        raise UserError("backend optimum", f"{python} cannot be run ({error.strerror})", "a Python") from error
    if ended.returncode or not (out / MODEL_FILE).is_file():
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise EdgestillError(
            "backend optimum",
            f"optimum-onnx failed: {lines[-1][:300]}",
            do=f"{_how_to_make_it()}. Or leave --backend out, for edgestill's own graph",
        )


def _unread(config: dict[str, Any]) -> int:
    """Weights that a token does not read: an embedding that is no head gives one row only."""
    return 0 if config.get("tie_word_embeddings") else int(config["vocab_size"]) * int(config["hidden_size"])


def _genai_config(config: dict[str, Any], model: onnx.ModelProto, checkpoint: Path, context: int) -> dict[str, Any]:
    """Return onnxruntime-genai's config for a graph with one pair of cache tensors per layer."""
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids"}
    given = {value.name for value in model.graph.input}
    decoder = {
        "filename": MODEL_FILE,
        "head_size": head_size(config),
        "hidden_size": int(config["hidden_size"]),
        "num_attention_heads": int(config["num_attention_heads"]),
        "num_hidden_layers": int(config["num_hidden_layers"]),
        "num_key_value_heads": kv_head_count(config),
        "inputs": {name: value for name, value in inputs.items() if value in given}
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }
    ends = end_tokens([] if config.get("eos_token_id") is None else config["eos_token_id"], checkpoint)
    first = ends if isinstance(ends, int) else ends[0]
    pad = config.get("pad_token_id")
    names = {
        "type": str(config["model_type"]),
        "bos_token_id": config.get("bos_token_id") if config.get("bos_token_id") is not None else first,
        "eos_token_id": ends,
        "pad_token_id": first if pad is None else pad,
        "vocab_size": int(config["vocab_size"]),
        "context_length": context,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1}
    return {"model": names, "search": search | {"past_present_share_buffer": False}}
