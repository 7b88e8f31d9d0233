"""The benchmark: a record that is whole and agrees with itself, measured in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.errors import EdgestillError, ModelError
from compress.model.checkpoint import read_config
from deploy import bench as bench_module
from deploy import sizing
from deploy.bench import BENCH_FILE, bench, bench_bundle, target_estimate
from deploy.bundle import BUNDLE_FILE, open_bundle
from deploy.params import BenchParams
from deploy.sizing import Precision
from deploy.targets import load_target
from tests.deploy.tools import context

PI = "raspberry-pi-5"


def test_the_record_is_whole_and_agrees_with_itself(bundle: Path, quantized: Path, tmp_path: Path) -> None:
    ctx = context("deploy.bench.local", tmp_path / "out", inputs={"bundle": bundle})
    result = bench(BenchParams(prompt_tokens=16, new_tokens=8, repeats=3), ctx)
    found = result.metrics
    assert json.loads((ctx.out / BENCH_FILE).read_text(encoding="utf-8")) == found
    assert found["runtime"] == "onnxruntime-genai int4"
    assert (found["where"], found["threads"], found["repeats"], found["warmup"]) == ("local", 1, 3, 1)
    for name in ("prefill_s", "decode_s_per_token", "first_token_spread_s"):
        assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"]
    assert found["prefill_tokens_per_s"] == pytest.approx(16 / found["prefill_s"]["median"])
    assert found["decode_tokens_per_s"] == pytest.approx(1 / found["decode_s_per_token"]["median"])
    assert found["first_token_s"] >= found["prefill_s"]["low"]
    bound = found["memory_bandwidth_bytes_per_s"] / found["weight_bytes"]
    assert found["read_bound_tokens_per_s"] == pytest.approx(bound)
    assert found["read_bound_share"] == pytest.approx(found["decode_tokens_per_s"] / bound)
    assert 2e7 < found["base_memory_bytes"] < found["peak_memory_bytes"] < 3e8  # torch alone would be more
    config = read_config(quantized)
    estimate = sizing.estimate(config, Precision.of_checkpoint(quantized, config), load_target("x86-laptop-avx2"))
    assert estimate.peak_memory_bytes == pytest.approx(found["peak_memory_bytes"], rel=0.35)


def test_the_target_is_estimated_beside_the_measurement(bundle: Path, quantized: Path, tmp_path: Path) -> None:
    """From the bundle alone; near what the checkpoint's config gives."""
    params, config, target = BenchParams(prompt_tokens=16, new_tokens=8), read_config(quantized), load_target(PI)
    ctx = context("deploy.bench.local", tmp_path / "out", inputs={"bundle": bundle}, target=target)
    result = bench(BenchParams(prompt_tokens=16, new_tokens=8, repeats=1), ctx)
    assert json.loads((ctx.out / BENCH_FILE).read_text(encoding="utf-8")) == result.metrics
    found = result.metrics["target_estimate"]
    assert found == target_estimate(bundle, target, params)
    assert result.notes[0] == f"target_estimate is reckoned for {PI}; nothing was measured there"
    wanted = sizing.estimate(config, Precision.of_checkpoint(quantized, config), target, 24)
    for name in ("decode_tokens_per_s", "peak_memory_bytes"):
        assert found[name] == pytest.approx(getattr(wanted, name), rel=0.05)
    whole = sizing.estimate_of_bundle(open_bundle(bundle), target, 24)  # all 24 tokens read at once, as in `wanted`
    assert whole.prefill_tokens_per_s == pytest.approx(wanted.prefill_tokens_per_s, rel=0.05)
    assert found["prefill_tokens_per_s"] < whole.prefill_tokens_per_s  # the operators' time is shared by fewer tokens
    assert found["first_token_s"] == pytest.approx(16 / found["prefill_tokens_per_s"])
    assert found["decode_tokens_per_s"] != pytest.approx(result.metrics["decode_tokens_per_s"], rel=1e-6)


def test_the_error_of_the_estimate_on_this_machine_is_known(bundle: Path, tmp_path: Path) -> None:
    ctx = context("deploy.bench.local", tmp_path / "out", inputs={"bundle": bundle})
    metrics = bench(BenchParams(prompt_tokens=16, new_tokens=8, repeats=3), ctx).metrics
    found = metrics["local_estimate"]
    assert found["target"] == "this-machine"
    assert found["peak_memory_bytes"] == pytest.approx(metrics["peak_memory_bytes"], rel=0.35)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert 0.02 < found[name] / metrics[name] < 50  # the two are timed at other moments of a busy machine
    rates, overhead = found["rates"], (2 * 11 + 8) * found["rates"]["node_seconds"]
    assert 1 / found["decode_tokens_per_s"] > overhead
    assert rates["threads"] == 1


def test_the_command_tells_measurement_from_estimate(bundle: Path) -> None:
    short = ["--set", "repeats=1", "--set", "prompt_tokens=4", "--set", "new_tokens=4"]
    result = CliRunner().invoke(cli.app, ["bench", str(bundle), "--target", PI, *short])
    assert result.exit_code == 0, result.output
    assert "measured on this machine" in result.stdout
    assert f"estimate for {PI}, not measured" in result.stdout
    assert f"this machine is not {PI}: it " in result.stdout
    plain = CliRunner().invoke(cli.app, ["bench", str(bundle), *short]).stdout
    assert "estimate from its measured rates" in plain
    assert "estimate for" not in plain
    as_json = json.loads(CliRunner().invoke(cli.app, ["bench", str(bundle), "--target", PI, *short, "--json"]).stdout)
    assert as_json["metrics"]["target_estimate"]["target"] == PI
    assert any(note.startswith(f"this machine is not {PI}") for note in as_json["notes"])


def test_tuned_threads_are_used_unless_others_are_asked_for(bundle: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(bundle, tmp_path / "tuned"))
    info = json.loads((tuned / BUNDLE_FILE).read_text(encoding="utf-8"))
    entries = {"session.intra_op.allow_spinning": "0"}
    info["tuned"] = {"threads": 2, "prefill_chunk": 3, "device": "x", "config_entries": entries, "measured": {}}
    (tuned / BUNDLE_FILE).write_text(json.dumps(info), encoding="utf-8")
    short = ["--set", "repeats=1", "--set", "prompt_tokens=8", "--set", "new_tokens=4", "--json"]
    for options, threads in (([], 2), (["--threads", "1"], 1)):
        done = CliRunner().invoke(cli.app, ["bench", str(tuned), *options, *short])
        found = json.loads(done.stdout)["metrics"]
        assert (found["threads"], found["tuned"]) == (threads, True)


def test_lengths_beyond_the_context_are_refused(bundle: Path) -> None:
    with pytest.raises(ModelError, match=r"prompt_tokens 200 and new_tokens 100; expected at most 256 together"):
        bench_bundle(bundle, prompt_tokens=200, new_tokens=100)


def test_a_failure_of_the_measuring_process_is_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text("raise RuntimeError('out of luck')", encoding="utf-8")
    monkeypatch.setattr(bench_module, "RUNNER", tmp_path / "run.py")
    with pytest.raises(EdgestillError, match=r"bench local: the measuring process failed: RuntimeError: out of luck"):
        bench_bundle(bundle, prompt_tokens=4, new_tokens=4, repeats=1)
    (tmp_path / "run.py").write_text("print('hello')", encoding="utf-8")
    with pytest.raises(EdgestillError, match=r"bench local: the runner's answer is not JSON: 'hello"):
        bench_bundle(bundle, prompt_tokens=4, new_tokens=4, repeats=1)
    (tmp_path / "run.py").write_text('print(\'{"threads": 1, "speed": 2}\')', encoding="utf-8")
    with pytest.raises(EdgestillError, match=r"the runner's record has other fields: .*speed"):
        bench_bundle(bundle, prompt_tokens=4, new_tokens=4, repeats=1)
