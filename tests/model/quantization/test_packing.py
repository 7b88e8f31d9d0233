"""The layout: every width there and back, golden words, the zero point's offset, damaged tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ModelError
from compress.model.quantization import packing
from compress.model.quantization.packing import QuantizedLinear
from tests.reference.quantization import pack_column

WIDTHS = packing.WIDTHS


def random_layer(
    out: int = 24, inputs: int = 96, *, bits: int = 4, group_size: int = 32, seed: int = 0
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    g_idx = packing.group_index(inputs, group_size)
    groups = int(g_idx.max()) + 1
    return QuantizedLinear(
        torch.randint(0, 1 << bits, (out, inputs), generator=generator).to(torch.uint8),
        (torch.rand(out, groups, generator=generator) + 0.01).to(torch.float16),
        torch.randint(0, 1 << bits, (out, groups), generator=generator).to(torch.uint8),
        g_idx,
    )


@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 140), columns=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_what_was_packed(bits: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = packing.pack_rows(values, bits)
    assert words.dtype == torch.int32
    assert [words[:, i].tolist() for i in range(columns)] == [
        pack_column(values[:, i].tolist(), bits) for i in range(columns)
    ]
    assert torch.equal(packing.unpack_rows(words, bits, rows).long(), values)


def test_words_of_the_published_layout() -> None:
    # worked out by hand after AutoGPTQ 0.7.1, qlinear_cuda_old.pack: value j of a word at bit j * bits,
    # and for 3 bits ten values, two bits of the 11th, then its third bit at the start of the next word
    count = torch.arange(8).unsqueeze(1)
    assert packing.pack_rows(count, 4).tolist() == [[0x76543210]]
    assert packing.pack_rows(15 - count, 4).flatten().tolist() == [0x89ABCDEF - (1 << 32)]
    assert packing.pack_rows(torch.tensor([[1], [2], [3], [255]]), 8).flatten().tolist() == [0xFF030201 - (1 << 32)]
    assert packing.pack_rows(torch.tensor([[1], [2], [3]]), 2).tolist() == [[0b111001]]
    eleventh = torch.zeros(32, 1, dtype=torch.int64)
    eleventh[10] = 0b110
    assert packing.pack_rows(eleventh, 3).flatten().tolist() == [-(1 << 31), 1, 0]


def test_golden_layer() -> None:
    layer = QuantizedLinear(
        codes=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 0.25], [1.0, 2.0]], dtype=torch.float16),
        zero_points=torch.tensor([[8, 1], [15, 3]], dtype=torch.uint8),
        g_idx=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
    )
    packed = packing.pack_layer(layer, bits=4)
    assert packed["qweight"].tolist() == [[0x76543210, 0x89ABCDEF - (1 << 32)]]
    assert packed["qzeros"].tolist() == [[0xE7], [0x20]]  # zero point - 1, first output lowest
    assert packed["scales"].tolist() == [[0.5, 1.0], [0.25, 2.0]]
    weights = packing.dequantize(*layer)
    assert weights[0].tolist() == [-4.0, -3.5, -3.0, -2.5, 0.75, 1.0, 1.25, 1.5]
    assert weights[1].tolist() == [0.0, -1.0, -2.0, -3.0, 16.0, 14.0, 12.0, 10.0]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("inputs", "group_size"), [(96, 32), (96, -1), (172, 32), (43, 16)])
@pytest.mark.parametrize("out", [24, 5])
def test_a_layer_comes_back_whole(bits: int, inputs: int, group_size: int, out: int) -> None:
    layer = random_layer(out, inputs, bits=bits, group_size=group_size)
    packed = {f"x.{name}": tensor for name, tensor in packing.pack_layer(layer, bits=bits).items()}
    for given_bits in (bits, None):
        back = packing.read_layer(packed, "x", bits=given_bits)
        assert all(torch.equal(a, b) for a, b in zip(layer, back, strict=True))
        assert torch.equal(packing.dequantize(*layer), packing.dequantize(*back))


def test_a_zero_point_of_zero_wraps_and_comes_back() -> None:
    layer = random_layer()._replace(zero_points=torch.zeros(24, 3, dtype=torch.uint8))
    packed = packing.pack_layer(layer, bits=4)
    assert set(packed["qzeros"].flatten().tolist()) == {-1}
    assert not packing.read_layer({f"x.{k}": v for k, v in packed.items()}, "x").zero_points.any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_of_codes_are_codes_again(bits: int) -> None:
    layer = random_layer(bits=bits)
    weights = packing.dequantize(*layer)
    assert torch.equal(packing.quantize(weights, *layer[1:], bits=bits), layer.codes)


def test_a_whole_checkpoint_is_dequantized() -> None:
    layers = {"a.q_proj": random_layer(seed=1), "b.up_proj": random_layer(16, 64, seed=2)}
    tensors = {f"{p}.{s}": t for p, layer in layers.items() for s, t in packing.pack_layer(layer, bits=4).items()}
    tensors |= {"norm.weight": torch.ones(3), "a.q_proj.bias": torch.ones(24)}
    plain = packing.dequantize_checkpoint(tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"})
    assert plain.keys() == {"norm.weight", "a.q_proj.bias", "a.q_proj.weight", "b.up_proj.weight"}
    for prefix, layer in layers.items():
        assert torch.equal(plain[f"{prefix}.weight"], packing.dequantize(*layer))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2.*gives garbage"),
        ({"bits": 5}, "bits 5"),
    ],
)
def test_other_formats_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        packing.dequantize_checkpoint({}, {"quant_method": "gptq", "bits": 4} | change)


def test_damaged_tensors_are_refused() -> None:
    packed = {f"x.{name}": tensor for name, tensor in packing.pack_layer(random_layer(), bits=4).items()}
    with pytest.raises(ModelError, match=r"missing tensors x\.qzeros"):
        packing.read_layer({k: v for k, v in packed.items() if k != "x.qzeros"}, "x")
    with pytest.raises(ModelError, match="shapes that belong together"):
        packing.read_layer(packed | {"x.scales": packed["x.scales"][:, :7]}, "x")
    with pytest.raises(ModelError, match="shapes that belong together"):
        packing.read_layer(packed | {"x.g_idx": packed["x.g_idx"] + 2}, "x")
    with pytest.raises(ModelError, match="shapes that belong together"):
        packing.read_layer(packed, "x", bits=8)
    with pytest.raises(ModelError, match="room for 9 codes of 4 bits"):
        packing.unpack_rows(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
    with pytest.raises(ModelError, match="one of"):
        packing.pack_rows(torch.zeros(1, 1), 5)
