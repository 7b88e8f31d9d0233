"""The config of a student that starts from scratch: the teacher's architecture, other sizes, another vocabulary.

Imports no torch: a plan asks this too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.shapes import StudentShape, shape_of, with_shape
from compress.tokenizer_files import highest_id, read_tokenizer


def scratch_config(teacher: Mapping[str, Any], params: CrossTokenizerParams) -> dict[str, Any]:
    """The student's config by ``params``; its context holds ``max_tokens`` tokens at least.

    Raises:
        ModelError: the tokenizer cannot be read.
    """
    assert params.tokenizer is not None, "the parameters ask for it"
    given = {name: value for name, value in params.sizes.items() if name != "head_dim"}
    own = asdict(shape_of(teacher))
    if "heads" in given:
        own["kv_heads"] = min(own["kv_heads"], given["heads"])
    values = with_shape(teacher, StudentShape(**(own | given)))
    values["head_dim"] = values["head_dim"] if params.head_dim is None else params.head_dim
    values["vocab_size"] = tokenizer_size(Path(params.tokenizer))
    values["max_position_embeddings"] = max(int(teacher.get("max_position_embeddings") or 0), params.max_tokens)
    return values


def tokenizer_size(folder: Path) -> int:
    """Number of token ids of the tokenizer in ``folder``.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            str(folder),
            "no tokenizer.json in it",
            "the folder of a fast tokenizer",
            "Relative paths start at the current folder",
        )
    return highest_id(read_tokenizer(folder)) + 1
