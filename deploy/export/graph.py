"""A small ONNX graph under construction: nodes, initializers stored in as few bytes as hold them exactly, names.

`GraphWriter` collects nodes; `constant` stores an array as fp16 or bf16 with a cast where that loses nothing (the
runtime folds the cast when it loads), `finish` gives short names to all inner values and writes the file. Knows ONNX;
knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
EXTERNAL_FROM = 64 << 20  # larger models keep their weights in a file beside the graph, which the runtime maps
_CAST_FROM = 256  # elements; below this the cast costs more bytes than it saves


class GraphWriter:
    """Nodes and initializers of a graph with the inputs and outputs of ``like``."""

    def __init__(self, like: onnx.ModelProto) -> None:
        self.like = like
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._casts: dict[str, str] = {}

    def add(
        self, op: str, inputs: list[str], output: str, *, name: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output and return the output's name."""
        node = helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def raw(self, name: str, array: npt.NDArray[Any]) -> str:
        """Store ``array`` as it is under ``name``, once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def constant(self, name: str, array: npt.NDArray[np.float32]) -> str:
        """Store fp32 ``array`` in the fewest bytes that hold it exactly and return the name of its fp32 value."""
        if name in self._casts:
            return self._casts[name]
        small = _smallest(array) if array.size >= _CAST_FROM else array
        if small.dtype == np.float32:
            self._casts[name] = self.raw(name, array)
        else:
            self.raw(name, small)
            self._casts[name] = self.add("Cast", [name], f"{name}/fp32", to=TensorProto.FLOAT)
        return self._casts[name]

    def finish(self) -> onnx.ModelProto:
        """Return the model: inner names short, no documentation, no shapes of inner values."""
        fixed = {value.name for value in (*self.like.graph.input, *self.like.graph.output)}
        renamed: dict[str, str] = {}
        for node in self.nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name and name not in fixed:
                        names[place] = renamed.setdefault(name, _short(len(renamed)))
        unused = sorted(self.initializers.keys() - renamed.keys())
        assert not unused, f"initializers that no node reads: {unused[:3]}"
        tensors = []
        for name, tensor in self.initializers.items():
            tensor.name = renamed[name]
            tensors.append(tensor)
        graph = helper.make_graph(
            self.nodes, "edgestill", list(self.like.graph.input), list(self.like.graph.output), tensors
        )
        model = helper.make_model(graph, opset_imports=list(self.like.opset_import), producer_name="edgestill")
        model.ir_version = self.like.ir_version
        return model


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model``: one file when small, else the weights beside it in ``NAME.data``."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < EXTERNAL_FROM:
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def count_nodes(model: onnx.ModelProto, ops: Iterable[str]) -> dict[str, int]:
    """Return how many nodes of each of ``ops`` the graph has."""
    return {op: sum(1 for node in model.graph.node if node.op_type == op) for op in ops}


def _smallest(array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return ``array`` as fp16, else bf16, where every value is held exactly, else as it is."""
    for kind in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            small = array.astype(kind)
        if np.array_equal(small.astype(np.float32), array):
            return np.asarray(small)
    return array


def _short(number: int) -> str:
    """Return a name of one to three characters for a number."""
    digits = "abcdefghijklmnopqrstuvwxyz0123456789"
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, len(digits))
        text = digits[rest] + text
    return text
