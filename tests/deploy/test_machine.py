"""Measuring this machine: rates that are plausible and agree, a target file that reads back, an estimate's error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress import cli, doctor
from compress.errors import EdgestillError
from deploy import machine
from deploy.machine import Rates, here, machine_target, measure_rates, target_text
from deploy.targets import load_target

RATES = Rates(
    threads=2, read_bytes_per_s=2e10, fp32_flops_per_s=1e11, code_ops_per_s=2e11, code_row_ops_per_s=5e10,
    node_seconds=1e-6, load_average=0.1,
)  # fmt: skip


def test_this_machine_has_plausible_rates() -> None:
    found = measure_rates(1)
    assert found.threads == 1
    assert 1e8 < found.read_bytes_per_s < 1e12
    assert 1e8 < found.fp32_flops_per_s < 1e13
    assert 1e8 < found.code_ops_per_s < 1e14
    assert 1e7 < found.code_row_ops_per_s < 1e13
    assert 1e-8 < found.node_seconds < 1e-3


def test_a_failure_of_the_measuring_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "executable", "/bin/false")
    with pytest.raises(EdgestillError, match=r"measuring this machine: the measuring process failed: exit code 1"):
        measure_rates(1)

    def slow(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(machine.subprocess, "run", slow)
    with pytest.raises(EdgestillError, match=r"not done after 300 s"):
        measure_rates(1)


@pytest.mark.parametrize("name", ["10", "1e3", "null", "yes", "desk"])
def test_a_measured_target_has_its_name_and_takes_every_format(tmp_path: Path, name: str) -> None:
    target = machine_target(doctor.machine(2), RATES, name, tmp_path)
    path = tmp_path / f"{name}.yaml"
    path.write_text(target_text(target, RATES, RATES, when="2026-01-02", versions={}), encoding="utf-8")
    assert (load_target(path).name, load_target(path).formats) == (name, ["onnx", "gptq", "gguf"])


def test_the_target_of_a_machine_reads_back_as_it_was(tmp_path: Path) -> None:
    facts = doctor.machine(2)
    target = machine_target(facts, RATES, "desk", tmp_path)
    path = tmp_path / "desk.yaml"
    busy = Rates(**{**RATES.__dict__, "load_average": 7.0})
    text = target_text(target, RATES, busy, when="2026-01-02", versions={"onnxruntime": "1.32.0"})
    path.write_text(text, encoding="utf-8")
    read = load_target(path)
    assert read.isa == [facts["system"].split()[-1], *facts["instruction_sets"]]
    assert (read.name, read.cores, read.memory_bytes) == ("desk", 2, target.memory_bytes)
    assert read.usable_memory_bytes <= min(read.memory_bytes, facts["memory_bytes"])
    assert read.read_bytes_per_s == RATES.read_bytes_per_s
    assert read.product_ops_per_s(coded=False, rows=1) == RATES.fp32_flops_per_s
    assert read.product_ops_per_s(coded=True, rows=32) == RATES.code_ops_per_s
    assert read.product_ops_per_s(coded=True, rows=1) == RATES.code_row_ops_per_s
    assert read.node_seconds == RATES.node_seconds
    assert 1e6 < read.storage_read_bytes_per_s < 1e11
    assert "Measured on 2026-01-02" in text
    assert "load average 7.0" in text  # and that the rates are too low
    quiet = target_text(target, RATES, RATES, when="2026-01-02", versions={})
    assert "load average" not in quiet


def test_a_target_without_measured_products_is_reckoned_in_fp32() -> None:
    board = load_target("raspberry-pi-5")
    assert board.product_ops_per_s(coded=True, rows=1) == board.flops_per_s
    rowless = here(RATES, code_row_ops_per_s=None)
    assert rowless.product_ops_per_s(coded=True, rows=1) == RATES.code_ops_per_s


def test_the_command_writes_a_target_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def rates(threads: int) -> Rates:
        asked.append(threads)
        return RATES

    monkeypatch.setattr(machine, "measure_rates", rates)
    place = tmp_path / "desk.yaml"
    command = ["targets", "measure", "--name", "desk", "--out", str(place), "--threads", "2"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert asked == [1, 2]
    assert load_target(place).name == "desk"
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 2
    assert "desk.yaml: is there already" in again.output
    wrong = CliRunner().invoke(cli.app, ["targets", "measure", "--name", "My desk"])
    assert wrong.exit_code == 2
    assert "--name: got 'My desk'" in wrong.output
    nowhere = CliRunner().invoke(cli.app, ["targets", "measure", "--out", str(tmp_path / "no" / "desk.yaml")])
    assert nowhere.exit_code == 2
    assert "no such folder" in nowhere.output


def test_targets_are_listed_and_shown_with_their_sources() -> None:
    listed = CliRunner().invoke(cli.app, ["targets", "list", "--json"])
    assert {"wasm-browser", "raspberry-pi-4"} <= {row["target"] for row in json.loads(listed.stdout)}
    shown = CliRunner().invoke(cli.app, ["targets", "show", "raspberry-pi-4"])
    assert "https://www.sci-pi.org.uk/bench/stream.html" in shown.stdout
    unknown = CliRunner().invoke(cli.app, ["targets", "show", "raspberry-pi-40"])
    assert unknown.exit_code == 2
    assert "Did you mean 'raspberry-pi-4'?" in unknown.output
