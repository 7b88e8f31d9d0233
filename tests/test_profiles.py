"""Every built-in profile and target decodes and plans; the hub profile's steps run on a shrunken twin."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from compress.assessment_params import METRICS
from compress.estimates import estimate
from compress.pipeline import run
from compress.plans import plan
from compress.profile import built_in_profiles, list_profiles, load_profile
from compress.progress import Progress
from compress.store import Store
from deploy.targets import list_targets, load_target
from tests.tiny import tiny_checkpoint

PROFILES = sorted(list_profiles())


def write_rows(path, count=60):
    """Rows with one plain answer each."""
    lines = [{"prompt": f"switch lamp {i} on please", "response": f"lamp {i} is on now"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def brought(tmp_path):
    """What a user brings: a teacher and text, where a profile does not carry its own."""
    text = "\n<|endoftext|>\n".join(f"Once there was a cat named Tom number {i}. It sat on a mat." for i in range(30))
    folder = tmp_path / "tinystories"
    folder.mkdir()
    (folder / "train.txt").write_text(text, encoding="utf-8")
    (folder / "valid-stories.txt").write_text(text, encoding="utf-8")
    tiny_checkpoint(tmp_path / "stories260k", "llama", layers=5, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=172)
    return {"stories": [f"teacher={tmp_path / 'stories260k'}", f"data={folder}"]}


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_decodes_and_plans(name, brought, tmp_path):
    profile = load_profile(name, overrides=brought.get(name, []))
    planned = plan(profile, store=Store(tmp_path / "store"))
    foretold = estimate(planned)
    assert len(planned.nodes) == len(foretold.seconds)
    assert all(seconds is not None for seconds in foretold.seconds)
    assert foretold.figures.keys() >= {"bundle size", "student parameters"}


@pytest.mark.parametrize("name", list_targets())
def test_every_target_decodes_and_cites_its_source(name):
    target = load_target(name)
    assert target.name == name
    text = (built_in_profiles() / "targets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "http" in text


def test_the_hub_profile_plans_without_weights_and_says_so(tmp_path):
    profile = load_profile("smollm2-135m-raspberry-pi-5")
    foretold = estimate(plan(profile, store=Store(tmp_path / "store")))
    assert foretold.figures["teacher parameters"][0] == 134_515_008  # as published for SmolLM2-135M
    assert any("not on this machine" in note for note in foretold.notes)
    assert any("smol-smoltalk has is not known before it is fetched" in note for note in foretold.notes)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_measures_quality(name, brought, tmp_path):
    profile = load_profile(name, overrides=brought.get(name, []))
    roles = plan(profile, store=Store(tmp_path / "store")).roles
    assert "verdict" in roles
    quality = {metric for task in profile.evaluate["tasks"] for metric in METRICS[task]}
    assert any(limit["metric"] in quality for limit in profile.gate)


def test_the_hub_profile_learns_from_one_split_and_is_judged_on_the_other(tmp_path):
    roles = plan(load_profile("smollm2-135m-raspberry-pi-5"), store=Store(tmp_path / "store")).roles
    assert (roles["pool"].params.split, roles["test"].params.split) == ("train", "test")
    assert roles["pool"].key != roles["test"].key


def test_the_wheel_takes_all_files_of_the_profiles():
    setup = tomllib.loads((built_in_profiles().parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = setup["tool"]["setuptools"]["package-data"]["profiles"]
    taken = {path for pattern in patterns for path in built_in_profiles().glob(pattern) if path.is_file()}
    needed = {path for suffix in ("*.yaml", "*.json", "*.jsonl") for path in built_in_profiles().rglob(suffix)}
    assert not needed - taken


@pytest.mark.timeout(400)  # a whole profile; a loaded machine takes four times as long
def test_the_hub_profile_runs_on_a_shrunken_twin(tmp_path):
    """Same architecture (9 heads in 3 groups, tied), random weights, every step of the profile."""
    config = json.loads((built_in_profiles() / "smollm2-135m" / "config.json").read_text(encoding="utf-8"))
    shape = {"layers": 2, "hidden": 144, "heads": 9, "kv_heads": 3, "head_dim": 16, "ffn": 256, "tied": True}
    assert config["num_attention_heads"] // config["num_key_value_heads"] == shape["heads"] // shape["kv_heads"]
    tiny_checkpoint(tmp_path / "twin", "llama", **shape)
    write_rows(tmp_path / "pool.jsonl")
    write_rows(tmp_path / "test.jsonl", count=20)
    profile = load_profile(
        "smollm2-135m-raspberry-pi-5",
        overrides=[
            f"teacher={tmp_path / 'twin'}",
            f"data.pool={tmp_path / 'pool.jsonl'}",
            f"data.test={tmp_path / 'test.jsonl'}",
            "gate[0].max_ratio=1000",  # random weights agree by chance alone
            "gate[1].min=0",
            "steps[model.pruning].recovery.steps=3",
            "steps[model.quantization].calibration_tokens=500",
            "bench.prompt_tokens=4",
            "bench.new_tokens=4",
        ],
    )
    record = run(profile, store=Store(tmp_path / "store"), progress=Progress(quiet=True))
    assert record["status"] == "done", record["error"]
    assert [limit["metric"] for limit in record["gate"]["limits"]] == ["perplexity", "top1_agreement"]
    assert (Path(record["bundle"]) / "model.onnx").is_file()
    assert record["target"]["name"] == "raspberry-pi-5"
    shutil.rmtree(tmp_path / "store")
