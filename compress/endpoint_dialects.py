"""How servers differ in the names of what they are asked: learned from their refusals, once per endpoint.

`Dialect.spoken` writes a request as the server wants it, `Dialect.learn` reads a refusal: a parameter that is unknown
or not supported is left out from then on, or sent under its other name. Read are the forms of OpenAI, vLLM and other
pydantic servers, Mistral, Google, Groq, llama.cpp, TGI (serde), Go, joi, zod and JSON schema. A value that is out of
range is no such refusal. Knows nothing of connections.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REFUSALS = frozenset({400, 404, 405, 422, 500, 501})  # codes whose text may name a parameter
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
NEARLY_GREEDY = 0.01  # for servers that take no temperature of 0
# What a server says of a parameter that it does not have; the parameter stands close by.
_UNKNOWN = (
    r"unsupported|not\s+(?:be\s+)?support\w*|(?:doesn't|don't|does\s+not|do\s+not|cannot|can't)\s+(?:support|accept|allow)"
    r"|unknown|unrecogni[sz]ed|unexpected|not\s+(?:permitted|allowed|recogni[sz]ed|available|enabled|implemented|known)"
    r"|extra\s+(?:inputs?|fields?)|extra_forbidden|additional\s+propert\w+|forbidden|deprecated|disabled"
    r"|invalid\s+(?:parameter|argument|field)|not\s+a\s+valid|no\s+such|unavailable|incompatible|instead"
    r"|no\s+longer|gives?\s+none|only\s+(?:the\s+)?default|cannot\s+both|cannot\s+find|is\s+ignored"
)
_REFUSAL = re.compile(_UNKNOWN, re.IGNORECASE)
_VALUE = re.compile(
    r"too\s+(?:large|long|big|high|many)|exceed|at\s+most|context\s+length|maximum|less\s+than\s+or|out\s+of\s+range",
    re.IGNORECASE,
)
_POSITIVE = re.compile(r"positive|greater\s+than\s+0|>\s*0|larger\s+than\s+0|above\s+0", re.IGNORECASE)
_LISTED = re.compile(
    r"\b(?:expected|allowed|valid|supported|known)\s+(?:one\s+of|are|fields?|keys?|values?)\b.*",
    re.DOTALL | re.IGNORECASE,
)
_NEAR = 120  # characters between a parameter and what is said of it


class Dialect:
    """What one endpoint takes; shared by requests in flight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: dict[str, dict[str, Any]] = {}  # path -> name -> None (left out), another name, or a value

    def spoken(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """``body`` as this server wants it at ``path``."""
        with self._lock:
            changes = dict(self._changes.get(path, {}))
        found: dict[str, Any] = {}
        for name, value in body.items():
            change = changes.get(name, name)
            if isinstance(change, str):
                found[change] = value
            elif change is not None:
                found[name] = change if value == 0 else value
        return found

    def learn(self, path: str, sent: Mapping[str, Any], told: bytes, may_miss: Sequence[str]) -> bool:
        """Whether the refusal ``told`` of ``sent`` names something that can be left out or called otherwise.

        ``may_miss`` are the parameters that the request may go without.
        """
        for name in named(told, sent):
            change = self._change(name, sent, told, may_miss)
            if change is not _NOTHING:
                with self._lock:
                    changes = self._changes.setdefault(path, {})
                    original = next((o for o, c in changes.items() if c == name), name)
                    if original in changes and changes[original] == change:
                        return True  # another request in flight has learned it meanwhile
                    if change == original:
                        continue  # both names are refused
                    changes[original] = change
                return True
        return False

    @staticmethod
    def _change(name: str, sent: Mapping[str, Any], told: bytes, may_miss: Sequence[str]) -> Any:
        if name in OTHER_NAMES:
            return OTHER_NAMES[name]
        if name not in may_miss:
            return _NOTHING
        if name == "temperature" and sent[name] == 0 and _POSITIVE.search(told.decode("utf-8", "replace")):
            return NEARLY_GREEDY
        return None

    def notes(self) -> list[str]:
        """What gave way, a sentence each."""
        said = []
        with self._lock:
            for changes in self._changes.values():
                for name, change in changes.items():
                    if isinstance(change, str):
                        said.append(f"the server takes {change} in place of {name}")
                    elif change is None:
                        said.append(f"the server does not take {name}, and was asked without")
                    else:
                        said.append(f"the server takes no {name} of 0; {change} was sent")
        return list(dict.fromkeys(said))


_NOTHING = object()


def named(told: bytes, sent: Mapping[str, Any]) -> list[str]:
    """The parameters of ``sent`` that a refusal says are unknown or not supported, the surest first."""
    text = told.decode("utf-8", errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    found: list[str] = []
    messages = [text]
    if value is not None:
        found = [name for name in _structured(value) if name in sent]
        messages = list(_messages(value)) or [text]
    for message in messages:
        found += _in_words(message, sent)
    for name, other in OTHER_NAMES.items():  # one is absent, and the other was sent
        if name in sent and other in text and re.search(r"required|missing", text, re.IGNORECASE):
            found.append(name)
    return list(dict.fromkeys(found))


def _structured(value: Any, depth: int = 0) -> Iterator[str]:
    """Names in fields made for them: ``param``, the end of ``loc``, ``keys`` of unrecognised ones."""
    if depth > 8:
        return
    if isinstance(value, list):
        for item in value[:100]:
            yield from _structured(item, depth + 1)
        return
    if not isinstance(value, dict):
        return
    said = " ".join(str(value.get(name, "")) for name in ("message", "msg", "type", "code", "detail"))
    refused = bool(_REFUSAL.search(said.replace("_", " "))) and not _VALUE.search(said)
    named_by_location = value.get("loc")
    if refused and isinstance(value.get("param"), str):
        yield value["param"].split(".")[-1]
    if refused and isinstance(named_by_location, list) and named_by_location:
        yield str(named_by_location[-1])
    keys = value.get("keys")
    if isinstance(keys, list) and "unrecogni" in said:
        yield from (str(key) for key in keys[:100])
    for name, item in value.items():
        if name not in ("input", "ctx", "body", "request"):  # those repeat what was sent
            yield from _structured(item, depth + 1)


def _messages(value: Any, depth: int = 0) -> Iterator[str]:
    """Texts that a server wrote itself."""
    if depth > 8:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value[:100]:
            yield from _messages(item, depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("input", "ctx", "body", "request", "loc"):
                yield from _messages(item, depth + 1)


def _in_words(message: str, sent: Mapping[str, Any]) -> list[str]:
    """Names that stand near words of refusal, in the order of their distance."""
    text = re.sub(r"['\"]input['\"]:.*", "", message[:4000], flags=re.DOTALL)  # what was sent, in pydantic's errors
    text = _LISTED.sub("", text)
    if _VALUE.search(text) and not re.search(r"unsupported|extra|unknown|unrecogni|instead", text, re.IGNORECASE):
        return []
    spots = [(found.start(), found.end()) for found in _REFUSAL.finditer(text)]
    near = []
    for name in sent:
        if name in ("model", "messages", "prompt"):
            continue
        for found in re.finditer(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            gaps = [max(start - found.end(), found.start() - end, 0) for start, end in spots]
            if gaps and min(gaps) <= _NEAR:
                near.append((min(gaps), found.start(), name))
    if "both" in text and {"temperature", "top_p"} <= {name for _, _, name in near}:
        return ["top_p"]  # of the two, the temperature is what was meant
    if not near and "temperature" in sent and sent["temperature"] == 0 and _POSITIVE.search(text):
        return ["temperature"] if "temperature" in text else []
    if "logprobs" in sent and not near and re.search(r"\blog[ _-]?prob", text, re.IGNORECASE) and spots:
        return ["logprobs"]  # in other words: log probabilities, top_logprobs
    near.sort()
    return [name for _, _, name in near[:1]]
