"""Reads mutated inputs in a process of its own: one line ``READER:SEED`` in, one line of JSON out.

A native library may end the process, or fill memory: whoever started it sees that. To repeat one by hand:
``python -m tests.hardening.worker 'config.json:17'``.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

MOST_SECONDS, MOST_GROWTH = 20.0, 1 << 30  # processor time, and bytes of the resident set, for one input


def attempt(text: str, made: Any, folder: Path) -> dict[str, Any]:
    """Mutate and read; the verdict is ``ok``, ``refused`` or ``fault``."""
    from compress.errors import EdgestillError, printable
    from tests.hardening.readers import NAMES, drawn

    name, _, seed = text.rpartition(":")
    reader, draw = NAMES[name], drawn(name, int(seed))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader.seed(made, folder)
    reader.mutate(folder, draw)  # an error here is the engine's own, and ends the process
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    verdict, said = "ok", ""
    try:
        reader.read(folder, made)
    except EdgestillError as error:
        said = printable(str(error))
        verdict = "refused" if error.exit_code in (1, 2) and len(said) < 20_000 else "fault"
        said.encode()  # what cannot be shown is no message
    except OSError as error:  # the command line tells it as it is
        verdict, said = "refused", repr(error)[:300]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        verdict, said = "fault", "".join(traceback.format_exception(error))[-3000:]
    seconds = time.process_time() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if verdict != "fault" and (seconds > MOST_SECONDS or growth > MOST_GROWTH):
        verdict, said = "fault", f"{seconds:.0f} s and {growth >> 20} MiB: {said[:500]}"
    return {"input": text, "verdict": verdict, "said": said, "seconds": seconds, "growth": growth}


def main(arguments: list[str]) -> None:
    """Read those that are named, or those that come on standard input."""
    from tests.hardening.readers import Made

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    if not arguments:  # what libraries print does not get between the answers
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "made").mkdir()
        made = Made(Path(root) / "made")
        for line in arguments or sys.stdin:
            answers.write(json.dumps(attempt(line.strip(), made, Path(root) / "input")) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
