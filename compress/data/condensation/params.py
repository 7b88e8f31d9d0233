"""Parameters of the condensation stages; imports only pydantic, so that a profile is checked without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.context import Params
from compress.patterns import slow_pattern

REWRITE = (
    "{prompt}\n\nHere is a correct answer:\n\n{answer}\n\n"
    "Answer the request in your own words, with the same result. Write the answer only."
)


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


class SelfDistillationParams(Params):
    """Reference answers said again by the unpruned model."""

    share: float = Field(default=1.0, ge=0.0, le=1.0, description="share of the rows to rewrite; 0: the pool as it is")
    request: str = Field(
        default=REWRITE, description="what the teacher is asked; {prompt} and {answer} stand for the row's own"
    )
    check: Literal["auto", "json", "label", "number", "pattern", "none"] = Field(
        default="auto",
        description="what reference and rewrite must agree in: the JSON, the labels named, the last number, the last "
        "match of pattern; auto: JSON where the answer is JSON, labels where it names one, else the last number; "
        "none: every rewrite is taken",
    )
    pattern: str = Field(default="", description="for check: pattern, a regular expression; its first group counts")
    max_new_tokens: int = Field(default=256, ge=1, description="longest rewrite; one that does not end is not taken")
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        le=5.0,
        description="of the rewrites; 0: greedy, which narrows students of free text: 1 there",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "{answer}" not in self.request or "{prompt}" not in self.request:
            raise ValueError("request must hold {prompt} and {answer}, so that the teacher sees both")
        if (self.check == "pattern") != bool(self.pattern):
            raise ValueError("check: pattern and pattern go together; set both or neither")
        if reason := slow_pattern(self.pattern, repeats=6):
            raise ValueError(f"pattern {reason}")
        return self
