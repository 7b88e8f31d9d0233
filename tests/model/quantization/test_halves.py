"""Sixteen bits for what stays plain: never infinite, exact where codes are, and the same for every reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.model.checkpoint import load_model
from compress.model.quantization.halves import exact_half, half, scale_bits
from compress.model.quantization.packing import dequantize
from compress.model.quantization.rtn import round_to_nearest
from deploy.export.gptq import export_gptq
from tests.deploy.tools import rounded
from tests.tiny import tiny_checkpoint

F16, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0.1, -3.0]], F16),
        ([[65504.0, 1.0]], F16),
        ([[65520.0, 1.0]], BF16),  # fp16 would round it to infinity
        ([[1e30, 1.0]], BF16),
        ([[1e-7, 1.0]], F16),  # small beside a large one in its row
        ([[1e-7, 2e-7], [1.0, 1.0]], BF16),  # a whole row that fp16 would leave two bits of
        ([[0.0, 0.0], [1.0, 1.0]], F16),
        ([1.0, 1e-9], F16),
    ],
)
def test_the_format_never_overflows_nor_loses_a_row(values: Any, kind: torch.dtype) -> None:
    given = torch.tensor(values)
    stored = half(given)
    assert stored.dtype == kind
    assert torch.isfinite(stored).all()
    assert ((stored.float() - given).abs().amax(-1) <= 2**-8 * given.abs().amax(-1)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_sixteen_bits_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ModelError, match="gain: values that 16 bits cannot hold"):
        half(torch.tensor([1.0, value]), "gain")


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 1.0, 300.0, 6e4, 6.55e4, 1e5, 2e5])
@pytest.mark.parametrize("clip_steps", [0, 10])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (8, False)])
def test_values_of_codes_fit_sixteen_bits_exactly(size: float, clip_steps: int, bits: int, sym: bool) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits))
    weight *= size / weight.abs().max()
    grid = {"bits": bits, "sym": sym, "clip_steps": clip_steps}
    values = dequantize(
        *round_to_nearest(weight, group_size=32, **grid, scale_bits=scale_bits(weight, bits=bits, sym=sym))
    )
    stored = exact_half(values)
    assert stored is not None
    assert torch.isfinite(stored).all()
    assert stored.dtype == (F16 if size < 58_000 else BF16) or 58_000 < size < 66_000  # there either may do
    plain = dequantize(*round_to_nearest(weight, group_size=32, **grid))
    error, own = ((one - weight).square().mean() for one in (plain, values))
    assert own < (1.6 if size < 58_000 else 3.5) * error  # of rougher scales


def changed(source: Path, **factors: float) -> Path:
    """Multiply the tensors whose names hold a key."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    for part, factor in factors.items():
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("embedding_bits", [4, 8, 16])
@pytest.mark.parametrize(("factors", "kind"), [({}, F16), ({"embed": 1e6}, BF16), ({"input_layernorm": 1e5}, BF16)])
def test_nothing_stored_is_wider_nor_infinite(
    embedding_bits: int, factors: dict[str, float], kind: torch.dtype, tmp_path: Path
) -> None:
    source = changed(tiny_checkpoint(tmp_path / "model", "qwen2", tied=False), **factors)
    out = rounded(source, tmp_path / "out", embedding_bits=embedding_bits, sym=False)
    tensors = load_file(out / "model.safetensors")
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert all(tensor.element_size() == 2 and torch.isfinite(tensor).all() for tensor in floats.values())
    assert {tensor.dtype for name, tensor in floats.items() if any(part in name for part in factors)} <= {kind}
    told = json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"]
    assert told == ("bfloat16" if factors else "float16")  # which a reader computes in
    opened = dict(load_model(out).named_parameters())
    for name, tensor in floats.items():
        if name in opened:
            assert torch.equal(opened[name], tensor.float())  # what we judge is what others read
    export_gptq(out, tmp_path / "gptq")
    assert (tmp_path / "gptq" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
