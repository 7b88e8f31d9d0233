#!/bin/sh
# MatMulNBitsQuantizer drops its own block size, symmetry and accuracy level when an algorithm is named.
#
# Versions:  onnxruntime 1.32.0, onnx 1.23.2
# Expected:  block_size=32, is_symmetric=True and accuracy_level=4 given to the quantizer hold whichever algorithm is
#            named beside them, or are refused beside it.
# Behaviour: they hold without an algorithm, and with RTN the block size does; with DefaultWeightOnlyQuantConfig() the
#            algorithm's own defaults (128, asymmetric, no accuracy level) win without a message. The accuracy level
#            alone changes the speed several times over.
# Output:    none: block 32, accuracy 4, zero points no; RTN: block 32; default: block 128, accuracy none, zero points
#            yes
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 numpy==2.2.6 ml_dtypes sympy
venv/bin/python - <<'PY' 2>/dev/null
import contextlib
import io
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

weight = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)


def made(algorithm):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", n]) for name, n in (("x", 256), ("y", 128))]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantizer = nbits.MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, accuracy_level=4, algo_config=algorithm)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    (node,) = [node for node in quantizer.model.model.graph.node if node.op_type == "MatMulNBits"]
    settings = {one.name: one.i for one in node.attribute}
    return settings["block_size"], settings.get("accuracy_level", 0), len(node.input) > 3 and bool(node.input[3])


none, rtn, default = made(None), made(nbits.RTNWeightOnlyQuantConfig()), made(nbits.DefaultWeightOnlyQuantConfig())
for name, (block, level, points) in (("none", none), ("RTN", rtn), ("default", default)):
    print(f"{name}: block {block}, accuracy {level or 'none'}, zero points {'yes' if points else 'no'}")
sys.exit(not (none == (32, 4, False) and rtn[0] == 32 and default == (128, 0, True)))
PY
