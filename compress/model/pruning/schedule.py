"""Which sizes pruning goes through: the final shape, and the rounds on the way to it.

`final_shape` turns the stage's parameters into a shape that can be saved and opened, `rounds` splits a large cut
into several of at most about ``max_step`` each (Minitron: at most a third at once). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.model.pruning.params import StructuredParams
from compress.model.shapes import (
    StudentShape,
    head_options,
    nearest_shape,
    parameter_count,
    shape_for_ratio,
    shape_of,
    with_shape,
)


def final_shape(config: Mapping[str, Any], params: StructuredParams, *, where: str) -> tuple[StudentShape, list[str]]:
    """Return the shape to reach and notes on what was rounded; ModelError when it cannot be cut from ``config``."""
    if params.sizes:
        return nearest_shape(config, **params.sizes, multiple_of=params.multiple_of, where=where)
    shape = shape_for_ratio(
        config, params.ratio, axes=params.axes, multiple_of=params.multiple_of, where=f"{where}.prune_ratio"
    )
    got = removed(config, shape)
    notes = []
    if abs(got - params.ratio) > 0.001:
        notes.append(f"prune_ratio {params.ratio:g}: the nearest shape that can be saved removes {got:.3f}")
    return shape, notes


def removed(config: Mapping[str, Any], shape: StudentShape) -> float:
    """Return the fraction of the parameters of ``config`` that ``shape`` does without."""
    return 1 - parameter_count(with_shape(config, shape)) / parameter_count(config)


def rounds(
    config: Mapping[str, Any], final: StudentShape, *, max_step: float, multiple_of: int = 32
) -> list[StudentShape]:
    """Return the shapes to go through, ``final`` last; empty when ``final`` is the shape already.

    Every size falls by the same factor per round, rounded to the grid, never below its final value.
    """
    own = shape_of(config)
    if final == own:
        return []
    left = 1 - removed(config, final)
    count = max(1, math.ceil(math.log(left) / math.log(1 - max_step) - 1e-9))
    path: list[StudentShape] = []
    before = own
    for index in range(1, count):
        shape = _between(config, (own, before, final), index / count, multiple_of=multiple_of)
        if shape not in (before, final):
            path.append(shape)
            before = shape
    return [*path, final]


def _between(
    config: Mapping[str, Any],
    ends: tuple[StudentShape, StudentShape, StudentShape],
    part: float,
    *,
    multiple_of: int,
) -> StudentShape:
    """Return the shape ``part`` of the way from the first to the last of ``ends``, not above the middle one."""
    own, before, final = ends

    def size(key: str, grid: int) -> int:
        start, last, end = (getattr(shape, key) for shape in ends)
        wanted = start * (end / start) ** part
        return int(min(last, max(end, round(wanted / grid) * grid)))

    hidden = size("hidden", multiple_of)
    pairs = _passable(config, hidden, before, final)
    if not pairs:  # no head count suits this width on the way: leave the width for a later round
        hidden = int(before.hidden or 0)
        pairs = _passable(config, hidden, before, final)
    wanted_heads = own.heads * (final.heads / own.heads) ** part
    heads, kv = min(pairs, key=lambda pair: (abs(pair[0] - wanted_heads), -pair[1]))
    return StudentShape(layers=size("layers", 1), heads=heads, kv_heads=kv, ffn=size("ffn", multiple_of), hidden=hidden)


def _passable(
    config: Mapping[str, Any], hidden: int, before: StudentShape, final: StudentShape
) -> list[tuple[int, int]]:
    """Return the head pairs that can be cut out of ``before`` and from which ``final`` can still be cut."""
    widest, narrowest = before.heads // before.kv_heads, final.heads // final.kv_heads
    return [
        (heads, kv)
        for heads, kv in head_options(config, hidden=hidden)
        if final.kv_heads <= kv <= before.kv_heads and narrowest <= heads // kv <= widest
    ]
