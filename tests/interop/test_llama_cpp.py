"""The GGUF file in llama.cpp: the same tokens, the same logits as far as its arithmetic goes, the same perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from compress.encoding import encode_text_prompt, load_tokenizer
from deploy.export.parity import torch_logits
from tests.deploy.tools import changed_config, rounded
from tests.interop.conftest import ROOT, Ask
from tests.tiny import tiny_checkpoint, tiny_conversations

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'edgestill[gguf]'")
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1600)]

SHARED = ROOT.parent / "shared"
STORIES, TEXTS = SHARED / "models" / "stories260k", SHARED / "data" / "tinystories" / "valid-stories.txt"
TEACHER = ROOT / "profiles" / "quickstart" / "teacher"
SHAPE: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "vocab": 320}
STRINGS = [
    "dim the kitchen lights to 30",
    "Once upon a time, there was a girl; she didn't know it's 12345 o'clock!",
    "  two  blanks\n\n\nlines\r\n and a tab\tend  ",
    "日本語 ñ é ß 🙂 ‘quotes’ ½",
    "<|bos|><|user|>lock the door<|end|><|assistant|>",
    "<s>hi</s> there",
    'WE\'LL SAY I\'VE {"name":"set_timer","args":{"minutes":5}}',
    "",
    "a",
]
ROPE = {"factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", False, {}),
    "qwen2": ("qwen2", True, {}),
    "qwen3": ("qwen3", False, {}),
    "llama3-rope": ("llama", True, {"rope_parameters": LLAMA3}),
    "linear-rope": ("qwen3", True, {"rope_parameters": {k: ROPE[k] for k in ("factor", "rope_theta")}
                                    | {"rope_type": "linear"}}),
    "yarn-rope": ("qwen2", False, {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
}  # fmt: skip
QUANTIZED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "Q4_0": ("llama", True, {"bits": 4, "group_size": 32}),
    "Q4_0-of-3-bits": ("qwen2", False, {"bits": 3, "group_size": 128}),
    "Q5_0": ("qwen3", True, {"bits": 4, "group_size": 32, "sym": False, "embedding_bits": 16}),
    "Q8_0": ("llama", False, {"bits": 8, "group_size": 64}),
    "mixed": ("llama", False, {"bits": 4, "group_size": 32, "overrides": [{"pattern": "*.down_proj", "bits": 8}]}),
}
SPLITS = {
    "qwen2": r"\p{N}",
    "smaug-bpe": r"\p{N}{1,3}",
    "llama-bpe": r"\p{N}{1,3}",  # and whole words of the vocabulary skip the merges
}
# Largest difference of a logit over the largest logit: files of floats in fp32; codes, whose products llama.cpp
# computes with activations rounded to 8 bits; bf16 weights, with activations rounded to bf16.
FP32, CODES, BF16 = 1e-5, 4e-2, 1e-2


def split_tokenizer(folder: Path, name: str) -> None:
    """Put a BPE with the splits of Qwen2, Llama 3 or SmolLM into ``folder``."""
    endings, rest = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if name in SPLITS:
        pattern = rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{SPLITS[name]}|{rest}"
        steps = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    texts = [message["content"] for talk in tiny_conversations(200) for message in talk] + STRINGS * 5
    special = [token["content"] for token in whole["added_tokens"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    made = json.loads(tokenizer.to_str())
    made["model"]["ignore_merges"] = name == "llama-bpe"
    whole |= {"model": made["model"], "pre_tokenizer": made["pre_tokenizer"]}
    path.write_text(json.dumps(whole), encoding="utf-8")


def stories(count: int) -> list[str]:
    text = TEXTS.read_text(encoding="utf-8")
    return [part.strip() for part in text.split("<|endoftext|>") if part.strip()][:count]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All checkpoints that are exported."""
    root, made = tmp_path_factory.mktemp("sources"), {"teacher": TEACHER}
    for name, (arch, tied, changes) in CASES.items():
        made[name] = changed_config(tiny_checkpoint(root / name, arch, tied=tied, **SHAPE), **changes)
    for name, (arch, tied, params) in QUANTIZED.items():
        plain = tiny_checkpoint(root / f"{name}-plain", arch, tied=tied, **SHAPE)
        made[name] = rounded(plain, root / name, clip_steps=3, **params)
    for name in ("qwen2", "smaug-bpe", "llama-bpe", "smollm"):
        made[f"split-{name}"] = tiny_checkpoint(root / f"split-{name}", "qwen3", layers=1, **SHAPE)
        split_tokenizer(made[f"split-{name}"], name)
    if STORIES.is_dir() and TEXTS.is_file():
        made["stories"] = STORIES
        made["stories-Q4_0"] = rounded(STORIES, root / "stories-q", bits=4, group_size=32, clip_steps=12)
        made["stories-Q8_0"] = rounded(STORIES, root / "stories-8", bits=8, group_size=32, clip_steps=0)
    return made


@pytest.fixture(scope="session")
def prompts(sources: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Token ids that every model reads: real text where the model knows text."""
    read = {}
    for name, source in sources.items():
        tokenizer = load_tokenizer(source)
        texts = stories(12) if name.startswith("stories") else STRINGS[:3]
        read[name] = [encode_text_prompt(text, tokenizer)[:200] for text in texts]
    return read


@pytest.fixture(scope="session")
def answers(
    ask: Ask,
    sources: dict[str, Path],
    prompts: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What llama.cpp makes of all files."""
    from deploy.export.gguf import export_gguf

    root = tmp_path_factory.mktemp("gguf")
    models = {}
    for name, source in sources.items():
        export_gguf(source, root / name)
        models[name] = {"model": str(root / name / "model.gguf"), "context": 256, "prompts": prompts[name]}
        models[name]["texts"] = STRINGS
    return ask("llama-cpp", "llama_cpp", {"models": models})


def needed(name: str, sources: dict[str, Path], answers: dict[str, Any]) -> None:
    if name not in sources:
        pytest.skip("the stories model and texts are not beside the repository")
    assert f"{name}/error" not in answers, answers[f"{name}/error"]


EVERY = [
    "teacher",
    *CASES,
    *QUANTIZED,
    "split-qwen2",
    "split-smaug-bpe",
    "split-llama-bpe",
    "split-smollm",
    "stories",
    "stories-Q4_0",
]


@pytest.mark.parametrize("name", EVERY)
def test_texts_become_the_same_tokens(sources: dict[str, Path], answers: dict[str, Any], name: str) -> None:
    needed(name, sources, answers)
    tokenizer = load_tokenizer(sources[name])
    for number, text in enumerate(STRINGS):
        assert list(answers[f"{name}/tokens{number}"]) == tokenizer(text)["input_ids"], text
    assert list(answers[f"{name}/ends"]) == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert str(answers[f"{name}/template"]) == (tokenizer.chat_template or "")


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((name, FP32) for name in (*CASES, "stories")),
        *((name, CODES) for name in (*QUANTIZED, "stories-Q4_0", "stories-Q8_0")),
        ("teacher", BF16),
    ],
)
def test_logits_are_the_same(
    sources: dict[str, Path], prompts: dict[str, list[list[int]]], answers: dict[str, Any], name: str, tolerance: float
) -> None:
    needed(name, sources, answers)
    wanted = list(torch_logits(sources[name], prompts[name]))
    found = [answers[f"{name}/logits{number}"] for number in range(len(wanted))]
    largest = max(float(np.abs(logits).max()) for logits in wanted)
    assert all(np.isfinite(logits).all() for logits in found)
    off = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)) / largest
    print(f"{name}: {off:.2g} of the largest logit")
    assert off < tolerance


def perplexity(logits: list[Any], prompts: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first."""
    losses = []
    for scores, ids in zip(logits, prompts, strict=True):
        exact = scores[:-1].astype(np.float64)
        top = exact.max(axis=1)
        log_sum = top + np.log(np.exp(exact - top[:, None]).sum(axis=1))
        losses.append(log_sum - exact[np.arange(len(ids) - 1), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.parametrize(("name", "tolerance"), [("stories", 1e-5), ("stories-Q8_0", 5e-3), ("stories-Q4_0", 5e-3)])
def test_perplexity_on_real_text_is_the_same(
    sources: dict[str, Path], prompts: dict[str, list[list[int]]], answers: dict[str, Any], name: str, tolerance: float
) -> None:
    needed(name, sources, answers)
    ours = perplexity(list(torch_logits(sources[name], prompts[name])), prompts[name])
    theirs = perplexity([answers[f"{name}/logits{n}"] for n in range(len(prompts[name]))], prompts[name])
    print(f"{name}: {ours:.4f} in torch, {theirs:.4f} in llama.cpp")
    assert ours < 5, "a model that knows the text"
    assert abs(theirs / ours - 1) < tolerance
