"""The first stage of every run: the user's file becomes an artifact of canonical rows.

`read` is the stage function. What a row is and how formats are told apart lives in ``compress.data.rows``; this
module only joins it to the store. It knows nothing of weights.
"""

from __future__ import annotations

import json

from compress.context import StageContext, StageResult
from compress.data.rows import read_source, write_rows
from compress.errors import DataError
from compress.ingestion_params import SourceParams

QUARANTINE = "quarantine.jsonl"


def read(params: SourceParams, ctx: StageContext) -> StageResult:
    """Read ``ctx.inputs["source"]`` into rows; malformed lines stop or go to ``quarantine.jsonl``.

    Raises:
        DataError: the source is missing, malformed (file and line are named) or holds no row.
    """
    source = ctx.inputs["source"]
    found = read_source(
        source,
        format=params.format,
        columns=params.columns,
        on_error=params.on_error,
        separator=params.separator,
    )
    if not found.rows:
        raise DataError(str(source), "no row in it", "at least one row of messages, prompt and response, or text")
    write_rows(ctx.out, found.rows)
    notes = []
    if found.quarantined:
        lines = (json.dumps(line, sort_keys=True, ensure_ascii=False, default=str) for line in found.quarantined)
        (ctx.out / QUARANTINE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        notes.append(f"{len(found.quarantined)} malformed lines were set aside in {QUARANTINE}")
    dropped = {"malformed": len(found.quarantined)} if found.quarantined else {}
    total = len(found.rows) + len(found.quarantined)
    return StageResult(metrics={"rows_in": total, "rows_out": len(found.rows), "dropped": dropped}, notes=notes)
