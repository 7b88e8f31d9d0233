"""What the device must do to cut texts as the library ``tokenizers`` does, read off a tokenizer.

`plan` turns normalizer, pre-tokenizer, added tokens and decoder into the plain steps of ``text`` in bundle.json, which
``run.py`` follows; `runtime_alone` says why the runtime's tokenizer would not do without them. Classes of characters in
patterns are written out as ranges, found by asking the library itself, so that no Unicode table of the device counts.
Knows nothing of templates and bundles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PLAIN_STEPS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Splits that the runtime is known to do as the library does; any other one is done by run.py.
_KNOWN_SPLITS = (
    GPT2_SPLIT,
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORDS}",
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS}",
)
_CLASS = re.compile(r"\\([pP])\{(\^?)([A-Za-z_]+)\}|\\([sSdDwWhH])|\[:(\^?)([a-z]+):\]|\\.|[\[\]]|&&", re.DOTALL)
_DO = "Give the model a byte-pair tokenizer, or leave out the format onnx: a GPTQ checkpoint takes any tokenizer"


class Unknown(Exception):
    """A step that run.py does not know; the text says which."""


@dataclass
class TokenPlan:
    """How texts are cut on the device.

    ``alone`` says, line by line, why the runtime's tokenizer alone would give other tokens; empty when nothing is known
    against it. ``steps`` are the entries of ``text`` in bundle.json; ``own`` those that cut without the runtime, with
    ``decode``; ``unknown`` why there are none.
    """

    alone: list[str] = field(default_factory=list)
    around: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] | None = None
    unknown: str = ""
    runtime_can: bool = True  # it may cut the normalised pieces


def backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer as it is used, in the form of tokenizer.json: the settings beside the file may have changed it."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def plan(tokenizer: PreTrainedTokenizerFast, where: str) -> TokenPlan:
    """Return how the device cuts texts as ``tokenizer`` does; ``where`` names it in errors.

    Raises:
        ModelError: a kind of tokenizer or of normalizer that neither the runtime nor run.py knows.
    """
    data = backend(tokenizer)
    kind = (data.get("model") or {}).get("type")
    if kind != "BPE":
        raise ModelError(where, f"a tokenizer of the kind {kind}, which onnxruntime-genai does not know", "BPE", _DO)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if data["model"].get(key):
            raise ModelError(where, f"a tokenizer with {key} {data['model'][key]!r}", "BPE without it", _DO)
    found = TokenPlan(around=_around(tokenizer))
    classes: dict[str, str] = {}
    try:
        normalizer = _normalizer(data.get("normalizer"), classes)
    except Unknown as error:
        raise ModelError(where, f"{error}, which the device cannot do", ", ".join(_PLAIN_STEPS), _DO) from error
    found.steps = {"normalizer": normalizer, "added": _added(tokenizer, data)}
    try:
        steps, byte_level = _pre_tokenizer(data.get("pre_tokenizer"), classes)
        found.own = {"pre": steps, "byte_level": byte_level}
    except Unknown as error:
        found.unknown = str(error)
    found.steps["classes"] = classes
    found.decode = _decoder(data.get("decoder"))
    _judge(found, tokenizer, data)
    return found


def _around(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokens before and after a text, and the one that begins every text."""
    whole, bare = (list(tokenizer("a", add_special_tokens=flag)["input_ids"]) for flag in (True, False))
    at = next((at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare), 0)
    return {"before": whole[:at], "after": whole[at + len(bare) :], "bos": tokenizer.bos_token_id}


def _judge(found: TokenPlan, tokenizer: PreTrainedTokenizerFast, data: Mapping[str, Any]) -> None:
    """Fill ``alone`` and ``runtime_can``: what is known of the runtime's tokenizer."""
    if data.get("normalizer"):
        found.alone.append(f"the runtime does not normalise texts ({_names(data['normalizer'])})")
    flags = ("single_word", "lstrip", "rstrip")
    flagged = [token["content"] for token in data["added_tokens"] if any(token.get(flag) for flag in flags)]
    if flagged:
        found.alone.append(f"the runtime does not heed how {', '.join(map(repr, flagged[:4]))} take blanks or words")
    split = _byte_level_split(data.get("pre_tokenizer"))
    if split not in _KNOWN_SPLITS:
        found.alone.append(f"the runtime does not split texts as {_names(data.get('pre_tokenizer'))} does")
        found.runtime_can = False
    if unreached := _unreached(tokenizer, data):
        listed = ", ".join(map(repr, unreached[:3]))
        found.alone.append(f"the runtime takes {len(unreached)} words whole that no merge makes ({listed})")
        found.runtime_can = False


def _unreached(tokenizer: PreTrainedTokenizerFast, data: Mapping[str, Any]) -> list[str]:
    """Words of the vocabulary that its merges do not make; the runtime takes them whole."""
    if data["model"].get("ignore_merges"):
        return []
    added = {token["content"] for token in data["added_tokens"]}
    model = tokenizer.backend_tokenizer.model
    words = [word for word in data["model"]["vocab"] if word not in added and not re.fullmatch(r"<0x..>", word)]
    return [word for word in words if word and len(model.tokenize(word)) != 1]


def _byte_level_split(step: Mapping[str, Any] | None) -> str:
    """The pattern by which a byte-level pre-tokenizer splits; empty where it is another kind."""
    steps = [] if step is None else step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return ""
    own = steps[-1].get("use_regex", True)
    if [one["type"] for one in steps] == ["Split", "ByteLevel"] and not own:
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return str(steps[0]["pattern"].get("Regex", "")) if plain else ""
    digits = [one["type"] for one in steps] == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    return GPT2_SPLIT if own and (len(steps) == 1 or digits) else ""


def _names(step: Mapping[str, Any] | None) -> str:
    """The kinds of the steps, for a sentence."""
    if step is None:
        return "no pre-tokenizer"
    inner = step.get("normalizers") or step.get("pretokenizers") or [step]
    return " + ".join(str(one["type"]) for one in inner)


def _normalizer(step: Mapping[str, Any] | None, classes: dict[str, str]) -> list[dict[str, Any]]:
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [one for inner in step["normalizers"] for one in _normalizer(inner, classes)]
    if kind in _PLAIN_STEPS:
        return [{"type": kind}]
    if kind == "Strip":
        return [{"type": kind, "left": step["strip_left"], "right": step["strip_right"]}]
    if kind == "Prepend":
        return [{"type": kind, "text": step["prepend"]}]
    if kind == "Replace":
        return [{"type": kind, "pattern": pattern(step["pattern"], classes), "text": step["content"]}]
    raise Unknown(f"the normalizer {kind}")


def _pre_tokenizer(step: Mapping[str, Any] | None, classes: dict[str, str]) -> tuple[list[dict[str, Any]], bool]:
    """The steps, and whether the words are spelled in bytes; that must come last."""
    if step is None:
        return [], False
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    found: list[dict[str, Any]] = []
    for at, one in enumerate(steps):
        if one["type"] == "ByteLevel" and at < len(steps) - 1:
            raise Unknown("a pre-tokenizer behind ByteLevel")
        if one["type"] == "Sequence":
            raise Unknown("a sequence of pre-tokenizers in another")
        found += _pre_step(one, classes)
    return found, bool(steps) and steps[-1]["type"] == "ByteLevel"


def _pre_step(step: Mapping[str, Any], classes: dict[str, str]) -> list[dict[str, Any]]:
    kind = step["type"]

    def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
        found = pattern({"Regex": regex}, classes)
        return {"type": "Split", "pattern": found, "behavior": behavior, "invert": invert}

    if kind == "ByteLevel":
        space = [{"type": "Space"}] if step.get("add_prefix_space") else []
        return [*space, *([split(GPT2_SPLIT)] if step.get("use_regex", True) else [])]
    if kind == "Split":
        found = split("x", step["behavior"], invert=bool(step.get("invert")))
        return [found | {"pattern": pattern(step["pattern"], classes)}]
    if kind == "Digits":
        return [split(r"\p{N}") if step["individual_digits"] else split(r"\p{N}", "Contiguous")]
    if kind == "Metaspace":
        mark, parts = step["replacement"], []
        if step.get("split", True):
            parts = [split(re.escape(mark), "MergedWithNext")]
        return [{"type": "Mark", "text": mark, "scheme": step["prepend_scheme"]}, *parts]
    if kind == "WhitespaceSplit":
        return [split(r"\s", "Removed")]
    if kind == "Punctuation":
        return [split(r"[!-/:-@\[-`{-~\p{P}]", step.get("behavior", "Isolated"))]
    raise Unknown(f"the pre-tokenizer {kind}")


def _added(tokenizer: PreTrainedTokenizerFast, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens with the flags that are set; ``normalized`` is how a token reads in a normalised text."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    found = []
    for token in data["added_tokens"]:
        entry: dict[str, Any] = {"content": token["content"], "id": token["id"]}
        entry |= {flag: True for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)}
        if token.get("normalized"):
            text = token["content"]
            entry["normalized"] = normalizer.normalize_str(text) if normalizer is not None else text
        found.append(entry)
    return found


def _decoder(step: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How run.py writes tokens as text; None where it does not know the decoder."""
    if step is None:
        return None
    if step["type"] == "ByteLevel":
        return {"byte_level": True}
    if step["type"] == "Metaspace":
        return {"byte_level": False, "mark": step["replacement"], "strip": step["prepend_scheme"] != "never"}
    steps = step["decoders"] if step["type"] == "Sequence" else [step]
    kinds = [one["type"] for one in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0].get("content") != " ":
        return None
    rest = [one for one in steps[3:] if one != {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    mark = steps[0]["pattern"].get("String")
    return None if rest or not mark else {"byte_level": False, "mark": mark, "strip": len(steps) > 3}


def pattern(step: Mapping[str, str], classes: dict[str, str]) -> str:
    """A pattern of the library in Python's words; classes of characters become names in ``classes``.

    Raises Unknown for a pattern that Python has not.
    """
    if "String" in step:
        return re.escape(step["String"])
    inside = 0
    found: list[str] = []
    last = 0
    text = step["Regex"]
    for match in _CLASS.finditer(text):
        found.append(text[last : match.start()])
        last = match.end()
        name = _class_name(match)
        if match[0] == "&&" and inside:
            raise Unknown("a pattern with an intersection of classes")
        if match[0] == "[":
            if inside:
                raise Unknown("a pattern with a class in a class")
            inside += 1
        elif match[0] == "]":
            inside = max(0, inside - 1)
        if name is None:
            found.append(match[0])
            continue
        classes[name] = ranges(name)
        found.append(f"⟦{name}⟧" if inside else f"[⟦{name}⟧]")
    joined = "".join([*found, text[last:]])
    try:
        re.compile(re.sub(r"⟦(.*?)⟧", lambda name: classes[name[1]], joined))
    except re.error as error:
        raise Unknown(f"the pattern {text[:80]!r} ({error})") from error
    return joined


def _class_name(match: re.Match[str]) -> str | None:
    r"""The library's own words for a class, such as ``\p{L}``; None for what is none."""
    if match[1]:
        negated = (match[1] == "P") != bool(match[2])
        return rf"\{'P' if negated else 'p'}{{{match[3]}}}"
    if match[4]:
        return rf"\{match[4]}"
    return f"[:{match[5]}{match[6]}:]" if match[6] else None


@lru_cache(maxsize=64)
def ranges(name: str) -> str:
    """The characters of a class as the inside of a Python class, as the library has them.

    All of planes 0 to 3 and the tags are asked for; the rest of Unicode is unassigned or private, and alike.
    """
    from tokenizers import Regex, normalizers

    asked = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
    alike = {0x50000: [(0x40000, 0xDFFFF), (0xE1000, 0xEFFFF)], 0xF0000: [(0xF0000, 0x10FFFF)]}
    every = "".join([chr(code) for codes in asked for code in codes] + [chr(code) for code in alike])
    members = [ord(char) for char in normalizers.Replace(Regex(f"[^{name}]+"), "").normalize_str(every)]
    found = [whole for code in members for whole in alike.get(code, [(code, code)])]
    joined: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return "".join(_escaped(a) if a == b else f"{_escaped(a)}-{_escaped(b)}" for a, b in joined)


def _escaped(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
