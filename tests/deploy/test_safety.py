"""Opening a bundle runs no code and reads no file but its own, whatever its configuration asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.assessment_params import CheckpointBenchParams
from compress.checkpoint_bench import bench
from compress.errors import ModelError
from deploy.bundle import BUNDLE_FILE, GENAI_CONFIG, RUNNER, open_bundle, write_bundle
from deploy.bundle_runner import run
from deploy.machine import measure_rates
from deploy.runners import GenaiRunner
from tests.deploy.tools import context


def altered(bundle: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose runtime's configuration was changed, with digests that are right."""
    shutil.copytree(bundle, out)
    path = out / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    described(out)
    return out


def described(folder: Path, **facts: Any) -> None:
    """Write ``bundle.json`` anew."""
    info = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
    write_bundle(folder, {key: value for key, value in info.items() if key not in ("edgestill", "files")} | facts)


def evil(config: dict[str, Any]) -> None:
    """What loads a library."""
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"


def test_every_command_refuses_a_bundle_that_loads_code(bundle: Path, tmp_path: Path) -> None:
    folder = altered(bundle, tmp_path / "evil", evil)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n", encoding="utf-8")
    for command in (["bench", str(folder)], ["eval", str(folder), "--data", str(tmp_path / "rows.jsonl")]):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 2, done.output
        assert "custom_ops_library" in done.stderr
        assert GENAI_CONFIG in done.stderr
    done = subprocess.run(
        [sys.executable, str(RUNNER), "--bundle", str(folder), "hello"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("run.py: error: ")
    assert "custom_ops_library" in done.stderr
    with pytest.raises(ModelError, match="custom_ops_library"):
        GenaiRunner(folder, threads=1, verify=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model": {"embedding": {"session_options": {"custom_ops_library": "e.so"}}}}', "'custom_ops_library'"),
        ('{"model": {"decoder": {"pipeline": [{"a": {"session_options": {"x": 1}}}]}}}', "the key 'x'"),
        ('{"session_options": {"custom_ops_library": "e.so"}, "session_options": {}}', "comes twice|custom_ops"),
        ('{"model": {"filename": "../model.onnx"}}', "no plain file name"),
        ('{"model": {"filename": ".."}}', "no plain file name"),
        ('{"model": {"adapter_filename": "C:a"}}', "no plain file name"),
        ('{"session_options": {"provider_options": [{"cuda": {}}]}}', "other than the CPU"),
        ('{"session_options": {"provider_options": [{"cpu": {"library": "e.so"}}]}}', "other than the CPU"),
        ('{"session_options": []}', "no table"),
    ],
)
def test_whatever_opens_other_files_is_named(text: str, reason: str) -> None:
    import re

    assert re.search(reason, run.forbidden(text))


def test_what_export_and_tune_write_is_allowed() -> None:
    from deploy.tune import AFFINITIES, SPINNING

    options = {"intra_op_num_threads": 2, "log_id": "x", "provider_options": [], SPINNING: "0", AFFINITIES: "2"}
    assert (
        run.forbidden(json.dumps({"model": {"decoder": {"filename": "model.onnx", "session_options": options}}})) == ""
    )


def test_tuned_entries_cannot_load_code_either(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(bundle, folder)
    described(folder, tuned={"threads": 1, "config_entries": {"custom_ops_library": "evil.so"}})
    with pytest.raises(ModelError, match="custom_ops_library"):
        open_bundle(folder)
    assert run.main(["--bundle", str(folder), "hello"]) == 2


@pytest.mark.parametrize(("file", "drop"), [(GENAI_CONFIG, "model"), (BUNDLE_FILE, "onnx"), (GENAI_CONFIG, "search")])
def test_incomplete_json_is_one_message(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, drop: str
) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(bundle, folder)
    found = json.loads((folder / file).read_text(encoding="utf-8"))
    found[drop] = {}
    (folder / file).write_text(json.dumps(found), encoding="utf-8")
    code = run.main(["--bundle", str(folder), *(["--bench"] if file == BUNDLE_FILE else ["hello"])])
    told = capsys.readouterr().err
    assert code == (0 if drop == "search" else 1)
    assert told.count("\n") == code
    assert told.startswith("run.py: error: "[: 99 * code])


def test_a_file_without_a_digest_is_told(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "undescribed"
    shutil.copytree(bundle, folder)
    info = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
    del info["files"]["model.onnx"]["sha256"]
    (folder / BUNDLE_FILE).write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no files\.model\.onnx\.sha256"):
        open_bundle(folder)
    assert run.main(["--bundle", str(folder), "--check"]) == 1


def test_modules_in_the_current_folder_are_not_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "torch", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run!')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert measure_rates(1, width=256).read_bytes_per_s > 0
    params = CheckpointBenchParams(prompt_tokens=4, new_tokens=4, repeats=1, warmup=0)
    figures = bench(params, context("deploy.bench.checkpoint", tmp_path / "out", inputs={"model": plain}))
    assert figures.metrics
