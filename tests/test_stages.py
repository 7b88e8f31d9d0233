"""The table of stages: every line resolves, names are found, misspelt ones are helped."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from compress.context import Params, StageContext
from compress.errors import ProfileError
from compress.stages import STAGES, Stage, find, load_function, methods, params_model

SLOTS = {"data", "model", "test", "reference", "bundle", "evaluation", "bench", "verdict", "source", "evaluations"}
USES = {"teacher", "teacher?", "tokenizer", "target", "device"}
EACH = pytest.mark.parametrize("line", STAGES, ids=lambda line: line.name)


@EACH
def test_line_is_well_formed(line: Stage) -> None:
    assert line.version >= 1
    assert {*line.reads, *line.optional, line.writes} <= SLOTS
    assert not set(line.reads) & set(line.optional)
    assert set(line.uses) <= USES
    assert 20 < len(line.summary) < 100
    assert not line.summary.endswith(".")


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(line.name for line in STAGES).items() if count > 1] == []


@EACH
def test_params_have_defaults_and_descriptions(line: Stage) -> None:
    model = params_model(line)
    assert issubclass(model, Params)
    model()  # a profile may leave all of them out
    assert [name for name, field in model.model_fields.items() if not field.description] == []
    assert "method" not in model.model_fields


@EACH
def test_function_takes_params_and_context(line: Stage) -> None:
    parameters = list(inspect.signature(load_function(line)).parameters.values())
    assert [parameter.name for parameter in parameters] == ["params", "ctx"]
    annotations = [str(parameter.annotation) for parameter in parameters]
    assert annotations == [params_model(line).__name__, StageContext.__name__]


def test_no_params_module_imports_torch() -> None:
    modules = sorted({line.params.partition(":")[0] for line in STAGES})
    script = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n" + (
        "heavy = {'torch', 'transformers', 'onnxruntime', 'pyarrow', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True)


@EACH
def test_find(line: Stage) -> None:
    assert find(line.stage, line.method) is line


def test_method_may_be_left_out_where_there_is_one_or_a_default() -> None:
    assert find("model.pruning").method == methods("model.pruning")[0]
    assert len(methods("model.pruning")) == 1
    assert find("model.distillation").method == "logits"
    assert len(methods("model.distillation")) > 1
    defaults = Counter(line.stage for line in STAGES if line.default)
    assert set(defaults.values()) == {1}


@pytest.mark.parametrize(
    ("stage", "method", "message"),
    [
        ("model.prunning", None, r"steps: unknown stage 'model\.prunning'; .*Did you mean 'model\.pruning'\?"),
        ("data.selection", None, r"steps\.data\.selection: no method given; expected method: dedup \| heuristics"),
        (
            "data.selection",
            "dedupe",
            r"data\.selection\.method: got 'dedupe'; expected one of .*Did you mean 'dedup'\?",
        ),
        ("zebra", None, r"unknown stage 'zebra'; expected one of data\.source"),
    ],
)
def test_unknown_names(stage: str, method: str | None, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        find(stage, method)
