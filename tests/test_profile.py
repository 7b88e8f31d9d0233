"""Profiles: reading, overriding, validation against the table, messages, built-in names."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from compress import profile as profiles
from compress.context import Params
from compress.errors import ProfileError
from compress.profile import find_profile, list_profiles, load_profile, stage_params
from compress.stages import Stage

ROOT = Path(__file__).parent.parent


class KeepParams(Params):
    keep: float = Field(0.5, gt=0, le=1, description="fraction")
    strict: bool = Field(False, description="a switch")


class Shape(Params):
    heads: int = Field(4, ge=1, description="heads")
    order: tuple[Literal["width", "depth"], ...] = Field(("width",), description="what goes first")


class PruneParams(Params):
    pattern: str = Field("2:4", pattern=r"^\d+:\d+$", description="zeros")
    student: Shape = Field(default_factory=Shape, description="shape")
    rate: float = Field(1e-4, ge=0, description="learning rate")
    layers: int | None = Field(None, description="layers")
    shapes: list[Shape] = Field(default_factory=list, description="several")


class ExportParams(Params):
    formats: list[Literal["onnx", "gptq"]] = Field(default_factory=lambda: ["onnx"], description="formats")

    @model_validator(mode="after")
    def _some(self):
        if not self.formats:
            raise ValueError("at least one format is needed")
        return self


class BenchParams(Params):
    repeats: int = Field(5, ge=1, description="repeats")


def line(stage, method, params, writes="data"):
    dotted = params if ":" in params else f"tests.test_profile:{params}"
    return Stage(stage, method, dotted, "nowhere:nothing", writes=writes)


TABLE = (
    line("data.source", "read", "KeepParams"),
    line("data.selection", "dedup", "KeepParams"),
    line("data.selection", "ifd", "KeepParams"),
    line("model.pruning", "structured", "PruneParams", "model"),
    line("deploy.export", "bundle", "ExportParams", "bundle"),
    line("evaluate", "bundle", "compress.assessment_params:EvaluateParams", "evaluation"),
    line("evaluate", "gate", "compress.assessment_params:GateParams", "verdict"),
    line("deploy.bench", "local", "BenchParams", "bench"),
)
GOOD = """\
edgestill: 1
name: good
seed: 7
teacher: teacher
data: {pool: pool.jsonl, test: sub/test.jsonl}
target: x86-laptop-avx2
hardware: {threads: 2}
steps:
  - data.selection: {method: dedup, keep: 0.8}
  - data.selection: {method: ifd}
  - model.pruning:
      pattern: 2:4
      rate: 1e-5
      student: {heads: 8, order: [depth, width]}
gate: [{metric: exact_match, max_drop: 0.02}]
evaluate: {tasks: [function_call]}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a profile beside a teacher and rows; messages then begin with its bare name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("pool.jsonl", "sub/test.jsonl"):
        (tmp_path / name).write_text("{}\n")

    def write(text=GOOD, name="p.yaml"):
        (tmp_path / name).write_text(text)
        return Path(name)

    return write


def load(path, *overrides):
    return load_profile(path, overrides=overrides, table=TABLE)


def test_a_good_profile(write, tmp_path):
    profile = load(write())
    assert (profile.name, profile.seed, profile.target) == ("good", 7, "x86-laptop-avx2")
    assert profile.teacher == str(tmp_path / "teacher")
    assert profile.data.pool == str(tmp_path / "pool.jsonl")
    assert profile.data.test == str(tmp_path / "sub" / "test.jsonl")
    assert profile.data.reference is None
    assert profile.hardware.threads == 2
    assert [step.name for step in profile.steps] == ["data.selection.dedup", "data.selection.ifd",
                                                     "model.pruning.structured"]  # fmt: skip
    assert profile.steps[1].params == {"keep": 0.5, "strict": False}
    assert profile.steps[2].params == {
        "pattern": "2:4", "rate": 1e-5, "layers": None, "shapes": [],
        "student": {"heads": 8, "order": ("depth", "width")},
    }  # fmt: skip
    assert profile.gate == [{"metric": "exact_match", "max_drop": 0.02}]
    assert profile.export == {"formats": ["onnx"]}
    assert profile.bench == {"repeats": 5}
    assert profile.evaluate["rows"] == 1000
    assert profile.path == tmp_path / "p.yaml"
    # what the profile holds is what the params models take, tuples included
    assert PruneParams.model_validate(profile.steps[2].params).student.order == ("depth", "width")


def test_smallest_profile_and_sections_switched_off(write):
    profile = load(write("edgestill: 1\nname: a\n"))
    assert (profile.steps, profile.teacher, profile.seed, profile.hardware.threads) == ((), None, 0, "auto")
    assert profile.export == {"formats": ["onnx"]}
    profile = load(write("edgestill: 1\nname: a\nexport: null\nbench:\nevaluate: ~\ngate:\nsteps:\n"))
    assert (profile.export, profile.bench, profile.evaluate, profile.gate) == (None, None, None, [])


def test_canonical_json_is_blind_to_order_and_layout(write):
    lines = GOOD.splitlines()
    turned = "\n".join(["# other layout", *lines[5:7], *lines[0:5], *lines[7:]]).replace("{heads: 8, ", "{heads: 0x8, ")
    first, second = load(write()), load(write(turned, "q.yaml"))
    assert first.canonical_json() == second.canonical_json()
    assert json.loads(first.canonical_json())["steps"][2]["params"]["student"]["order"] == ["depth", "width"]
    assert "p.yaml" not in first.canonical_json()
    assert load(write(), "seed=8").canonical_json() != first.canonical_json()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 7", "seeed: 7", r"p\.yaml:3: seeed: unknown key; expected one of edgestill, name.*Did you mean "
         r"'seed'\?"),
        ("keep: 0.8", "kepe: 0.8", r"p\.yaml:9: steps\[0\]\.data\.selection\.kepe: unknown key; expected one of "
         r"method, keep, strict\. Did you mean 'keep'\?"),
        ("heads: 8", "haeds: 8", r"p\.yaml:14: steps\[2\]\.model\.pruning\.student\.haeds: unknown key; expected one "
         r"of heads, order\. Did you mean 'heads'"),
        ("rate: 1e-5", "shapes: [{heads: 1}, {head: 1}]", r"pruning\.shapes\[1\]\.head: unknown key; expected one of "
         "heads, order"),
        ("seed: 7", "seed: seven", r"p\.yaml:3: seed: got 'seven'; expected an integer"),
        ("seed: 7", "seed: -1", r"p\.yaml:3: seed: got -1; expected at least 0"),
        ("seed: 7", "seed: 1.0", r"p\.yaml:3: seed: got 1\.0; expected an integer"),
        ("seed: 7", "seed: '7'", r"p\.yaml:3: seed: got '7'; expected an integer\. Remove the quotes"),
        ("seed: 7", "seed: [1]", r"p\.yaml:3: seed: got a list of 1; expected an integer"),
        ("seed: 7", "seed:", r"p\.yaml:3: seed: got nothing \(null\); expected an integer"),
        ("seed: 7", "seed: 7\nseed: 8", r"p\.yaml:4: seed: the key is given twice, first on line 3"),
        ("name: good", "name: 1.10", r'p\.yaml:2: name: got 1\.1 \(written 1\.10\); expected a string\. Quote it: '
         r'"1\.10"'),
        ("name: good", "name: true", r'p\.yaml:2: name: got true; expected a string\. Quote it: "true"'),
        ("name: good", "name: My Profile", r"p\.yaml:2: name: got 'My Profile'; expected text like"),
        ("keep: 0.8", "keep: 1.5", r"steps\[0\]\.data\.selection\.keep: got 1\.5; expected at most 1"),
        ("keep: 0.8", "keep: .inf", r"steps\[0\]\.data\.selection\.keep: got inf \(written \.inf\)"),
        ("keep: 0.8", "keep: .nan", r"steps\[0\]\.data\.selection\.keep: got nan .*expected a finite number"),
        ("keep: 0.8", "strict: no", r"strict: got 'no'; expected true or false\. In YAML 1\.2 no is a string: write "
         r"true or"),
        ("pattern: 2:4", "pattern: 124", r'pattern: got 124; expected a string\. Quote it: "124"'),
        ("rate: 1e-5", "rate: '1e-5'", r"rate: got '1e-5'; expected a number\. Remove the quotes"),
        ("rate: 1e-5", "layers: 2:4", r"layers: got '2:4'; expected an integer"),
        ("order: [depth, width]", "order: [deep]", r"order\[0\]: got 'deep'; expected 'width' or 'depth'\. Did you "
         r"mean"),
        ("student: {heads: 8, order: [depth, width]}", "student: 8", r"student: got 8; expected a mapping"),
        ("threads: 2", "threads: all", r"p\.yaml:7: hardware\.threads: got 'all'; expected 'auto' or an integer"),
        ("edgestill: 1\n", "", r"p\.yaml:1: edgestill: missing; expected a value for this key"),
        ("edgestill: 1", "edgestill: 2", r"p\.yaml:1: edgestill: got 2; expected 1"),
        ("method: ifd", "method: idf", r"p\.yaml:10: steps\[1\]\.data\.selection\.method: got 'idf'; expected one of "
         r"dedup, ifd\. Did you mean 'ifd'\?"),
        ("method: ifd", "keep: 0.1", r"p\.yaml:10: steps\[1\]\.data\.selection: no method given; expected method: "
         r"dedup \| ifd"),
        ("method: ifd", "method: [ifd]", r"method: got a list of 1; expected the name of a method"),
        ("model.pruning:", "model.prunning:", r"p\.yaml:11: steps\[2\]\.model\.prunning: unknown stage "
         r"'model\.prunning'; expected one of data\.selection, model\.pruning\. Did you mean 'model\.pruning'"),
        ("- data.selection: {method: ifd}", "- data.selection", r"p\.yaml:10: steps\[1\]: got 'data\.selection'; "
         r"expected one"),
        ("- data.selection: {method: ifd}", "- data.selection: ifd", r"steps\[1\]\.data\.selection: got 'ifd'; "
         r"expected a map"),
        ("- data.selection: {method: ifd}", "- {a: 1, b: 2}", r"steps\[1\]: got a mapping of 2; expected one stage"),
        ("- data.selection: {method: ifd}", "- deploy.export: {}", r"steps\[1\]\.deploy\.export: this is no step\. "
         r"Give its parameters under export"),
        ("- data.selection: {method: ifd}", "- data.source: {method: read}", "unknown stage 'data.source'"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "gate: [{metric: a}]", r"p\.yaml:15: gate\[0\]: exactly one "
         r"of min"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "gate: [{metric: a, mix: 1}]", r"gate\[0\]\.mix: unknown "
         r"key; expected one of metric, min.*Did you mean 'm(in|ax)'"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "gate: {metric: a}", r"p\.yaml:15: gate: got a mapping of "
         r"1; expected"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "export: {formats: []}", "export: at least one format is "
         "needed"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "export: {formats: [onx]}", r"export\.formats\[0\]: got "
         r"'onx'; expected 'onnx' or 'gptq'\. Did you mean 'onnx'"),
        ("gate: [{metric: exact_match, max_drop: 0.02}]", "steps: 3", "steps: the key is given twice"),
        ("seed: 7", "<<: {seed: 3}", r"p\.yaml:3: <<: unknown key"),
        ("seed: 7", "seed: !!python/name:os.system", r"p\.yaml:3: seed: got the tag !!python/name:os\.system"),
    ],
)  # fmt: skip
def test_mistakes(write, old, new, message):
    assert old in GOOD
    with pytest.raises(ProfileError, match=message):
        load(write(GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("gate", "overrides", "message"),
    [
        ("metric: perplexity, max: 9", [], r"p\.yaml:15: gate\[0\]\.metric: perplexity is not measured by this "
         r"profile; expected one of exact_match, .*, parameters, bundle_bytes\. Add perplexity to "
         r"evaluate\.tasks, or take"),
        ("metric: kl, max: 1", ["evaluate.tasks=[agreement]", "teacher=null"], r"gate\[0\]\.metric: kl is not "
         r"measured .*; expected one of parameters, bundle_bytes\. Name a teacher"),
        ("metric: kl, max_drop: 1", ["evaluate.tasks=[agreement]"], r"gate\[0\]\.max_drop: kl already compares with "
         r"the teacher, who has no kl of its own; expected min or max\. Write {metric: kl, max: \.\.\.}"),
        ("metric: top1_agreement, min_ratio: 1", ["evaluate.tasks=[agreement]"], r"gate\[0\]\.min_ratio: "
         r"top1_agreement already .* Write {metric: top1_agreement, min: \.\.\.}"),
        ("metric: parameters, min_ratio: 2", ["teacher=null"], r"gate\[0\]\.min_ratio: min_ratio compares with the "
         r"teacher, and the profile names none; expected min or max\. Name a teacher"),
        ("metric: bundle_bytes, max: 9", ["export=null"], r"gate\[0\]\.metric: bundle_bytes is not measured by this "
         r"profile; expected one of .*, parameters\. Switch the export on"),
        ("metric: exact_match, min: 0", ["evaluate=null"], r"gate\[0\]\.metric: exact_match is not measured by this "
         r"profile; expected one of parameters, bundle_bytes\. Add function_call to evaluate\.tasks"),
        ("metric: exact_match, min: 0", ["export.formats=[gptq]"], r"--set export\.formats=\[gptq\]: export\.formats: "
         r"got gptq, but evaluate and bench run the ONNX bundle; expected onnx among them\. Add onnx, or set evaluate: "
         r"null and bench: null"),
        ("metric: parameters, max: 9", ["export.formats=[gptq]", "data.test=null"], "but bench run the ONNX bundle"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_judged_is_refused(write, gate, overrides, message):
    path = write(GOOD.replace("metric: exact_match, max_drop: 0.02", gate))
    with pytest.raises(ProfileError, match=message):
        load(path, *overrides)


def test_a_checkpoint_export_that_nothing_runs_is_fine(write):
    overrides = ["export.formats=[gptq]", "bench=null", "evaluate=null", "gate=[{metric: bundle_bytes, max: 9}]"]
    assert load(write(), *overrides).export == {"formats": ["gptq"]}


def test_all_mistakes_stand_in_one_message(write):
    text = GOOD.replace("seed: 7", "seed: no").replace("keep: 0.8", "keep: 8").replace("rate: 1e-5", "rat: 1e-5")
    with pytest.raises(ProfileError) as caught:
        load(write(text), "hardware.threads=0", "teacher=3")
    assert str(caught.value).splitlines() == [
        "p.yaml: 5 problems",
        "  p.yaml:3: seed: got 'no'; expected an integer",
        "  p.yaml:9: steps[0].data.selection.keep: got 8; expected at most 1",
        "  p.yaml:13: steps[2].model.pruning.rat: unknown key; expected one of method, pattern, student, rate, layers, "
        "shapes. Did you mean 'rate'?",
        '  --set teacher=3: teacher: got 3; expected a string. Quote it: "3".',
        "  --set hardware.threads=0: hardware.threads: got 0; expected 'auto' or at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yaml: the file is empty; expected a mapping"),
        ("# nothing\n", "p.yaml: the file is empty"),
        ("- a\n", "p.yaml: got a list of 1; expected a mapping that begins with edgestill: 1"),
        ("hello", "p.yaml: got 'hello'; expected a mapping"),
        ("a: [", "p.yaml:1: not YAML"),
    ],
)
def test_what_is_no_profile(write, text, message):
    with pytest.raises(ProfileError, match=message):
        load(write(text))


@pytest.mark.parametrize(
    ("override", "where", "expected"),
    [
        ("seed=9", ("seed",), 9),
        ("name=other", ("name",), "other"),
        ("description=a: b", None, r"--set description=a: b: description: got a mapping of 1; expected a string"),
        ("description='a: b'", ("description",), "a: b"),
        ("hardware.threads=auto", ("hardware", "threads"), "auto"),
        ("data.columns.text=body", ("data", "columns"), {"text": "body"}),
        ("target=", ("target",), None),
        ("export.formats=[onnx, gptq]", ("export", "formats"), ["onnx", "gptq"]),
        ("export=null", ("export",), None),
        ("gate[0].max_drop=0.5", ("gate", 0, "max_drop"), 0.5),
        ("steps[0].data.selection.keep=1e-3", ("steps", 0, "params", "keep"), 1e-3),
        ("steps[2].model.pruning.student.heads=16", ("steps", 2, "params", "student", "heads"), 16),
        ("steps[2].model.pruning.student.order[0]=width", ("steps", 2, "params", "student", "order"), 2 * ["width"]),
        ("steps[model.pruning].pattern=4:8", ("steps", 2, "params", "pattern"), "4:8"),
        ("steps[data.selection.dedup].keep=0.1", ("steps", 0, "params", "keep"), 0.1),
        ("steps[1].data.selection.method=dedup", ("steps", 1, "method"), "dedup"),
        ("steps=[{data.selection: {method: dedup}}]", ("steps", 0, "params", "keep"), 0.5),
        ("steps[1]={model.pruning: {}}", ("steps", 1, "stage"), "model.pruning"),
        ("seed", None, r"--set seed: got 'seed'; expected KEY=VALUE"),
        ("=3", None, "expected KEY=VALUE"),
        ("a..b=3", None, "expected KEY=VALUE"),
        ("seed.x=3", None, r"--set seed\.x=3: seed\.x: seed is 7; expected a mapping there"),
        ("seed[0]=3", None, r"seed\[0\]: seed is 7; expected a list there"),
        ("nothing[0]=3", None, r"nothing is not there; expected a list there"),
        ("sed=3", None, r"--set sed=3: sed: unknown key.*Did you mean 'seed'"),
        ("steps[9].x=3", None, r"steps has 3 entries; expected an index from 0 to 2"),
        ("steps[data.selection].keep=1", None, r"data\.selection is steps\[0\], steps\[1\]; expected the index"),
        ("steps[model.pruninng].rate=1", None, r"steps has no 'model\.pruninng'; expected one of .*Did you mean "
         r"'model\.pru"),
        ("steps[0].model.pruning.heads=4", None, r"steps\[0\] is data\.selection, not model\.pruning"),
        ("steps[0].data.selection.keep=2", None, r"--set steps\[0\]\.data\.selection\.keep=2: "
         r"steps\[0\]\.data\.selection\.keep: got 2; expected at most 1"),
        ("seed=[1", None, r"--set seed=\[1: not YAML"),
        ("seed=!!python/name:os.system", None, r"--set seed=!!python/name:os\.system: got the tag"),
        ("data.columns={a: b, a: c}", None, "the key is given twice"),
    ],
)  # fmt: skip
def test_overrides(write, override, where, expected):
    if where is None:
        with pytest.raises(ProfileError, match=expected):
            load(write(), override)
        return
    value = json.loads(load(write(), override).canonical_json())
    for key in where:
        value = value[key]
    assert value == expected


def test_later_overrides_win_and_build_on_earlier_ones(write):
    profile = load(
        write(), "seed=1", "seed=2", "steps[0]={data.selection: {method: ifd}}", "steps[0].data.selection.keep=1"
    )
    assert profile.seed == 2
    assert profile.steps[0].params["keep"] == 1


def test_paths_of_overrides_start_at_the_current_folder(write, tmp_path, monkeypatch):
    path = write().absolute()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "other").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load(path, "teacher=other").teacher == str(elsewhere / "other")
    assert load(path, "teacher=./other/../other").teacher == str(elsewhere / "other")
    assert load(path, "teacher=sub").teacher == str(tmp_path / "sub")  # beside the profile
    assert load(path, "teacher=Some/Model-7B").teacher == "Some/Model-7B"  # a hub name
    assert load(path, "teacher=http://localhost:8000/v1").teacher == "http://localhost:8000/v1"
    assert load(path, "teacher=missing").teacher == str(tmp_path / "missing")
    assert load(path, "target=dev.yaml").target == str(tmp_path / "dev.yaml")
    assert load(path, "data.test=other").data.test == str(elsewhere / "other")


def test_home_is_expanded(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "sub"))
    assert load(write(), "data.pool=~/test.jsonl").data.pool == str(tmp_path / "sub" / "test.jsonl")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.txt", "train-extra.txt", "valid-b.txt", "valid-a.txt"], ("train.txt", "valid-a.txt", None)),
        (["pool.jsonl", "train.jsonl", "test.jsonl", "valid.jsonl", "reference.jsonl"],
         ("pool.jsonl", "test.jsonl", "reference.jsonl")),
        (["training.jsonl", "dev.parquet", "README.md"], ("", "dev.parquet", None)),
        (["state.json", "data-00000.arrow"], ("", None, None)),
    ],
)  # fmt: skip
def test_a_folder_of_data(write, tmp_path, files, expected):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x\n")
    want = tuple(None if name is None else str(folder / name) if name else str(folder) for name in expected)
    text = GOOD.replace("data: {pool: pool.jsonl, test: sub/test.jsonl}", "data: rows")
    for profile in (load(write(text)), load(write(), "data=rows")):
        assert (profile.data.pool, profile.data.test, profile.data.reference) == want


def test_data_override_keeps_names_and_formats_of_the_profile(write, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("mine.txt", "train.txt", "valid-a.txt", "valid-b.txt"):
        (folder / name).write_text("x\n")
    text = GOOD.replace(
        "pool: pool.jsonl, test: sub/test.jsonl", "pool: old/mine.txt, test: old/valid-b.txt, format: text"
    )
    data = load(write(text), "data=rows").data
    assert (data.pool, data.test, data.format) == (str(folder / "mine.txt"), str(folder / "valid-b.txt"), "text")
    data = load(write(text), "data=rows/train.txt").data  # a file is the pool; the rest stays
    assert (data.pool, data.test) == (str(folder / "train.txt"), str(tmp_path / "old" / "valid-b.txt"))


def test_finding_profiles(tmp_path, monkeypatch):
    built_in = tmp_path / "built"
    built_in.mkdir()
    (built_in / "quick.yaml").write_text("edgestill: 1\nname: quick\n")
    monkeypatch.setattr(profiles, "built_in_profiles", lambda: built_in)
    monkeypatch.chdir(tmp_path)
    assert list_profiles() == {"quick": built_in / "quick.yaml"}
    assert find_profile("quick") == built_in / "quick.yaml"
    (tmp_path / "quick").mkdir()  # a folder of that name in the current one is in nobody's way
    assert find_profile("quick") == built_in / "quick.yaml"
    with pytest.raises(
        ProfileError, match=r"profile: got 'quikc'; expected a file, or one of quick\. Did you mean 'quick'"
    ):
        find_profile("quikc")
    with pytest.raises(ProfileError, match=r"x/quick\.yaml: no such file.*Did you mean 'quick'"):
        find_profile("x/quick.yaml")
    with pytest.raises(ProfileError, match="built: is a folder"):
        find_profile("built")
    (tmp_path / "quick").rmdir()
    (tmp_path / "quick").write_text("edgestill: 1\nname: mine\n")
    assert find_profile("quick") == Path("quick")  # a file comes first


def test_built_in_profiles_of_this_checkout():
    assert profiles.built_in_profiles() == ROOT / "profiles"
    assert list_profiles().keys() == {path.stem for path in (ROOT / "profiles").glob("*.yaml")}


def test_built_in_profiles_of_an_installed_package(tmp_path):
    """As a wheel unpacks it: the packages beside each other in a folder of sys.path, the checkout out of sight."""
    site = tmp_path / "site"
    for package in ("compress", "profiles", "deploy"):
        shutil.copytree(
            ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__", "teacher", "*.jsonl")
        )
    (site / "profiles" / "only-here.yaml").write_text("edgestill: 1\nname: only-here\nexport:\nbench:\n")
    code = (
        "import sys; from compress import load_profile; print(load_profile('only-here').path, 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(site / "profiles" / "only-here.yaml"), "False"]


def test_single_stage():
    stage, params = stage_params("data.selection", overrides=["method=ifd", "keep=0.25"], table=TABLE)
    assert (stage.name, params.keep) == ("data.selection.ifd", 0.25)
    stage, params = stage_params("model.pruning", overrides=["student.heads=2", "student.order=[depth]"], table=TABLE)
    assert (params.student.heads, params.student.order) == (2, ("depth",))
    assert stage_params("data.selection", method="dedup", table=TABLE)[0].method == "dedup"


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("data.selection", ["keep=1"], r"stage\.data\.selection: no method given; expected method: dedup \| ifd"),
        ("data.selction", [], "unknown stage 'data.selction'.*Did you mean 'data.selection'"),
        ("data.selection", ["method=3"], "--set method=3: method: got 3; expected the name of a method"),
        ("data.selection", ["method=ifd", "kep=1", "strict=no"], r"--set: 2 problems\n  --set strict=no: strict: got "
         r"'no'.*\n  --set kep=1: kep: unknown key; expected one of method, keep, strict\. Did you mean 'keep'"),
        ("data.selection", ["keep"], "--set keep: got 'keep'; expected KEY=VALUE"),
    ],
)  # fmt: skip
def test_mistakes_of_a_single_stage(stage, overrides, message):
    with pytest.raises(ProfileError, match=message):
        stage_params(stage, overrides=overrides, table=TABLE)


def test_loading_is_fast(write):
    path = write()
    load(path)
    start = time.process_time()
    for _ in range(5):
        load(path)
    assert (time.process_time() - start) / 5 < 0.1  # about 10 ms on a slow core
