"""The shape that a student will have, from the teacher's config and the stage's parameters alone.

Imports no torch: a plan asks this too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.model.distillation.params import DEFAULT_RATIO, LogitsParams
from compress.model.shapes import StudentShape, nearest_shape, shape_for_ratio, shape_of


def student_shape(teacher: Mapping[str, Any], params: LogitsParams, *, where: str) -> tuple[StudentShape, list[str]]:
    """The student's shape, and notes on sizes that were rounded.

    Raises:
        ModelError: the shape cannot be cut out of the teacher, or does not fit together.
    """
    if not params.sizes:
        ratio = DEFAULT_RATIO if params.prune_ratio is None else params.prune_ratio
        axes = ("heads", "ffn", "layers")
        return shape_for_ratio(teacher, ratio, axes=axes, multiple_of=params.multiple_of, where=where), []
    if params.init == "scratch":
        own = shape_of(teacher)
        given = params.sizes
        shape = StudentShape(
            layers=given.get("layers", own.layers),
            heads=given.get("heads", own.heads),
            kv_heads=given.get("kv_heads", min(own.kv_heads, given.get("heads", own.heads))),
            ffn=given.get("ffn", own.ffn),
            hidden=given.get("hidden", own.hidden),
        )
        return shape, []
    return nearest_shape(
        teacher,
        layers=params.layers,
        heads=params.heads,
        kv_heads=params.kv_heads,
        ffn=params.ffn,
        hidden=params.hidden,
        multiple_of=params.multiple_of,
        where=where,
    )
