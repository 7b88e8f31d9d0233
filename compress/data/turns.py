"""Builds the messages of a chat from the columns of a record, with all that the model needs beside the question.

`chat` takes the columns that it uses out of a record's fields. Where each stands in the messages:

- a system column: a system message at the beginning; in front of the text of one that is there already
- tools: behind the system message's text, one JSON object per line under `TOOLS_HEAD`
- history: turns before the request
- instruction, prompt, input, context: one user message, in this order, with blank lines between them; a long part that
  stands in another one word for word is not repeated

Shapes that are not understood are left in the fields, where the caller keeps and names them. Knows nothing of files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compress.data.plain import RecordError, kind, names, shown

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query")
ANSWERS = ("response", "answer", "completion", "output")
ALPACA_ANSWERS = ("output", "response", "answer", "completion")  # beside an instruction alone
SEVERAL_ANSWERS = ("answers",)
PREFERRED = ("chosen",)
CONTEXTS = ("context", "passage")
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
TOOLS_HEAD = "You can call these functions:"
LONG = 24  # characters from which a part that stands in another one is taken for a copy of it, not for a coincidence
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
TOOLS_SAID = "tools stand as JSON in the system message, not in the chat template's own form"
CHOSEN_SAID = "chosen is taken as the answer; no stage learns from rejected"
ALTERNATIVES_SAID = "the first of several answers is taken, all are kept in meta"

Message = dict[str, str]


def chat(fields: dict[str, Any], said: list[str], *, mapped: bool = False) -> tuple[Message, ...] | None:
    """The messages of a record, or None where its columns hold no chat; what was decided is added to ``said``.

    ``mapped``: the user named the column of the answer, which is ``response`` now.

    Raises:
        RecordError: a column that holds the chat has another shape than is known.
    """
    conversation = next((name for name in CONVERSATIONS if fields.get(name)), None)
    if conversation is not None:
        turns = _answered(_messages(_decoded(fields.pop(conversation)), conversation), fields, said)
    else:
        found = _asked_and_answered(fields, said, mapped=mapped)
        if found is None:
            return None
        turns = found
    system = _first(fields, SYSTEMS)
    text = string(fields.pop(system), system) if system is not None else ""
    if text:
        turns = _with_system(turns, text, before=True)
    tools = _tools(fields, turns)
    if tools:
        said.append(TOOLS_SAID)
        turns = _with_system(turns, tools, before=False)
    return turns


def _answered(turns: tuple[Message, ...], fields: dict[str, Any], said: list[str]) -> tuple[Message, ...]:
    """``turns`` with the answer behind them that a column of its own holds, where they end in a question."""
    answer = _first(fields, (*ANSWERS, *PREFERRED))
    if turns[-1]["role"] == "assistant" or answer is None or not isinstance(fields[answer], (str, list, dict)):
        return turns
    reply = _reply(fields, answer, said)
    if any(message["role"] == "user" for message in reply):
        return _whole(turns, reply)
    return (*turns, *reply)


def _asked_and_answered(fields: dict[str, Any], said: list[str], *, mapped: bool) -> tuple[Message, ...] | None:
    """Request and answer from their columns; None where one of them is missing."""
    alpaca = "instruction" in fields and _first(fields, PROMPTS) is None and not mapped
    answer = _first(fields, (*(ALPACA_ANSWERS if alpaca else ANSWERS), *SEVERAL_ANSWERS, *PREFERRED))
    if answer is None:
        return None
    chosen = answer == "chosen" and _spoken(fields["chosen"])
    request = _request(fields)
    if request is None and not chosen:
        return None
    reply = _reply(fields, answer, said)
    if chosen:
        return _whole(request or (), reply)
    system, rest = _parted(request or ())
    return (*system, *_history(fields), *rest, *reply)


def _spoken(value: object) -> bool:
    """Whether this list of messages has the user's turns too."""
    return isinstance(value, list) and any(message["role"] == "user" for message in _messages(value, "chosen"))


def _whole(request: tuple[Message, ...], reply: tuple[Message, ...]) -> tuple[Message, ...]:
    """``reply`` is a whole conversation, with the request in it."""
    said = "\n".join(message["content"] for message in reply)
    for message in request:
        if message["content"] not in said:
            got = f"the prompt {shown(message['content'])!r} does not stand in the conversation of chosen"
            raise RecordError(got, "one conversation", "Remove the column that is wrong")
    return reply


def _request(fields: dict[str, Any]) -> tuple[Message, ...] | None:
    """The user's message from its columns, or the messages of a prompt that is a list; None where there is none."""
    heads = [name for name in ("instruction", _first(fields, PROMPTS)) if name is not None and name in fields]
    if not heads:
        heads = [name for name in ("input",) if name in fields]
    if not heads:
        return None
    turns: tuple[Message, ...] = ()
    if isinstance(fields[heads[-1]], list):
        name = heads.pop()
        turns = _messages(fields.pop(name), name)
    parts = [string(fields.pop(name), name) for name in heads]
    if len(parts) == 2:
        parts = _without_copies(parts)
    for name in ("input", *CONTEXTS):
        extra = _texts(fields.get(name))
        if extra is not None:
            fields.pop(name)
            copied = len(extra) >= LONG and any(extra in text for text in (*parts, *(m["content"] for m in turns)))
            if extra and not (copied and heads != ["instruction"]):
                parts.append(extra)
    text = "\n\n".join(part for part in parts if part)
    if not turns:
        return ({"role": "user", "content": text},)
    return _behind_request(turns, text) if text else turns


def _behind_request(turns: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """``turns`` with ``text`` behind the user's last message."""
    at = next((i for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] == "user"), None)
    if at is None:
        return (*turns, {"role": "user", "content": text})
    asked = {**turns[at], "content": f"{turns[at]['content']}\n\n{text}"}
    return (*turns[:at], asked, *turns[at + 1 :])


def _without_copies(parts: list[str]) -> list[str]:
    """An instruction and a prompt that was made from it: the longer one alone."""
    short, long = sorted(parts, key=len)
    return [long] if short == long or (len(short) >= LONG and short in long) else parts


def _texts(value: object) -> str | None:
    """A text, or the texts of a list with blank lines between them; None for anything else."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n\n".join(item for item in value if item)
    return value if isinstance(value, str) else None


def _reply(fields: dict[str, Any], name: str, said: list[str]) -> tuple[Message, ...]:
    """The answer: a text, a list of messages, or one of the shapes that hold several right answers."""
    value = fields.pop(name)
    if name == "chosen":
        said.append(CHOSEN_SAID)
    if isinstance(value, dict) and not value.keys().isdisjoint(("role", "from")):
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _messages(value, name)
    several = value.get("text", value.get("value")) if isinstance(value, dict) else value
    if isinstance(several, str) and isinstance(value, dict):  # TriviaQA
        several = [several]
    if isinstance(several, list):
        texts = [text for text in several if isinstance(text, str) and text]
        if not texts:
            do = "Give it an answer, or set data.on_error: quarantine to put such rows aside"
            raise RecordError(f"{name} holds no text", "at least one answer", do)
        if len(set(texts)) > 1 or isinstance(value, dict):
            fields[name] = value
        if len(set(texts)) > 1:
            said.append(ALTERNATIVES_SAID)
        return ({"role": "assistant", "content": texts[0]},)
    return ({"role": "assistant", "content": string(value, name)},)


def _history(fields: dict[str, Any]) -> tuple[Message, ...]:
    """Earlier turns: pairs of question and answer, or messages; other shapes stay in ``fields``."""
    value = _decoded(fields.get("history"))
    if not isinstance(value, list) or (value and all(isinstance(item, str) for item in value)):
        return ()
    fields.pop("history")
    if not value:
        return ()
    if isinstance(value[0], dict):
        return _messages(value, "history")
    turns: list[Message] = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(f"history[{index}] is no pair", "pairs of [question, answer], or messages")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": string(text, f"history[{index}]")})
    return tuple(turns)


def _tools(fields: dict[str, Any], turns: Sequence[Message]) -> str:
    """The tools as text for a system message; empty where there are none, or the system message names all of them."""
    name = next((name for name in TOOLS if fields.get(name)), None)
    if name is None:
        return ""
    value = _decoded(fields[name])
    given_list = [_decoded(item) for item in (value if isinstance(value, list) else [value])]
    listed = [item for item in given_list if isinstance(item, dict)]
    if len(listed) < len(given_list):
        return ""
    given = "\n".join(message["content"] for message in _parted(turns)[0])
    called = [item.get("function", item) for item in listed]
    called = [item.get("name") if isinstance(item, dict) else None for item in called]
    if listed and given and all(isinstance(item, str) and item and item in given for item in called):
        return ""
    fields.pop(name)
    try:
        lines = [json.dumps(_filled(item), ensure_ascii=False, sort_keys=True) for item in listed]
    except (RecursionError, TypeError, ValueError):
        raise RecordError(f"{name} cannot be written as JSON", "a list of JSON objects") from None
    return "\n".join([TOOLS_HEAD, *lines]) if lines else ""


def _filled(value: Any) -> Any:
    """Without the nulls that Parquet puts where one tool lacks what another has."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _with_system(turns: tuple[Message, ...], text: str, *, before: bool) -> tuple[Message, ...]:
    """``turns`` with ``text`` in their system message, which is made where there is none."""
    if not turns or turns[0]["role"] != "system":
        return ({"role": "system", "content": text}, *turns)
    given = turns[0]["content"]
    if text in given:
        return turns
    joined = "\n\n".join(part for part in ((text, given) if before else (given, text)) if part)
    return ({**turns[0], "content": joined}, *turns[1:])


def _parted(turns: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system messages at the beginning, and the rest."""
    at = next((i for i, message in enumerate(turns) if message["role"] != "system"), len(turns))
    return tuple(turns[:at]), tuple(turns[at:])


# ---------------------------------------------------------------------------------- single messages


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{name} is {kind(value)}", "a list of {role, content}, at least one")
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise RecordError(f"{where} is a {kind(item)}", "an object with role and content")
    fields = {_lower(key, item): value for key, value in item.items()}
    role_key, content_key = ("role", "content") if fields.get("role") is not None else ("from", "value")
    if role_key not in fields or content_key not in fields:
        raise RecordError(f"{where} has the keys {names(item)}", "role and content (or from and value)")
    role, content = fields[role_key], fields[content_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        got = repr(shown(role)) if isinstance(role, str) else f"a {kind(role)}"
        raise RecordError(f"{where}.{role_key} is {got}", "one of " + ", ".join(sorted(ROLES)))
    if not isinstance(content, str):
        raise RecordError(f"{where}.{content_key} is a {kind(content)}", "text")
    message = {"role": ROLES[role.lower()], "content": content}
    for key, value in fields.items():
        if key in (role_key, content_key) or value is None or value == []:
            continue
        if not isinstance(value, str):
            raise RecordError(f"{where}.{shown(key)} is a {kind(value)}", "only text beside role and content")
        if key in message:
            raise RecordError(f"{where} has both {role_key} and {key}", "role and content, or from and value")
        message[key] = value
    return message


def _lower(key: str, item: Mapping[str, Any]) -> str:
    """``key`` as it is known where only its letter case differs."""
    known = key.strip().lower()
    return known if known in ("role", "content", "from", "value") and known not in item else key


def _first(fields: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """The first column of ``known`` that is there, one that is not empty before others."""
    there = [name for name in known if name in fields]
    return next((name for name in there if fields[name] not in ("", [], {})), there[0] if there else None)


def _decoded(value: object) -> object:
    """A list or an object that stands as JSON in a string; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def string(value: object, name: str) -> str:
    """``value``, which must be a text.

    Raises:
        RecordError: it is none.
    """
    if not isinstance(value, str):
        raise RecordError(f"{name} is a {kind(value)}", "text")
    return value
