"""Files of a run: the library's own format, one tensor at a time, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import StoreError
from compress.model.distillation.resume import in_file_order, open_tensors, read_tensors, save_tensors

VALUES = {"step": 3, "text": 'a "b"\n\u00e9', "share": 0.1}
KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
]


def tensors():
    made = {f"kind.{kind}": torch.arange(5).to(kind) for kind in KINDS}
    return made | {"b": torch.randn(3, 5), "a": torch.tensor(3.0), "none": torch.zeros(0, 4), "t": torch.randn(4, 3).T}


def test_the_bytes_are_the_library_s_own(tmp_path):
    given = tensors()
    save_tensors(tmp_path / "ours", given, VALUES)
    metadata = {"values": json.dumps(VALUES, sort_keys=True)}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    found, values = read_tensors(tmp_path / "ours")
    assert values == VALUES
    assert all(torch.equal(found[name], given[name]) and torch.equal(loaded[name], given[name]) for name in given)


def test_tensors_are_asked_for_one_by_one_and_read_one_by_one(tmp_path):
    given, asked = tensors(), []
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in given.items()}
    names = {id(tensor): name for name, tensor in outlines.items()}

    def whole(tensor):
        asked.append(names[id(tensor)])
        return given[asked[-1]]

    save_tensors(tmp_path / "file", outlines, VALUES, whole=whole)
    assert asked == in_file_order(outlines)
    opened = open_tensors(tmp_path / "file")
    assert list(opened.outlines) == asked
    assert all(outline.is_meta and outline.dtype == given[name].dtype for name, outline in opened.outlines.items())
    assert torch.equal(opened["b"], given["b"])


def test_a_file_cut_short_is_left_aside_and_one_that_cannot_be_written_leaves_the_old(tmp_path):
    path = tmp_path / "file"
    save_tensors(path, tensors(), VALUES)
    before = path.read_bytes()

    def full(tensor):
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device"):
        save_tensors(path, tensors(), VALUES, whole=full)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    path.write_bytes(before[:-3])
    assert open_tensors(path) is None
    assert read_tensors(tmp_path / "absent") is None


def test_what_breaks_off_leaves_nothing_and_foreign_formats_are_left_aside(tmp_path, caplog):
    def lost(tensor):
        raise RuntimeError("a process died")

    with pytest.raises(RuntimeError, match="a process died"):
        save_tensors(tmp_path / "lost", tensors(), VALUES, whole=lost)
    assert list(tmp_path.iterdir()) == []
    foreign = tmp_path / "foreign"
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, foreign, {"values": "{}"})
    assert open_tensors(foreign) is None
    assert "is damaged and left aside" in caplog.text
