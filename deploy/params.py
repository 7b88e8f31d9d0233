"""Parameters of export and bench. Imports only pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.context import Params

PROMPTS = (
    "Turn on the light in the kitchen.",
    "Once upon a time there was a little girl who lived in a house by the sea.",
    "Set a timer for 25 minutes, please!",
    "What is the weather like in Paris tomorrow?",
)


Format = Literal["onnx", "gptq", "gguf"]


def _default_formats() -> list[Format]:
    return ["onnx"]


class ExportParams(Params):
    """What is written, how its graph computes, and how closely it must agree with the checkpoint in torch."""

    formats: list[Format] = Field(
        default_factory=_default_formats,
        min_length=1,
        description="onnx: the bundle; beside it gptq: a checkpoint, gguf: a file for llama.cpp",
    )
    backend: Literal["builder", "optimum"] = Field(
        "builder",
        description="who draws the ONNX graph: onnxruntime-genai's builder, which keeps codes; or optimum-onnx, plain "
        "operators in fp32, in an environment of its own (make optimum-env)",
    )
    accuracy_level: Literal[0, 1, 4] = Field(
        4, description="of the int4 products: 4 rounds activations to 8 bits, two to three times faster; 0, 1: fp32"
    )
    last_logits: bool = Field(
        True,
        description="a prompt's logits at its last position alone, which is what generation reads and other runtimes "
        "compute; false: at every position, for a program that reads them",
    )
    context_tokens: int | None = Field(
        None, ge=16, description="longest prompt and answer together; left out: the model's own"
    )
    parity_rows: int = Field(16, ge=1, le=1000, description="rows of the data, or prompts, that prove parity")
    parity_tokens: int = Field(128, ge=8, description="longest of them in tokens; the rest is cut")
    prompts: list[str] = Field(
        default_factory=lambda: list(PROMPTS),
        min_length=1,
        description="texts that prove parity without data",
    )
    parity_tolerance: float = Field(
        1e-3, gt=0, lt=1, description="of the graph in fp32: largest difference of a logit over the largest logit"
    )
    max_kl: float = Field(
        0.05, gt=0, description="of the graph as shipped: largest mean divergence from torch, nats per token"
    )
    functions: dict[str, list[str]] | None = Field(
        None,
        description="functions that the device has, with their arguments, which run.py holds answers against; left "
        "out: those that the data's rows call",
    )
    licence: str | None = Field(None, description="licence of the model; left out: as its model card says")


class BenchParams(Params):
    """Lengths and repeats of a measurement; medians are reported with their spread."""

    prompt_tokens: int = Field(32, ge=1, description="tokens of the prompt")
    new_tokens: int = Field(64, ge=2, description="tokens that are generated")
    repeats: int = Field(5, ge=1, description="measured repeats; the median counts")
    warmup: int = Field(1, ge=0, description="repeats before that are not measured")


class TuneParams(Params):
    """What request is made fast, for how long better settings are sought, and what quality they must keep."""

    budget_s: float = Field(
        default=120.0, gt=0, description="seconds of searching; opening and checking the bundle come on top"
    )
    prompt_tokens: int = Field(default=128, ge=1, description="tokens of the prompt of a typical request")
    new_tokens: int = Field(default=64, ge=2, description="tokens of its answer")
    rounds: int = Field(default=5, ge=1, description="paired measurements that decide between two settings")
    margin: float = Field(
        default=0.02, ge=0, lt=1, description="share of the time that a setting must save to be taken"
    )
    max_kl: float = Field(
        default=0.02,
        gt=0,
        description="largest mean divergence from the bundle as it was, nats per token, of rougher arithmetic",
    )
