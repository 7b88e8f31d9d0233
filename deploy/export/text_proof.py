"""The text path of a bundle, proven: the device makes the tokens that training and evaluation see.

`prove` asks a bundle's own ``run.py``, in a process like the device's, for the tokens of hard texts and conversations
and of the data's own rows, and compares them with those of `compress.encoding`. What differs is given to ``run.py`` to
do (``text`` of bundle.json), or the template is rewritten; what then still differs is refused, before anything is
written. Knows nothing of the model's graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from compress import processes
from compress.encoding import decode, encode_text_prompt, load_tokenizer
from compress.errors import EdgestillError, ModelError
from deploy.bundle import BUNDLE_FILE, GENAI_CONFIG, RUNNER, RUNNER_FILE
from deploy.export import hard_texts
from deploy.export.hard_texts import Conversation
from deploy.export.runtime_template import NotAlike, needs_no_trimming, runtime_form, tree
from deploy.export.runtime_tokenizer import TokenPlan, backend, plan
from deploy.export.tokenizer import TEMPLATE_FILE, chosen_templates, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 900.0  # for all requests of one proof
_CONFIG = {
    "model": {
        **{"type": "llama", "context_length": 8, "vocab_size": 8},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        "decoder": {"filename": "model.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1,
                    "num_hidden_layers": 1, "num_key_value_heads": 1, "inputs": {}, "outputs": {}},
    },
    "search": {},
}  # fmt: skip
_REFUSE = "Nothing was written. Please report it with the model's tokenizer.json and chat template"


@dataclass
class TextPath:
    """How a bundle cuts and renders texts: ``text`` of its bundle.json, its template, and what was changed and why."""

    entries: dict[str, Any] = field(default_factory=dict)
    template: str | None = None  # what chat_template.jinja holds, where it is not the folder's own
    tokenizer: dict[str, Any] | None = None  # what tokenizer.json holds, where it is not the folder's own
    notes: list[str] = field(default_factory=list)
    proof: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What the tokenizer in Python makes: tokens by text, tokens by conversation (None: the template refuses it)."""

    texts: dict[str, list[int]]
    chats: list[tuple[Conversation, list[int] | None]]
    decoded: list[tuple[list[int], str]]
    tokenizer: PreTrainedTokenizerFast

    def said(self, value: object) -> str:
        """Token ids as tokens, other values as they are, in 240 characters."""
        if value is None:
            return "refused by the template"
        return repr(self.tokenizer.convert_ids_to_tokens(value) if isinstance(value, list) else value)[:240]

    def requests(self) -> list[dict[str, Any]]:
        """All of it, as ``run.py --serve`` is asked."""
        asked: list[dict[str, Any]] = [{"op": "encode", "text": text} for text in self.texts]
        for (messages, tools), _ in self.chats:
            asked.append({"op": "encode", "messages": messages} | ({} if tools is None else {"tools": tools}))
        return asked + [{"op": "decode", "ids": ids} for ids, _ in self.decoded]


def prove(
    source: Path, work: Path, *, texts: Sequence[str] = (), chats: Sequence[list[dict[str, Any]]] = ()
) -> TextPath:
    """Return how a bundle of ``source`` must read texts so that they are cut as `compress.encoding` cuts them.

    ``texts`` and ``chats`` are the data's own; ``work`` is scratch space.

    Raises:
        ModelError: the device cannot be made to do so; names the first text that differs.
        EdgestillError: ``run.py`` did not answer.
    """
    where = str(source / "tokenizer.json")
    tokenizer = load_tokenizer(source)
    tokens = plan(tokenizer, where)
    path = TextPath(tokenizer=_changed(tokenizer, source))
    if path.tokenizer is not None:
        path.notes.append("tokenizer.json was written anew, with what tokenizer_config.json adds to it")
    templates, note = chosen_templates(tokenizer, source)
    path.notes += [note] if note else []
    wanted = _wanted(tokenizer, tokens, texts, chats, with_chats=bool(templates))
    forms = _template_forms(templates, tokenizer, source) if templates else [_Form({}, None, "")]
    with tempfile.TemporaryDirectory(prefix="text-", dir=work) as temporary:
        _settle(path, tokens, forms, wanted, _Device(source, Path(temporary)))
    path.proof |= {
        "texts": len(wanted.texts),
        "chats": len(wanted.chats),
        "decoded": len(wanted.decoded),
        "sha256": hashlib.sha256(json.dumps(wanted.requests(), sort_keys=True).encode()).hexdigest(),
        "versions": _versions(),
        "changed": list(path.notes),
    }
    return path


def _changed(tokenizer: PreTrainedTokenizerFast, source: Path) -> dict[str, Any] | None:
    """The tokenizer as it is used, where its settings make it another than tokenizer.json says; else None."""
    from tokenizers import Tokenizer

    used, filed = backend(tokenizer), json.loads(Tokenizer.from_file(str(source / "tokenizer.json")).to_str())
    return used if any(used[key] != filed[key] for key in used if key not in ("padding", "truncation")) else None


@dataclass(frozen=True)
class _Form:
    """One way to render chats: entries of ``text``, the file's template (None: as it is), and the note that says so."""

    entries: dict[str, Any]
    template: str | None
    note: str


def _template_forms(templates: dict[str, str], tokenizer: PreTrainedTokenizerFast, source: Path) -> list[_Form]:
    """The ways to render, the plainest first: as it is, rewritten for the runtime, walked by run.py."""
    where, default = f"{source}: chat template", templates["default"]
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    forms: list[_Form] = []
    reason = "it has another template for tools" if "tool_use" in templates else ""
    file = default if not isinstance(tokenizer.chat_template, str) or _two_templates(source) else None
    if not reason:
        try:
            rewritten = runtime_form(default, special, where)
            if needs_no_trimming(default):
                forms.append(_Form({}, file, ""))
            note = "the chat template was rewritten with explicit blanks, since the runtime does not trim its blocks"
            forms.append(_Form({}, rewritten, note))
        except NotAlike as error:
            reason = f"the runtime does not render {error} as transformers does"
    why = f"run.py renders the chat template itself, since {reason or 'the runtime renders it otherwise'}"
    try:
        trees = {name: tree(text, where) for name, text in templates.items()}
    except ModelError:
        if not forms:
            raise
        return forms
    return [*forms, _Form({"templates": trees, "variables": special}, file, why)]


def _two_templates(source: Path) -> bool:
    """Whether the folder holds a template in a file and one in its settings: transformers takes the file."""
    settings = source / "tokenizer_config.json"
    within = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return bool(within) and (source / TEMPLATE_FILE).is_file()


def _wanted(
    tokenizer: PreTrainedTokenizerFast,
    tokens: TokenPlan,
    texts: Sequence[str],
    chats: Sequence[list[dict[str, Any]]],
    *,
    with_chats: bool,
) -> Wanted:
    """The tokens that the Python side makes of the built-in set and of the data's own."""
    added = tokens.steps["added"]
    asked = [*hard_texts.texts(tokenizer, added), *texts]
    if not tokens.alone:  # the runtime ends a text at a NUL, and run.py then refuses it
        asked = [text for text in asked if "\0" not in text]
    by_text = {text: list(encode_text_prompt(text, tokenizer)) for text in asked}
    talks: list[Conversation] = []
    if with_chats:
        special = [str(token["content"]) for token in added]
        talks = [*hard_texts.conversations(special), *((list(chat), None) for chat in chats)]
    by_chat = [(talk, ids) for talk in talks for ids in _rendered_ids(talk, tokenizer)]
    plain = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in asked]
    whole = [(ids, decode(ids, tokenizer)) for ids in plain if ids]
    decoded = [(ids, text) for ids, text in whole if not {"\0", "\ufffd"} & set(text)]  # no half characters
    return Wanted(by_text, by_chat, decoded, tokenizer)


def _rendered_ids(talk: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[list[int] | None]:
    """Tokens of a conversation with the generation prompt, as `compress.encoding.encode_prompt`: one list.

    None in it where the template itself refuses the conversation; no list where it breaks on it.
    """
    messages, tools = talk
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - a template raises whatever it likes
        return [None] if type(error) is TemplateError else []
    return [list(tokenizer(str(text), add_special_tokens=False)["input_ids"])]


def _settle(path: TextPath, tokens: TokenPlan, forms: Sequence[_Form], wanted: Wanted, device: _Device) -> None:
    """Find the plainest way that gives the wanted tokens, and write it into ``path``. ModelError where none does."""
    ways = _ways(tokens)
    at = {"texts": 0, "chats": 0, "decode": 0}
    decoders: list[tuple[dict[str, Any], str]] = [({}, "")]
    if tokens.decode is not None:
        decoders.append(({"decode": tokens.decode}, "run.py writes tokens as text, since the runtime writes others"))
    while True:
        way, form, decoder = ways[at["texts"]], forms[at["chats"]], decoders[at["decode"]]
        entries = {**tokens.around, **way[0], **form.entries, **decoder[0]}
        path.entries, path.template = entries, form.template
        missed = _first(wanted, device.answers(entries, path, wanted.requests()))
        if not missed:
            break
        part = next(iter(missed))
        if at[part] + 1 == len({"texts": ways, "chats": forms, "decode": decoders}[part]):
            why = f" ({tokens.unknown})" if tokens.unknown and part != "decode" else ""
            raise ModelError(str(device.source), f"{missed[part]}{why}", "the same tokens on both", _REFUSE)
        at[part] += 1
        path.proof.setdefault("turned_down", []).append(missed[part])
    path.notes += [note for note in (way[1], form.note, decoder[1]) if note]


def _ways(tokens: TokenPlan) -> list[tuple[dict[str, Any], str]]:
    """The ways to cut texts, the plainest first, each with its note."""
    because = "; ".join(tokens.alone)
    ways: list[tuple[dict[str, Any], str]] = []
    if not tokens.alone:
        ways.append(({}, ""))
        because = "the runtime's tokenizer gave other tokens"
    if tokens.runtime_can:
        steps = {**tokens.steps, **tokens.own, "cut": "runtime"}
        ways.append((steps, f"run.py prepares texts for the runtime's tokenizer: {because}"))
    if tokens.own:
        steps = {**tokens.steps, **tokens.own, "cut": "run.py"}
        ways.append((steps, f"run.py cuts texts itself, by tokenizer.json: {because}"))
    if not ways:
        raise ModelError(
            "tokenizer.json", f"{because}; {tokens.unknown} is not known to run.py", "one that is", _REFUSE
        )
    return ways


def _first(wanted: Wanted, answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The first difference of each part, texts before chats before decoding; empty where all is the same."""
    found: dict[str, str] = {}
    replies = iter(answers)

    def compare(part: str, kind: str, asked: object, expected: object, got: object) -> None:
        if expected != got and part not in found:
            ours, theirs = (wanted.said(value) for value in (expected, got))
            found[part] = f"{kind} {asked!r:.200} is {ours} in training and evaluation, and {theirs} on the device"

    for text, ids in wanted.texts.items():
        reply = next(replies)
        compare("texts", "the text", text, ids, reply.get("ids", reply.get("error")))
    for (messages, _), chat_ids in wanted.chats:
        reply = next(replies)
        got = reply.get("ids", reply.get("error"))
        if chat_ids is not None or "ids" in reply:  # else both refuse it
            compare("chats", "the chat", messages, chat_ids, got)
    for ids, decoded in wanted.decoded:
        reply = next(replies)
        compare("decode", "the text of tokens", ids[:24], decoded, reply.get("text", reply.get("error")))
    return found


class _Device:
    """A folder with all of a bundle but the model, and its run.py in a process of its own."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder

    def answers(self, entries: dict[str, Any], path: TextPath, requests: list[dict[str, Any]]) -> list[Any]:
        """What ``run.py --serve`` answers to ``requests`` where bundle.json has ``entries``.

        Raises EdgestillError when the process ends otherwise than it should.
        """
        inner = Path(tempfile.mkdtemp(dir=self.folder)).resolve()  # the process starts there
        write_tokenizer(self.source, inner, template=path.template, tokenizer=path.tokenizer)
        shutil.copyfile(RUNNER, inner / RUNNER_FILE)
        (inner / GENAI_CONFIG).write_text(json.dumps(_CONFIG), encoding="utf-8")
        (inner / BUNDLE_FILE).write_text(json.dumps({"text": entries}), encoding="utf-8")
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = processes.tied(processes.python(str(inner / RUNNER_FILE), "--serve", "--threads", "1"))
        try:
            done = subprocess.run(  # noqa: S603 - our own file and our own interpreter
                command, input=lines, capture_output=True, text=True, encoding="utf-8", check=False, env=kept,
                cwd=inner, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            got = f"run.py has not cut {len(requests)} texts within {SECONDS} s"
            raise EdgestillError(str(self.source), got, do="Try again when the machine is less busy") from None
        found = [json.loads(line) for line in done.stdout.split("\n") if line.startswith("{")]
        if done.returncode or len(found) != len(requests):
            if "cannot be opened" in done.stderr or not found:
                return [{"error": done.stderr.strip()[-200:]}] * len(requests)
            raise EdgestillError(str(inner), f"run.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return found


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime-genai", "tokenizers", "transformers")}
