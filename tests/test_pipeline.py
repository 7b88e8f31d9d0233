"""The pipeline with cheap stages: hits, keys, failures, kills. Nothing here loads torch."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compress import run_record
from compress.errors import DataError, ModelError, ProfileError, StoreError, TrainingError
from compress.pipeline import Plan, plan, run
from compress.profile import load_profile
from compress.progress import Progress
from compress.run_record import RunRecord
from compress.stages import Stage
from compress.store import Store
from tests.fake_stages import CALLS, TABLE, write_profile

QUIET = Progress(quiet=True)
REPOSITORY = Path(__file__).parents[1]
ALL_STAGES = [
    "data.source.read of pool",
    "data.source.read of test",
    "evaluate.teacher",
    "data.selection.first",
    "data.selection.second",
    "model.distillation.fake",
    "evaluate.model after model.distillation.fake",
    "model.quantization.fake",
    "evaluate.model after model.quantization.fake",
    "deploy.export.bundle",
    "evaluate.bundle",
    "evaluate.gate",
    "deploy.bench.checkpoint of teacher",
    "deploy.bench.checkpoint of student",
    "deploy.bench.local",
]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "p")


def go(path: Path, store: Store, *overrides: str, table: tuple[Stage, ...] = TABLE, **options: object) -> RunRecord:
    profile = load_profile(path, overrides=overrides, table=table)
    return run(profile, store=store, table=table, progress=QUIET, **options)  # type: ignore[arg-type]


def planned(
    path: Path, store: Store, *overrides: str, table: tuple[Stage, ...] = TABLE, until: str | None = None
) -> Plan:
    return plan(load_profile(path, overrides=overrides, table=table), store=store, table=table, until=until)


def content(record: RunRecord) -> dict[str, str]:
    """Digest-like view of all artifacts: stage name -> manifest text."""
    return {s["name"]: (Path(s["path"] or "") / "manifest.json").read_text() for s in record["stages"]}


def ran(record: RunRecord) -> list[str]:
    return [stage["name"] for stage in record["stages"] if not stage["cached"]]


def test_runs_all_stages_in_order_and_records_them(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = go(profile_path, store)
    assert [stage["name"] for stage in record["stages"]] == ALL_STAGES
    assert record == run_record.read(tmp_path / "store" / "runs" / record["id"] / "run.json")
    assert record["status"] == "done"
    assert all(stage["state"] == "done" and stage["seconds"] is not None for stage in record["stages"])
    assert [step["dropped"] for step in record["funnel"]] == [{}, {"short": 4}, {"short": 4}]
    assert [row["subject"] for row in record["bench"]] == ["teacher", "student", "bundle"]
    assert record["gate"] is not None
    assert record["gate"]["passed"]
    assert record["bundle"] == record["stages"][9]["path"]
    distilled = Path(record["stages"][5]["path"] or "") / "content.txt"
    # what the stages wrote: the pool through both selections (text and seed each), then the distillation's own
    assert distilled.read_text() == '{"text": "one"}\n|a|7|b|7|c|7'


def test_summary_has_teacher_student_and_bundle(profile_path: Path, tmp_path: Path) -> None:
    record = go(profile_path, Store(tmp_path / "store"))
    assert [(row["subject"], row["parameters"], row["bytes"]) for row in record["summary"]] == [
        ("teacher", 600, 2400),
        ("student", 100, 400),
        ("bundle", 100, 90),
    ]
    assert all(row["metric"] == "exact_match" for row in record["summary"])
    # wrong rows are the strokes in the content: 6 after distillation, 8 after quantization, 10 in the bundle
    quality = [row["quality"]["mean"] for row in record["summary"] if row["quality"]]
    assert quality == [1.0, 1 - 6 / 40, 1 - 10 / 40]


def test_ledger_names_the_step_that_lost_most(profile_path: Path, tmp_path: Path) -> None:
    ledger = go(profile_path, Store(tmp_path / "store"))["ledger"]
    assert ledger is not None
    losses = {entry["step"]: entry["loss"] for entry in ledger["entries"]}
    assert losses == pytest.approx(
        {"teacher": 0, "model.distillation.fake": 0.15, "model.quantization.fake": 0.05, "bundle": 0.05}
    )
    assert ledger["most_lost"] == "model.distillation.fake"


def test_second_run_is_all_hits(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = go(profile_path, store)
    CALLS.clear()
    second = go(profile_path, store)
    assert CALLS == []
    assert ran(second) == []
    assert second["ledger"] == first["ledger"]
    assert second["summary"] == first["summary"]
    assert second["funnel"] == first["funnel"]


def test_second_run_takes_under_two_seconds_and_imports_no_torch(profile_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    go(profile_path, Store(store))
    heavy = "('torch', 'transformers', 'onnxruntime', 'pyarrow', 'datasets')"
    script = (
        "import sys\n"
        "from compress.profile import load_profile\n"
        "from compress.pipeline import run\n"
        "from compress.progress import Progress\n"
        "from compress.store import Store\n"
        "from tests.fake_stages import TABLE\n"
        f"record = run(load_profile({str(profile_path)!r}, table=TABLE), store=Store({str(store)!r}), table=TABLE,"
        " progress=Progress(quiet=True))\n"
        "assert all(stage['cached'] for stage in record['stages'])\n"
        f"assert not [name for name in {heavy} if name in sys.modules]\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: beside other work on the same cores, the clock on the wall tells of that work
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize(
    ("override", "first_to_run"),
    [
        ("steps[0].data.selection.text=z", "data.selection.first"),
        ("steps[1].data.selection.times=2", "data.selection.second"),
        ("steps[2].model.distillation.text=z", "model.distillation.fake"),
        ("steps[3].model.quantization.text=z", "model.quantization.fake"),
        ("evaluate.rows=7", "evaluate.teacher"),
        ("gate=[]", "evaluate.gate"),
        ("bench.prompt_tokens=5", "deploy.bench.checkpoint of teacher"),
        ("export.text=z", "deploy.export.bundle"),
    ],
)
def test_changed_parameter_reruns_only_what_follows(
    profile_path: Path, tmp_path: Path, override: str, first_to_run: str
) -> None:
    store = Store(tmp_path / "store")
    go(profile_path, store)
    before = {node.name: node.key for node in planned(profile_path, store).nodes}
    after = planned(profile_path, store, override)
    changed = [node.name for node in after.nodes if node.key != before[node.name]]
    assert changed[0] == first_to_run
    assert ran(go(profile_path, store, override)) == changed
    # what does not read the changed thing, directly or not, keeps its key
    for node in after.nodes:
        follows = any(not hasattr(source, "path") and source.name in changed for source in node.inputs.values())
        own = node.name == first_to_run or node.stage.stage == "evaluate" or node.stage.stage == "deploy.bench"
        assert node.name not in changed or follows or own


def test_all_that_the_profile_says_of_reading_reaches_the_source(profile_path: Path, tmp_path: Path) -> None:
    roles = planned(profile_path, Store(tmp_path / "store"), "data.separator='***'", "data.split=valid").roles
    assert {(role, roles[role].params.separator, roles[role].params.split) for role in ("pool", "test")} == {
        ("pool", "***", "valid"),
        ("test", "***", "valid"),
    }
    rows = planned(profile_path, Store(tmp_path / "store"), "data.pool=a/rows", "data.test=a/rows").roles
    assert [rows[role].params.split for role in ("pool", "test")] == ["train", "test"]
    rows = planned(profile_path, Store(tmp_path / "store"), "data.test=a/rows@v1.0").roles
    assert [rows[role].params.split for role in ("pool", "test")] == [None, "test"]


def test_gate_change_reruns_the_gate_alone(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    go(profile_path, store)
    assert ran(go(profile_path, store, "gate=[{metric: exact_match, min: 0.1}]")) == ["evaluate.gate"]


def change_file(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "kept", "changed"),
    [
        (change_file("pool.jsonl", '{"text": "other"}\n'), "evaluate.teacher", "data.source.read of pool"),
        (change_file("test.jsonl", '{"text": "other"}\n'), "model.quantization.fake", "evaluate.teacher"),
        (change_file("teacher/tokenizer.json", '{"a": 1}'), "data.selection.first", "data.selection.second"),
        (change_file("teacher/chat_template.jinja", "{{ x }}"), "data.selection.first", "data.selection.second"),
        (change_file("teacher/model.safetensors", "other"), "data.selection.second", "model.distillation.fake"),
        (change_file("teacher/config.json", '{"vocab_size": 9}'), "data.selection.second", "model.distillation.fake"),
        (change_file("teacher/README.md", "words"), "model.distillation.fake", None),
    ],
    ids=["pool", "test", "tokenizer", "template", "weights", "config", "readme"],
)
def test_changed_outside_file_changes_the_key(
    profile_path: Path, tmp_path: Path, change: Callable[[Path], None], kept: str, changed: str | None
) -> None:
    store = Store(tmp_path / "store")
    before = {node.name: node.key for node in planned(profile_path, store).nodes}
    change(profile_path.parent)
    after = {node.name: node.key for node in planned(profile_path, Store(tmp_path / "store")).nodes}
    assert after[kept] == before[kept]
    if changed is None:
        assert after == before
    else:
        assert after[changed] != before[changed]
        assert after["deploy.export.bundle"] != before["deploy.export.bundle"] or changed == "evaluate.teacher"


def test_seed_changes_every_key(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before, after = planned(profile_path, store), planned(profile_path, store, "seed=8")
    assert not {node.key for node in before.nodes} & {node.key for node in after.nodes}


def test_stage_version_changes_its_key_and_what_follows(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    newer = tuple(replace(line, version=2) if line.name == "model.distillation.fake" else line for line in TABLE)
    before = {node.name: node.key for node in planned(profile_path, store).nodes}
    after = {node.name: node.key for node in planned(profile_path, store, table=newer).nodes}
    changed = [name for name in ALL_STAGES if before[name] != after[name]]
    assert changed[0] == "model.distillation.fake"
    assert changed == [name for name in ALL_STAGES[5:] if name != "deploy.bench.checkpoint of teacher"]


def test_keys_hold_no_path_and_no_time(profile_path: Path, tmp_path: Path) -> None:
    elsewhere = write_profile(tmp_path / "another" / "place")
    here = [node.key for node in planned(profile_path, Store(tmp_path / "a")).nodes]
    there = [node.key for node in planned(elsewhere, Store(tmp_path / "b")).nodes]
    assert here == there


def test_failing_stage_leaves_no_artifact_and_a_record(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    broken = "steps[2].model.distillation.error=true"
    with pytest.raises(TrainingError, match="the loss is NaN"):
        go(profile_path, store, broken)
    node = next(n for n in planned(profile_path, store, broken).nodes if n.name == "model.distillation.fake")
    assert store.lookup(node.key) is None
    assert sorted(path.name for path in (tmp_path / "store" / "artifacts").iterdir()) == store.keys()
    record = run_record.read(next((tmp_path / "store" / "runs").glob("*/run.json")))
    assert record["status"] == "failed"
    assert record["error"] == {
        "kind": "TrainingError",
        "message": "step 7: the loss is NaN. Lower the learning rate.",
        "stage": "model.distillation.fake",
    }
    states = {stage["name"]: stage["state"] for stage in record["stages"]}
    assert states["model.distillation.fake"] == "failed"
    assert states["model.quantization.fake"] == "waiting"


def test_gate_that_says_no_is_recorded(profile_path: Path, tmp_path: Path) -> None:
    record = go(profile_path, Store(tmp_path / "store"), "gate=[{metric: exact_match, max_drop: 0.02}]")
    assert record["status"] == "gate_failed"
    assert record["gate"] is not None
    limit = record["gate"]["limits"][0]
    assert not limit["passed"]
    assert limit["value"] == pytest.approx(0.25)
    assert limit["low"] is not None
    assert limit["high"] is not None
    assert limit["low"] < 0.25 < limit["high"]
    assert limit["judged"] == limit["high"]
    span = f"interval {limit['low']:.4g} to {limit['high']:.4g}, judged at its upper end {limit['high']:.4g}"
    assert record["verdict"] == (
        f"The gate failed on exact_match: at most 0.02 below the teacher, measured 0.25 ({span}), from 0.75 against "
        "the teacher's 1. The step that lost most is model.distillation.fake."
    )
    assert record["bench"], "the benchmarks run even so"


def test_exact_limit_that_fails_is_told_without_an_interval(profile_path: Path, tmp_path: Path) -> None:
    record = go(profile_path, Store(tmp_path / "store"), "gate=[{metric: parameters, min_ratio: 7}]")
    told = "parameters: at least 7 times smaller than the teacher, measured 6, from 100 against the teacher's 600. "
    assert record["verdict"].startswith(f"The gate failed on {told}")


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("data", "data.selection.second"),
        ("data.selection", "data.selection.second"),
        ("data.selection.first", "data.selection.first"),
        ("0", "data.selection.first"),
        ("model.distillation", "evaluate.model after model.distillation.fake"),
        ("deploy.export", "deploy.export.bundle"),
        ("evaluate.gate", "evaluate.gate"),
    ],
)
def test_until_stops_after_the_step(profile_path: Path, tmp_path: Path, until: str, last: str) -> None:
    nodes = planned(profile_path, Store(tmp_path / "store"), until=until).nodes
    assert nodes[-1].name == last


@pytest.mark.parametrize("until", ["", " ", "None"])
def test_until_that_names_nothing(profile_path: Path, tmp_path: Path, until: str) -> None:
    with pytest.raises(ProfileError, match=rf"--until: no step is called '{until}'; expected one of data\.source"):
        planned(profile_path, Store(tmp_path / "store"), until=until)


@pytest.mark.parametrize("step", ["model.pruning: {text: p}", "model.quantization: {text: p}"])
def test_codes_are_not_changed(profile_path: Path, tmp_path: Path, step: str) -> None:
    steps = f"steps=[{{model.quantization: {{text: q}}}}, {{data.selection: {{method: first}}}}, {{{step}}}]"
    told = rf"steps\[2\]\.{step.partition(':')[0]}: it stands after model\.quantization\.fake, steps\[0\]"
    with pytest.raises(ProfileError, match=told + r".*expected plain weights\. Put it before steps\[0\]"):
        planned(profile_path, Store(tmp_path / "store"), steps)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.new_tokens=13", "bench: prompt_tokens 4 and new_tokens 13 make 17; expected at most 16 together, "
         "the model's context"),
        ("export.context_tokens=11", "prompt_tokens 4 and new_tokens 8 make 12; expected at most 11 together, "
         "export.context_tokens"),
    ],
)  # fmt: skip
def test_bench_beyond_the_context(profile_path: Path, tmp_path: Path, override: str, message: str) -> None:
    (profile_path.parent / "teacher" / "config.json").write_text('{"max_position_embeddings": 16}')
    planned(profile_path, Store(tmp_path / "store"), "bench.new_tokens=12")
    with pytest.raises(ProfileError, match=message):
        planned(profile_path, Store(tmp_path / "store"), override)


def test_until_unknown_step(profile_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no step is called 'model\.prunning'"):
        planned(profile_path, Store(tmp_path / "store"), until="model.prunning")


def test_first_model_step_that_needs_a_model_starts_from_the_teacher(profile_path: Path, tmp_path: Path) -> None:
    nodes = planned(profile_path, Store(tmp_path / "store"), "steps=[{model.quantization: {text: q}}]").nodes
    node = next(node for node in nodes if node.name == "model.quantization.fake")
    assert node.inputs["model"] == planned(profile_path, Store(tmp_path / "store")).facts.teacher


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("data.pool=nowhere.jsonl", DataError, "nowhere.jsonl: no such file or folder"),
        ("teacher=/no/such/model", ModelError, "/no/such/model: no such folder"),
    ],
)
def test_missing_outside_thing(
    profile_path: Path, tmp_path: Path, override: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        planned(profile_path, Store(tmp_path / "store"), override)


def test_step_that_reads_an_empty_slot(profile_path: Path, tmp_path: Path) -> None:
    text = profile_path.read_text().replace("pool: pool.jsonl, ", "")
    profile_path.write_text(text)
    with pytest.raises(ProfileError, match=r"steps\[0\]: data.selection.first reads the slot 'data', which is empty"):
        planned(profile_path, Store(tmp_path / "store"))


def test_limits_without_test_rows(profile_path: Path, tmp_path: Path) -> None:
    profile_path.write_text(profile_path.read_text().replace(", test: test.jsonl", ""))
    with pytest.raises(ProfileError, match="gate: there are limits but nothing is evaluated"):
        planned(profile_path, Store(tmp_path / "store"))


def test_without_test_rows_and_limits_nothing_is_judged(profile_path: Path, tmp_path: Path) -> None:
    profile_path.write_text(profile_path.read_text().replace(", test: test.jsonl", ""))
    record = go(profile_path, Store(tmp_path / "store"), "gate=[]")
    assert record["gate"] is None
    assert record["status"] == "done"
    assert record["verdict"] == "Done; nothing was judged."


def test_damaged_artifact_is_made_again(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", say=lambda _: None)
    first = go(profile_path, store)
    victim = Path(first["stages"][3]["path"] or "") / "content.txt"
    victim.write_text(victim.read_text().upper())  # the same size: only --verify sees it
    assert ran(go(profile_path, store)) == []
    assert ran(go(profile_path, store, verify=True)) == ["data.selection.first"]
    victim.write_text("short")
    assert ran(go(profile_path, store)) == ["data.selection.first"]
    assert content(go(profile_path, store)) == content(first)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_store_without_permission(profile_path: Path, tmp_path: Path) -> None:
    place = tmp_path / "closed"
    place.mkdir()
    place.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        go(profile_path, Store(place / "store"))


def test_store_where_a_file_stands(profile_path: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match="store"):
        go(profile_path, Store(tmp_path / "store"))


def start(profile_path: Path, store: Path, *, at: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """The command in another process, up to the moment when ``at`` becomes true."""
    script = (
        "import sys, compress.cli, compress.pipeline, compress.profile\n"
        "from tests.fake_stages import TABLE\n"
        "from functools import partial\n"
        "compress.pipeline.run = partial(compress.pipeline.run, table=TABLE)\n"
        "compress.profile.load_profile = partial(compress.profile.load_profile, table=TABLE)\n"
        f"sys.argv = ['edgestill', 'run', {str(profile_path)!r}, '--store', {str(store)!r}, '--json']\n"
        "compress.cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    limit = time.monotonic() + 20
    while not at():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < limit, "the run never came to the point"
        time.sleep(0.005)
    return process


def in_the_middle(store: Path, steps: int) -> Callable[[], bool]:
    """Whether the slow stage has done a few of its ``steps``."""

    def reached() -> bool:
        states = [path.read_text() for path in store.glob("work/*/state.txt")]
        return any(3 <= len(state) < steps for state in states)

    return reached


def test_kill_in_the_middle_of_a_stage_then_the_same_result(tmp_path: Path) -> None:
    path, store = write_profile(tmp_path / "p", steps=40), tmp_path / "store"
    process = start(path, store, at=in_the_middle(store, 40))
    process.kill()
    process.communicate()
    killed = json.loads(next(store.glob("runs/*/run.json")).read_text())
    assert killed["status"] == "running"
    done = next(store.glob("work/*/state.txt")).read_text()
    assert len(done) >= 3
    began = time.perf_counter()
    resumed = go(path, Store(store))
    slow = resumed["stages"][5]
    assert slow["seconds"] is not None
    assert slow["seconds"] < 0.05 * (40 - len(done)) + 1.0, "it began again from the start"
    unbroken = go(path, Store(tmp_path / "unbroken"))
    assert content(resumed) == content(unbroken)
    assert not list(store.glob("artifacts/.*")), "nothing half-written is left"
    assert not list(store.glob("work/*"))
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_gives_130_and_a_record(tmp_path: Path, number: signal.Signals) -> None:
    path, store = write_profile(tmp_path / "p", steps=200), tmp_path / "store"
    process = start(path, store, at=in_the_middle(store, 200))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert b"interrupted" in errors
    record = run_record.read(next(store.glob("runs/*/run.json")))
    assert record["status"] == "interrupted"
    assert "model.distillation.fake" in record["verdict"]
    assert list(store.glob("work/*/state.txt")), "what was done is kept"


def test_peak_memory_is_of_the_stage(profile_path: Path, tmp_path: Path) -> None:
    record = go(profile_path, Store(tmp_path / "store"))
    peaks = [stage["peak_memory_bytes"] for stage in record["stages"]]
    assert all(peak is not None and peak > 1_000_000 for peak in peaks)
