"""The whole way on a tiny model, for real: every stage, kills in the middle, and the artifacts that come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.pipeline import run
from compress.profile import load_profile
from compress.progress import Progress
from compress.run_record import RunRecord
from compress.store import Store
from tests.tiny import tiny_checkpoint, tiny_conversations

pytestmark = pytest.mark.timeout(600)  # a busy machine

REPOSITORY = Path(__file__).parents[1]
PROFILE = """\
edgestill: 1
name: tiny
seed: 3
teacher: teacher
data: {pool: pool.jsonl, test: test.jsonl}
target: x86-laptop-avx2
hardware: {threads: 1}
steps:
  - data.selection: {method: dedup}
  - data.selection: {method: heuristics}
  - data.selection: {method: ifd, keep: 0.95, max_ratio: 10}
  - data.condensation: {method: k_center, rows: 60}
  - model.distillation: {layers: 2, steps: 60, batch_tokens: 256, top_k: 16}
  - model.pruning: {ffn: 64, recovery: {steps: 6, batch_tokens: 256}}
  - model.quantization: {method: gptq, bits: 4, group_size: 16}
export: {formats: [onnx], parity_rows: 4}
evaluate: {tasks: [function_call, perplexity, agreement], rows: 24, max_new_tokens: 8}
gate: [{metric: perplexity, max_ratio: 100}, {metric: bundle_bytes, min_ratio: 2}]
bench: null
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder / "teacher", layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, seed=1)
    for name, count, seed in (("pool", 300, 0), ("test", 60, 9)):
        lines = (json.dumps({"messages": talk}) for talk in tiny_conversations(count, seed=seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def unbroken(profile: Path) -> RunRecord:
    return go(profile, profile.parent / "unbroken")


def go(profile: Path, store: Path) -> RunRecord:
    return run(load_profile(profile), store=Store(store), progress=Progress(quiet=True))


def manifests(record: RunRecord) -> dict[str, object]:
    """Digests of all files of all artifacts."""
    read = {
        stage["name"]: json.loads((Path(stage["path"] or "") / "manifest.json").read_text())
        for stage in record["stages"]
    }
    return {name: manifest["files"] for name, manifest in read.items()}


def test_the_bundle_tells_every_step_that_led_to_it(unbroken: RunRecord, profile: Path) -> None:
    """With parameters and figures that are the same each time, and what came in from outside."""
    bundle = Path(unbroken["bundle"] or "")
    text = (bundle / "bundle.json").read_text(encoding="utf-8")
    told = json.loads(text)
    before = [stage for stage in unbroken["stages"] if stage["stage"].startswith(("data.", "model."))]
    wanted = [stage["name"].partition(" ")[0] for stage in before if not stage["name"].endswith("of test")]
    assert [f"{step['stage']}.{step['method']}" for step in told["steps"]] == [*wanted, "deploy.export.bundle"]
    steps = {step.get("id"): step for step in told["steps"]}
    for stage in before:
        if stage["key"] in steps:
            assert steps[stage["key"]]["params"] == stage["params"]
            assert steps[stage["key"]]["inputs"] == stage["inputs"]
    figures = {step["stage"]: step.get("figures", {}) for step in told["steps"]}
    assert figures["model.quantization"]["bits"] == 4
    assert figures["model.quantization"]["kl"] > 0
    assert figures["model.distillation"]["validation_loss"] > 0
    assert "seconds" not in figures["model.distillation"]
    origins = {one["role"]: one for one in told["origins"]}
    assert sorted(origins) == ["pool", "teacher"]
    assert (origins["pool"]["name"], origins["pool"]["licence"]) == ("pool.jsonl", "not stated")
    assert origins["teacher"]["identity"] == unbroken["teacher"]["identity"]
    assert str(profile.parent) not in text


def test_a_packed_bundle_holds_what_the_run_measured(unbroken: RunRecord, tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="zstandard is not installed: make setup")
    bundle = Path(unbroken["bundle"] or "")
    run_file = bundle.parents[1] / "runs" / unbroken["id"] / "run.json"
    command = ["pack", str(bundle), "--run", str(run_file), "--out", str(tmp_path / "b.tar.zst")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    from deploy.archive import bundle_folder

    with bundle_folder(tmp_path / "b.tar.zst") as folder:
        measured = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["measured"]
    assert measured["ledger"] == unbroken["ledger"]
    assert measured["gate"] == unbroken["gate"]
    assert [step["name"] for step in measured["steps"]] == [stage["name"] for stage in unbroken["stages"]]
    assert "path" not in measured["teacher"]
    other = shutil.copytree(bundle, tmp_path / "other")
    (other / "bundle.json").write_text((other / "bundle.json").read_text() + "\n")
    wrong = CliRunner().invoke(
        cli.app, ["pack", str(other), "--run", str(run_file), "--out", str(tmp_path / "c.tar.zst")]
    )
    assert (wrong.exit_code, "made another bundle than" in wrong.stderr) == (2, True)


def test_all_stages_and_the_gate(unbroken: RunRecord) -> None:
    assert unbroken["status"] == "done", unbroken["verdict"]
    names = [stage["name"] for stage in unbroken["stages"]]
    for stage in ("data.selection.ifd", "model.distillation.logits", "model.quantization.gptq", "evaluate.bundle"):
        assert stage in names
    steps = [entry["step"] for entry in unbroken["ledger"]["entries"]] if unbroken["ledger"] else []
    assert steps == ["teacher", *(name for name in names if name.startswith("model.")), "bundle"]
    parameters = [entry["parameters"] or 0 for entry in unbroken["ledger"]["entries"]] if unbroken["ledger"] else []
    assert parameters[0] > parameters[1] > parameters[2] == parameters[3] == parameters[4]
    losses = [point["loss"] for point in unbroken["curves"][0]["points"] if "loss" in point]
    assert losses[-1] < losses[0]


def test_funnel_adds_up(unbroken: RunRecord) -> None:
    steps = unbroken["funnel"]
    assert steps[0]["rows_in"] == 300
    for before, after in pairwise(steps):
        assert after["rows_in"] == before["rows_out"]
    for step in steps:
        assert step["rows_in"] - sum(step["dropped"].values()) + step["added"] == step["rows_out"]
        assert step["added"] == 0
    assert steps[-1]["rows_out"] == 60


def test_estimates_are_near(unbroken: RunRecord) -> None:
    found = {entry["what"]: entry for entry in unbroken["estimates"]}
    for what in ("teacher parameters", "student parameters"):
        assert found[what]["measured"] == found[what]["estimated"]
    size = found["bundle size"]
    assert size["measured"] == pytest.approx(size["estimated"], rel=0.15)


def test_bundle_agrees_with_the_checkpoint_it_came_from(unbroken: RunRecord) -> None:
    assert unbroken["ledger"] is not None
    checkpoint, bundle = unbroken["ledger"]["entries"][-2:]
    assert bundle["metrics"]["nll"]["mean"] == pytest.approx(checkpoint["metrics"]["nll"]["mean"], rel=0.01)


def test_report_is_written(unbroken: RunRecord) -> None:
    assert "<svg" in Path(unbroken["report"] or "").read_text(encoding="utf-8")


def test_second_run_is_all_hits_and_loads_no_torch(profile: Path, unbroken: RunRecord) -> None:
    store = profile.parent / "unbroken"
    script = (
        "import resource, sys\nfrom compress import cli\n"
        f"sys.argv = ['edgestill', 'run', {str(profile)!r}, '--store', {str(store)!r}]\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not [n for n in ('torch', 'transformers', 'onnxruntime', 'pyarrow') if n in sys.modules]\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert used.ru_utime + used.ru_stime < 2.0, used\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    count = len(unbroken["stages"])
    assert f"{count} stages, {count} from the store" in done.stdout


def key_of(record: RunRecord, stage: str) -> str:
    return next(entry["key"] for entry in record["stages"] if entry["name"] == stage)


def killed(profile: Path, store: Path, work: Path) -> None:
    """Run the command and kill it once something lies in ``work``, the scratch folder of a stage."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress.cli", "run", str(profile), "--store", str(store)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    while not (work.is_dir() and any(work.iterdir())):
        assert process.poll() is None, "the run ended before it came to the stage"
        time.sleep(0.002)
    process.kill()
    process.wait()


@pytest.mark.parametrize("stage", ["model.distillation.logits", "model.quantization.gptq"])
def test_kill_in_the_middle_then_the_same_artifacts(
    profile: Path, unbroken: RunRecord, tmp_path: Path, stage: str
) -> None:
    store, key = tmp_path / "store", key_of(unbroken, stage)
    # what stands before the stage is taken over, so that the kill hits the stage itself
    before = unbroken["stages"][: [entry["name"] for entry in unbroken["stages"]].index(stage)]
    for folder in ("artifacts", "records"):
        (store / folder).mkdir(parents=True)
    for entry in before:
        os.symlink(Path(entry["path"] or ""), store / "artifacts" / entry["key"])
    killed(profile, store, store / "work" / key)
    assert not (store / "artifacts" / key).exists()
    resumed = go(profile, store)
    assert manifests(resumed) == manifests(unbroken)
    assert not [path.name for path in (store / "artifacts").iterdir() if path.name.startswith(".")]
    assert not list((store / "work").iterdir())
