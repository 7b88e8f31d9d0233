"""What is refused where input comes in: sizes, depth, numbers, types, patterns, templates, archives; each in its words."""

# ruff: noqa: E501 - tables of cases
from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from compress.chat_templates import TemplateFault, render
from compress.errors import ModelError, ProfileError, UserError
from compress.files import licence_of
from compress.json_reader import JsonFault, checked, parse_json, read_json, read_table, required
from compress.model.shapes import check_config, parameter_count, shape_for_ratio
from compress.names import is_plain_name
from compress.patterns import slow_pattern
from compress.tokenizer_files import highest_id, read_tokenizer
from compress.yaml_reader import read_yaml
from deploy.archive import unpack
from tests.hardening.mutations import TEMPLATES
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ("9" * 5000, "a number of 5000 digits"),
        ("1e999", "beyond what a double holds"),
        ("[NaN]", "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ('{"a": "\\ud800"}', r"half a surrogate pair \(\\ud800\)"),
        ('{"\\uDFFF": 1}', "half a surrogate pair"),
        ("{", "line 1"),
        (b"\xff", "0xff at 0 is not UTF-8"),
    ],
)
def test_json_that_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(JsonFault, match=words):
        parse_json(text)


def test_json_that_is_read() -> None:
    deep = "[" * 99 + "1" + "]" * 99
    assert json.dumps(parse_json(deep)) == deep
    assert parse_json('{"a": "\\ud83d\\ude00", "b": 18446744073709551616, "c": 1e300}') == {"a": "\U0001f600", "b": 2**64, "c": 1e300}  # fmt: skip
    assert parse_json("[NaN]", constants=True) != parse_json("[0]")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    with pytest.raises(UserError, match=r"pipe\.json: not a plain file"):
        read_json(tmp_path / "pipe.json", UserError)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json", UserError)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="a JSON list; expected a JSON object"):
        read_table(tmp_path / "list.json", UserError)


def test_entries_by_type_and_range() -> None:
    table = {"a": 5, "b": True, "c": "x", "d": 10**40}
    assert required(table, "a", int, "here", ModelError, least=5, most=5) == 5
    for key, kind, words in (
        ("b", int, "b is True"),
        ("c", dict, "expected an object"),
        ("z", str, "no z"),
        ("d", int, "d is 1"),
    ):
        with pytest.raises(ModelError, match=f"here: .*{words}"):
            required(table, key, kind, "here", ModelError)


def test_whole_values_by_type() -> None:
    from typing_extensions import TypedDict as Readable

    form = Readable("Form", {"sizes": list[int]})  # type: ignore[misc] # noqa: UP013
    checked(form, {"sizes": [1], "more": "x"}, "here", ModelError)
    with pytest.raises(ModelError, match=r"here: sizes\.1 is '2'; expected a valid integer"):
        checked(form, {"sizes": [1, "2"]}, "here", ModelError)
    with pytest.raises(ModelError, match="here: no sizes"):
        checked(form, {}, "here", ModelError)


# ------------------------------------------------------------------------------------------------ names, patterns, texts


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "\ud800", "x" * 256, "\x1b[m"])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_plain_name(name)


def test_plain_names() -> None:
    assert all(map(is_plain_name, ("model.onnx", "model-00001-of-00002.safetensors", ".x", "\u00e9", "a b")))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a?){40}b", "(?:a*)*", "((ab)|c)+", "([a-z]+)*$", "(a{1,9}){1,9}", "(", "a" * 30_000],
)
def test_patterns_that_may_take_for_ever(pattern: str) -> None:
    assert slow_pattern(pattern, repeats=3)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        r"^(?:model\.layers\.(?:0|1)\.(?:mlp\.up_proj|mlp\.down_proj))$",
        r".*\.19\..*gate_proj.*",
        r"(\d+)$",
        r"[(+*]+",
        r"(?:,\d{3})*",
        r"\(a+\)*",
    ],
)
def test_patterns_that_are_taken(pattern: str) -> None:
    assert slow_pattern(pattern, repeats=3) == ""


HOSTILE = ["a" * 1_000_000, "1," * 500_000, " \n" * 500_000, "a!" * 500_000, "{" * 1_000_000, "\u0301" * 500_000, "- \n" * 300_000, "((((a" * 200_000,
           "http://" * 150_000, "a1" * 500_000, "\u4e2d\u6587" * 400_000, "---\nlicense:" + "\n" * 500_000]  # fmt: skip


@pytest.mark.parametrize("at", range(len(HOSTILE)))
def test_rules_over_a_megabyte_take_seconds(at: int) -> None:
    """Time that grew with the square of a megabyte would be hours."""
    from compress.data.condensation.self_distillation import NUMBER
    from compress.data.rows import make_row
    from compress.data.selection.heuristic_rules import judge
    from compress.data.selection.near_duplicates import exact_key
    from compress.data.selection.params import HeuristicsParams

    text, start = HOSTILE[at], time.process_time()
    row = make_row(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    judge(row, HeuristicsParams(max_chars=10_000_000))
    exact_key(row, "all")
    list(NUMBER.finditer(text))
    slow_pattern(text[:20_000], repeats=3)
    assert time.process_time() - start < 20


def test_licences(tmp_path: Path) -> None:
    def said(card: str) -> str:
        (tmp_path / "README.md").write_text(card)
        return licence_of(tmp_path)

    assert said("---\ntags: [a]\nlicense:   apache-2.0  \n---\ntext") == "apache-2.0"
    for none in ("license: mit\n", "---\nlicense: mit\n", "---\nlicense:\n---\n", "---\nlicense: \x1b[31mred\n---\n"):
        assert said(none) == "not stated"
    start = time.process_time()
    said("---\n" + "license:\n" * 100_000)
    assert time.process_time() - start < 5


# ------------------------------------------------------------------------------------------------ chat templates

CHATML = (
    "{%- set ns = namespace(last=messages|length - 1) %}{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>{% endif %}"
    "{{- '<|' ~ m['role'] ~ '|>\n' + m.content|trim + '<|end|>\n' }}{% if m.reasoning_content is defined %}{{ m.reasoning_content|tojson }}{% endif %}"
    "{% if not loop.last %} {{ loop.index0 }} of {{ ns.last }}{% endif %}{% endfor %}{{ bos_token }}{{ '%d-%s' % (3, 'x') }}{{ 'y' * 3 }}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ messages|map(attribute='role')|join(', ') }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ ['a', 'b'][::-1]|list }}{{ messages[0].content.split(' ')[-1].upper() }}"
    "{% if 'x' in messages[0].content %}x{% elif 1 < 2 <= 3 %}y{% endif %}{% generation %}z{% endgeneration %}{{ none }}{{ nothing|default('d') }}"
)


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, CHATML, "{{ messages|tojson(indent=2) }}", "{% for i in range(3) %}{{ i }}{% break %}{% endfor %}"],
)
@pytest.mark.parametrize("generation", [True, False])
def test_templates_render_as_the_library_renders_them(tmp_path: Path, template: str, generation: bool) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = template
    chats: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "  hi there  "}],
        [{"role": "system", "content": "caf\u00e9"}, {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "{}", "reasoning": "so"}],
    ]  # fmt: skip
    for chat in chats:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        assert render(template, chat, generation=generation, tokens=tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize(
    "template",
    [
        text
        for text in TEMPLATES
        if re.search(r"10 ?\*\*|5000\)|200000|\(20\) %|\(13\) %|000000|1/0|include|f\(\)|5000\]", text)
    ],
)
def test_templates_without_end_are_refused(template: str) -> None:
    start = time.thread_time()
    with pytest.raises(TemplateFault):
        render(template, [{"role": "user", "content": "x"}], generation=True, tokens={})
    assert time.thread_time() - start < 8


# ------------------------------------------------------------------------------------------------ models

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 10**12}, {"vocab_size": 2**40}, {"num_hidden_layers": 10**9}, {"num_attention_heads": 0}, {"intermediate_size": -1},
        {"num_hidden_layers": True}, {"hidden_size": 64.0}, {"hidden_size": "64"}, {"num_key_value_heads": 0}, {"num_key_value_heads": 10**30},
        {"head_dim": 10**9}, {"head_dim": -4}, {"max_position_embeddings": 10**15}, {"architectures": 5}, {"architectures": [5]},
        {"model_type": "gpt2"}, {"model_type": "deepseek_v3"}, {"layer_types": 5}, {"layer_types": [5, 6]}, {"rope_parameters": []},
        {"tie_word_embeddings": "yes"}, {"quantization_config": 5}, {"quantization_config": {"bits": 10**20}},
        {"quantization_config": {"bits": 4, "dynamic": {"+:(a+)+b": {}}}}, {"quantization_config": {"bits": 4, "dynamic": {"a": 5}}},
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^c\.json"):
        check_config(CONFIG | changed, where="c.json")


def test_large_configs_are_taken_and_no_plan_takes_for_ever() -> None:
    check_config(CONFIG)
    large = CONFIG | {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 262_144, "intermediate_size": 53248, "head_dim": None}  # fmt: skip
    check_config(large)
    assert parameter_count(large) > 4e11
    widest = large | {
        "hidden_size": 1 << 17,
        "num_attention_heads": 4096,
        "num_key_value_heads": 4096,
        "num_hidden_layers": 1024,
    }
    check_config(widest)
    with pytest.raises(ModelError, match=r"shapes of .* would have to be tried"):
        shape_for_ratio(widest, 0.3, axes=("heads", "hidden", "layers", "ffn"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": {"vocab": {"a": 1, "b": "2"}}}, "gives 'b' the id '2'"),
        ({"model": {"vocab": {"a": -1}}}, "the id -1"),
        ({"model": {"vocab": {"a": True}}}, "the id True"),
        ({"model": {"vocab": {"a": 2**40}}}, "the id"),
        ({"model": {"vocab": [["a", 0.5], "b"]}}, r"vocab\[1\] is 'b'"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}, r"added_tokens\[0\]"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": 5}, "added_tokens is 5"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}, r"merges\[0\]"),
        ({"model": 5}, r"no model\.vocab"),
        ([], "a JSON list"),
    ],
)
def test_tokenizer_files_that_are_refused(tmp_path: Path, data: Any, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=words):
        read_tokenizer(tmp_path)


def test_the_highest_id_counts_added_tokens(tmp_path: Path) -> None:
    data = {"model": {"vocab": {"a": 3}, "merges": [["a", "b"], "c d"]}, "added_tokens": [{"id": 9, "content": "x"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert highest_id(read_tokenizer(tmp_path)) == 9


# ------------------------------------------------------------------------------------------------ YAML, archives


@pytest.mark.parametrize(
    "number", ["0x" + "f" * 4500, "0o" + "7" * 4500, "9" * 4500, "0." + "3" * 4500, "1" * 200 + "e5"]
)
def test_yaml_numbers_are_bounded(number: str) -> None:
    document = read_yaml(f"a: {number}", "p.yaml")
    assert [f"got a number of {len(number)} digits" in str(problem) for problem in document.problems] == [True]
    with pytest.raises(ProfileError, match="nested deeper"):
        read_yaml("[" * 50_000, "p.yaml")


def packed(tmp_path: Path, size: int, digest: str, content: bytes) -> Path:
    """An archive whose bundle.json announces one file of ``size``."""
    info = {"edgestill": 1, "formats": ["onnx"], "model": {"parameters": 1}, "onnx": {}, "files": {"x": {"bytes": size, "sha256": digest}, "y": {"bytes": 0, "sha256": "0"}}}  # fmt: skip
    out, described = io.BytesIO(), json.dumps(info).encode()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("bundle.json", described), ("x", content), ("y", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    path = tmp_path / "b.tar.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(out.getvalue()))
    return path


def test_a_small_archive_cannot_unpack_to_much(tmp_path: Path) -> None:
    zeros = bytes(64 << 20)
    path = packed(tmp_path, len(zeros), hashlib.sha256(zeros).hexdigest(), zeros)
    assert path.stat().st_size < 20_000
    with pytest.raises(ModelError, match=r"67\.1 MB are to be unpacked from .*; expected at most 16\.9 MB"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out/x").exists()


def test_a_wrong_digest_ends_the_unpacking_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x is not what bundle\.json names"):
        unpack(packed(tmp_path, 3, "0" * 64, b"abc"), tmp_path / "out")
    assert not (tmp_path / "out/y").exists()
