"""A bundle vouches for its files: what is damaged, missing or no bundle is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.errors import ModelError
from deploy.bundle import BUNDLE_FILE, bundle_bytes, open_bundle
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
    assert opened.info["provenance"]["stage"] == "model.quantization.rtn"


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
        ("[]", "not a bundle of this form"),
        ('{"edgestill": 2}', "not a bundle of this form"),
        ('{"edgestill": 1, "formats": ["onnx"], "model": {"bits": 4}}', "no files"),
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
