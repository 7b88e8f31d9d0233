"""The first stage of every run: the user's file becomes an artifact of canonical rows.

`read` is the stage function. What a row is and how formats are told apart lives in ``compress.data.rows``; this
module only joins it to the store. It knows nothing of weights.
"""

from __future__ import annotations

from compress.context import StageContext, StageResult
from compress.data.rows import read_source, write_quarantine, write_rows
from compress.ingestion_params import SourceParams


def read(params: SourceParams, ctx: StageContext) -> StageResult:
    """Read ``ctx.inputs["source"]`` into rows; malformed lines stop the run or go to ``quarantine.jsonl``.

    Raises:
        DataError: the source is missing, malformed (file and line are named) or holds no row.
    """
    found = read_source(
        ctx.inputs["source"],
        format=params.format,
        columns=params.columns,
        on_error=params.on_error,
        separator=params.separator,
        split=params.split,
    )
    write_rows(ctx.out, found.rows)
    write_quarantine(ctx.out, found.quarantined)
    notes = list(found.notes)
    malformed = len(found.quarantined)
    if malformed:
        notes.append(f"{malformed} malformed lines were set aside in quarantine.jsonl")
    rows = len(found.rows)
    dropped = {"malformed": malformed} if malformed else {}
    return StageResult(metrics={"rows_in": rows + malformed, "rows_out": rows, "dropped": dropped}, notes=notes)
