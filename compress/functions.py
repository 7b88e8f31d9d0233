"""The table of functions that an assistant's rows call: what there is on the device, as far as rows tell.

Knows nothing of models; what a call looks like is known to ``evaluators.metrics``.
"""

from __future__ import annotations

from pathlib import Path

from compress.data.rows import read_rows
from evaluators.metrics import functions_in

INVENTED = frozenset({"magpie", "impossible"})  # sources of rows that a model wrote: it may have made names up, too


def functions_of(folder: Path) -> dict[str, list[str]]:
    """Functions that the rows of a data artifact call, with their arguments; empty where fewer than half are calls."""
    return functions_in(row.answer for row in read_rows(folder) if row.is_chat and row.source not in INVENTED)
