"""The command line: what it prints, exit codes, and that no error is a traceback."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import compress.pipeline
import compress.plans
import compress.profile
from compress import cli, doctor, errors, single
from compress.context import StageContext
from compress.data.rows import chat_row, read_source, write_jsonl
from compress.endpoint import Reply
from compress.stages import STAGES, Stage
from compress.teachers import record
from tests.fake_stages import TABLE, write_profile
from tests.tiny import tiny_checkpoint

CALL = '{"name":"lock","args":{"room":"hall"}}'


@pytest.fixture
def profile_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of cheap stages, and the core told of their table."""
    monkeypatch.setattr(compress.pipeline, "run", partial(compress.pipeline.run, table=TABLE))
    monkeypatch.setattr(compress.pipeline, "plan", partial(compress.pipeline.plan, table=TABLE))
    monkeypatch.setattr(compress.profile, "load_profile", partial(compress.profile.load_profile, table=TABLE))
    return write_profile(tmp_path / "p")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pool.jsonl"
    write_jsonl(path, [chat_row(f"lock the {name} door", CALL) for name in ("hall", "attic", "hall", "garage")])
    return path


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def failed(result: Result, code: int) -> str:
    """The one message of a failed command."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("edgestill: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_run_shows_table_verdict_and_report(profile_path: Path, tmp_path: Path) -> None:
    result = call("run", profile_path, "--store", tmp_path / "store")
    assert result.exit_code == 0, result.output
    for word in (
        "teacher",
        "student, quantized bundle",
        "exact_match",
        "tok/s",
        "The gate passed",
        "report.html",
        "bundle:",
    ):
        assert word in result.stdout
    report = Path(result.stdout.rpartition("report: ")[2].strip())
    assert "<html" in report.read_text(encoding="utf-8")


def test_run_json_is_the_record(profile_path: Path, tmp_path: Path) -> None:
    result = call("run", profile_path, "--store", tmp_path / "store", "--json")
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "store" / "runs" / record["id"] / "run.json").read_text())


def test_failed_gate_gives_3(profile_path: Path, tmp_path: Path) -> None:
    gate = "gate=[{metric: exact_match, max_drop: 0.02}]"
    result = call("run", profile_path, "--store", tmp_path / "store", "--set", gate)
    message = failed(result, 3)
    assert "exact_match: at most 0.02 below the teacher" in message
    assert "The step that lost most is model.distillation.fake" in message
    (line,) = [line for line in result.stdout.splitlines() if "FAIL" in line]
    assert "exact_match: how much lower than the teacher's is 0.25 (interval 0.1405 to " in line
    assert "judged at its upper end" in line
    assert "allowed <= 0.02" in line


def test_failing_stage_gives_1(profile_path: Path, tmp_path: Path) -> None:
    override = "steps[0].data.selection.error=true"
    message = failed(call("run", profile_path, "--store", tmp_path / "store", "--set", override), 1)
    assert message == "edgestill: error: step 7: the loss is NaN. Lower the learning rate."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "steps[0].data.selection.tmes=2"], "tmes"),
        (["--set", "steps[0].data.selection.times=0"], "times"),
        (["--set", "teacher=/no/such"], "/no/such: no such folder"),
        (["--set", "data.pool=gone.jsonl"], "gone.jsonl"),
        (["--until", "nothing"], "--until: no step is called 'nothing'"),
    ],
)
def test_wrong_input_gives_2(profile_path: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = call("run", profile_path, "--store", tmp_path / "store", *arguments)
    assert words in failed(result, 2)
    assert not (tmp_path / "store" / "artifacts").exists()


def test_unknown_profile_gives_2() -> None:
    assert "no-such-profile" in failed(call("run", "no-such-profile"), 2)


@pytest.mark.parametrize("arguments", [["run"], ["nonsense"], ["ls", "everything"], ["run", "x", "--nonsense"]])
def test_usage_errors_give_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_fault_of_ours_is_one_message(profile_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(compress.pipeline, "run", broken)
    message = failed(call("run", profile_path, "--store", tmp_path / "store"), 1)
    assert message == "edgestill: error: KeyError: 'oops'. This is a fault in edgestill; EDGESTILL_DEBUG=1 shows where"
    monkeypatch.setenv("EDGESTILL_DEBUG", "1")
    result = call("run", profile_path, "--store", tmp_path / "store")
    assert isinstance(result.exception, KeyError)


def test_store_that_cannot_be_written_gives_1(profile_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = failed(call("run", profile_path, "--store", tmp_path / "file"), 1)
    assert str(tmp_path / "file") in message


def test_step_selects_rows_and_keeps_the_dropped(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.jsonl"
    result = call("step", "data.selection", "--in", rows, "--out", out, "--set", "method=dedup", "--set", "near=false")
    assert result.exit_code == 0, result.output
    assert len(read_source(out).rows) == 3
    dropped = [json.loads(line) for line in (tmp_path / "kept.dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 1
    assert "exact" in json.dumps(dropped[0]["meta"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.dropped.jsonl", "kept.jsonl", "pool.jsonl"]


def test_step_writes_a_folder_that_the_next_step_reads(rows: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two.parquet"
    assert call("step", "data.selection.dedup", "--in", rows, "--out", first).exit_code == 0
    result = call("step", "data.selection.heuristics", "--in", f"data={first}", "--out", second, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["rows_out"] == len(read_source(second).rows) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.selection"], "no method given; expected method: dedup"),
        (["data.selecton"], "Did you mean 'data.selection'?"),
        (["data.selection.dedup", "--set", "treshold=1"], "treshold"),
        (["data.selection.dedup", "--set", "threshold=7"], "threshold"),
        (["data.selection.ifd"], "--teacher: missing; data.selection.ifd needs it"),
        (
            ["model.distillation", "--teacher", "t"],
            "kept.jsonl is a file of rows; model.distillation.logits writes a model",
        ),
    ],
)
def test_step_wrong_input_gives_2(rows: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = call("step", *arguments, "--in", rows, "--out", tmp_path / "kept.jsonl")
    assert words in failed(result, 2)
    assert not (tmp_path / "kept.jsonl").exists()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "data.selection.dedup reads data, not given; expected --in data=PATH"),
        (["pool.jsonl", "pool.jsonl"], "two inputs for the slot 'data'"),
        (["gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["data=pool.jsonl", "model=."], "data.selection.dedup does not read model; expected data"),
    ],
)
def test_step_inputs(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [part for text in inputs for part in ("--in", text)]
    assert words in failed(call("step", "data.selection.dedup", *given, "--out", "kept.jsonl"), 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "/nope", "--target", "x86-laptop-avx2"], "/nope: no such file or folder; expected a Hugging Face"),
        (["export", "gone", "--target", "x86-laptop-avx2"], "gone: no such file or folder; expected a Hugging Face"),
        (["export", "empty", "--target", "x86-laptop-avx2"], "no config.json in it; expected a Hugging Face model"),
        (["export", "model", "--data", "no.jsonl", "--target", "x86-laptop-avx2"], "no.jsonl: no such file or folder"),
        (["bench", "/nope"], "/nope: no such file or folder; expected a bundle"),
        (["bench", "empty"], "bundle.json: no such file; expected a bundle folder. Make one with: edgestill export"),
        (["eval", "/nope", "--data", "pool.jsonl"], "/nope: no such file or folder"),
        (["eval", "model", "--data", "/nope"], "/nope: no such file or folder"),
        (["eval", "model", "--data", "empty"], "empty: an empty folder; expected a file or folder of rows"),
        (["step", "data.selection.dedup", "--in", "empty", "--out", "o"], "empty: an empty folder"),
        (["step", "data.selection.dedup", "--in", "", "--out", "o"], "--in: got '', an empty value"),
        (["step", "data.selection.dedup", "--in", "data=", "--out", "o"], "--in: got 'data=', an empty path"),
        (["step", "data.selection.dedup", "--in", "dta=pool.jsonl", "--out", "o"], "Did you mean 'data'?"),
        (["step", "data.selection.dedup", "--in", "bad.jsonl", "--out", "deep/er/o"], "bad.jsonl:1: malformed JSON"),
        (
            ["step", "data.quality.mislabel", "--in", "pool.jsonl", "--out", "o", "--teacher", "/nope"],
            "--teacher /nope: no such file or folder; expected a model folder, a hub name",
        ),
        (
            ["step", "data.quality.mislabel", "--in", "pool.jsonl", "--out", "deep/o", "--teacher", "http://h/v1"],
            "teacher: the endpoint names no model",
        ),
    ],
)
def test_a_failed_command_leaves_nothing(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    for name in ("empty", "model", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "bad.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = sorted(tmp_path.rglob("*"))
    message = failed(call(*arguments), 2)
    assert words in message
    assert "profile" not in message, "no profile was named"
    assert sorted(tmp_path.rglob("*")) == before


def test_relative_paths_without_a_profile_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = failed(call("bench", "gone"), 2)
    assert message.endswith(f"Relative paths start at the current folder, {tmp_path}.")


@pytest.mark.parametrize(("error", "kept"), [("UserError", False), ("ParityError", False), ("StoreError", True)])
def test_checkpoints_are_kept_only_to_go_on_from(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, kept: bool
) -> None:
    def halting(params: object, ctx: StageContext) -> None:
        (ctx.work / "half").write_text("")
        raise getattr(errors, error)("here", "it broke")

    monkeypatch.setattr("compress.data.selection.static.dedup", halting)
    result = call("step", "data.selection.dedup", "--in", rows, "--out", tmp_path / "o")
    failed(result, getattr(errors, error).exit_code)
    left = {path.name for path in tmp_path.iterdir()} - {"pool.jsonl"}
    assert all(name.startswith(".data.selection.dedup-") for name in left)
    assert bool(left) is kept


@pytest.mark.parametrize("line", STAGES, ids=lambda line: line.name)
def test_every_stage_takes_its_inputs_by_name(line: Stage, rows: Path) -> None:
    slots = [*line.reads, *line.optional]
    given = ["evaluation.one" if slot == "evaluations" else slot for slot in slots]
    inputs = single.parse_inputs([f"{slot}={rows}" for slot in given], line)
    single._missing(line, inputs)
    assert len(inputs) == len(slots)


@pytest.mark.parametrize("form", ["source={}", "{}"])
def test_step_reads_a_source(rows: Path, tmp_path: Path, form: str) -> None:
    with rows.open("a") as stream:
        stream.write("no json\n")
    out = tmp_path / "canonical.jsonl"
    arguments = ["--in", form.format(rows), "--out", out, "--set", "on_error=quarantine"]
    result = call("step", "data.source.read", *arguments)
    assert result.exit_code == 0, result.output
    assert len(read_source(out).rows) == 4
    assert "no json" in (tmp_path / "canonical.quarantine.jsonl").read_text()


def test_step_holds_evaluations_against_limits(rows: Path, tmp_path: Path) -> None:
    for name, seed in (("teacher", 0), ("student", 1)):
        model = tiny_checkpoint(tmp_path / name, seed=seed)
        arguments = ["--in", f"model={model}", "--in", rows, "--out", tmp_path / f"of-{name}"]
        result = call("step", "evaluate.model", *arguments, "--set", "tasks=[perplexity]")
        assert result.exit_code == 0, result.output
    inputs = [
        "--in",
        f"evaluation.teacher={tmp_path / 'of-teacher'}",
        "--in",
        f"evaluation.end={tmp_path / 'of-student'}",
    ]
    kept = call("step", "evaluate.gate", *inputs, "--out", tmp_path / "a", "--set", "limits=[{metric: nll, max: 100}]")
    assert kept.exit_code == 0, kept.output
    verdict = json.loads((tmp_path / "a" / "verdict.json").read_text())
    assert [entry["step"] for entry in verdict["ledger"]["entries"]] == ["teacher", "end"]
    broken = "limits=[{metric: nll, max: 0.001}]"
    message = failed(call("step", "evaluate.gate", *inputs, "--out", tmp_path / "b", "--set", broken), 3)
    assert "a limit is not kept" in message
    assert "verdict.json" in message


def test_the_gate_says_how_it_is_given_evaluations(rows: Path, tmp_path: Path) -> None:
    message = failed(call("step", "evaluate.gate", "--out", tmp_path / "v"), 2)
    assert "evaluate.gate reads evaluations, not given; expected --in evaluation.NAME=PATH" in message
    message = failed(call("step", "evaluate.gate", "--in", rows, "--out", tmp_path / "v"), 2)
    assert "expected --in evaluation.NAME=PATH" in message


@pytest.mark.parametrize("seed", ["-5", "4294967296"])
def test_a_seed_out_of_range_gives_2(rows: Path, tmp_path: Path, seed: str) -> None:
    result = call("step", "data.selection.dedup", "--in", rows, "--out", tmp_path / "o", "--seed", seed)
    assert result.exit_code == 2
    assert "--seed" in result.stderr
    assert not (tmp_path / "o").exists()


def test_the_teacher_is_taken_as_text(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def opener(where: object, **_: object) -> None:
        opened.append(where)
        raise errors.UserError("teacher", "enough")

    monkeypatch.setattr("compress.teachers.open_teacher", opener)
    for teacher in ("http://host/v1#m", "somebody/some-model"):
        arguments = ["--in", rows, "--out", tmp_path / "o", "--teacher", teacher]
        assert "teacher: enough" in failed(call("step", "data.quality.mislabel", *arguments), 2)
    assert opened == ["http://host/v1#m", "somebody/some-model"]


def test_step_never_overwrites(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.jsonl"
    out.write_text("mine")
    result = call("step", "data.selection.dedup", "--in", rows, "--out", out)
    assert "is there already" in failed(result, 2)
    assert out.read_text() == "mine"


def test_malformed_rows_name_the_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    message = failed(call("step", "data.selection.dedup", "--in", bad, "--out", tmp_path / "o"), 2)
    assert "bad.jsonl:2" in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"], "nothing is left behind"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The result of an export in both formats of a tiny quantized checkpoint, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_checkpoint(folder / "plain", layers=1, hidden=64, head_dim=16)
    arguments = ["--in", model, "--out", folder / "q", "--set", "group_size=32"]
    assert call("step", "model.quantization.rtn", *arguments).exit_code == 0
    formats = ["--format", "onnx", "--format", "gptq"]
    arguments = ["--target", "x86-laptop-avx2", *formats, "--out", folder / "bundle"]
    return call("export", folder / "q", *arguments), folder / "bundle"


def test_export_writes_a_bundle_and_says_what_it_counts(exported: tuple[Result, Path]) -> None:
    result, bundle = exported
    assert result.exit_code == 0, result.output
    size = sum(path.stat().st_size for path in bundle.iterdir() if path.is_file())
    assert re.search(rf"bundle_bytes +│ {size:,} ", result.stdout)
    assert "bundle_bytes counts the 6 files that go to the device" in result.stdout
    assert "gptq/ (gptq_bytes) is not needed there and not counted" in result.stdout
    assert result.stdout.endswith(f"wrote {bundle}\n")
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "plain", "q"]


def test_export_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=1, hidden=64, head_dim=16)
    monkeypatch.chdir(tmp_path)
    result = call("export", model, "--target", "x86-laptop-avx2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["metrics"]["parity"]["exact"]["top1"] == 1.0
    place = tmp_path / "model-x86-laptop-avx2"  # where none was named
    assert told["metrics"]["bundle_bytes"] == sum(path.stat().st_size for path in place.iterdir())


def test_export_needs_no_target_for_a_gguf_file(
    exported: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'edgestill[gguf]'")
    monkeypatch.chdir(tmp_path)
    result = call("export", exported[1].parent / "q", "--format", "gguf", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["metrics"]["gguf_bytes"] == (tmp_path / "q-bundle" / "gguf" / "model.gguf").stat().st_size
    assert "bundle_bytes counts the GGUF file in gguf/" in told["notes"][0]


def test_the_backend_optimum_says_what_it_needs(
    exported: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESTILL_OPTIMUM_PYTHON", str(tmp_path / "none"))
    arguments = ["--backend", "optimum", "--out", tmp_path / "out"]
    assert "Make it with: make optimum-env" in failed(call("export", exported[1].parent / "q", *arguments), 2)


def test_bench_times_a_bundle(exported: tuple[Result, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    short = ["--set", "prompt_tokens=4", "--set", "new_tokens=4", "--set", "repeats=1", "--threads", "1"]
    told = call("bench", exported[1], *short)
    assert told.exit_code == 0, told.output
    assert re.search(r"decode_tokens_per_s +│ \d", told.stdout)
    result = call("bench", exported[1], *short, "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["threads"] == 1
    assert metrics["decode_tokens_per_s"] > 0 < metrics["peak_memory_bytes"]
    assert not list(tmp_path.iterdir()), "only the figures count: nothing is written"


def test_a_gptq_bundle_says_that_it_cannot_be_run(exported: tuple[Result, Path], rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "gptq-only"
    arguments = ["--target", "x86-laptop-avx2", "--format", "gptq", "--out", out, "--json"]
    result = call("export", exported[1].parent / "q", *arguments)
    assert result.exit_code in (0, 2), result.output
    if result.exit_code == 2:
        pytest.skip("a bundle without ONNX is refused at the export")
    told = json.loads(result.stdout)
    assert told["metrics"]["bundle_bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert "there is no ONNX model" in told["notes"][0]
    for command in (["bench", out], ["eval", out, "--data", rows]):
        message = failed(call(*command), 2)
        assert "holds the format gptq alone: no ONNX model" in message
        assert "Export the model again with --format onnx" in message
        assert f"edgestill eval {out / 'gptq'} --data ROWS" in message
    result = call("eval", out / "gptq", "--data", rows)
    assert result.exit_code == 0, result.output


def test_eval_of_a_model_folder(rows: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    result = call(
        "eval", model, "--data", rows, "--tasks", "function_call,perplexity", "--set", "max_new_tokens=2", "--json"
    )
    assert result.exit_code == 0, result.output
    measures = json.loads(result.stdout)["metrics"]["metrics"]
    assert measures["exact_match"]["n"] == 4
    assert measures["perplexity"]["mean"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "agreement"], "--teacher: missing; agreement compares with it"),
        (["--tasks", "function_cal"], "function_cal"),
    ],
)
def test_eval_wrong_input_gives_2(rows: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert words in failed(call("eval", tmp_path / "model", "--data", rows, *arguments), 2)


def test_eval_of_something_else_gives_2(rows: Path) -> None:
    assert "neither a model folder nor a bundle" in failed(call("eval", rows, "--data", rows), 2)


def test_ls_runs_and_report(profile_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    call("run", profile_path, "--store", store)
    runs = json.loads(call("ls", "runs", "--store", store, "--json").stdout)
    assert [(entry["profile"], entry["status"]) for entry in runs] == [("fake", "done")]
    for name in ("latest", runs[0]["run"]):
        result = call("report", name, "--store", store)
        assert Path(result.stdout.strip()).name == "report.html", result.output
    assert "not found" in failed(call("report", "nothing", "--store", store), 2)


def test_ls_stages_and_profiles() -> None:
    assert "MinHash" in call("ls", "stages").stdout
    assert call("ls", "profiles").exit_code == 0


def test_doctor_tells_of_this_machine(tmp_path: Path) -> None:
    result = call("doctor", "--store", tmp_path, "--json")
    assert result.exit_code == 0
    found = {entry["what"]: entry for entry in json.loads(result.stdout)}
    assert found["cores"]["value"] == f"{doctor.cores()} usable"
    assert found["torch"]["value"].startswith("2.")
    assert {"cpu", "memory", "disk", "instruction sets", "python"} <= set(found)


def test_doctor_says_how_to_install_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CORE", ("no-such-package",))
    monkeypatch.setattr(doctor, "EXTRAS", {"wings": ("no_such_wings", "flying")})
    result = call("doctor", "--store", tmp_path, "--json")
    assert result.exit_code == 1
    found = {entry["what"]: entry for entry in json.loads(result.stdout)}
    assert found["no-such-package"] == {
        "what": "no-such-package", "value": "missing", "state": "problem", "do": "pip install no-such-package"
    }  # fmt: skip
    assert found["extra wings"]["do"] == "for flying: pip install 'edgestill[wings]'"


@pytest.mark.parametrize("role", ["teacher: ADDRESS", "teachers: {other: 'ADDRESS'}"])
@pytest.mark.parametrize("address", ["http://me:SECRETPW@127.0.0.1:9/v1#m", "http://127.0.0.1:9/v1?key=SECRETPW#m"])
def test_a_password_in_an_address_is_refused_by_plan_and_kept_nowhere(
    rows: Path, tmp_path: Path, role: str, address: str
) -> None:
    profile, store = tmp_path / "p.yaml", tmp_path / "store"
    head = f"edgestill: 1\nname: ep\ndata: {{pool: {rows}}}\n{role.replace('ADDRESS', address)}\n"
    profile.write_text(head + "steps:\n  - data.selection: {method: dedup}\n")
    for command in ("plan", "run"):
        message = failed(call(command, str(profile), "--store", str(store)), 2)
        assert "the endpoint's URL holds a" in message
        assert "SECRETPW" not in message
    assert not any("SECRETPW" in path.read_text(errors="replace") for path in store.rglob("*") if path.is_file())


@pytest.mark.parametrize("recorded", [True, False])
def test_a_profile_of_data_steps_with_a_teacher_that_only_answers(rows: Path, tmp_path: Path, recorded: bool) -> None:
    """There is no model to export, and nothing is judged: the rows are the result."""
    asked = [[{"role": "user", "content": f"lock the {name} door"}] for name in ("hall", "attic", "garage")]
    record(tmp_path / "replies.jsonl", asked, [Reply(CALL, -0.1, True)] * 3)
    profile, store = tmp_path / "p.yaml", ["--store", str(tmp_path / "store")]
    teacher = tmp_path / "replies.jsonl" if recorded else "http://127.0.0.1:9/v1#m"
    head = f"edgestill: 1\nname: ep\nteacher: {teacher}\ndata: {{pool: {rows}}}\n"
    profile.write_text(head + "steps:\n  - data.quality: {method: mislabel}\n")
    planned = call("plan", profile, *store, "--json")
    assert [stage["name"] for stage in json.loads(planned.stdout)["stages"]] == [
        "data.source.read of pool",
        "data.quality.mislabel",
    ]
    if recorded:
        assert call("run", profile, *store).exit_code == 0


def test_a_step_prints_one_table_whatever_its_figures_are(capsys: pytest.CaptureFixture[str]) -> None:
    from compress import terminal

    layers = {f"layer {at}": {"kl": at / 7, "bits": [4, 4, 8]} for at in range(300)}
    metrics = {"loss": 1.25, "zero": -0.0, "layers": layers, "frontier": [{"kl": 1.0, "bytes": 3}] * 900,
               "exact_match": {"mean": 1.0, "low": 0.884, "high": 1.0, "n": 30}, "note": "[red]x[/]" * 90}  # fmt: skip
    terminal.show_figures(metrics, terminal.console())
    shown = capsys.readouterr().out
    assert len(shown) < 3000
    assert "600 figures, with --json" in shown
    assert "900 entries, with --json" in shown
    assert "1 [0.884, 1]" in shown
    assert "[red]x[/]" in shown
    assert not re.search(r"-0\b", shown)
