"""Tokenizers of several kinds, made in the test: bytes, byte-level BPE, like SentencePiece, lossy ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, tiny_conversations

# another template than that of tests.tiny: other names for the turns, a line feed behind the roles and the ends
OTHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [message["content"] for talk in tiny_conversations(120, seed=2) for message in talk] + [
    "Grüße aus der Küche — 30 €, naïve café.",
    "  two spaces\tand a tab\nand a line",
]
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]


def _fast(tokenizer: Tokenizer, template: str | None, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **named
    )


def byte_level(merges: int, *, template: str | None = OTHER_TEMPLATE, prefix: bool = False) -> PreTrainedTokenizerFast:
    """The 256 bytes and at most ``merges`` longer tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, template, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], eos_token="<|im_end|>")


def pieces(size: int = 420, *, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """BPE in the way of SentencePiece: a space before every text, bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + BYTE_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:-2], trainer)
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = []  # the trainer knows no other way to put bytes in, but they are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    return _fast(tokenizer, template, special, bos_token="<|bos|>", eos_token="<|end|>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other model, with its pre-tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="first")
    letters = sorted({letter for text in TEXTS for letter in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", initial_alphabet=letters,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, OTHER_TEMPLATE, ["<unk>", "</s>", "<|im_end|>"], eos_token="</s>", unk_token="<unk>")


def lower_case() -> PreTrainedTokenizerFast:
    """Bytes of the text in lower case."""
    plain = byte_level(0)
    plain.backend_tokenizer.normalizer = normalizers.Lowercase()
    return plain


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens do not hold the spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, None, ["[UNK]"], unk_token="[UNK]")


def save(tokenizer: Any, folder: Path) -> Path:
    """Write a tokenizer as a folder that holds nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder
