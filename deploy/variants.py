"""Copies of an exported model that differ in one thing, over the same weights, for proofs and reading quality.

`accuracy_copy` computes in fp32 what ships with activations of 8 bits, or the other way round. `every_position_copy`
gives logits at all positions of a prompt, where what ships gives those of the last one, which is all that generation
reads: nodes that keep the last position are left out, all others stay as they are. Weights are linked, not copied.
Knows the names that `deploy.export.onnx` gives; imports no torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx

MODEL_FILE = "model.onnx"
LAST = "last"  # prefix of the names of nodes that keep the last position
LOGITS = "logits"
POSITIONS = "sequence_length"  # the symbolic size of the runtime's own graphs


def accuracy_copy(folder: Path, out: Path, level: int) -> bool:
    """Write the model of ``folder`` with MatMulNBits at accuracy ``level`` into ``out``; False when it has it.

    4 rounds activations to 8 bits per block, 1 computes in fp32, which is what 0 does on a CPU as well.
    """
    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    changed = False
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and (attribute.i == 4) != (level == 4):
                attribute.i, changed = level, True
    if changed:
        _write(model, folder, out)
    return changed


def every_position_copy(folder: Path, out: Path) -> bool:
    """Write the model of ``folder`` with logits at every position into ``out``; False when it gives them already."""
    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    kept = [node for node in model.graph.node if not _keeps_last(node)]
    dropped = [node for node in model.graph.node if _keeps_last(node)]
    if not dropped:
        return False
    before = {node.output[0]: node.input[0] for node in dropped}
    indices = {node.input[1] for node in dropped}
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = before.get(name, name)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name not in indices]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(tensors)
    declare_positions(model, None)
    _write(model, folder, out)
    return True


def _keeps_last(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "Gather" and node.name.startswith(f"{LAST}."))


def declare_positions(model: onnx.ModelProto, count: int | None) -> None:
    """Declare logits at ``count`` positions, None: at every one. The runtime reads it to size what it is given."""
    (logits,) = (value for value in model.graph.output if value.name == LOGITS)
    positions = logits.type.tensor_type.shape.dim[1]
    positions.Clear()
    if count is None:
        positions.dim_param = POSITIONS
    else:
        positions.dim_value = count


def _write(model: onnx.ModelProto, folder: Path, out: Path) -> None:
    (out / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    for path in folder.iterdir():
        if path.is_file() and path.name != MODEL_FILE:
            _link(path, out / path.name)


def _link(source: Path, place: Path) -> None:
    """Put ``source`` at ``place`` without copying where the file system can; weights may be large."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
