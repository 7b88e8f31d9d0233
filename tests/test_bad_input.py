"""Bad input through the command line itself: profiles, rows, models, stores and targets that cannot work.

Every case asserts the same contract: the right exit code, exactly one message on standard error that says where, what
was got and what to do, no traceback, no report of success, and no artifact of the stage that failed. What single
readers and checks say in detail is proven beside them; here it is that nothing gets lost on the way out.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import cli
from compress.assessment_params import METRICS
from evaluators.metrics import CALL_METRICS
from tests.tiny import tiny_checkpoint, tiny_conversations

pytestmark = pytest.mark.timeout(300)  # a busy machine

REPOSITORY = Path(__file__).parents[1]
PREFIX = "edgestill: error: "
PROFILE = """\
edgestill: 1
name: tiny
seed: 3
teacher: teacher
data: {pool: pool.jsonl, test: test.jsonl}
target: x86-laptop-avx2
hardware: {threads: 1}
steps:
  - data.selection: {method: heuristics}
  - model.distillation: {layers: 1, steps: 2, batch_tokens: 256}
  - model.quantization: {method: gptq, bits: 4, group_size: 16}
export: {formats: [onnx]}
evaluate: {tasks: [perplexity], rows: 4}
gate: [{metric: perplexity, max_ratio: 1000}]
bench: null
"""


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Place:
    """A folder with a profile, its data and its teacher; ``call`` runs the command there."""

    folder: Path
    call: Callable[..., Outcome]

    @property
    def profile(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def replace(self, old: str, new: str) -> None:
        """Change the profile's text."""
        text = self.profile.read_text()
        assert text.count(old) == 1, old
        self.profile.write_text(text.replace(old, new))

    def run(self, *more: str) -> Outcome:
        return self.call("run", self.profile, "--store", self.store, *more)

    def artifacts(self) -> list[str]:
        """The stages of the artifacts, sorted; a folder without a manifest would be half an artifact."""
        folders = list((self.store / "artifacts").iterdir()) if (self.store / "artifacts").is_dir() else []
        assert all((folder / "manifest.json").is_file() for folder in folders), folders
        return sorted(json.loads((folder / "manifest.json").read_text())["facts"]["stage"] for folder in folders)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (self.store / "runs").glob("*/run.json")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tiny_checkpoint(folder / "teacher", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64)
    for name, count in (("pool", 40), ("test", 8)):
        lines = (json.dumps({"messages": talk}) for talk in tiny_conversations(count, seed=count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(PROFILE)
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    shutil.copytree(original, tmp_path / "p")

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgestill", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, captured.out, captured.err)

    return Place(tmp_path / "p", call)


def message(outcome: Outcome, code: int) -> str:
    """The one message of a command that failed with ``code`` and told nothing else."""
    assert outcome.code == code, outcome.err
    everything = outcome.out + outcome.err
    assert "Traceback" not in everything
    assert "fault in edgestill" not in everything
    assert "report:" not in everything
    assert "gate passed" not in everything
    lines = [line for line in outcome.err.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, outcome.err
    assert everything.count(PREFIX) == 1
    return outcome.err[outcome.err.index(PREFIX) + len(PREFIX) :]


def refused(place: Place, *words: str) -> None:
    """Exit 2 before anything is made: no store at all."""
    text = message(place.run(), 2)
    for word in words:
        assert word in text
    assert not place.store.exists()


def stopped(place: Place, code: int, *words: str, before: list[str]) -> None:
    """A stage failed: only those ``before`` it leave artifacts, the record says so, and no page is written."""
    text = message(place.run(), code)
    for word in words:
        assert word in text
    assert place.artifacts() == before
    assert [record["status"] for record in place.records()] == ["failed"]
    assert not list(place.store.rglob("report.html"))


# --- profiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 3", "sead: 3", ["tiny.yaml:3: sead: unknown key", "expected one of", "Did you mean 'seed'?"]),
        (
            "steps: 2,",
            "stpes: 2,",
            ["tiny.yaml:10: steps[1].model.distillation.stpes: unknown key", "Did you mean 'steps'?"],
        ),
        ("data.selection", "data.selecton", ["tiny.yaml:9: steps[0].data.selecton", "Did you mean 'data.selection'?"]),
        ("heuristics", "heuristic", ["method: got 'heuristic'; expected one of", "Did you mean 'heuristics'?"]),
        ("metric: perplexity", "metric: perplexty", ["tiny.yaml:14", "'perplexty'", "Did you mean 'perplexity'?"]),
        (
            "x86-laptop-avx2",
            "x86-laptop-avx",
            ["target: got 'x86-laptop-avx'; expected", "Did you mean 'x86-laptop-avx2'?"],
        ),
    ],
    ids=["key", "parameter", "stage", "method", "metric", "target"],
)
def test_unknown_name_is_answered_with_the_nearest(place: Place, old: str, new: str, words: list[str]) -> None:
    place.replace(old, new)
    refused(place, *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 3", "seed: three", ["tiny.yaml:3: seed: got 'three'; expected an integer"]),
        ("steps: 2", "steps: [2]", ["tiny.yaml:10: steps[1].model.distillation.steps", "expected an integer"]),
        ("hardware: {threads: 1}", "hardware: 1", ["tiny.yaml:7: hardware: got 1"]),
        ("seed: 3", "seed: -1", ["tiny.yaml:3: seed: got -1", "at least 0"]),
        ("bits: 4", "bits: 5", ["tiny.yaml:11: steps[2].model.quantization.bits: got 5; expected 2, 3, 4 or 8"]),
        ("steps: 2", "steps: 2, learning_rate: 0", ["learning_rate: got 0", "more than 0"]),
        ("max_ratio: 1000", "max_ratio: .nan", ["tiny.yaml:14", "max_ratio"]),
    ],
    ids=["text", "list", "scalar-section", "negative", "choice", "zero", "nan"],
)
def test_wrong_type_or_range(place: Place, old: str, new: str, words: list[str]) -> None:
    place.replace(old, new)
    refused(place, *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("group_size: 16", "group_size: 2:4", ["tiny.yaml:11", "group_size: got '2:4'"]),
        ("group_size: 16", "group_size: 16, act_order: no", ["act_order: got 'no'", "write true or false"]),
        ("name: tiny", "name: 1.10", ['name: got 1.1 (written 1.10); expected a string. Quote it: "1.10".']),
        ("seed: 3", "seed: 1e3", ["seed: got 1000.0 (written 1e3); expected an integer"]),
        ("seed: 3", "seed: 3\nseed: 4", ["tiny.yaml:4: seed: the key is given twice, first on line 3"]),
        ("seed: 3", "seed: 3\n\tx: 4", ["tiny.yaml:4: not YAML", "Indent with spaces, not tabs"]),
        ("seed: 3", "seed: !!python/object/apply:os.system [id]", ["tiny.yaml:3", "expected plain YAML without tags"]),
    ],
    ids=["2:4", "no", "1.10", "1e3", "twice", "tab", "tag"],
)
def test_yaml_traps(place: Place, old: str, new: str, words: list[str]) -> None:
    place.replace(old, new)
    refused(place, *words)


def test_1e_5_is_a_number(place: Place) -> None:
    place.replace("steps: 2,", "steps: 2, learning_rate: 1e-5,")
    outcome = place.call("plan", place.profile, "--store", place.store)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["tiny.yaml"]), (b"- a\n- b\n", ["tiny.yaml"]), (b"edgestill: 1\nname: \xff\n", ["tiny.yaml:2", "UTF-8"])],
    ids=["empty", "list", "not-utf-8"],
)
def test_file_that_is_no_profile(place: Place, content: bytes, words: list[str]) -> None:
    place.profile.write_bytes(content)
    refused(place, *words)


def test_known_metrics_are_those_that_are_measured() -> None:
    assert METRICS["function_call"] == (*CALL_METRICS, "unknown_function_rate")


def test_several_mistakes_are_one_message(place: Place) -> None:
    place.replace("seed: 3", "sead: 3")
    place.replace("bits: 4", "bits: 5")
    text = message(place.run(), 2)
    assert "2 problems" in text
    assert "sead" in text
    assert "bits" in text


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pool", "test"])
def test_missing_rows(place: Place, name: str) -> None:
    (place.folder / f"{name}.jsonl").unlink()
    refused(place, f"{name}.jsonl: no such file or folder", "Relative paths start at the profile's folder")


def test_no_rows_named_at_all(place: Place) -> None:
    place.replace("data: {pool: pool.jsonl, test: test.jsonl}\n", "")
    refused(place, "data", "pool")


GOOD = b'{"prompt": "lock the hall door", "response": "yes"}\n'


@pytest.mark.parametrize("name", ["pool", "test"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", [": no rows; expected at least one row. Check that the file is not empty"]),
        (b"\n \n\n", [": no rows; expected at least one row"]),
        (GOOD + b'\n{"prompt": "a", \n' + GOOD, [":3: malformed JSON", "one JSON object per line", "quarantine"]),
        (GOOD + b"not json\n", [":2: malformed JSON"]),
        (GOOD + b'{"prompt": "caf\xe9"}\n', [":2: byte 0xe9", "not valid UTF-8", "iconv"]),
        (b'{"question": "a", "reply": "b"}\n', [":1: the columns are question, reply; expected", "Rename the columns"]),
        (GOOD + b"[1]\n", [":2: "]),
    ],
    ids=["empty", "blank", "cut", "not-json", "latin-1", "columns", "no-object"],
)
def test_bad_rows(place: Place, name: str, content: bytes, words: list[str]) -> None:
    (place.folder / f"{name}.jsonl").write_bytes(content)
    stopped(place, 2, *(f"{name}.jsonl{words[0]}", *words[1:]), before=["data.source"] * (name == "test"))


def test_selection_that_keeps_nothing(place: Place) -> None:
    place.replace("{method: heuristics}", "{method: heuristics, min_chars: 90000}")
    stopped(
        place,
        2,
        "heuristics: no row is left of 40 (too short: 40). Loosen the limit",
        before=["data.source", "data.source", "evaluate"],
    )


# --- models ------------------------------------------------------------------------------------------------------


def pickle_only(teacher: Path) -> None:
    torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()


def truncated(teacher: Path) -> None:
    path = teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_finite(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})


def larger_tokenizer(teacher: Path) -> None:
    path = teacher / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 320, "content": "<|one_too_many|>"})
    path.write_text(json.dumps(data))


def gpt2(teacher: Path) -> None:
    facts = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 1}
    (teacher / "config.json").write_text(json.dumps(facts))


def no_tokenizer(teacher: Path) -> None:
    (teacher / "tokenizer.json").unlink()


def other_shape(teacher: Path) -> None:
    path = teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))


def broken_config(teacher: Path) -> None:
    (teacher / "config.json").write_text('{"vocab_size": ')


MODELS: list[tuple[Callable[[Path], None], list[str]]] = [
    (pickle_only, ["teacher: only pickled weights (pytorch_model.bin); expected model.safetensors"]),
    (truncated, ["model.safetensors", "cut off"]),
    (not_finite, ["teacher", "1 NaN or infinite values in model.layers.0.mlp.up_proj.weight"]),
    (larger_tokenizer, ["tokenizer.json: token id 320; expected ids below the model's vocab_size 320", "Use the"]),
    (gpt2, ["config.json", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
    (no_tokenizer, ["tokenizer.json"]),
    (other_shape, ["model.safetensors", "mlp"]),
    (broken_config, ["config.json", "JSON"]),
]


@pytest.mark.parametrize(("spoil", "words"), MODELS, ids=[spoil.__name__ for spoil, _ in MODELS])
def test_teacher_that_cannot_be_used(place: Place, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(place.folder / "teacher")
    text = message(place.run(), 2)
    for word in words:
        assert word in text
    assert set(place.artifacts()) <= {"data.source"}
    assert not list(place.store.rglob("report.html"))


def test_no_teacher(place: Place) -> None:
    shutil.rmtree(place.folder / "teacher")
    refused(place, "teacher: no such folder; expected a Hugging Face model folder")


@pytest.mark.parametrize(("spoil", "words"), MODELS[:5], ids=[spoil.__name__ for spoil, _ in MODELS[:5]])
def test_export_of_such_a_model(place: Place, spoil: Callable[[Path], None], words: list[str]) -> None:
    model, out = place.folder / "teacher", place.folder / "bundle"
    spoil(model)
    text = message(place.call("export", model, "--target", "x86-laptop-avx2", "--out", out), 2)
    assert words[-1] in text
    assert not out.exists()
    assert not [path.name for path in place.folder.iterdir() if path.name.startswith(".")], "nothing is left behind"


# --- the store ---------------------------------------------------------------------------------------------------


def test_file_where_the_store_should_be(place: Place) -> None:
    place.store.write_text("mine")
    text = message(place.run(), 1)
    assert f"{place.store}" in text
    assert "Not a directory. Choose another place with --store." in text
    assert place.store.read_text() == "mine"


def test_no_write_permission(place: Place) -> None:
    """In a process of its own, since root may write everywhere until it gives up its capabilities."""
    place.store.mkdir(mode=0o555)
    script = (
        "import ctypes, os, sys\n"
        "from compress import cli\n"
        "if os.getuid() == 0:\n"
        "    version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"  # see capset(2)
        "    assert ctypes.CDLL(None).capset(version, none) == 0\n"
        f"sys.argv = ['edgestill', 'run', {str(place.profile)!r}, '--store', {str(place.store)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    text = message(Outcome(done.returncode, done.stdout, done.stderr), 1)
    assert f"{place.store}" in text
    assert "Permission denied" in text
    assert "choose another place with --store" in text.lower()
    assert not list(place.store.iterdir())


class FullDisk:
    """Opens files as ever, but a write below ``folder`` finds no room."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, io.open

    def __call__(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        inside = isinstance(file, (str, os.PathLike)) and Path(file).is_relative_to(self.folder)
        if inside and set(mode) & set("wxa"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return self.open(file, mode, *args, **options)


@pytest.mark.parametrize("part", ["runs", "records", "artifacts"])
def test_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    opener = FullDisk(place.store / part)
    monkeypatch.setattr(io, "open", opener)
    monkeypatch.setattr(builtins, "open", opener)
    outcome = place.run()
    monkeypatch.undo()
    text = message(outcome, 1)
    assert f"{place.store / part}" in text
    assert "No space left on device" in text
    assert "--store" in text
    assert not place.artifacts()
    assert not list(place.store.rglob("report.html"))


# --- the target --------------------------------------------------------------------------------------------------

DEVICE = """\
edgestill: 1
name: watch
description: a device with next to no memory
cpu: one small core
cores: 1
isa: [aarch64, asimd]
memory_bytes: 2000000
usable_memory_bytes: 1000000
memory_bandwidth_bytes_per_s: 1.0e9
fp32_flops_per_s: 1.0e9
storage_bytes: STORAGE
storage_read_bytes_per_s: 1.0e6
runtime: onnxruntime-genai
formats: [onnx]
context_tokens: 128
"""


@pytest.mark.parametrize(("storage", "word"), [("4000000000", "memory"), ("1000", "storage")])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_target_too_small_for_the_bundle(place: Place, command: str, storage: str, word: str) -> None:
    (place.folder / "watch.yaml").write_text(DEVICE.replace("STORAGE", storage))
    place.replace("x86-laptop-avx2", "watch.yaml")
    text = message(place.call(command, place.profile, "--store", place.store), 2)
    assert "watch" in text
    assert word in text
    assert not place.store.exists()
