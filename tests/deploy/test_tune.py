"""Tuning: the search finds a known best within its budget, quality is held, and a kill leaves what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import ModelError, ParityError, UserError
from deploy import tune as tuning
from deploy.bundle import Bundle, open_bundle, tuned, write_bundle
from deploy.bundle_runner import run
from deploy.params import TuneParams
from deploy.runners import GenaiRunner
from deploy.tune_search import Judges, NotMeasurable, Rules, Setting, Timing, search

START = Setting(threads=4)
VALUES = {
    "threads": [4, 2, 1],
    "spinning": [True, False],
    "pinned": [False, True],
    "prefill_chunk": [None, 64, 32],
    "accuracy_level": [4, 1],
}
QUICK = TuneParams(budget_s=4.0, prompt_tokens=12, new_tokens=4, rounds=1)


class Machine:
    """Times of settings by a formula with one best setting; a busy moment slows each pair down alike."""

    def __init__(self, factors: dict[tuple[str, Any], float], busy: tuple[int, ...] = (1, 2, 3)) -> None:
        self.factors, self.busy, self.clock, self.count = factors, busy, 0.0, 0

    def measure(self, setting: Setting) -> Timing:
        """A request under ``setting``."""
        self.count += 1
        self.clock += 1.0
        busy = self.busy[(self.count - 1) // 2 % len(self.busy)]
        time = busy * float(np.prod([self.factors.get(item, 1.0) for item in asdict(setting).items()]))
        if setting.threads == 2 and setting.spinning:  # an interaction: spinning hurts there
            time *= 1.5
        return Timing(prefill_s=10 * time, decode_s=time)


FACTORS = {
    ("threads", 4): 2.0,
    ("threads", 2): 1.0,
    ("threads", 1): 1.8,
    ("prefill_chunk", 64): 0.9,
    ("pinned", True): 0.95,
}
BEST = Setting(threads=2, spinning=False, pinned=True, prefill_chunk=64)


def found(machine: Machine, *, budget: float = 1e9, refuse: Callable[[Setting], str] = lambda _: "") -> Any:
    """The result of a search on ``machine``."""
    judges = Judges(machine.measure, refuse, lambda: machine.clock >= budget)
    return search(START, VALUES, Rules(new_tokens=64, rounds=3), judges)


def test_the_search_finds_the_best_setting_and_always_the_same() -> None:
    best, trials = found(Machine(FACTORS))
    assert best == BEST
    assert found(Machine(FACTORS)) == (best, trials)
    assert {trial.knob for trial in trials} == set(VALUES)
    assert all(trial.ratio < 0.98 for trial in trials if trial.verdict == "taken")


def test_a_search_is_over_when_its_budget_is() -> None:
    machine = Machine(FACTORS)
    best, trials = found(machine, budget=7.0)
    assert machine.clock <= 8.0  # the pair that ran is finished
    assert best == replace(START, threads=2)  # the first duel was decided
    assert trials[-1].verdict == "the time was up"
    assert found(Machine(FACTORS), budget=0.0) == (START, [])


def test_nothing_is_taken_where_nothing_helps_enough() -> None:
    best, trials = found(Machine({("pinned", True): 0.99, ("threads", 2): 0.7}))  # 0.7 * 1.5 is no gain
    assert best.pinned is False
    assert best == START or best.threads == 2
    assert not any(trial.knob == "pinned" and trial.verdict == "taken" for trial in trials)


def test_what_costs_quality_is_refused_however_fast() -> None:
    fast = {("accuracy_level", 1): 0.1}
    assert found(Machine(fast))[0].accuracy_level == 1
    refuse = lambda setting: "KL 1" if setting.accuracy_level == 1 else ""  # noqa: E731 - a word
    best, trials = found(Machine(fast), refuse=refuse)
    assert best.accuracy_level == 4
    assert [trial.verdict for trial in trials if trial.knob == "accuracy_level"] == ["refused: KL 1"] * (
        sum(trial.knob == "accuracy_level" for trial in trials)
    )


def test_a_setting_that_does_not_run_is_passed_over() -> None:
    machine = Machine(FACTORS, busy=(1,))

    def measure(setting: Setting) -> Timing:
        if setting.pinned:
            raise NotMeasurable(setting, "no such core")
        return machine.measure(setting)

    best, trials = search(START, VALUES, Rules(64, rounds=3), Judges(measure, lambda _: "", lambda: False))
    assert best == replace(BEST, pinned=False)
    assert any(trial.verdict == "does not run: no such core" for trial in trials)


def test_a_tuned_bundle_is_whole_and_answers_as_before(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = tuning.tune(bundle, out, QUICK, device="a test")
    said = open_bundle(out).info["tuned"]
    assert set(said) >= {"threads", "prefill_chunk", "device", "config_entries", "measured"}
    assert said["threads"] == result.setting.threads
    assert said["measured"]["before"]["decode_tokens_per_s"] > 0
    config = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == result.setting.threads
    runner, before = GenaiRunner(out), GenaiRunner(bundle, threads=1)
    assert runner.threads == result.setting.threads
    if result.setting.accuracy_level == 4:
        assert runner.generate([[9, 8, 7]], 12, set()) == before.generate([[9, 8, 7]], 12, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]
    assert not tuned(bundle)


def only(monkeypatch: pytest.MonkeyPatch, best: Setting) -> None:
    """Let the search end at ``best`` without measuring."""
    rates = {"before": {}, "after": {}}
    monkeypatch.setattr(tuning, "_find", lambda *_: (best, [], rates))


def test_every_setting_is_written_and_read_by_the_runtime(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "processors", lambda: [[0], [1]])
    best = Setting(2, False, True, False, prefill_chunk=4, accuracy_level=1)
    only(monkeypatch, best)
    out = tmp_path / "tuned"
    tuning.tune(bundle, out, QUICK, device="a test")
    config = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    session = config["model"]["decoder"]["session_options"]
    assert (session[tuning.SPINNING], session["intra_op_num_threads"]) == ("0", 2)
    assert tuned(out)["config_entries"] == {tuning.SPINNING: "0", tuning.AFFINITIES: "2"}
    assert (config["search"]["chunk_size"], config["search"]["past_present_share_buffer"]) == (4, False)
    graph = onnx.load(str(out / "model.onnx"))
    levels = {a.i for node in graph.graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {1}
    assert open_bundle(out).info["onnx"]["accuracy_level"] == 1
    assert GenaiRunner(out).generate([[9, 8, 7, 6, 5, 4, 3, 2, 1]], 5, set())


def test_a_bundle_with_pinned_threads_opens_with_any_count(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "processors", lambda: [[0], [1]])
    only(monkeypatch, Setting(2, pinned=True))
    out = tmp_path / "tuned"
    tuning.tune(bundle, out, QUICK, device="a test")
    assert tuning.AFFINITIES not in (out / "genai_config.json").read_text(encoding="utf-8")
    info, config = open_bundle(out).info, run.read_json(out / run.GENAI_CONFIG)
    answers = []
    for threads, pinned in ((None, True), (2, True), (1, False), (3, False)):
        runner = GenaiRunner(out, threads=threads)
        assert (tuning.AFFINITIES in runner._overlay) == pinned
        settings = run.Settings.of(dict(info), config, threads)
        assert settings.config_entries == ({tuning.AFFINITIES: "2"} if pinned else {})
        assert run.Runner(out, dict(info), settings).vocabulary == runner.vocabulary
        answers.append(runner.generate([[9, 8, 7]], 6, set()))
    assert answers == answers[:1] * 4


def test_siblings_are_pinned_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "processors", lambda: [[0, 1], [2, 3], [4, 5]])
    assert tuning.session_entries(Setting(3, pinned=True)) == {tuning.AFFINITIES: "3;5"}
    assert tuning.session_entries(Setting(4, pinned=True)) == {tuning.AFFINITIES: "3;5;2"}


def test_a_second_tune_starts_from_what_was_exported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "processors", lambda: [[0], [1]])
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    config_file = place / "genai_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["search"]["past_present_share_buffer"] = False
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    exported = write_bundle(place, {k: v for k, v in open_bundle(bundle).info.items() if k != "files"}).info
    graph = (place / "model.onnx").read_bytes()
    only(monkeypatch, Setting(2, False, True, share_buffer=False, prefill_chunk=4, accuracy_level=1))
    tuning.tune(place, place, QUICK, device="a test")
    once = open_bundle(place).info
    assert once["onnx"]["accuracy_level"] == 1
    assert set(once["parity"]) == set(exported["parity"]) - {"shipped"}
    assert once["tuned"]["kl"] > 0
    untuned = tuning._copy_untuned(open_bundle(place), tmp_path / "untuned")
    assert untuned.info["parity"] == exported["parity"]
    assert untuned.info["onnx"] == exported["onnx"]
    assert json.loads((untuned.folder / "genai_config.json").read_text(encoding="utf-8")) == config
    before, after = (onnx.load_from_string(data) for data in (graph, (untuned.folder / "model.onnx").read_bytes()))
    assert before == after
    start = tuning.starting_point(untuned)
    assert (start.share_buffer, start.accuracy_level) == (False, 4)
    assert "share_buffer" not in tuning.values(start, 8, 2)
    only(monkeypatch, Setting(1, share_buffer=False))
    tuning.tune(place, place, QUICK, device="a test")
    again = open_bundle(place).info
    assert (again["parity"], again["tuned"]["was"]) == (exported["parity"], {
        "accuracy_level": 4,
        "search": {"past_present_share_buffer": False},
        "session": {"intra_op_num_threads": 1},
    })  # fmt: skip


def test_accuracy_is_no_knob_where_the_graph_has_none(bundle: Path, tmp_path: Path) -> None:
    start = tuning.starting_point(open_bundle(bundle))
    base = tmp_path / "base"
    shutil.copytree(bundle, base)
    assert "accuracy_level" in tuning._space(start, QUICK, tuning.Workers(base, QUICK))
    shutil.rmtree(tmp_path / "level-1")
    model = onnx.load(str(base / "model.onnx"), load_external_data=False)
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "accuracy_level"]:
            node.attribute.remove(attribute)
    (base / "model.onnx").write_bytes(model.SerializeToString())
    assert "accuracy_level" not in tuning._space(start, QUICK, tuning.Workers(base, QUICK))
    info = {**open_bundle(bundle).info, "onnx": {"accuracy_level": 0, "context_tokens": 256}}
    made = tmp_path / "made"
    (base / "bundle.json").unlink()
    assert not tuning._write(Bundle(base, info), made, Setting(1, accuracy_level=1), {})
    assert open_bundle(made).info["onnx"]["accuracy_level"] == 0


def test_a_process_that_dies_is_told_apart() -> None:
    def measure(setting: Setting) -> Timing:
        if setting == START:
            raise NotMeasurable(setting, "killed")
        return Timing(1.0, 1.0)

    best, trials = search(START, {"threads": [4, 2]}, Rules(64, rounds=1), Judges(measure, lambda _: "", lambda: False))
    assert best == START
    assert [trial.verdict for trial in trials] == ["the best so far died: killed"]


class Dying:
    """Workers of which the setting ``dead`` fails."""

    base = Path("base")

    def __init__(self, dead: Setting) -> None:
        self.dead = dead

    def measure(self, setting: Setting) -> Timing:
        """Time one request."""
        if setting == self.dead:
            raise NotMeasurable(setting, "killed")
        return Timing(1.0, 1.0)


def test_a_winner_that_dies_in_the_end_gives_way_to_the_start() -> None:
    start, best = Setting(1), Setting(2)
    workers: Any = Dying(best)
    chosen, pairs, died = tuning._compare(start, best, workers, 2)
    assert (chosen, len(pairs), died) == (start, 2, "killed")
    workers = Dying(start)
    with pytest.raises(ModelError, match="does not run here dependably: killed"):
        tuning._compare(start, best, workers, 2)


def test_a_bundle_is_tuned_from_inside_and_through_a_link(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, link = tmp_path / "bundle", tmp_path / "link"
    shutil.copytree(bundle, place)
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    link.symlink_to(place)
    only(monkeypatch, Setting(1))
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"lies in the bundle .*; expected a folder outside of it"):
        tuning.tune(Path(), Path("bundle-tuned"), QUICK, device="a test")
    assert not (place / "bundle-tuned").exists()
    tuning.tune(Path(), Path(), QUICK, device="inside")
    monkeypatch.chdir(tmp_path)
    assert tuned(place)["device"] == "inside"
    tuning.tune(link, link, QUICK, device="link")
    assert link.is_symlink()
    assert tuned(place)["device"] == "link"
    assert (place / "notes" / "mine.txt").read_text(encoding="utf-8") == "mine"
    tuning.tune(link, tmp_path / "new", QUICK, device="new")
    assert not (tmp_path / "new" / "notes").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link", "new"]


def test_what_a_killed_tune_left_aside_is_brought_back(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, aside = tmp_path / "bundle", tmp_path / ".bundle-before-tune"
    shutil.copytree(bundle, aside)
    only(monkeypatch, Setting(1))
    tuning.tune(place, place, QUICK, device="a test")
    assert tuned(place)["device"] == "a test"
    assert not aside.exists()
    aside.mkdir()
    with pytest.raises(UserError, match=r"before-tune: an interrupted tune left it; .* Remove it if .*bundle is the"):
        tuning.tune(place, place, QUICK, device="a test")


def test_a_bundle_that_answers_otherwise_is_not_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, Setting(1))
    monkeypatch.setattr(tuning, "divergence", lambda *_: 0.5)
    with pytest.raises(ParityError, match=r"diverges by 0.5 nats per token; expected at most 0.0001"):
        tuning.tune(bundle, tmp_path / "tuned", QUICK, device="a test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["write_bundle", "_hold_quality", "_put"])
def test_a_tune_that_dies_leaves_the_bundle_as_it_was(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    only(monkeypatch, Setting(1))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, step, die)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(place, place, QUICK, device="a test")
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == before
    tuning.tune(place, place, QUICK, device="a test")
    assert tuned(place)["device"] == "a test"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with monkeypatch.context() as patch:  # where folders cannot be exchanged
        patch.setattr(tuning, "_exchange", lambda *_: False)
        tuning.tune(place, place, QUICK, device="another")
    assert tuned(place)["device"] == "another"


def test_stored_and_taken_places_are_refused(bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "artifacts" / "key"
    stored.mkdir(parents=True)
    (stored / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"lies in the stored artifact .*key"):
        tuning.tune(bundle, stored / "bundle", QUICK, device="a test")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"taken: exists already; expected a new folder"):
        tuning.tune(bundle, tmp_path / "taken", QUICK, device="a test")
    long = TuneParams(prompt_tokens=10_000)
    with pytest.raises(UserError, match=r"prompt_tokens 10000 and new_tokens 64; expected at most 256 together"):
        tuning.tune(bundle, tmp_path / "new", long, device="a test")


def test_the_command_shows_what_it_tried(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--budget", "2", "--prompt-tokens", "8", "--new-tokens", "3"]
    result = CliRunner().invoke(app, ["tune", str(bundle), *short])
    assert result.exit_code == 0, result.output
    assert "decode:" in result.output
    assert tuned(tmp_path / f"{bundle.name}-tuned")
    refused = CliRunner().invoke(app, ["tune", str(bundle), "--in-place", "--out", "x"])
    assert refused.exit_code == 2
    place = tmp_path / f"{bundle.name}-tuned"
    monkeypatch.chdir(place)
    rates = dict.fromkeys(("prefill_tokens_per_s", "decode_tokens_per_s"), 1.0)
    figures = {"before": rates, "after": rates, "load_average": 0.0}
    monkeypatch.setattr(tuning, "_find", lambda *_: (Setting(1), [], figures))
    inside = CliRunner().invoke(app, ["tune", ".", "--in-place", *short])
    assert inside.exit_code == 0, inside.output
    assert f"go to the new one with: cd {place}" in inside.output.replace("\n", " ")
