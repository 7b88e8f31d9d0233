"""Small malformed inputs through the command line: exit code 1 or 2 and one message, never a fault of edgestill's."""

# ruff: noqa: E501 - a table of cases
from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import cli
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.timeout(300)  # a busy machine
DEEP = "[" * 100_000
ROW = '{"prompt": "a", "response": "b"}\n'
EVAL = ["eval", "M", "--data", "in.jsonl", "--rows", "1"]
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "M", layers=1, hidden=32, heads=2, kv_heads=1, ffn=64)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content) and None


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def do(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return do


def index(value: Any) -> Change:
    def do(folder: Path) -> None:
        (folder / "M/model.safetensors").unlink()
        (folder / "M/model.safetensors.index.json").write_text(json.dumps(value))

    return do


def bundle(change: Callable[[dict[str, Any]], Any]) -> Change:
    def do(folder: Path) -> None:
        (folder / "B").mkdir()
        (folder / "B/x").write_bytes(b"x")
        files = {"x": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
        info = {"edgestill": 1, "formats": ["onnx"], "model": {"parameters": 1}, "onnx": {}, "files": files}
        found = change(info)
        (folder / "B/bundle.json").write_text(found if isinstance(found, str) else json.dumps(info))

    return do


def only_gguf(info: dict[str, Any]) -> None:
    del info["files"]
    info |= {"formats": ["gguf"], "gguf_files": {"x": {"bytes": 1, "sha256": "0"}}}


CASES: dict[str, tuple[list[str], Change, str]] = {
    "yaml: a hexadecimal number": (["plan", "p.yaml"], text("p.yaml", "edgestill: 0x" + "f" * 4500), "4502 digits"),
    "target: the same": (["targets", "show", "p.yaml"], text("p.yaml", "edgestill: 0x" + "f" * 4500), "4502 digits"),
    "--set: the same": (["plan", "quickstart", "--set", "seed=0x" + "f" * 4500], lambda _: None, "4502 digits"),
    "--set: a long index": (["plan", "quickstart", "--set", f"steps[{'9' * 5000}].x=1"], lambda _: None, "an index"),
    "config: architectures": (EVAL, edit("M/config.json", lambda c: c.update(architectures=5)), "architecture 5"),
    "config: deep": (EVAL, text("M/config.json", DEEP), "config.json: cannot be read as JSON: nested deeper"),
    "config: huge": (EVAL, edit("M/config.json", lambda c: c.update(hidden_size=10**12)), "hidden_size is 1000000000000"),
    "config: another type": (EVAL, edit("M/config.json", lambda c: c.update(model_type="gpt2")), "model_type 'gpt2'"),
    "index: weight_map": (EVAL, index({"weight_map": 5}), "weight_map is 5"),
    "index: a shard": (EVAL, index({"weight_map": {"a": 5}}), "names the shard 5"),
    "index: out of the folder": (EVAL, index({"weight_map": {"a": "../x"}}), "names the shard '../x'"),
    "tokenizer: no id": (EVAL, edit("M/tokenizer.json", lambda t: t.update(added_tokens=[{"content": "x"}])), "added_tokens[0]"),
    "tokenizer: id is text": (EVAL, edit("M/tokenizer.json", lambda t: t["model"]["vocab"].update(a="2")), "the id '2'"),
    "tokenizer: deep": (EVAL, text("M/tokenizer.json", DEEP), "tokenizer.json: cannot be read as JSON: nested deeper"),
    "tokenizer: unknown part": (["export", "M", "--out", "B"], edit("M/tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Nope"})), "tokenizer.json"),
    "template: divides by zero": (EVAL, text("M/chat_template.jinja", "{{ 1/0 }}"), "division by zero"),
    "template: includes": (EVAL, text("M/chat_template.jinja", "{% include 'x' %}"), "no loader"),
    "template: without end": (EVAL, text("M/chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), "not rendered after"),
    "template: fills memory": (EVAL, text("M/chat_template.jinja", "{{ 'x' * 10**10 }}"), "beyond all bounds"),
    "bundle: formats": (["pack", "B"], bundle(lambda i: i.update(formats=5)), "formats is 5"),
    "bundle: files": (["pack", "B"], bundle(lambda i: i.update(files="abc")), "files is 'abc'"),
    "bundle: no files": (["pack", "B"], bundle(only_gguf), "B/gguf/x"),
    "bundle: deep": (["pack", "B"], bundle(lambda _: DEEP), "nested deeper"),
    "bundle: a long number": (["bench", "B"], bundle(lambda _: '{"edgestill": %s}' % ("9" * 5000)), "5000 digits"),
    "bundle: tuned": (["tune", "B"], bundle(lambda i: i.update(tuned={"threads": "4"})), "tuned.threads"),
    "run.json: a schema alone": (["report", "run.json"], text("run.json", '{"schema": 1}'), "run.json: no "),
    "run.json: deep": (["report", "run.json"], text("run.json", DEEP), "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_one_message(
    name: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, change, words = CASES[name]
    if "M" in arguments:
        shutil.copytree(original, tmp_path / "M")
        (tmp_path / "in.jsonl").write_text(ROW)
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGESTILL_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(sys, "argv", ["edgestill", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capfd.readouterr().err
    assert end.value.code in (1, 2), said
    assert "fault in edgestill" not in said
    assert "Traceback" not in said
    assert words in said
    assert said.count("edgestill: error: ") == 1
