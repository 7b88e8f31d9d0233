"""The tokenizer's files in a bundle: the same content in fewer bytes.

``tokenizer.json`` is saved with indentation by most tools, which makes up to half of it. `write_tokenizer` copies the
files and writes the JSON ones without blanks; a template or tokenizer that the bundle needs in another form goes in
their place. Knows nothing of models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.files import NAMED_TEMPLATES
from compress.json_reader import parse_json
from compress.model.checkpoint import copy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = "chat_template.jinja"
# not needed to run: the model's vocabulary and merges stand in tokenizer.json too
_REDUNDANT = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")


def compact(text: str) -> str:
    """Return JSON ``text`` without blanks between its parts; order and values stay."""
    return json.dumps(parse_json(text), ensure_ascii=False, separators=(",", ":"))


def write_tokenizer(
    source: Path, out: Path, *, template: str | None = None, tokenizer: dict[str, Any] | None = None
) -> None:
    """Copy the tokenizer of ``source`` into ``out``; ModelError when a file of it is not JSON.

    ``template`` becomes the one chat template, ``tokenizer`` the content of tokenizer.json.
    """
    copy_tokenizer(source, out)
    for name in _REDUNDANT:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / NAMED_TEMPLATES, ignore_errors=True)
    for path in sorted(out.glob("tokenizer*.json")):
        try:
            content = compact(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(str(source / path.name), f"cannot be read as JSON ({error})") from error
        if path.name == "tokenizer.json" and tokenizer is not None:
            content = compact(json.dumps(tokenizer))
        if path.name == "tokenizer_config.json" and template is not None:
            settings = json.loads(content)
            settings.pop("chat_template", None)
            content = compact(json.dumps(settings))
        path.write_text(content, encoding="utf-8")
    if template is not None:
        (out / "chat_template.json").unlink(missing_ok=True)
        (out / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="")


def chosen_templates(tokenizer: PreTrainedTokenizerFast, source: Path) -> tuple[dict[str, str], str]:
    """The template that transformers takes, as ``default``, the one for tools as ``tool_use``, and a note on others.

    Empty where the model has none. Raises ModelError for named templates of which none is the default.
    """
    found: Any = tokenizer.chat_template
    if not found:
        return {}, ""
    templates = {"default": found} if isinstance(found, str) else dict(found)
    if "default" not in templates:
        got, do = f"chat templates without a default one: {', '.join(sorted(templates))}", f"Save it as {TEMPLATE_FILE}"
        raise ModelError(str(source), got, "a template named default, which chats without a choice take", do)
    kept = {name: templates[name] for name in ("default", "tool_use") if name in templates}
    if len(templates) == 1:
        return kept, ""
    named = ", ".join(sorted(templates))
    return kept, f"of the named chat templates ({named}) the default one is taken; tool_use only where tools are given"
