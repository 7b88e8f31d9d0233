"""What a bundle is told of its past: licences that cards state, figures that checkpoints carry, and keys that know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.files import NOT_STATED, file_sha256, licence_of
from compress.identities import model_identity
from compress.lineage import figures_of
from compress.shipping import figures_of_run

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


def test_a_licence_that_goes_into_the_bundle_is_part_of_the_key(tmp_path: Path) -> None:
    """The rest of a card is not: it goes nowhere."""
    (tmp_path / "config.json").write_text("{}")
    bare = model_identity(tmp_path, file_sha256)
    (tmp_path / "README.md").write_text("# A model\n")
    assert licence_of(tmp_path) == NOT_STATED
    assert model_identity(tmp_path, file_sha256) == bare
    (tmp_path / "README.md").write_text(CARD)
    stated = model_identity(tmp_path, file_sha256)
    assert licence_of(tmp_path) == "apache-2.0"
    assert stated != bare
    (tmp_path / "README.md").write_text(CARD + "more\n")
    assert model_identity(tmp_path, file_sha256) == stated


def test_a_checkpoints_own_figures_are_told_and_nothing_else(tmp_path: Path) -> None:
    assert figures_of(tmp_path) == {}
    told = {"stage": "x", "shape": {"layers": 2}, "training": {"steps": 9, "notes": []}, "figures": {"kl": 0.5}}
    (tmp_path / "edgestill.json").write_text(json.dumps(told))
    assert figures_of(tmp_path) == {"steps": 9, "kl": 0.5}


def test_a_run_without_a_bundle_has_no_figures_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run r: made no bundle. See: edgestill ls runs"):
        figures_of_run({"id": "r", "bundle": None}, tmp_path)
