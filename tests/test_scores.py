"""Figures from row scores: intervals at the border, few changes, what a single row cannot tell, and no sign on 0."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.assessment_params import GateParams
from compress.context import StageContext
from compress.judgement import judge
from compress.progress import Progress
from compress.scores import Scores, as_measure, difference, measure, ratio


def scores(subject: str = "model", **columns: Any) -> Scores:
    """Scores with the given columns; a pair is (sums, weights)."""
    made = Scores(subject, 6, 24)
    for name, values in columns.items():
        sums, weights = values if isinstance(values, tuple) else (values, None)
        made.add(name, [f"r{i}" for i in range(len(sums))], np.asarray(sums, dtype=float),
                 None if weights is None else np.asarray(weights, dtype=float))  # fmt: skip
    return made


def verdict(tmp_path: Path, limit: dict[str, Any], teacher: Scores, shipped: Scores) -> tuple[bool, str]:
    """Whether ``limit`` holds, and the text of the verdict's file."""
    inputs = {}
    for at, each in enumerate((teacher, shipped)):
        folder = tmp_path / str(at)
        folder.mkdir()
        each.write(folder)
        inputs[f"evaluation.{at:02d}.{'teacher' if not at else 'bundle'}"] = folder
    out = tmp_path / "out"
    out.mkdir()
    result = judge(
        GateParams.model_validate({"limits": [limit]}),
        StageContext("evaluate.gate", inputs, out, tmp_path, 5, Progress(quiet=True)),
    )
    return bool(result.metrics["passed"]), (out / "verdict.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("metric", ["exact_match", "function_accuracy", "valid_json", "argument_f1", "top1_agreement"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_no_point(metric: str, value: float) -> None:
    weights = np.full(30, 7.0) if metric == "top1_agreement" else np.ones(30)
    found = measure(scores(**{metric: (value * weights, weights)}), metric, seed=0)
    assert found.mean == value
    assert found.high - found.low == pytest.approx(0.115, abs=0.003)
    assert value in (found.low, found.high)


def test_shares_between_0_and_1_that_hardly_differ_are_no_point_either() -> None:
    found = measure(scores(argument_f1=[0.8] * 20), "argument_f1", seed=0)
    assert found.low < 0.65
    assert found.high > 0.9
    plain = measure(scores(argument_f1=np.random.default_rng(0).random(200)), "argument_f1", seed=0)
    assert plain.method == "bootstrap"
    assert plain.high - plain.low < 0.09


@pytest.mark.parametrize("metric", ["exact_match", "argument_f1"])
def test_no_change_on_few_rows_proves_no_small_drop(tmp_path: Path, metric: str) -> None:
    for rows, passed in ((1, False), (5, False), (30, False), (150, True)):
        (tmp_path / str(rows)).mkdir()
        same = scores(**{metric: [1.0] * rows})
        limit = {"metric": metric, "max_drop": 0.03}
        assert verdict(tmp_path / str(rows), limit, same, same)[0] is passed
        (tmp_path / f"ratio {rows}").mkdir()
        limit = {"metric": metric, "min_ratio": 0.97}  # teacher / shipped
        assert verdict(tmp_path / f"ratio {rows}", limit, same, same)[0] is passed


def test_a_few_changed_shares_are_judged_as_if_they_had_changed_wholly() -> None:
    before = scores(argument_f1=[1.0] * 40)
    after = scores(argument_f1=[0.5, 0.5] + [1.0] * 38)
    found = difference(after, before, "argument_f1", seed=0)
    assert found is not None
    assert found.mean == pytest.approx(-0.025)
    assert found.low < -0.16  # the exact upper bound of 2 of 40
    assert found.high > 0.0
    turned = ratio(after, before, "argument_f1", seed=0)
    assert turned is not None
    assert turned.low < 0.84


def test_one_row_of_a_loss_has_no_interval_and_passes_nothing(tmp_path: Path) -> None:
    one = scores(perplexity=([8.0], [4.0]), kl=([0.1], [4.0]))
    for limit in ({"metric": "perplexity", "max": 99}, {"metric": "perplexity", "max_ratio": 2},
                  {"metric": "perplexity", "max_rise": 9}, {"metric": "kl", "max": 9}):  # fmt: skip
        place = tmp_path / re.sub(r"\W", "", str(limit))
        place.mkdir()
        passed, text = verdict(place, limit, one, one)
        assert not passed
        assert "one row, of which no interval can be made" in text
        assert not re.search("Infinity|NaN", text)
    assert as_measure(measure(one, "kl", seed=0)) == {"mean": 0.025, "low": None, "high": None, "n": 1}


def test_rows_that_are_all_equal_are_said_to_be_so() -> None:
    found = measure(scores(kl=[0.25] * 9), "kl", seed=0)
    assert (found.low, found.high) == (0.25, 0.25)
    assert found.note == "all 9 rows are equal, so that the interval has no width"


def test_zero_has_no_sign(tmp_path: Path) -> None:
    same = scores(exact_match=[1.0] * 150, perplexity=([4.0] * 150, [2.0] * 150))
    for limit in ({"metric": "exact_match", "max_drop": 0.1}, {"metric": "perplexity", "max_rise": 0.5}):
        place = tmp_path / limit["metric"]  # type: ignore[operator]
        place.mkdir()
        _, text = verdict(place, limit, same, same)
        assert not re.search(r"-0(\.0*)?(?![\d.])", text), text
        assert json.loads(text)["ledger"]["entries"][1]["loss"] == 0


def test_a_ratio_to_a_share_that_may_be_0_is_not_told() -> None:
    rare = scores(exact_match=[1.0] + [0.0] * 8)
    assert ratio(rare, rare, "exact_match", seed=0) is None
    often = scores(exact_match=[1.0] * 7 + [0.0] * 8)
    assert ratio(often, often, "exact_match", seed=0) is not None
