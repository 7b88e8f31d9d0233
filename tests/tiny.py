"""Tiny models, tokenizers, checkpoints and rows with random weights, made in the test that needs them.

`tiny_model` builds a Llama, Qwen2 or Qwen3 of a few thousand parameters; `tiny_tokenizer` trains a byte-level
BPE with the quickstart's chat template and special tokens into a folder; `tiny_checkpoint` writes both as one
Hugging Face folder; `tiny_conversations` and `tiny_token_rows` make rows. Everything follows from its seed and
nothing is downloaded. Knows nothing of stages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

SPECIAL = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")  # ids 0..4
PAD, BOS, USER, ASSISTANT, END = range(5)
ARCHITECTURES = ("llama", "qwen2", "qwen3")
VOCAB = 320
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROOMS = ("kitchen", "hall", "attic", "study", "garage", "porch")


def tiny_config(
    arch: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 64,
    vocab: int = VOCAB,
    tied: bool = True,
    positions: int = 256,
) -> Any:
    """Return the transformers config of one of `ARCHITECTURES`; ``head_dim`` is ``hidden // heads`` if left out."""
    import transformers

    cls = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[arch]
    return cls(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        architectures=[{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]],
        dtype="float32",
    )


def tiny_model(arch: str = "llama", *, seed: int = 0, scale: float = 0.1, **shape: Any) -> Any:
    """Return a random fp32 model in eval mode; ``shape`` as `tiny_config`.

    Every parameter is drawn anew with spread ``scale`` (norm gains around one, biases too), because the
    library's start (biases zero, gains one, weights 0.02) would hide a forgotten bias or gain.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(arch, **shape), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1.0 + noise if "norm" in name else noise)
    return model.float().eval()


@lru_cache
def _trained(vocab: int) -> str:
    """Return the JSON of a byte-level BPE of at most ``vocab`` entries, trained on made-up requests."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message["content"] for talk in tiny_conversations(200, seed=1) for message in talk]
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(folder: Path, *, vocab: int = VOCAB) -> Any:
    """Save a byte-level BPE of at most ``vocab`` entries with the chat template to ``folder`` and return it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab)),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # "TokenizersBackend" opens in transformers 5 only
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return fast


def tiny_checkpoint(folder: Path, arch: str = "llama", *, seed: int = 0, **shape: Any) -> Path:
    """Write `tiny_model` and `tiny_tokenizer` into ``folder`` (the vocabulary of both is ``vocab``); return it."""
    model = tiny_model(arch, seed=seed, **shape)
    model.save_pretrained(folder)
    tiny_tokenizer(folder, vocab=model.config.vocab_size)
    return folder


def tiny_conversations(count: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return ``count`` chats of one user turn and one JSON answer, in the manner of the quickstart."""
    draw = random.Random(seed)
    talks = []
    for _ in range(count):
        room, level = draw.choice(ROOMS), draw.randrange(0, 101, 5)
        ask, call = draw.choice(
            [
                (f"dim the {room} lights to {level}", {"name": "set_light", "args": {"room": room, "level": level}}),
                (f"set a timer for {level} minutes", {"name": "set_timer", "args": {"minutes": level}}),
                (f"lock the {room} door", {"name": "lock", "args": {"room": room}}),
                (f"who won the cup in the {room}", {"name": "none"}),
            ]
        )
        answer = json.dumps(call, separators=(",", ":"))
        talks.append([{"role": "user", "content": ask}, {"role": "assistant", "content": answer}])
    return talks


def tiny_token_rows(
    count: int, *, tokens: int | Sequence[int] = (6, 10, 16), vocab: int = VOCAB, seed: int = 0
) -> list[Any]:
    """Return ``count`` random `TokenRow` whose lengths cycle through ``tokens``; the first third is the prompt."""
    from compress.encoding import TokenRow

    draw = random.Random(seed)
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    rows = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        ids = (BOS, *(draw.randrange(len(SPECIAL), vocab) for _ in range(length - 1)))
        prompt = max(1, length // 3)
        rows.append(TokenRow(id=f"{index:016x}", ids=ids, answer=(0,) * prompt + (1,) * (length - prompt)))
    return rows
