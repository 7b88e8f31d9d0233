"""In a profile: a plan foretells the student, and attributions cost time."""

from __future__ import annotations

import json

import pytest

from compress.errors import ProfileError
from compress.estimates import estimate
from compress.model.checkpoint import read_config
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.student_shapes import student_shape
from compress.model.shapes import parameter_count, with_shape
from compress.plans import plan
from compress.profile import load_profile
from compress.store import Store
from tests.tiny import tiny_checkpoint

PROFILE = """\
edgestill: 1
name: classes
teacher: teacher
data: {pool: pool.jsonl}
steps:
  - model.distillation: {method: classifier, init: scratch, layers: 1, MORE}
export: null
bench: null
"""


@pytest.fixture
def planned(tmp_path):
    tiny_checkpoint(tmp_path / "teacher", layers=2)
    lines = [json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(10)]
    (tmp_path / "pool.jsonl").write_text("".join(lines), encoding="utf-8")

    def make(more):
        path = tmp_path / "profile.yaml"
        path.write_text(PROFILE.replace("MORE", more), encoding="utf-8")
        return plan(load_profile(path), store=Store(tmp_path / "store"))

    make.folder = tmp_path
    return make


def test_a_plan_foretells_the_student_and_what_attributions_cost(planned):
    plain, explained = (estimate(planned(f"steps: 10, attribution_weight: {weight}")) for weight in ("0.0", "1.0"))
    config = read_config(planned.folder / "teacher")
    shape, _ = student_shape(config, ClassifierParams(init="scratch", layers=1).student, where="here")
    parameters = parameter_count(with_shape(config, shape))
    assert plain.figures["student parameters"] == (parameters, "parameters")
    assert explained.seconds[-1] > plain.seconds[-1]


def test_a_wrong_parameter_is_refused_with_its_key(planned):
    with pytest.raises(ProfileError, match=r"classes.*two labels or more"):
        planned("classes: [a]")
