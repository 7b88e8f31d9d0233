"""What a run measured of a bundle, for the ``bundle.json`` of the archive that ships: `figures_of_run`.

Evaluation, gate and benchmark follow the export, and a stored artifact is never changed: their figures stand in the
run's record, and are joined to a copy of the bundle. Holds no path and no name of a person's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.files import file_sha256
from compress.run_record import RunRecord

MEASURED = "measured"
_STEP = ("name", "key", "inputs", "params", "metrics", "notes", "seconds", "peak_memory_bytes")


def figures_of_run(record: RunRecord, bundle: Path) -> dict[str, Any]:
    """``{"measured": {...}}``: ledger, gate, benchmarks and every step with its parameters, figures and notes.

    Raises:
        UserError: the run made no bundle, or another one than ``bundle``.
    """
    made = record["bundle"]
    if made is None:
        raise UserError(f"run {record['id']}", "made no bundle", do="See: edgestill ls runs")
    ours, theirs = (Path(folder) / "bundle.json" for folder in (bundle, made))
    if not theirs.is_file() or file_sha256(ours) != file_sha256(theirs):
        raise UserError(f"run {record['id']}", f"made another bundle than {bundle}", f"the one in {made}")
    steps = [{name: dict(stage)[name] for name in _STEP} for stage in record["stages"] if stage["state"] == "done"]
    teacher = {name: value for name, value in record["teacher"].items() if name != "path"}
    return {
        MEASURED: {
            "teacher": teacher,
            "ledger": record["ledger"],
            "gate": record["gate"],
            "bench": record["bench"],
            "steps": steps,
            "device": record["device"],
            "versions": record["versions"],
        }
    }
