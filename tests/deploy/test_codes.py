"""Layout of codes for the runtime's operator: nothing is rounded, groups stay whole, padding is exactly zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ModelError
from deploy.export import codes
from deploy.export.codes import PAD, Coded


def random_coded(rows: int, groups: np.ndarray, bits: int, seed: int = 0, *, sym: bool = False) -> Coded:
    """A matrix of random codes."""
    draw = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    middle = np.full((rows, count), 1 << (bits - 1), np.uint8)
    return Coded(
        codes=draw.integers(0, 1 << bits, (rows, len(groups))).astype(np.uint8),
        scales=draw.random((rows, count)).astype(np.float32) + 0.1,
        zero_points=middle if sym else draw.integers(0, 1 << bits, (rows, count)).astype(np.uint8),
        groups=groups.astype(np.int64),
        bits=bits,
    )


def unpacked(packed: np.ndarray, bits: int, block: int) -> np.ndarray:
    """The operator's reading of packed codes, written plainly."""
    rows, blocks, _ = packed.shape
    values = np.zeros((rows, blocks * block), int)
    for row in range(rows):
        for column in range(blocks * block):
            byte = int(packed[row].reshape(-1)[column * bits // 8])
            values[row, column] = byte >> (column * bits % 8) & ((1 << bits) - 1)
    return values


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 80, 43])
def test_packed_codes_read_back_as_the_same_weights(bits: int, columns: int) -> None:
    matrix = random_coded(3, np.arange(columns) // 16, bits)
    block, order = codes.column_layout(matrix.groups, bits)
    ready = codes.take_columns(matrix, order, block)
    packed, scales, zero_points = codes.pack(ready, block)
    assert zero_points is not None
    steps = unpacked(packed, bits, block)[:, : len(order)]
    zeros = unpacked(zero_points[:, None], bits, zero_points.shape[1] * 8 // bits)[:, : scales.shape[1]]
    blocks = np.arange(len(order)) // block
    weight = (steps - zeros[:, blocks]) * scales[:, blocks]
    assert np.array_equal(weight.astype(np.float32)[:, order != PAD], matrix.weight()[:, order[order != PAD]])
    assert not weight[:, order == PAD].any()


def test_zero_points_in_the_middle_take_no_bytes() -> None:
    matrix = random_coded(2, np.arange(32) // 32, 4, sym=True)
    assert codes.pack(matrix, 32)[2] is None


@pytest.mark.parametrize(
    ("groups", "block", "identity"),
    [
        (np.arange(128) // 32, 32, True),
        (np.arange(128) // 64, 64, True),
        (np.zeros(256, int), 128, True),  # one group per row
        (np.zeros(96, int), 32, True),  # no bytes for a block that is filled up
        (np.arange(172) // 32, 32, True),  # a shorter last group
        (np.arange(129) // 43, 16, False),  # groups that are no whole blocks are filled up
        (np.array([1, 0] * 16), 16, False),  # act_order
    ],
)
def test_the_layout_finds_block_size_and_order(groups: np.ndarray, block: int, identity: bool) -> None:
    found, order = codes.column_layout(groups, 4)
    assert found == block
    assert codes.is_identity(order, len(groups)) == identity
    assert sorted(order[order != PAD]) == list(range(len(groups)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=90), st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_any_dealing_of_columns_to_groups_keeps_every_weight(dealt: list[int], bits: int, seed: int) -> None:
    groups = np.unique(np.array(dealt), return_inverse=True)[1]
    matrix = random_coded(2, groups, bits, seed)
    block, order = codes.column_layout(groups, bits)
    ready = codes.take_columns(matrix, order, block)
    real = order != PAD
    assert np.array_equal(ready.weight()[:, real], matrix.weight()[:, order[real]])
    assert not ready.weight()[:, ~real].any()
    assert len(codes.pack(ready, block)[0]) == 2


def test_padded_rows_are_zero_and_the_others_untouched() -> None:
    matrix = random_coded(3, np.arange(32) // 16, 4)
    taken = codes.take_rows(matrix, np.array([2, PAD, 0]))
    assert np.array_equal(taken.weight()[[0, 2]], matrix.weight()[[2, 0]])
    assert not taken.weight()[1].any()


def test_three_bits_have_no_operator() -> None:
    matrix = random_coded(2, np.zeros(16, int), 3)
    with pytest.raises(ModelError, match="3-bit codes; expected 2, 4 or 8 bits"):
        codes.pack(matrix, 16)
