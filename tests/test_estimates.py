"""What a plan foretells: from a config alone, near what comes out, and a refusal when it cannot fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress import doctor
from compress.errors import ModelError, ProfileError, TargetError
from compress.estimates import Estimate, estimate
from compress.model.shapes import parameter_count
from compress.plans import Plan, plan
from compress.profile import load_profile
from compress.run_record import TIME_OF_ALL, TIME_TO_RUN
from compress.store import Store

REPOSITORY = Path(__file__).parents[1]
# The shape of SmolLM2-135M, whose published size is 134.5 million parameters.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
PROFILE = """\
edgestill: 1
name: estimated
teacher: teacher
data: {pool: pool.jsonl}
target: TARGET
steps:
  - model.distillation: {layers: 15, steps: 100, batch_tokens: 1024}
  - model.quantization: {method: rtn, bits: 4, group_size: 32, embedding_bits: 8}
bench: null
"""
SMALL_TARGET = """\
edgestill: 1
name: watch
description: A watch with very little memory
cpu: made up
isa: [aarch64]
cores: 1
memory_bytes: 200000000
usable_memory_bytes: 100000000
memory_bandwidth_bytes_per_s: 1.0e9
fp32_flops_per_s: 1.0e9
storage_bytes: STORAGE
storage_read_bytes_per_s: 1.0e7
runtime: onnxruntime-genai
formats: [onnx]
"""


def folder(tmp_path: Path, *, target: str = "raspberry-pi-5", **config: object) -> Path:
    """A profile whose teacher is a ``config.json`` and nothing else."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (tmp_path / "pool.jsonl").write_text('{"text": "once upon a time"}\n' * 1000)
    path = tmp_path / "estimated.yaml"
    path.write_text(PROFILE.replace("TARGET", target))
    return path


def planned(path: Path, *overrides: str) -> Plan:
    return plan(load_profile(path, overrides=overrides), store=Store(path.parent / "store"))


def foretold(path: Path, *overrides: str) -> Estimate:
    return estimate(planned(path, *overrides))


def test_sizes_follow_from_the_config_alone(tmp_path: Path) -> None:
    found = foretold(folder(tmp_path)).figures
    assert found["teacher parameters"] == (134_515_008, "parameters")
    half = parameter_count({**CONFIG, "num_hidden_layers": 15})
    assert found["student parameters"] == (half, "parameters")
    layers = half - 49152 * 576
    # 4 bits and a 2-byte scale per 32 weights in the layers, 8 bits and the same scale in the embedding
    weights = layers * (0.5 + 2 / 32) + 49152 * 576 * (1 + 2 / 32)
    assert found["bundle size"][0] == pytest.approx(weights, rel=0.05)
    assert 5 < found["decode on raspberry-pi-5"][0] < 1000


def test_every_node_of_the_plan_has_its_time(tmp_path: Path) -> None:
    path = folder(tmp_path)
    found = foretold(path)
    assert len(found.seconds) == len(planned(path).nodes)
    assert all(seconds is not None and seconds > 0 for seconds in found.seconds)
    total = sum(seconds or 0 for seconds in found.seconds)
    assert found.figures["time of all stages"][0] == pytest.approx(total, rel=0.5, abs=10)


def test_more_steps_take_longer_and_larger_batches_more_memory(tmp_path: Path) -> None:
    path = folder(tmp_path)
    less = foretold(path)
    more = foretold(path, "steps[0].model.distillation.steps=10000", "steps[0].model.distillation.batch_tokens=8192")
    assert more.figures["time of all stages"][0] > 10 * less.figures["time of all stages"][0]
    assert more.figures["peak memory of the run"][0] > less.figures["peak memory of the run"][0] + 1e9


@pytest.mark.parametrize(
    ("sets", "measured"),
    [
        # Highest resident set of any stage of a finished run on 2 threads of an AMD EPYC (run.json, peak_memory_bytes).
        (["avx2", "avx512f", "avx512_bf16"], 1_174_000_000),
        (["avx2"], 1_001_422_848),  # an earlier run, scoring of the pool
    ],
)
def test_memory_of_the_quickstart_is_near_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], measured: int
) -> None:
    machine = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "memory_bytes": 3 * 2**30, "instruction_sets": sets}
    monkeypatch.setattr(doctor, "machine", lambda threads: machine)
    found = estimate(plan(load_profile("quickstart"), store=Store(tmp_path / "store"))).figures
    assert measured / 1.5 < found["peak memory of the run"][0] < measured * 1.5


def test_time_to_run_leaves_out_what_is_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    made = planned(path)
    fresh = estimate(made)
    assert fresh.figures[TIME_TO_RUN] == fresh.figures[TIME_OF_ALL]
    slowest = max(zip(fresh.seconds, made.nodes, strict=True), key=lambda pair: pair[0] or 0)
    stored = {slowest[1].key}
    monkeypatch.setattr(Store, "lookup", lambda _, key, **__: tmp_path if key in stored else None)
    found = foretold(path).figures
    assert found[TIME_OF_ALL] == fresh.figures[TIME_OF_ALL]
    assert found[TIME_TO_RUN][0] == pytest.approx(found[TIME_OF_ALL][0] - (slowest[0] or 0))
    stored |= {node.key for node in made.nodes}
    assert foretold(path).figures[TIME_TO_RUN] == (0.0, "s")


def test_rows_of_a_hub_data_set_are_not_known_and_the_plan_says_so(tmp_path: Path) -> None:
    path, hub_rows = folder(tmp_path), ["data.pool=somebody/some-rows"]
    condense = "steps=[{data.selection: {method: dedup}}, {data.condensation: {rows: 5000}}, {model.distillation: {}}]"
    found = foretold(path, *hub_rows, condense)
    assert any(
        "How many rows somebody/some-rows has is not known" in note and "told for 5000" in note for note in found.notes
    )
    local = foretold(path, condense)
    assert not any("not known" in note for note in local.notes)
    assert (found.seconds[1] or 0) > 0.3 + 5000 / 20_000 - 1e-9
    found = foretold(path, *hub_rows, "steps=[{data.selection: {method: dedup}}, {model.distillation: {}}]")
    assert found.seconds[:3] == [None, None, None]
    assert any("is left out" in note for note in found.notes)
    assert foretold(path, *hub_rows).seconds[1] is not None  # its steps say how long it trains


def test_fewer_bits_give_a_smaller_bundle(tmp_path: Path) -> None:
    path = folder(tmp_path)
    sizes = [foretold(path, f"steps[1].model.quantization.bits={bits}").figures["bundle size"][0] for bits in (2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.8 * sizes[2]


def watch(tmp_path: Path, storage: int) -> None:
    (tmp_path / "watch.yaml").write_text(SMALL_TARGET.replace("STORAGE", str(storage)))


@pytest.mark.parametrize(
    ("storage", "words"), [(10**7, "of storage; expected at most 10 MB"), (10**9, "of memory, .* of context")]
)
def test_misfit_is_refused(tmp_path: Path, storage: int, words: str) -> None:
    watch(tmp_path, storage)
    found = foretold(folder(tmp_path, target="watch.yaml"))
    with pytest.raises(TargetError, match=words):
        found.refuse_misfit()


def test_plan_refuses_a_misfit_with_2_and_runs_nothing(tmp_path: Path) -> None:
    watch(tmp_path, 10**7)
    path, store = folder(tmp_path, target="watch.yaml"), tmp_path / "store"
    for command in ("plan", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "compress.cli", command, str(path), "--store", str(store)],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "edgestill: error: target watch: the bundle needs about" in done.stderr
        assert "Traceback" not in done.stderr
    assert not store.exists()


def test_mix_towards_reference_rows_that_are_not_there(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(
        ProfileError, match=r"steps\[0\]\.data\.quality\.mix: got reference, but the profile names no ref"
    ):
        planned(path, "steps=[{data.quality: {method: stabilize}}]")
    planned(path, "steps=[{data.quality: {method: stabilize, mix: uniform}}]")


def test_distillation_goes_on_from_plain_weights_only(tmp_path: Path) -> None:
    steps = "steps=[{model.quantization: {method: rtn}}, {model.distillation: {init: INIT}}]"
    planned(folder(tmp_path), steps.replace("INIT", "teacher_layers"))
    with pytest.raises(
        ProfileError, match=r"steps\[1\]\.model\.distillation: it stands after model\.quantization\.rtn"
    ):
        planned(tmp_path / "estimated.yaml", steps.replace("INIT", "checkpoint"))


def test_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    path = folder(tmp_path, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelError, match="architecture GPT2LMHeadModel; expected one of LlamaForCausalLM, Qwen2"):
        foretold(path)


def test_hub_name_without_its_config_is_noted_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = folder(tmp_path)
    found = foretold(path, "teacher=somebody/some-model")
    assert found.figures == {}
    assert "the config of the teacher somebody/some-model is not on this machine" in found.notes[0]
    assert not (tmp_path / "cache").exists()


def test_hub_name_with_a_cached_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    snapshot = tmp_path / "cache" / "hub" / "models--somebody--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    found = foretold(folder(tmp_path), "teacher=somebody/some-model")
    assert found.figures["teacher parameters"] == (134_515_008, "parameters")


def test_plan_loads_no_torch(tmp_path: Path) -> None:
    path = folder(tmp_path)
    script = (
        "import sys\nfrom compress import cli\n"
        f"sys.argv = ['edgestill', 'plan', {str(path)!r}, '--json']\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not [n for n in ('torch', 'transformers', 'onnxruntime', 'pyarrow') if n in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert [row["cached"] for row in shown["stages"]] == [False] * len(shown["stages"])
    assert any("fits raspberry-pi-5" in note for note in shown["notes"])
