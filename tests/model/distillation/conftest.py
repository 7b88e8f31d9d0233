"""Contexts for training runs in a temporary folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.context import StageContext
from compress.progress import Progress


@pytest.fixture
def context(tmp_path):
    """Make a stage context with its own work and output folder."""

    def make(name: str = "run", **more) -> StageContext:
        work, out = tmp_path / name / "work", tmp_path / name / "out"
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        values = {"name": "model.distillation.logits", "inputs": {}, "seed": 3, "threads": 1} | more
        return StageContext(out=out, work=work, progress=Progress(quiet=True), **values)

    return make


def files(folder: Path) -> dict[str, bytes]:
    """Contents of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(Exception):
    """Stands for a kill."""


def dying(*_: Any, **__: Any) -> None:
    """In the place of a function: the kill comes there."""
    raise Killed("killed")


def killed_while_saving(module: Any, run: Callable[[StageContext], Any], ctx: StageContext) -> None:
    """Run a stage of ``module`` that is killed before its student is saved, and empty its output as the store does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_model", dying)
        with pytest.raises(Killed, match="killed"):
            run(ctx)
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
