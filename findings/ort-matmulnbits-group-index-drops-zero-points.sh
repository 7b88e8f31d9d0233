#!/bin/sh
# MatMulNBits with a group index leaves the zero points out.
#
# Versions:  onnxruntime 1.32.0, onnx 1.23.2
# Expected:  the operator's inputs zero_points and g_idx are both optional and may be given together; a g_idx that
#            only repeats the natural order of the groups (0 ... 0 1 ... 1) changes nothing.
# Behaviour: with both, packed 4-bit zero points are ignored and 8 is taken in their place, on the CPU and at both
#            accuracy levels. An asymmetric GPTQ checkpoint with act_order that is written this way gives wrong
#            products and no message.
# Output:    without g_idx off by 0.000 from the definition; with g_idx off by 44.413 from it and by 0.000 from zero
#            points of 8
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.2.6
venv/bin/python - <<'PY'
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

inner, outer, block = 64, 8, 32
draw = np.random.default_rng(0)
codes = draw.integers(0, 16, (outer, inner)).astype(np.uint8)
points = draw.integers(0, 16, (outer, inner // block)).astype(np.uint8)
scales = draw.uniform(0.5, 1, (outer, inner // block)).astype(np.float32)
x = draw.standard_normal((3, inner)).astype(np.float32)


def product(zero_points):
    grouped = codes.reshape(outer, -1, block).astype(np.float32) - zero_points
    return x @ (grouped * scales[..., None]).reshape(outer, inner).T


def operator(group_index):
    held = {
        "codes": (TensorProto.UINT8, (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(outer, -1, block // 2)),
        "scales": (TensorProto.FLOAT, scales),
        "points": (TensorProto.UINT8, points[:, 0::2] | points[:, 1::2] << 4),
    }
    if group_index:
        held["index"] = (TensorProto.INT32, (np.arange(inner) // block).astype(np.int32))
    tensors = [helper.make_tensor(name, kind, a.shape, a.tobytes(), raw=True) for name, (kind, a) in held.items()]
    node = helper.make_node("MatMulNBits", ["x", *held], ["y"], domain="com.microsoft",
                            K=inner, N=outer, bits=4, block_size=block)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, n]) for name, n in (("x", inner), ("y", outer))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], tensors), opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def off(a, b):
    return float(np.abs(a - b).max())


right, of_eight = product(points[..., None].astype(np.float32)), product(8.0)
plain, indexed = operator(False), operator(True)
print(f"without g_idx off by {off(plain, right):.3f} from the definition; with g_idx off by {off(indexed, right):.3f} "
      f"from it and by {off(indexed, of_eight):.3f} from zero points of 8")
sys.exit(not (off(plain, right) < 1e-3 and off(indexed, right) > 1 and off(indexed, of_eight) < 1e-3))
PY
