"""What the device does with text: the tokens that training and evaluation see, or a refusal before all is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compress.encoding import encode_prompt, encode_text_prompt, load_tokenizer
from compress.errors import ModelError
from deploy.bundle_runner import run
from deploy.export import gguf_tokenizer, text_proof
from deploy.export.runtime_template import NotAlike, needs_no_trimming, runtime_form, tree
from deploy.export.text_proof import TextPath, prove
from deploy.export.tokenizer import write_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OVER_LINES = """{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
{{ message['content'] }}<|im_end|>
    {% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
THOUGHTS = """{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}
    {%- if m.role == 'user' and ns.last < 0 %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}
{% endfor %}{% for m in messages %}
    {%- set said = m.content %}
    {%- if '</think>' in said and loop.index0 < ns.last %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role.replace('assistant', 'model') + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TALK = [
    "say yes to the yes-men yesterday",
    "go on  go\tgoing",
    "Hello World 123",
    "the cat sat on the mat",
    "caf\u00e9 \u00c0",
]
TEXTS = [
    "say yes",
    "Say NO",
    "  two blanks first",
    "cafe\u0301 and \ufb01ne",
    "line one\nline two",
    "123 go",
    "x<|im_end|> y",
]


def byte_level(pre: Any = None, normalizer: Any = None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A byte-level BPE of the words of `TALK`."""
    found = Tokenizer(models.BPE())
    if normalizer is not None:
        found.normalizer = normalizer
    found.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator(
        TALK * 3,
        trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    found.add_tokens(list(added))
    return found


def sentencepiece(scheme: str | None) -> Tokenizer:
    """BPE with byte fallback: Metaspace with ``scheme``, or the normalizer of older files where it is None."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    listed = ["<unk>", "<s>", "</s>", *SPECIAL]
    byte = [f"<0x{at:02X}>" for at in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=listed + byte, show_progress=False)
    found.train_from_iterator(TALK * 3, trainer)
    data = json.loads(found.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in listed]
    data["pre_tokenizer"] = None
    found = Tokenizer.from_str(json.dumps(data))
    if scheme is None:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(steps)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def save(folder: Path, tokenizer: Tokenizer, template: Any = CHATML, **settings: Any) -> Path:
    """Save it as a model folder has it."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", **settings)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def device(source: Path, out: Path, path: TextPath, *, plain: bool = False) -> run.Text:
    """The text path of a bundle; ``plain``: as if bundle.json said nothing, and the files were the model's."""
    out.mkdir()
    write_tokenizer(source, out, template=None if plain else path.template, tokenizer=path.tokenizer)
    (out / "genai_config.json").write_text(json.dumps(text_proof._CONFIG), encoding="utf-8")
    return run.Text(run.Opened(og, out, {"text": {} if plain else path.entries}))


def differing(text: run.Text, source: Path) -> int:
    """How many of `TEXTS`, raw and as chats, become other tokens than in the evaluation."""
    tokenizer = load_tokenizer(source)
    chats = [[{"role": "user", "content": one}] for one in TEXTS]
    count = sum(text.raw(one) != encode_text_prompt(one, tokenizer) for one in TEXTS)
    return count + sum(text.chat(chat) != encode_prompt(chat, tokenizer) for chat in chats if tokenizer.chat_template)


ADDED = [AddedToken("yes", single_word=True, normalized=False), AddedToken("go", lstrip=True, normalized=False)]
KINDS: dict[str, tuple[Any, str, str | None]] = {  # what makes it, who cuts, what the note says
    "text-nfc": (lambda: byte_level(normalizer=normalizers.NFC()), "runtime", "does not normalise texts (NFC)"),
    "text-lowercase": (
        lambda: byte_level(normalizer=normalizers.Lowercase()),
        "runtime",
        "normalise texts (Lowercase)",
    ),
    "text-single-word": (
        lambda: byte_level(added=ADDED),
        "runtime",
        "take blanks or words",
    ),
    "text-metaspace-first": (lambda: sentencepiece("first"), "run.py", "does not split texts as Metaspace does"),
    "metaspace-never": (lambda: sentencepiece("never"), "run.py", "does not split texts as Metaspace does"),
    "prefix-space": (
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "run.py",
        "as ByteLevel does",
    ),
    "split-unknown": (
        lambda: byte_level(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ),
        "run.py",
        "does not split texts as Split + ByteLevel does",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_the_runtime_does_otherwise_is_done_by_the_script(name: str, tmp_path: Path) -> None:
    make, cut, note = KINDS[name]
    special = {"bos_token": "<s>", "unk_token": "<unk>"} if "metaspace" in name else {}
    source = save(tmp_path / "model", make(), **special)
    path = prove(source, tmp_path)
    assert path.entries["cut"] == cut
    assert any(str(note) in said for said in path.notes), path.notes
    assert path.proof["changed"] == path.notes
    assert path.proof["texts"] > 50
    assert path.proof["chats"] > 20
    assert differing(device(source, tmp_path / "bundle", path), source) == 0
    if name != "split-unknown":  # which the runtime cannot open at all
        assert differing(device(source, tmp_path / "plain", path, plain=True), source) > 0  # the fault is real


def test_older_sentencepiece_files_are_cut_alike(tmp_path: Path) -> None:
    source = save(tmp_path / "model", sentencepiece(None), bos_token="<s>", unk_token="<unk>")
    path = prove(source, tmp_path)
    assert differing(device(source, tmp_path / "bundle", path), source) == 0


def test_what_needs_nothing_gets_nothing(tmp_path: Path) -> None:
    source = save(tmp_path / "model", byte_level())
    path = prove(source, tmp_path, texts=["the data's own"], chats=[[{"role": "user", "content": "hi"}]])
    assert (path.template, path.tokenizer, path.notes) == (None, None, [])
    assert set(path.entries) == {"before", "after", "bos"}
    assert path.proof["sha256"] != prove(source, tmp_path).proof["sha256"]  # the data's rows count


def test_blocks_over_several_lines_are_rewritten(tmp_path: Path) -> None:
    """template-over-lines."""
    source = save(tmp_path / "model", byte_level(), OVER_LINES)
    path = prove(source, tmp_path)
    assert path.template is not None
    assert path.notes == [
        "the chat template was rewritten with explicit blanks, since the runtime does not trim its blocks"
    ]
    assert differing(device(source, tmp_path / "bundle", path), source) == 0
    assert differing(device(source, tmp_path / "plain", path, plain=True), source) == len(TEXTS)
    rewritten = tmp_path / "bundle"
    for messages in ([{"role": "user", "content": "a\n"}], [{"role": "system", "content": " b"}]):
        assert encode_prompt(messages, load_tokenizer(rewritten)) == encode_prompt(messages, load_tokenizer(source))


def test_what_the_runtime_cannot_render_is_rendered_by_the_script(tmp_path: Path) -> None:
    source = save(tmp_path / "model", byte_level(), THOUGHTS)
    path = prove(source, tmp_path)
    assert set(path.entries["templates"]) == {"default"}
    assert "run.py renders the chat template itself, since the runtime does not render" in path.notes[0]
    talk = [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"},
        {"role": "user", "content": "and"},
    ]
    text = device(source, tmp_path / "bundle", path)
    assert text.chat(talk) == encode_prompt(talk, load_tokenizer(source))
    assert "so" not in text.rendered(talk)
    with pytest.raises(run.Fault, match="the conversation is empty"):
        text.chat([])


def test_the_default_of_named_templates_counts(tmp_path: Path) -> None:
    """template-named-list: as in tokenizer_config.json, as files beside it, and without a default."""
    named = {"default": CHATML, "tool_use": "TOOLS {{ tools | length }} " + CHATML}
    source = save(tmp_path / "model", byte_level(), named)
    path = prove(source, tmp_path)
    assert path.notes[0].startswith("of the named chat templates (default, tool_use) the default one is taken")
    text = device(source, tmp_path / "bundle", path)
    assert differing(text, source) == 0
    assert text.rendered([{"role": "user", "content": "x"}], [{"name": "f"}]).startswith("TOOLS 1 ")
    only = save(tmp_path / "only", byte_level(), {"rag": CHATML, "tool_use": CHATML})
    with pytest.raises(ModelError, match=r"chat templates without a default one: rag, tool_use"):
        prove(only, tmp_path)
    with pytest.raises(ModelError, match=r"chat templates without a default one: rag, tool_use"):
        encode_prompt([{"role": "user", "content": "x"}], load_tokenizer(only))


def test_the_file_counts_before_the_settings(tmp_path: Path) -> None:
    source = save(tmp_path / "model", byte_level(), CHATML)
    settings = source / "tokenizer_config.json"
    other = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": "OTHER"}
    settings.write_text(json.dumps(other), encoding="utf-8")
    path = prove(source, tmp_path)
    assert path.template == CHATML
    assert differing(device(source, tmp_path / "bundle", path), source) == 0
    assert "chat_template" not in json.loads(
        (tmp_path / "bundle" / "tokenizer_config.json").read_text(encoding="utf-8")
    )


def test_tokenizers_that_nothing_can_open_are_refused(tmp_path: Path) -> None:
    """text-unigram."""
    found = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<|im_end|>", -2.0)], unk_id=0))
    source = save(tmp_path / "model", found, unk_token="<unk>")
    with pytest.raises(ModelError, match=r"tokenizer of the kind Unigram, which onnxruntime-genai does not.*byte-pair"):
        prove(source, tmp_path)


def test_what_still_differs_is_refused_with_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "model", byte_level(normalizer=normalizers.NFC()))
    broken = tmp_path / "run.py"
    script = Path(text_proof.RUNNER).read_text(encoding="utf-8").replace('kind in ("NFC", ', 'kind in ("", ')
    broken.write_text(script, encoding="utf-8")
    monkeypatch.setattr(text_proof, "RUNNER", broken)
    with pytest.raises(ModelError, match=r"the text 'composed caf.* in training and evaluation, and .* on the device"):
        prove(source, tmp_path)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | groupby('role') }}", "the filter groupby"),
        ("{{ messages[0].content.format(1) }}", "the method format"),
        ("{% include 'x' %}", "Include"),
        ("{{ ('<' | safe) ~ messages[0].content }}", "the filter safe before others"),
        ("{% for m in messages recursive %}{{ m }}{% endfor %}", "a recursive loop"),
        ("{% for m in messages %}", "is no Jinja template"),
    ],
)
def test_templates_that_the_device_cannot_render_are_refused(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        tree(template, "model")


@pytest.mark.parametrize(
    "template",
    [
        "{% if '</think>' in messages[0].content %}a{% endif %}",  # false in the runtime
        "{{ tools | length }}",  # rearranged there
        "{{ messages[0].content[1:] }}",  # bytes there
        "{{ messages[0].content | length }}",
        "{% for m in messages %}{% if m.role %}{% set x = m.role %}{% endif %}{{ x }}{% endfor %}",  # kept
        "{% for m in messages %}{% endfor %}{{ m }}",
        "{{ messages[0].content and 'a' }}",  # true there
        "{{ 'a'.upper() }}",
    ],
)
def test_what_the_runtime_takes_for_something_else_is_not_given_to_it(template: str) -> None:
    with pytest.raises(NotAlike):
        runtime_form(template, ["bos_token"], "model")


def test_trimming_is_seen() -> None:
    assert needs_no_trimming(CHATML)
    assert not needs_no_trimming(OVER_LINES)
    assert (
        runtime_form("{% if messages %}\n a\n{% endif %}\n", [], "model")
        == '{%- if messages -%}{{- " a\\n" -}}{%- endif -%}'
    )


def test_a_gguf_file_holds_the_default_template_or_says_that_it_has_none(tmp_path: Path) -> None:
    """gguf-named-templates."""
    named = save(tmp_path / "named", byte_level(), {"default": CHATML, "tool_use": "TOOLS " + CHATML})
    found = gguf_tokenizer.read(named, size=400)
    assert found.chat_template == CHATML
    assert any("named chat templates (default, tool_use) the default one is taken" in note for note in found.notes)
    bare = gguf_tokenizer.read(save(tmp_path / "bare", byte_level(), None), size=400)
    assert bare.chat_template is None
    assert any("the model has no chat template" in note for note in bare.notes)
