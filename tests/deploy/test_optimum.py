"""The back-end optimum without its environment: what is said of it, and the runtime config; see tests/interop."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import EdgestillError, TargetError, UserError
from compress.model.checkpoint import read_config
from deploy.export import optimum
from deploy.export.stage import _model_facts, export
from deploy.params import ExportParams
from deploy.targets import load_target
from tests.deploy.tools import context


def run(source: Path, out: Path, **update: object) -> None:
    target = load_target("x86-laptop-avx2").model_copy(update=update)
    export(ExportParams(backend="optimum"), context("deploy.export", out, inputs={"model": source}, target=target))


def script(place: Path, text: str) -> Path:
    """An interpreter of sorts, which ignores its arguments or not as ``text`` says."""
    place.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    place.chmod(0o755)
    return place


def test_a_missing_environment_says_how_to_make_it(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(optimum.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no interpreter at .*none; .*make optimum-env.*EDGESTILL_OPTIMUM_PYTHON"):
        run(quantized, tmp_path / "out")
    monkeypatch.delenv(optimum.VARIABLE)
    monkeypatch.setattr(optimum, "_PLACE", tmp_path / "build" / "python")
    with pytest.raises(UserError, match=r"no interpreter at .*build/python"):
        run(quantized, tmp_path / "out")
    (tmp_path / "text").write_text("no program", encoding="utf-8")
    monkeypatch.setenv(optimum.VARIABLE, str(tmp_path / "text"))
    with pytest.raises(UserError, match=r"text cannot be run \(Permission denied\)"):
        run(quantized, tmp_path / "out")


def test_without_a_makefile_it_is_made_by_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert f"OPTIMUM := {' '.join(optimum.PACKAGES)}\n" in makefile
    monkeypatch.setenv(optimum.VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(optimum, "_MAKEFILE", tmp_path / "Makefile")
    with pytest.raises(UserError) as caught:
        optimum.interpreter()
    assert "optimum/bin/pip install torch==" in str(caught.value)
    assert "make " not in str(caught.value)
    assert optimum.VARIABLE in str(caught.value)


def test_a_graph_of_values_is_not_called_int4(quantized: Path) -> None:
    config = read_config(quantized)
    assert _model_facts(config, plain=False)["bits"] == 4
    assert _model_facts(config, plain=True)["bits"] is None
    assert _model_facts(config, plain=True)["group_size"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'Traceback' >&2; echo 'ModuleNotFoundError: no optimum' >&2; exit 1", "ModuleNotFoundError: no optimum"),
        ("exit 0", "it said nothing"),
    ],
)
def test_a_failure_over_there_is_one_message(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv(optimum.VARIABLE, str(script(tmp_path / "python", text)))
    with pytest.raises(EdgestillError, match=f"optimum-onnx failed: {said}.*make optimum-env") as caught:
        run(quantized, tmp_path / "out")
    assert caught.value.exit_code == 1


def test_the_target_is_asked_for_room_in_fp32(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes become fp32 again: 69,952 parameters are 280 kB of the 300 and more that are asked for."""
    monkeypatch.setenv(optimum.VARIABLE, str(script(tmp_path / "python", "exit 1")))
    with pytest.raises(TargetError, match=r"needs about 3\d\d kB of storage"):
        run(quantized, tmp_path / "out", storage_bytes=200_000)
