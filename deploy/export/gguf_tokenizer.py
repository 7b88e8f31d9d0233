"""A tokenizer.json in the words of llama.cpp, or a refusal: its tokenizer must cut every text into the same tokens.

llama.cpp has its own tokenizers and picks one by two names. `read` takes byte-level BPE (``gpt2`` with the name of a
pre-tokenizer) and BPE with byte fallback as SentencePiece makes it (``llama``), and checks each setting of the file
that llama.cpp would leave out; whatever is not known to give the same tokens is a ModelError. Knows nothing of GGUF's
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.encoding import end_of_turn, load_tokenizer, stop_ids
from compress.errors import ModelError
from compress.tokenizer_files import read_tokenizer
from deploy.export.tokenizer import chosen_templates

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what splits a text before BPE, and whether whole words of the vocabulary skip the merges -> llama.cpp's name for it
_SPLITS = {
    (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORDS}", False): "qwen2",
    (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS}", True): "llama-bpe",
    (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS}", False): "smaug-bpe",
}
# tokens at which llama.cpp stops by their text (llama-vocab.cpp, special_eog_ids)
_KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
}
_KNOWN = "byte-level BPE with the splits of GPT-2, Qwen2, Llama 3 or SmolLM, or SentencePiece BPE with byte fallback"
_DO = "Leave gguf out of the formats: llama.cpp would cut texts into other tokens than the model was trained on"


@dataclass
class Vocabulary:
    """What a GGUF file says of the tokenizer; lists are by token id and as long as the model's vocabulary."""

    model: str  # gpt2 or llama
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False
    add_bos: bool = False
    add_eos: bool = False
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, eom, unk, pad -> id
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def read(folder: Path, *, size: int) -> Vocabulary:
    """Return the tokenizer of a model ``folder`` whose vocabulary has ``size`` entries; missing ones are unused.

    Raises ModelError for a tokenizer that llama.cpp has not, naming what it has.
    """
    path = folder / "tokenizer.json"
    data = read_tokenizer(folder)
    model = data["model"]
    if model.get("type") != "BPE":
        raise _unknown(path, f"a tokenizer of type {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(path, f"{key} {model[key]!r}")
    found = _sentencepiece(path, data) if model.get("byte_fallback") else _byte_level(path, data)
    _add_added(found, data.get("added_tokens") or [], size)
    _add_settings(found, folder)
    return found


def _byte_level(path: Path, data: Mapping[str, Any]) -> Vocabulary:
    pre, notes = _pre_tokenizer(path, data), []
    normalizer = data.get("normalizer")
    if normalizer is not None:
        if normalizer.get("type") != "NFC":
            raise _unknown(path, f"the normalizer {normalizer.get('type')}")
        notes.append("llama.cpp does not compose accents (NFC) first; texts that are composed give the same tokens")
    model = data["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = _by_id(model["vocab"])
    return Vocabulary("gpt2", pre, tokens, [NORMAL] * len(tokens), merges=merges, notes=notes)


def _pre_tokenizer(path: Path, data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for what splits a text before the merges."""
    whole_words = bool(data["model"].get("ignore_merges"))
    found = data.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        raise _unknown(path, f"the pre-tokenizer {' + '.join(map(str, kinds))}")
    own_split = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_split and not whole_words:
        return "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    if digits and own_split and not whole_words:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_split:
        split = steps[0]
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        name = _SPLITS.get((split["pattern"].get("Regex", ""), whole_words))
        if plain and name:
            return name
        raise _unknown(path, f"a split by {str(split['pattern'])[:120]}{', ignore_merges' if whole_words else ''}")
    raise _unknown(path, f"the pre-tokenizer {' + '.join(map(str, kinds))}{', ignore_merges' if whole_words else ''}")


def _sentencepiece(path: Path, data: Mapping[str, Any]) -> Vocabulary:
    """SentencePiece merges the pair whose joined token scores best; a list of merges says the same if it is whole."""
    steps = data.get("normalizer") or {}
    steps = steps.get("normalizers", [steps] if steps else [])
    if data.get("pre_tokenizer") is not None:
        raise _unknown(path, f"the pre-tokenizer {data['pre_tokenizer'].get('type')} with byte fallback")
    prefix = bool(steps) and steps[0] == {"type": "Prepend", "prepend": "▁"}
    if steps[int(prefix) :] != [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
        raise _unknown(path, f"the normalizer {json.dumps(data.get('normalizer'), ensure_ascii=False)[:120]}")
    vocab = data["model"]["vocab"]
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise _unknown(path, f"byte fallback without the byte <0x{missing[0]:02X}>")
    ranks = _ranks(path, data["model"], vocab)
    tokens = _by_id(vocab)
    unknown = data["model"].get("unk_token")
    scores = [float(-ranks.get(token, len(ranks))) for token in tokens]
    bytes_of = {f"<0x{byte:02X}>" for byte in range(256)}
    types = [UNKNOWN if token == unknown else BYTE if token in bytes_of else NORMAL for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)


def _ranks(path: Path, model: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, int]:
    """Return merged token -> its place among the merged tokens, the first to merge 0.

    Raises ModelError when two tokens of the vocabulary join to a third and no merge says so, or the merges that give
    one token do not stand together: then no score per token says the same as the list.
    """
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        joined = left + right
        if joined != last and joined in ranks:
            raise _unknown(path, f"merges of {joined!r} that do not stand together")
        ranks.setdefault(joined, len(ranks))
        last = joined
    listed = set(pairs)
    for token in vocab:
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if token in ranks and pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _unknown(path, f"no merge of {pair[0]!r} and {pair[1]!r}, which SentencePiece would join")
    return ranks


def _by_id(vocab: Mapping[str, int]) -> list[str]:
    tokens = [""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        tokens[index] = token
    return tokens


def _add_added(found: Vocabulary, added: list[dict[str, Any]], size: int) -> None:
    """Put in the added tokens, which are cut out of a text first, and fill up to ``size`` with unused ones."""
    stripping = []
    gaps = range(len(found.tokens), size)
    found.tokens += [""] * len(gaps)
    found.types += [UNUSED] * len(gaps)
    for token in added:
        index = int(token["id"])
        found.tokens[index] = token["content"]
        if found.types[index] != UNKNOWN:
            found.types[index] = CONTROL if token.get("special") else USER_DEFINED
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            stripping.append(token["content"])
    for index, text in enumerate(found.tokens):
        if text == "":
            found.tokens[index], found.types[index] = f"[PAD{index}]", UNUSED
    if found.scores is not None:
        found.scores += [0.0] * len(gaps)
    if stripping:
        found.notes.append(f"llama.cpp leaves blanks around {', '.join(stripping)}; the tokenizer takes them")


def _add_settings(found: Vocabulary, folder: Path) -> None:
    """Special tokens, what is put around a text, and the chat template, as the tokenizer in Python has them."""
    tokenizer = load_tokenizer(folder)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            found.special[name] = int(index)
    templates, note = chosen_templates(tokenizer, folder)
    if note:
        found.notes.append(note.replace("; tool_use only where tools are given", "; a GGUF file holds no other"))
    if templates:
        found.chat_template = templates["default"]
    else:
        found.notes.append("the model has no chat template, so that llama.cpp would take one of its own for chats")
    _add_ends(found, tokenizer)
    ids, bare = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    found.add_bos = len(ids) > len(bare) and ids[0] == found.special.get("bos")
    found.add_eos = len(ids) > len(bare) and ids[-1] == found.special.get("eos")
    if len(ids) != len(bare) + found.add_bos + found.add_eos:
        raise _unknown(folder / "tokenizer.json", "special tokens around a text other than BOS and EOS")


def _add_ends(found: Vocabulary, tokenizer: Any) -> None:
    """Every token that ends an answer, under the names that llama.cpp knows: it stops at each of the three."""
    turn = end_of_turn(tokenizer, "assistant") if tokenizer.chat_template else None
    ends = [token for token in stop_ids(tokenizer) if token < len(found.tokens) and token != found.special.get("eos")]
    ends.sort(key=lambda token: (token != turn, token))  # the template's first
    for name in ("eos", "eot", "eom"):
        if ends and name not in found.special:
            found.special[name] = ends.pop(0)
    left = [found.tokens[token] for token in ends if found.tokens[token] not in _KNOWN_ENDS]
    if left:
        known = "llama.cpp has names for three tokens that end an answer"
        found.notes.append(f"{known}: it goes on after {', '.join(left)}")


def _unknown(path: Path, got: str) -> ModelError:
    return ModelError(str(path), f"{got}, which the GGUF export does not know", _KNOWN, _DO)
