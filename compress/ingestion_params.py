"""Parameters of the stage that reads the user's files; imports only pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.context import Params


class SourceParams(Params):
    """How a file or folder of rows is read; the same for pool, test and reference of one profile."""

    format: Literal["auto", "jsonl", "parquet", "text", "datasets"] = Field(
        "auto", description="file format; auto goes by the ending"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name -> the file's name, for files with other column names"
    )
    on_error: Literal["stop", "quarantine"] = Field(
        "stop", description="a malformed line stops the run, or is set aside and counted"
    )
    separator: str = Field(
        "auto",
        description="text files: the mark between texts; a line feed gives a row per line, two a row per paragraph",
    )
    split: Literal["train", "valid", "test"] | None = Field(
        None,
        description="of a folder or hub name only this split; test rows of the hub, or of the pool's own data set, are "
        "always its test split",
    )
