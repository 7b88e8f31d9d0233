"""Parameters of the condensation stages; imports only pydantic, so that a profile is checked without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.context import Params


class KCenterParams(Params):
    """Farthest-point selection down to a row budget."""

    rows: int | None = Field(default=None, ge=1, description="rows to keep; empty: share decides")
    share: float = Field(default=0.5, gt=0.0, le=1.0, description="share of the rows to keep, where rows is empty")
    embedding: Literal["hashed", "teacher"] = Field(
        default="teacher", description="teacher: its mean last hidden state; hashed: TF-IDF of hashed n-grams"
    )
    of: Literal["prompt", "all"] = Field(default="prompt", description="which part of a chat is embedded")
    stratify: Literal["none", "proportional", "equal"] = Field(
        default="none",
        description="one selection per label, or function called where there is none, the budget split by size or "
        "evenly; none: one selection over all",
    )
    dims: int = Field(default=512, ge=16, le=65_536, description="width of the hashed embedding")
    max_tokens: int = Field(default=512, ge=8, description="longer rows are cut for the teacher's embedding")
