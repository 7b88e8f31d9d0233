"""The last step of every stage that takes rows out: write what is left, write what went, refuse an empty result.

`finish` does it, so that all stages report the same figures. Knows nothing of why a row goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compress.context import StageContext, StageResult
from compress.data.rows import Dropped, Row, write_rows
from compress.errors import DataError


def finish(
    ctx: StageContext,
    kept: Sequence[Row],
    dropped: Sequence[Dropped],
    *,
    do: str,
    metrics: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> StageResult:
    """Write the artifact and count; ``do`` tells the user what to change should no row be left.

    Raises:
        DataError: no row is kept; the message counts the reasons.
    """
    reasons = dict(sorted(Counter(d.reason for d in dropped).items()))
    if not kept:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
        raise DataError(ctx.name, f"no row is left of {len(dropped)} ({counts or 'none came in'})", "", do)
    write_rows(ctx.out, kept, dropped, stage=ctx.name)
    figures = {"rows_in": len(kept) + len(dropped), "rows_out": len(kept), "dropped": reasons, **(metrics or {})}
    return StageResult(metrics=figures, notes=list(notes))
