"""Names on the hub against paths, and the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.names import closest, is_hub_name, nearest


@pytest.mark.parametrize(
    "text",
    [
        "owner/name",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen2.5-0.5B",
        "a-b_c/d.e_f",
        "o/v1.5",
        "o/d@v1.0",
        "o/d@refs/pr/1",
    ],
)
def test_hub_names(text: str) -> None:
    assert is_hub_name(text)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "/owner/name",
        "a/b/c",
        "./name",
        "../name",
        ".cache/name",
        "~/name",
        "owner/",
        "/name",
        "owner/pool.jsonl",
        "owner/POOL.JSONL",
        "owner/config.json",
        "owner/text.txt",
        "http://host",
        "owner/na me",
        "owner/name@",
        "owner/name@..",
        "owner/name@refs/../../x",
        "owner/name@/x",
        "owner/pool.jsonl@v1",
        "öwner/name",
        "",
    ],
)
def test_what_is_no_hub_name(text: str) -> None:
    assert not is_hub_name(text)


def test_a_misspelt_path_is_no_hub_name(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert is_hub_name("models/gone")
    assert not is_hub_name("models/gone", tmp_path / "elsewhere", tmp_path)


def test_nearest() -> None:
    assert nearest("sead", ["seed", "steps"]) == "Did you mean 'seed'?"
    assert nearest("zzz", ["seed", "steps"]) == ""
    assert closest("quest", ["question"], cutoff=0.9) is None
