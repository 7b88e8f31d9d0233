"""A bundle vouches for its files: what is damaged, missing or no bundle is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.errors import ModelError
from deploy.bench import bench_bundle
from deploy.bundle import BUNDLE_FILE, GPTQ_FOLDER, bundle_bytes, open_bundle, write_bundle
from deploy.runners import GenaiRunner


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_a_whole_bundle_opens_and_says_what_it_is(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.formats == ["onnx"]
    assert opened.model["architecture"] == "LlamaForCausalLM"
    assert opened.model["bits"] == 4
    assert opened.parameters == 69_952
    assert opened.bytes == bundle_bytes(bundle) == sum(path.stat().st_size for path in bundle.iterdir())
    assert set(opened.info["files"]) == {path.name for path in bundle.iterdir()} - {BUNDLE_FILE}
    assert opened.info["parity"]["exact"]["top1"] == 1.0
    assert [step["stage"] for step in opened.info["steps"]] == ["model.quantization", "deploy.export"]
    assert opened.info["steps"][0]["params"]["bits"] == 4
    assert opened.info["origins"] == [{"role": "model", "licence": "not stated"}]


def test_the_bundle_names_no_path_and_no_time(bundle: Path) -> None:
    text = (bundle / BUNDLE_FILE).read_text(encoding="utf-8")
    assert "/tmp" not in text
    assert "20" + "26-" not in text


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "genai_config.json"])
def test_a_flipped_bit_is_refused_by_its_digest(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ModelError, match=rf"{name}: its content changed since the export \(SHA-256 differs\)"):
        open_bundle(copy)
    with pytest.raises(ModelError, match=r"SHA-256 differs"):
        GenaiRunner(copy, threads=1)
    open_bundle(copy, verify=False)  # sizes alone do not show it


def test_a_cut_off_file_is_refused_by_its_size(copy: Path) -> None:
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=rf"model.onnx: {len(data) - 100} bytes; expected {len(data)} as exported"):
        open_bundle(copy, verify=False)


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json: missing from the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "a JSON list"),
        ('{"edgestill": 2}', "not a bundle of this form"),
        ('{"edgestill": 1, "formats": ["onnx"], "model": {"parameters": 4}}', "no files"),
    ],
)
def test_another_bundle_json_is_refused(copy: Path, text: str, message: str) -> None:
    (copy / BUNDLE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        open_bundle(copy)


def test_a_file_outside_the_bundle_is_refused(copy: Path) -> None:
    info = json.loads((copy / BUNDLE_FILE).read_text(encoding="utf-8"))
    info["files"]["../plain"] = {"bytes": 1, "sha256": ""}
    (copy / BUNDLE_FILE).write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ModelError, match=r"the file name '../plain'; expected a plain name"):
        open_bundle(copy)


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bundle.json: no such file.*edgestill export"):
        open_bundle(tmp_path)


@pytest.fixture
def checkpoint_alone(copy: Path) -> Path:
    """A bundle of the format gptq alone: no file for a runtime, a checkpoint of two files."""
    info = json.loads((copy / BUNDLE_FILE).read_text(encoding="utf-8"))
    for path in copy.iterdir():
        path.unlink()
    (copy / GPTQ_FOLDER).mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "weights")):
        (copy / GPTQ_FOLDER / name).write_text(text, encoding="utf-8")
    write_bundle(copy, {"formats": ["gptq"], "model": info["model"]})
    return copy


def test_a_bundle_of_a_checkpoint_alone_opens_and_counts_it(checkpoint_alone: Path) -> None:
    opened = open_bundle(checkpoint_alone)
    size = len("{}") + len("weights") + (checkpoint_alone / BUNDLE_FILE).stat().st_size
    assert opened.bytes == bundle_bytes(checkpoint_alone) == size
    assert set(opened.shipped) == {"config.json", "model.safetensors"}
    (checkpoint_alone / GPTQ_FOLDER / "config.json").unlink()
    with pytest.raises(ModelError, match=r"gptq/config.json: missing from the bundle"):
        open_bundle(checkpoint_alone)


def test_a_bundle_of_a_checkpoint_alone_is_not_run(checkpoint_alone: Path) -> None:
    message = r"the format gptq alone: no ONNX model.*expected onnx. Export the model again with --format onnx"
    with pytest.raises(ModelError, match=message):
        GenaiRunner(checkpoint_alone, threads=1)
    with pytest.raises(ModelError, match=message):
        bench_bundle(checkpoint_alone)


def test_what_lies_beside_the_files_of_a_bundle_is_not_counted(copy: Path) -> None:
    before = bundle_bytes(copy)
    (copy / GPTQ_FOLDER).mkdir()
    (copy / GPTQ_FOLDER / "model.safetensors").write_text("of the same codes", encoding="utf-8")
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    assert bundle_bytes(copy) == before
